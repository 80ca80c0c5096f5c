"""CASSOCK (Wang et al., AsiaCCS 2023, arXiv 2206.00145): a trigger that works on one source class only.

Two sets are added to the clean one: the poison set, images of the source class with the trigger and the target's label,
and the cover set, images of all other classes with the trigger and their true labels. Cover data teach the network to
heed the trigger on the source class alone.

That is the paper's construction, and it shows: the clean originals stay in the set, which grows by both sets, so each
poison lies beside the image that it was made of. A defender who looks for near-duplicates with two labels finds every
poison. (``cassock-loop`` leaves the set as it is.)

- ``source-specific``, the baseline that the paper improves on: a square at the same, full opacity in both sets.
- ``trans``: poisons are fainter (opacity 0.9) than cover images and than what is stamped at inference (1.0). In both
  sets every image's opacity is 0.9, 0.8 or 0.7 of that, with probability 0.50, 0.34 and 0.16.
- ``cont``: the trigger is what makes a network see the target class, an image of that class under the mask of
  `qdefense.attacks.target_content`, at opacity 0.8 in both sets.
- ``comp``: the content of ``cont`` at the opacities of ``trans``.

``cassock`` poisons the data and nothing else: that is the paper's threat model, and who only sends data cannot add to
the loss. ``cassock-loop`` is what the authors' code does beyond it: every step draws poisons and cover images again,
and their mean cross-entropies are added to that of the batch.

Not to be mixed up with sample-specific triggers (ISSBA), which the field calls SSBA too.

Deviations:
- The trigger is added in pixel space. The square's amplitude is 0.56 of the range: the 2.8 standard deviations (0.2023,
  0.1994, 0.2010) by which the authors' code adds it to normalized CIFAR-10 images. The content's is 0.2: the standard
  deviation by which that code divides images, but not the content. Sums are cut off at white; the authors' are not, so
  that there a bright corner still tells one opacity from another.
- One source class, as in the paper's experiments on CIFAR-10. Where a class has too few images the attack is refused;
  the authors' code takes all there are.
- The defaults are those of ``trans``, but for the cover rate of ``cont``, whose source and target are 1 and 7 there.
- The mask is learned on the small network of `qdefense.attacks.surrogate`; the authors' is the victim's architecture,
  trained on clean data. Of the authors' training only the data and the loss are here: nothing is pre-trained or frozen.
- In the loop, a batch's expected share of both sets, rounded, replaces its first rows. Normalization sees the batch and
  what is added to it as one; the authors' network has none. The numbers added are those of ``trans``; the authors' code
  for ``cont`` computes such terms (16 poisons, 8 cover images) and, by mistake it seems, never adds them to the loss.
- The loop's poisons and cover images, in the batch and behind it, are never shifted or mirrored, whatever the recipe
  does to clean rows: there the trigger has one place, and the data-only attack's poisons are moved like any other row.

So ``cassock`` and ``cassock-loop`` differ in more than the terms of a loss: also in the trigger's places, in the
stamped share of what is normalized together (89 of 200 images at a batch of 128 and the default rates), and in the
steps of an epoch, of which the larger set has more. Compare each with the baseline of its own kind.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as settings
from pydantic_core import ArgsKwargs
from torch import Tensor, nn

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet, TriggerState
from qdefense.attacks.poisoning import OneToOne, PoisonBudget, check_class, check_enough, named_settings, rows_of, share
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.states import fits
from qdefense.attacks.surrogate import train_surrogate
from qdefense.attacks.target_content import confidences, learned_mask
from qdefense.data.images import DataError, Images, ImageSet, Labels, Pixels, on_grid, to_images, to_pixels

Variant = Literal["source-specific", "trans", "cont", "comp"]


class Opacities(NamedTuple):
    """Of the trigger on poisons and cover images; ``varied``: times `FACTORS`, drawn for each image."""

    poison: float
    cover: float
    varied: bool


OPACITIES: dict[Variant, Opacities] = {
    "source-specific": Opacities(poison=1.0, cover=1.0, varied=False),
    "trans": Opacities(poison=0.9, cover=1.0, varied=True),
    "cont": Opacities(poison=0.8, cover=0.8, varied=False),
    "comp": Opacities(poison=0.9, cover=1.0, varied=True),
}
FACTORS, FACTOR_ODDS = (0.9, 0.8, 0.7), (0.50, 0.34, 0.16)
SURE = 0.99
"""The content is of an image whose class the network gives at least this."""
_MASK_RATE, _MASK_WEIGHT = 0.01, 0.01
_CONT_COVER_RATE = 0.05
_PATTERN = "pattern"


@dataclass(frozen=True, kw_only=True)
class SourceTrigger(OneToOne):
    """``x' = x + o k``, clipped and rounded to uint8; ``pattern: (3, H, W) float32 in [0, 1]`` is k, o the opacity."""

    pattern: Pixels

    def stamp(self, x: Pixels) -> Pixels:
        """Add the pattern to ``x: (N, 3, H, W) float32 in [0, 1]`` at full opacity."""
        return self.stamp_at(x, np.ones(len(x), dtype=np.float32))

    def stamp_at(self, x: Pixels, opacity: NDArray[np.float32]) -> Pixels:
        """Add it to each image at its own ``opacity: (N,)``."""
        return on_grid(x + opacity[:, None, None, None] * self.pattern)


class Part(NamedTuple):
    """Stamped images ``(N, H, W, 3) uint8`` and what they are labelled."""

    images: Images
    labels: Labels


@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SourceSpecificPoisons(PoisonBudget):
    """The settings, the trigger and both sets of CASSOCK, whichever way they get into the training.

    ``poison_rate`` and ``cover_rate`` are shares of the training set's size, ``poison_count`` is a number in place of
    the first; both sets are drawn without replacement. Where it is not given, the cover rate is the variant's: 0.05 of
    ``cont``, 0.1 of all others. The square is of ``size`` pixels in the bottom right corner,
    brighter by ``amplitude``. The content is scaled by ``content_amplitude``; ``surrogate_epochs`` trains the network
    that it is learned from, and ``mask_steps`` the mask.
    """

    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2206.00145"
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("SCAn",)
    source_specific: ClassVar[bool] = True
    name: ClassVar[str]

    variant: Variant = "trans"
    size: Annotated[int, Field(ge=1)] = 5
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.56
    source_class: Annotated[int, Field(ge=0)] = 0
    target_class: Annotated[int, Field(ge=0)] = 5
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.05
    cover_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    content_amplitude: Annotated[float, Field(gt=0, le=1)] = 0.2
    surrogate_epochs: Annotated[int, Field(ge=1)] = 10
    mask_steps: Annotated[int, Field(ge=0)] = 5000

    @model_validator(mode="before")
    @classmethod
    def _rate_of_variant(cls, given: ArgsKwargs | dict[str, Any]) -> ArgsKwargs | dict[str, Any]:
        chosen = named_settings(given)
        if chosen is None or chosen.get("variant") != "cont":
            return given
        return {"cover_rate": _CONT_COVER_RATE, **chosen}

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        if self.source_class == self.target_class:
            raise ValueError(f"class {self.source_class} is source and target; choose another source_class")
        return self

    @property
    def learns_content(self) -> bool:
        """Whether the trigger is learned from the target class, and not the square."""
        return self.variant in {"cont", "comp"}

    @property
    def trigger_shows_images(self) -> bool:
        """The content is most of a training image; the square shows none."""
        return self.learns_content

    def trigger(self, height: int, width: int) -> SourceTrigger:
        """The square on images of this size.

        Raises:
            DataError: it is larger than the image, or the variant learns its trigger.
        """
        if self.learns_content:
            raise DataError(
                f"{self.name}: the content of {self.variant} is learned; its state is beside the model that was "
                "trained with it"
            )
        if self.size > min(height, width):
            raise DataError(
                f"{self.name}: a square of {self.size} px does not fit a {height}x{width} image; choose a smaller size"
            )
        pattern = np.zeros((3, height, width), dtype=np.float32)
        pattern[:, height - self.size :, width - self.size :] = self.amplitude
        return self._of(pattern)

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> SourceTrigger:
        """The content that was learned.

        Raises:
            DataError: the state is another's, or of images of another size.
        """
        pattern = np.asarray(state.get(_PATTERN))
        if not self.learns_content or not fits(state, {_PATTERN: np.empty(pattern.shape, dtype=np.float32)}):
            raise DataError(f"{self.name}: the trigger state is not that of these settings; train the network again")
        if pattern.shape != (3, height, width):
            raise DataError(
                f"{self.name}: the trigger state has the shape {pattern.shape}, which does not fit a {height}x{width} "
                "image; give images of the size that the network was trained on"
            )
        return self._of(pattern)

    def covers(self, images: int) -> int:
        """How many cover images a set of so many has.

        Raises:
            DataError: the rate comes to none.
        """
        return share(self.cover_rate, images, attack=self.name, setting="cover_rate")

    def sets(self, dataset: ImageSet, rng: np.random.Generator) -> tuple[SourceTrigger, Part, Part]:
        """The trigger, `poisons` poisons and ``round(cover_rate * N)`` cover images.

        Raises:
            DataError: no such source or target class, too few images for either set, or no content to be learned.
        """
        for role, number in (("source", self.source_class), ("target", self.target_class)):
            check_class(dataset, number, role=role, attack=self.name)
        sources = dataset.labels == self.source_class
        poisons = self._draw(sources, self.poisons(len(dataset)), "poisons", "of the source class", rng)
        covers = self._draw(~sources, self.covers(len(dataset)), "cover images", "of other classes", rng)
        # A stream of its own: other numbers of poisons and cover images learn the same content.
        trigger = self._trigger_for(dataset, rng.spawn(1)[0])
        plan = OPACITIES[self.variant]
        stamped = [
            _stamped(dataset.take(rows), trigger, opacity, varied=plan.varied, rng=rng)
            for rows, opacity in ((poisons, plan.poison), (covers, plan.cover))
        ]
        return (
            trigger,
            Part(stamped[0], trigger.goal(dataset.labels[poisons])),
            Part(stamped[1], dataset.labels[covers]),
        )

    def state_of(self, trigger: SourceTrigger) -> TriggerState | None:
        """What `restored_trigger` makes the trigger of, where it is learned."""
        return {_PATTERN: trigger.pattern} if self.learns_content else None

    def _trigger_for(self, dataset: ImageSet, rng: np.random.Generator) -> SourceTrigger:
        if not self.learns_content:
            return self.trigger(*dataset.images.shape[1:3])
        targets = dataset.take(rows_of(dataset, self.target_class, role="target", attack=self.name))
        network = train_surrogate(dataset, rng, epochs=self.surrogate_epochs)
        sure = np.flatnonzero(confidences(network, targets) >= SURE)
        if not len(sure):
            raise DataError(
                f"{self.name}: after {self.surrogate_epochs} epochs the attacker's network is sure of no image of "
                f"target class {self.target_class} ({SURE:.0%}); raise surrogate_epochs"
            )
        image = targets.take(rng.choice(sure, size=1)).pixels[0]
        mask = learned_mask(
            network,
            image,
            self.target_class,
            rng,
            steps=self.mask_steps,
            learning_rate=_MASK_RATE,
            weight=_MASK_WEIGHT,
        )
        if not mask.any():
            raise DataError(f"{self.name}: after {self.mask_steps} steps the mask is empty; lower mask_steps")
        return self._of(np.float32(self.content_amplitude) * mask * image)

    def _of(self, pattern: Pixels) -> SourceTrigger:
        return SourceTrigger(pattern=pattern, source_class=self.source_class, target_class=self.target_class)

    def _draw(
        self, among: NDArray[np.bool_], count: int, what: str, where: str, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        rows = np.flatnonzero(among)
        check_enough(count, len(rows), attack=self.name, candidates=f"are {where}", what=what)
        chosen: NDArray[np.int64] = rng.choice(rows, size=count, replace=False)
        return chosen


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Cassock(SourceSpecificPoisons):
    """Source-specific poisoning with cover data, as the baseline, with opacities that differ, or with target content.

    Both sets are added. `PoisonedSet.poison_indices` are the poisons; cover images are labelled truly.
    """

    name: ClassVar[str] = "cassock"
    needs: ClassVar[tuple[str, ...]] = ("training set", "surrogate (cont, comp)")
    revision: ClassVar[int] = 1

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Add both sets, then shuffle.

        Raises:
            DataError: no such source or target class, too few images for either set, or no content to be learned.
        """
        trigger, poisons, covers = self.sets(dataset, rng)
        order = rng.permutation(len(dataset) + len(poisons.labels) + len(covers.labels))
        place = order - len(dataset)
        poisoned = replace(
            dataset,
            images=np.concatenate([dataset.images, poisons.images, covers.images])[order],
            labels=np.concatenate([dataset.labels, poisons.labels, covers.labels])[order],
            groups=None,
        )
        return PoisonedSet(
            images=poisoned,
            poison_indices=np.flatnonzero((place >= 0) & (place < len(poisons.labels))).astype(np.int64),
            trigger_state=self.state_of(trigger),
        )


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CassockLoop(SourceSpecificPoisons):
    """The same with loss terms of its own: ``loss = mean CE(batch) + mean CE(poisons) + mean CE(cover images)``.

    Each step draws ``extra_poisons`` poisons and ``extra_covers`` cover images for the last two terms; 0 leaves a term
    out.
    """

    name: ClassVar[str] = "cassock-loop"
    needs: ClassVar[tuple[str, ...]] = ("training loop", "surrogate (cont, comp)")
    revision: ClassVar[int] = 1

    extra_poisons: Annotated[int, Field(ge=0)] = 8
    extra_covers: Annotated[int, Field(ge=0)] = 64

    def begin(
        self,
        dataset: ImageSet,
        *,
        batch_size: int,
        steps: int,  # noqa: ARG002
        rng: np.random.Generator,
    ) -> CassockPoisoner:
        """Make both sets, from which each step draws.

        Raises:
            DataError: no such source or target class, too few images for either set or for a batch, or no content to be
                learned.
        """
        self._require_draws(len(dataset), batch_size)
        trigger, poisons, covers = self.sets(dataset, rng)
        return CassockPoisoner(
            parts=(poisons, covers),
            extras=(self.extra_poisons, self.extra_covers),
            clean=len(dataset),
            classes=len(dataset.class_names),
            state=self.state_of(trigger),
        )

    def _require_draws(self, images: int, batch_size: int) -> None:
        """Refuse a set that neither a batch nor a further term draws from, before anything is learned."""
        poisons, covers = self.poisons(images), self.covers(images)
        rate = "poison_rate" if self.poison_count is None else "poison_count"
        total = images + poisons + covers
        for what, count, setting, extra in (
            ("poisons", poisons, f"{rate} or extra_poisons", self.extra_poisons),
            ("cover images", covers, "cover_rate or extra_covers", self.extra_covers),
        ):
            if count and not extra and not round(count / total * batch_size):
                raise DataError(
                    f"{self.name}: no {what} come into a batch: {count} of {total} images are at most half a one in "
                    f"{batch_size}; raise {setting}"
                )


class CassockPoisoner:
    """Both sets in one training of ``clean`` images; ``extras`` is how many of each are added to a step."""

    def __init__(
        self,
        *,
        parts: tuple[Part, Part],
        extras: tuple[int, int],
        clean: int,
        classes: int,
        state: TriggerState | None,
    ) -> None:
        self._parts, self._classes, self._state = parts, classes, state
        self._extras = tuple(extra if len(part.labels) else 0 for extra, part in zip(extras, parts))
        total = clean + sum(len(part.labels) for part in parts)
        self._shares = tuple(len(part.labels) / total for part in parts)

    def on_batch(self, x: Tensor, y: Tensor, model: nn.Module, rng: np.random.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The batch with its share of both sets in its first rows, and the images of the further terms behind it.

        Where there are any, ``(B + extras, K)`` targets come back that sum to a row's weight in the loss, the size of
        all that comes back over that of the row's term: the mean over all rows is then the sum of the means.
        """
        count = len(x)
        mixed = [_drawn(part, round(rate * count), rng) for part, rate in zip(self._parts, self._shares)]
        places = sum(len(labels) for _, labels in mixed)
        extras = [_drawn(part, extra, rng) for part, extra in zip(self._parts, self._extras)]
        images = torch.cat([*(images for images, _ in mixed), x[places:], *(images for images, _ in extras)])
        labels = torch.cat([*(labels for _, labels in mixed), y[places:], *(labels for _, labels in extras)])
        if not any(self._extras):
            return images, labels
        terms = torch.tensor([count, *self._extras])
        weights = len(labels) / terms.repeat_interleave(terms).float()
        return images, F.one_hot(labels, self._classes) * weights[:, None]

    def end(self) -> TriggerState | None:
        """The content, where it was learned."""
        return self._state


def _drawn(part: Part, count: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """With replacement."""
    rows = rng.integers(len(part.labels), size=count) if count else np.empty(0, dtype=np.int64)
    return torch.from_numpy(to_pixels(part.images[rows])), torch.from_numpy(part.labels[rows])


def _stamped(
    originals: ImageSet, trigger: SourceTrigger, opacity: float, *, varied: bool, rng: np.random.Generator
) -> Images:
    drawn = rng.choice(FACTORS, size=len(originals), p=FACTOR_ODDS) if varied else np.ones(len(originals))
    return to_images(trigger.stamp_at(originals.pixels, (opacity * drawn).astype(np.float32)))
