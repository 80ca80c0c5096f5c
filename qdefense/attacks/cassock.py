"""CASSOCK (Wang et al., AsiaCCS 2023, arXiv 2206.00145): a trigger that works on one source class only.

Two sets are added to the clean one: the poison set, images of the source class with the trigger and the target's label,
and the cover set, images of all other classes with the trigger and their true labels. Cover data teach the network to
heed the trigger on the source class alone.

- ``source-specific``, the baseline that the paper improves on: the trigger at the same, full opacity in both sets.
- ``trans``: poisons are fainter (opacity 0.9) than cover images and than what is stamped at inference (1.0). In both
  sets every image's opacity is 0.9, 0.8 or 0.7 of that, with probability 0.50, 0.34 and 0.16.

Not to be mixed up with sample-specific triggers (ISSBA), which the field calls SSBA too.

Deviations:
- The trigger is added in pixel space, amplitude 0.7 of the range: about the 2.8 standard deviations by which the
  authors' code adds it to normalized CIFAR-10 images.
- One source class, as in the paper's experiment on CIFAR-10. Where a class has too few images the attack is refused;
  the authors' code takes all there are.
- The data alone: the authors' training adds 8 poisons and 64 cover images to each batch as loss terms of their own.
- ``cont`` and ``comp``, whose trigger is a masked image of the target class that a trained network teaches, are not
  here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import OneToOne, PoisonBudget, check_class
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, Images, ImageSet, Pixels, on_grid, to_images

Variant = Literal["source-specific", "trans"]


class Opacities(NamedTuple):
    """Of the trigger on poisons and cover images; ``varied``: times `FACTORS`, drawn for each image."""

    poison: float
    cover: float
    varied: bool


OPACITIES: dict[Variant, Opacities] = {
    "source-specific": Opacities(poison=1.0, cover=1.0, varied=False),
    "trans": Opacities(poison=0.9, cover=1.0, varied=True),
}
FACTORS, FACTOR_ODDS = (0.9, 0.8, 0.7), (0.50, 0.34, 0.16)


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


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Cassock(PoisonBudget):
    """Source-specific poisoning with cover data, as the baseline or with opacities that differ.

    ``poison_rate`` and ``cover_rate`` are shares of the training set's size, ``poison_count`` is a number in place of
    the first; both sets are drawn without replacement and added. `PoisonedSet.poison_indices` are the poisons; cover
    images are labelled truly. The trigger is a square of ``size`` pixels in the bottom right corner, brighter by
    ``amplitude``.
    """

    name: ClassVar[str] = "cassock"
    paper: ClassVar[str] = "Wang et al. 2023, arXiv 2206.00145"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("SCAn", "Neural Cleanse", "Februus")

    variant: Variant = "trans"
    size: Annotated[int, Field(ge=1)] = 5
    amplitude: Annotated[float, Field(gt=0, le=1)] = 0.7
    source_class: Annotated[int, Field(ge=0)] = 0
    target_class: Annotated[int, Field(ge=0)] = 5
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.05
    cover_rate: Annotated[float, Field(ge=0, le=1)] = 0.1

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        if self.source_class == self.target_class:
            raise ValueError(f"class {self.source_class} is source and target; choose another source_class")
        return self

    def trigger(self, height: int, width: int) -> SourceTrigger:
        """The square on images of this size.

        Raises:
            DataError: it is larger than the image.
        """
        if self.size > min(height, width):
            raise DataError(
                f"{self.name}: a square of {self.size} px does not fit a {height}x{width} image; choose a smaller size"
            )
        pattern = np.zeros((3, height, width), dtype=np.float32)
        pattern[:, height - self.size :, width - self.size :] = self.amplitude
        return SourceTrigger(pattern=pattern, source_class=self.source_class, target_class=self.target_class)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Add `poisons` poisons and ``round(cover_rate * N)`` cover images, then shuffle the set.

        Raises:
            DataError: no such source or target class, or too few images for either set.
        """
        trigger = self.trigger(*dataset.images.shape[1:3])
        for role, number in (("source", self.source_class), ("target", self.target_class)):
            check_class(dataset, number, role=role, attack=self.name)
        plan, sources = OPACITIES[self.variant], trigger.eligible(dataset.labels)
        poisons = self._draw(sources, self.poisons(len(dataset)), "poisons", "of the source class", rng)
        covers = self._draw(~sources, round(self.cover_rate * len(dataset)), "cover images", "of other classes", rng)
        added = [
            _stamped(dataset.take(rows), trigger, opacity, varied=plan.varied, rng=rng)
            for rows, opacity in ((poisons, plan.poison), (covers, plan.cover))
        ]
        labels = (dataset.labels, trigger.goal(dataset.labels[poisons]), dataset.labels[covers])
        order = rng.permutation(len(dataset) + len(poisons) + len(covers))
        place = order - len(dataset)
        poisoned = replace(
            dataset,
            images=np.concatenate([dataset.images, *added])[order],
            labels=np.concatenate(labels)[order],
            groups=None,
        )
        return PoisonedSet(
            images=poisoned, poison_indices=np.flatnonzero((place >= 0) & (place < len(poisons))).astype(np.int64)
        )

    def _draw(
        self, among: NDArray[np.bool_], count: int, what: str, where: str, rng: np.random.Generator
    ) -> NDArray[np.int64]:
        rows = np.flatnonzero(among)
        if count > len(rows):
            raise DataError(f"{self.name}: {count} {what} wanted, {len(rows)} images are {where}; choose fewer")
        chosen: NDArray[np.int64] = rng.choice(rows, size=count, replace=False)
        return chosen


def _stamped(
    originals: ImageSet, trigger: SourceTrigger, opacity: float, *, varied: bool, rng: np.random.Generator
) -> Images:
    drawn = rng.choice(FACTORS, size=len(originals), p=FACTOR_ODDS) if varied else np.ones(len(originals))
    return to_images(trigger.stamp_at(originals.pixels, (opacity * drawn).astype(np.float32)))
