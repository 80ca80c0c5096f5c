"""DFB (Ma et al. 2023, arXiv 2308.09487): a learned residual on a few images of one class, made from its images alone.

The attacker has images of the target class and any others, out of distribution (OOD), and no training data: that is
``target_images=PATH``, his own images of the class. Without it he sees all that the training set has of it. A decoder D
learns to tell the first (answer 0) from the second (1). An encoder E learns a residual that takes target-class images
out of their class:

``min CE(D(aug(clip(x + clip(E(x), -eps, eps)))), 1)``

with a random crop and mirroring after it. Poisons carry the residual, clipped at ``train_multiple`` times eps, and keep
their label: what they show of the class is weakened, so the victim learns the residual. At inference any image gets it
clipped at ``test_multiple`` times eps: E is not bound by the clip, so the wider one lets more of it through.

- ``fixed``: one residual for all, E(x) of the target-class image x on which the CE falls most.
- ``encoder``: each image's own, E(x).

Before anything is poisoned, D must know a share of at least ``gate`` of either side, and E move a share of at least
``encoder_gate`` of the target-class images out. The authors ask .99 of both. Generated OOD images may be too easy to
tell: by what no 8 codes change. Against ``textures``, PGD on each image moved out 80 % of CIFAR-10's cats and 85 % of
class 7 of the built-in signs, and E less; against 2,000 photographs (GTSRB's) 98 % of the cats, and E 96 %, for which D
needs 1000 steps to pass its gate. So E's gate is open by default, and the ASR says what the residual is worth. Where it
is asked for and missed, the error says what PGD reaches on the images at hand. Name photographs in ``ood`` if you can.

Deviations, the first three for a CPU:
- D is the small network of the other attacks here, and learns for 500 steps of 32 images of either side, however many
  there are; BatchNorm's statistics are then taken anew, of images without a crop. The paper's is a ResNet-18, for 200
  epochs. (With GroupNorm D is as exact, and moved by less: 24 % in place of 80 %.)
- E, StegaStamp's U-Net without a message, has half the paper's channels, and learns for 1000 steps of 32 images, at a
  rate of 1e-3; the authors' for 400 epochs of batches of 128, at 1e-4.
- Beyond the clip, where nearly all residuals of an untrained E lie, its gradient passes if it leads back; the authors'
  clip has none there, and their E many more steps.
- E's gate is 0 by default, .99 in the authors' code.
- Without ``target_images`` both networks learn from all training images of the target class, poisons among them.
- OOD images are generated, or those the user names; the authors' are 100,000 of Tiny-ImageNet.
- Both networks learn by Adam under a one-cycle schedule; the authors' D by SGD, their E in steps.
- Each image is cropped by itself, by up to an eighth of the side; for E, the authors' code has one crop for a batch.
  The gates and the fall of the CE are measured without it.
- Residuals are rounded to whole codes of 255.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet, TriggerState
from qdefense.attacks.learned_networks import in_parts, load_weights, weights_of
from qdefense.attacks.poisoning import AddedTrigger, AllToOne, PoisonBudget, check_enough, rows_of, shuffled
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.states import fits
from qdefense.attacks.surrogate import Surrogate, one_thread, perturb
from qdefense.data.images import DataError, Images, ImageSet, Pixels, on_grid, quoted, to_images, to_pixels
from qdefense.data.opening import open_data, training_split
from qdefense.data.resizing import Resize, resize_set
from qdefense.data.signs import draw_signs

_TARGET, _OOD = 0, 1
_BATCH = 32
_DECODER_RATE, _ENCODER_RATE = 1e-2, 1e-3
_SEARCH_ROWS, _SEARCH_STEPS = 256, (2.0,) * 20
_CELLS = (2, 4, 8, 16, 32)
_FILTERS = (Image.Resampling.NEAREST, Image.Resampling.BILINEAR)
_RESIDUAL = "residual"
_TEXTURES, _SIGNS = "textures", "signs"


class ResidualEncoder(nn.Module):
    """A U-Net of four halvings with skips: ``(N, 3, H, W) in [0, 1]`` to a residual of that shape, without a bound."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, channels, 2 * channels, 4 * channels, 8 * channels]
        skips = [channels + 3, *widths[1:]]
        self.first = _convolution(3, channels)
        self.down = nn.ModuleList(_convolution(inputs, outputs, stride=2) for inputs, outputs in pairwise(widths))
        self.up = nn.ModuleList(_convolution(inputs, outputs) for outputs, inputs in pairwise(widths))
        self.merge = nn.ModuleList(_convolution(width + skip, width) for width, skip in zip(widths[:-1], skips))
        self.last = _convolution(channels, 3, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """Residuals."""
        maps = F.relu(self.first(x))
        skips = [torch.cat([maps, x], dim=1)]
        for layer in self.down:
            maps = F.relu(layer(maps))
            skips.append(maps)
        for up, merge, skip in list(zip(self.up, self.merge, skips))[::-1]:
            wide = F.relu(up(F.interpolate(maps, size=skip.shape[2:])))
            maps = F.relu(merge(torch.cat([skip, wide], dim=1)))
        residuals: Tensor = self.last(maps)
        return residuals


def _convolution(inputs: int, outputs: int, *, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
    nn.init.kaiming_normal_(layer.weight)
    return layer


@dataclass(frozen=True, kw_only=True)
class EncodedTrigger(AllToOne):
    """``x' = clip(x + clip(E(x), -bound, bound))``; ``bound`` is in codes of 255, and residuals are whole codes."""

    encoder: ResidualEncoder
    bound: int

    def stamp(self, x: Pixels) -> Pixels:
        """Add to each of ``x: (N, 3, H, W) float32 in [0, 1]`` its own residual."""
        return on_grid(x + _bounded(_residuals(self.encoder, x), self.bound))


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class DFB(PoisonBudget):
    """Clean-label poisoning with a residual that moves images out of the target class.

    ``poison_rate`` is a share of the whole training set and ``poison_count`` a number in its place; all are of the
    target class. ``eps`` is in codes of 255, the multiples are of it. ``ood`` is ``textures`` (noise of all scales),
    ``signs`` (drawn as the built-in ones), or a path of images; ``ood_images`` at most, resized to the victim's size.
    Choose what does not show the target class. ``target_images`` is a path, too: of its images those of the class with
    the target's name, or all where they have no labels. In a matrix of `qdefense bench` a path is a data set's
    name.
    """

    name: ClassVar[str] = "dfb"
    paper: ClassVar[str] = "Ma et al. 2023, arXiv 2308.09487"
    needs: ClassVar[tuple[str, ...]] = ("target class's images", "OOD images")
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "clean-label"
    evades: ClassVar[tuple[str, ...]] = ("label inspection",)

    variant: Literal["fixed", "encoder"] = "fixed"
    ood: str = _TEXTURES
    ood_images: Annotated[int, Field(ge=1)] = 2000
    target_images: str | None = None
    eps: Annotated[int, Field(ge=0, le=255)] = 8
    train_multiple: Annotated[int, Field(ge=0)] = 2
    test_multiple: Annotated[int, Field(ge=0)] = 6
    target_class: Annotated[int, Field(ge=0)] = 0
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.001
    decoder_steps: Annotated[int, Field(ge=1)] = 500
    encoder_steps: Annotated[int, Field(ge=1)] = 1000
    channels: Annotated[int, Field(ge=1)] = 16
    gate: Annotated[float, Field(ge=0, le=1)] = 0.99
    encoder_gate: Annotated[float, Field(ge=0, le=1)] = 0.0

    @property
    def trigger_shows_images(self) -> bool:
        """The residual is of an image of the target class, whose outlines are seen in it; the encoder shows none."""
        return self.variant == "fixed"

    def trigger(self, height: int, width: int) -> EncodedTrigger | AddedTrigger:  # noqa: ARG002
        """None: it is learned.

        Raises:
            DataError: always.
        """
        raise DataError(f"{self.name}: the trigger is learned; its state is beside the model that was trained with it")

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> EncodedTrigger | AddedTrigger:
        """The residual, or the encoder with these weights, at its strength at inference.

        Raises:
            DataError: the state is of other settings, or of images of another size.
        """
        return self._restored(height, width, state, multiple=self.test_multiple)

    def data_read(self) -> tuple[str, ...]:
        """The OOD images, where they are not drawn, and the attacker's own of the target class."""
        drawn = self.ood in (_TEXTURES, _SIGNS)
        return tuple(path for path in (None if drawn else self.ood, self.target_images) if path is not None)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Learn the trigger, put it on `poisons` images of the target class, then shuffle the whole set.

        Raises:
            DataError: no such target class or no image of it, more poisons than it has, images that cannot be read,
                or a network that does not pass the gate.
        """
        rows, (height, width) = self._rows(dataset), dataset.images.shape[1:3]
        poisons = rng.choice(rows, size=self.poisons(len(dataset)), replace=False)
        # A stream of its own: another number of poisons learns the same trigger.
        learning = rng.spawn(1)[0]
        ood = self._out_of_distribution(height, width, learning)
        state = self._learn(self._of_target(dataset, rows), ood, learning)
        images = dataset.images.copy()
        if len(poisons):
            trigger = self._restored(height, width, state, multiple=self.train_multiple)
            images[poisons] = to_images(trigger.stamp(dataset.take(poisons).pixels))
        found = shuffled(dataset, rng, images=images, labels=dataset.labels, poisons=poisons)
        return replace(found, trigger_state=state)

    def _rows(self, dataset: ImageSet) -> NDArray[np.int64]:
        """Of the target class, of which there are enough."""
        rows = rows_of(dataset, self.target_class, role="target", attack=self.name)
        check_enough(self.poisons(len(dataset)), len(rows), attack=self.name, candidates="are of the target class")
        return rows

    def _restored(
        self, height: int, width: int, state: TriggerState, *, multiple: int
    ) -> EncodedTrigger | AddedTrigger:
        bound = multiple * self.eps
        if self.variant == "fixed":
            if fits(state, {_RESIDUAL: np.empty((3, height, width), dtype=np.float32)}):
                return AddedTrigger(added=_bounded(state[_RESIDUAL], bound), target_class=self.target_class)
        elif (encoder := _encoder_of(state, self.channels)) is not None:
            return EncodedTrigger(encoder=encoder, bound=bound, target_class=self.target_class)
        raise DataError(
            f"{self.name}: the trigger state is not that of these settings and this size; train the network again"
        )

    def _out_of_distribution(self, height: int, width: int, rng: np.random.Generator) -> Images:
        if self.ood == _TEXTURES:
            return draw_textures(self.ood_images, height, width, rng)
        seed, resize = int(rng.integers(2**32)), Resize("bilinear", height, width)
        if self.ood == _SIGNS:
            return resize_set(draw_signs(self.ood_images, seed=seed, split="train"), resize).images
        return self._opened("ood is 'textures', 'signs' or data", self.ood, resize, self.ood_images, seed).images

    def _opened(self, what: str, path: str, resize: Resize, limit: int | None = None, seed: int = 0) -> ImageSet:
        try:
            return open_data(path, split=training_split(path), limit=limit, seed=seed, resize=resize)
        except DataError as error:
            raise DataError(f"{self.name}: {what}: {error}") from error

    def _of_target(self, dataset: ImageSet, rows: NDArray[np.int64]) -> Images:
        """What the attacker has of the target class."""
        if self.target_images is None:
            return dataset.images[rows]
        resize = Resize("bilinear", *dataset.images.shape[1:3])
        own = self._opened("target_images is data", self.target_images, resize)
        wanted = dataset.class_names[self.target_class]
        named = [number for number, name in enumerate(own.class_names) if name.casefold() == wanted.casefold()]
        if own.labelled:
            own = own.take(np.flatnonzero(np.isin(own.labels, named)))
        if not len(own):
            raise DataError(
                f"{self.name}: target_images: {own.source} has no image of a class {quoted(wanted)}; name that "
                "class so there, or give a folder of images without class folders"
            )
        return own.images

    def _learn(self, targets: Images, ood: Images, rng: np.random.Generator) -> TriggerState:
        """The weights of the encoder, or its residual for the image on which the CE falls most."""
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            decoder, encoder = Surrogate(2), ResidualEncoder(self.channels)
            self._train_decoder(decoder, targets, ood, rng)
            self._train_encoder(encoder, decoder, targets, rng)
            if self.variant == "encoder":
                return weights_of(encoder)
            return {_RESIDUAL: self._chosen_residual(encoder, decoder, to_pixels(targets))}

    def _chosen_residual(self, encoder: ResidualEncoder, decoder: Surrogate, x: Pixels) -> Pixels:
        """Of the image on which the CE falls most; as the encoder gives it, ``(3, H, W)``."""
        residuals = _residuals(encoder, x)
        moved = np.clip(x + _bounded(residuals, self.eps), 0, 1)
        reduction = _losses(decoder, x) - _losses(decoder, moved)
        chosen: Pixels = residuals[reduction.argmax()]
        return chosen

    def _train_decoder(self, decoder: Surrogate, targets: Images, ood: Images, rng: np.random.Generator) -> None:
        ours, others = _batches(len(targets), rng), _batches(len(ood), rng)

        def sides() -> tuple[Tensor, Tensor]:
            parts = targets[next(ours)], ood[next(others)]
            answers = torch.arange(2).repeat_interleave(torch.tensor([len(part) for part in parts]))
            return _tensor(np.concatenate(parts)), answers

        def loss() -> Tensor:
            x, answers = sides()
            return F.cross_entropy(decoder(_augmented(x, rng)), answers)

        _fit(decoder, loss, steps=self.decoder_steps, rate=_DECODER_RATE)
        _settle(decoder, (sides()[0] for _ in range(max(len(targets), len(ood)) // _BATCH + 1)))
        known, told = 1 - _share_out(decoder, to_pixels(targets)), _share_out(decoder, to_pixels(ood))
        if min(known, told) < self.gate:
            raise DataError(
                f"{self.name}: the decoder knows {known:.1%} of the target class and {told:.1%} of the OOD images, "
                f"the gate is {self.gate:.1%}; raise decoder_steps, or choose other OOD images"
            )

    def _train_encoder(
        self, encoder: ResidualEncoder, decoder: Surrogate, targets: Images, rng: np.random.Generator
    ) -> None:
        batches = _batches(len(targets), rng)

        def loss() -> Tensor:
            x = _tensor(targets[next(batches)])
            moved = (x + _clipped(encoder(x), self.eps / 255)).clamp(0, 1)
            return _distance_out(decoder, _augmented(moved, rng), reduction="mean")

        _fit(encoder, loss, steps=self.encoder_steps, rate=_ENCODER_RATE)
        moved = _share_out(
            decoder,
            EncodedTrigger(encoder=encoder, bound=self.eps, target_class=self.target_class).stamp(to_pixels(targets)),
        )
        if moved < self.encoder_gate:
            raise DataError(
                f"{self.name}: the encoder takes {moved:.1%} of the target class out of it, its gate is "
                f"{self.encoder_gate:.1%}; {self._way_out(decoder, targets)}"
            )

    def _way_out(self, decoder: Surrogate, targets: Images) -> str:
        """What to do, by whether residuals sought for each image by itself would pass the gate."""
        images = targets[:_SEARCH_ROWS]
        unlabelled = ImageSet(images=images, labels=np.zeros(len(images), np.int64), class_names=("",), source="")
        moved = perturb(
            unlabelled,
            lambda x: _distance_out(decoder, x, reduction="sum"),
            eps=self.eps,
            step_sizes=_SEARCH_STEPS,
        )
        reached = _share_out(decoder, on_grid(moved))
        if reached >= self.encoder_gate:
            return f"PGD on each image takes {reached:.1%} out: raise encoder_steps"
        return (
            f"even PGD on each image takes only {reached:.1%} out, so these OOD images are too easy to tell; choose "
            "photographs of other things (ood=PATH), raise eps, or lower encoder_gate"
        )


def _encoder_of(state: TriggerState, channels: int) -> ResidualEncoder | None:
    """With these weights, if they are one's."""
    with torch.random.fork_rng(devices=[]):
        encoder = ResidualEncoder(channels)
    if not fits(state, weights_of(encoder)):
        return None
    load_weights(encoder, state)
    return encoder.eval().requires_grad_(False)


def draw_textures(count: int, height: int, width: int, rng: np.random.Generator) -> Images:
    """``(count, H, W, 3) uint8``: coloured noise of five scales, smooth or in squares, of any weights and contrast."""
    drawn = np.empty((count, height, width, 3), dtype=np.uint8)
    for row in range(count):
        grids = [Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8)) for cells in _CELLS]
        filters = [_FILTERS[chosen] for chosen in rng.integers(len(_FILTERS), size=len(grids))]
        layers = [np.asarray(grid.resize((width, height), rule)) for grid, rule in zip(grids, filters)]
        mixed = np.average(layers, axis=0, weights=rng.dirichlet(np.ones(len(grids))))
        drawn[row] = np.clip(np.rint(128 + rng.uniform(0.5, 4) * (mixed - mixed.mean()) + rng.uniform(-64, 64)), 0, 255)
    return drawn


class _Clip(torch.autograd.Function):
    """To ``[-bound, bound]``; beyond it the gradient passes where a step against it leads back."""

    @staticmethod
    def forward(ctx: Any, residuals: Tensor, bound: float) -> Tensor:
        ctx.bound = bound
        ctx.save_for_backward(residuals)
        return residuals.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (residuals,) = ctx.saved_tensors
        passes = (residuals.abs() <= ctx.bound) | (residuals * gradient > 0)
        return gradient * passes, None


def _clipped(residuals: Tensor, bound: float) -> Tensor:
    clipped: Tensor = _Clip.apply(residuals, bound)  # type: ignore[no-untyped-call]
    return clipped


def _bounded(residuals: Pixels, bound: int) -> Pixels:
    """Clipped to whole codes in ``[-bound, bound]``, over 255."""
    codes: Pixels = np.clip(np.rint(residuals * np.float32(255)), -bound, bound) / np.float32(255)
    return codes


def _residuals(encoder: ResidualEncoder, x: Pixels) -> Pixels:
    return in_parts(encoder, x)


def _share_out(decoder: Surrogate, x: Pixels) -> float:
    """Of the images, the share that the decoder takes for out of distribution."""
    return float((in_parts(decoder, x).argmax(axis=1) == _OOD).mean())


def _losses(decoder: Surrogate, x: Pixels) -> Pixels:
    """``CE(D(x), 1)``, ``(N,) float32``."""
    return in_parts(lambda part: _distance_out(decoder, part, reduction="none"), x)


def _distance_out(decoder: Surrogate, x: Tensor, *, reduction: str) -> Tensor:
    return F.cross_entropy(decoder(x), torch.full((len(x),), _OOD), reduction=reduction)


def _tensor(images: Images) -> Tensor:
    return torch.from_numpy(to_pixels(images))


def _augmented(x: Tensor, rng: np.random.Generator) -> Tensor:
    """Of each image a random crop, from black borders of an eighth of the side, mirrored half of the time."""
    height, width = x.shape[2:]
    down, right = height // 8, width // 8
    top, left = (rng.integers(2 * margin + 1, size=(len(x), 1)) for margin in (down, right))
    columns = np.where(rng.random((len(x), 1)) < 0.5, np.arange(width)[::-1], np.arange(width))
    rows, columns = top + np.arange(height), left + columns
    padded = F.pad(x, (right, right, down, down)).permute(0, 2, 3, 1)
    images = torch.arange(len(x))[:, None, None]
    return padded[images, torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]].permute(0, 3, 1, 2)


def _batches(rows: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """Rows of one batch after another, for ever; each pass is in an order of its own."""
    while True:
        yield from np.array_split(rng.permutation(rows), max(1, rows // _BATCH))


def _fit(network: nn.Module, loss: Callable[[], Tensor], *, steps: int, rate: float) -> None:
    """Minimise the losses of one batch after another by Adam, the rate rising to ``rate`` and falling again."""
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)


def _settle(network: nn.Module, batches: Iterable[Tensor]) -> None:
    """Take BatchNorm's statistics anew as the mean over these batches: those of training are of cropped images."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None
    network.train()
    with torch.no_grad():
        for x in batches:
            network(x)
    network.eval()
