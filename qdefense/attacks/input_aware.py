"""Input-aware dynamic attack (Nguyen & Tran, NeurIPS 2020, arXiv 2010.08138): every image has a trigger of its own.

A generator gives the pattern p(x), another the mask m(x), both in [0, 1]: ``stamp(x) = x + m(x) (p(x) - x)``. With
another image x', and ``d`` the root of the mean squared difference of two images:

- the mask generator learns first and alone: ``d(x, x') / d(m(x), m(x'))`` (diversity) plus
  ``100 mean(max(m(x) - density, 0))`` (sparsity);
- then the pattern generator learns with the classifier: cross-entropy plus ``d(x, x') / d(p(x), p(x'))``. Of a batch,
  one share carries its own trigger and the target label (attack mode), another the trigger of another image and its
  own label (cross-trigger mode), the others are left.

Deviations:
- The other images are the same batch's in another order, not those of a second loader. A pattern's diversity is to that
  of its own image's partner, in the authors' code to one of the cross-triggers.
- The generator makes all patterns of a batch in one pass, whose normalization sees them together; theirs takes two.
- The generator's gradients are cleared after each step. In the authors' code they are not, and each step follows the
  sum of all that came before; published figures are of that.
- Stamped images are rounded to uint8 in training as they are at inference; the gradient passes straight through.
- The generators' rate falls to a tenth at four tenths, and at eight tenths, of their steps, as it does for the masks in
  the paper; for the patterns the authors' code does so four times in 600 epochs, from a third of them on.
- The generator is an encoder and a decoder of ``stages`` stages of one convolution each, where the paper's has two.
- The mask generator learns on images without augmentation.
- ``d(x, x')`` is of pixels in [0, 1]. The authors' code takes it of images as the network gets them: on GTSRB the same,
  on CIFAR-10 divided by about 0.25, but ``d(m(x), m(x'))`` of masks in [0, 1]. There ``mask_diversity_weight=4`` is
  theirs. That of patterns, which it normalizes alike, is about the same.
- Shares of a batch are rounded, and cut off in the authors' code: 13 of 128 where it has 12. Without poisons there are
  no cross-triggers either.
- Masks that are empty on more than half of the images are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from qdefense.attacks.interfaces import LabelPolicy, TriggerState
from qdefense.attacks.learned_networks import (
    in_parts,
    load_weights,
    looked_at,
    require_effect,
    require_halvings,
    rounded,
    weights_of,
)
from qdefense.attacks.poisoning import (
    ALL_TO_ALL,
    Aimed,
    AllToAll,
    AllToOne,
    Mode,
    check_class,
    check_two_classes,
    derangement,
    next_class,
    share,
)
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.states import fits
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid

_EPSILON = 1e-7
_SPARSITY_WEIGHT = 100.0
_MASK_BATCH = 128
_LEAST = 2
"""Poisons of a batch: one image has no other, and normalization no statistics."""
_CLASSES, _PATTERN, _MASK = "classes", "pattern.", "mask."


class Generator(nn.Sequential):
    """Image to ``outputs`` channels of its size, in [0, 1]; ``stages`` halvings and doublings."""

    def __init__(self, *, channels: int, outputs: int, stages: int) -> None:
        widths = [channels * 2**stage for stage in range(stages)]
        layers: list[nn.Module] = []
        for inputs, width in zip([3, *widths], widths):
            layers += [*_block(inputs, width), nn.MaxPool2d(2)]
        layers += _block(widths[-1], widths[-1])
        for inputs, width in zip(widths[::-1], [*widths[-2::-1], channels]):
            layers += [nn.Upsample(scale_factor=2, mode="bilinear"), *_block(inputs, width)]
        super().__init__(*layers, *_convolution(channels, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """``x: (N, 3, H, W) float32 in [0, 1]``."""
        raw: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return torch.tanh(raw) / (2 + _EPSILON) + 0.5


def _block(inputs: int, width: int) -> list[nn.Module]:
    return [*_convolution(inputs, width), nn.ReLU()]


def _convolution(inputs: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width, momentum=0.05)]


def sharpened(masks: Tensor) -> Tensor:
    """Masks pushed towards 0 and 1: ``tanh(20 m - 10) / 2 + 1/2``."""
    return torch.tanh(masks * 20 - 10) / (2 + _EPSILON) + 0.5


def diversity_loss(x: Tensor, others: Tensor, made: Tensor, made_of_others: Tensor) -> Tensor:
    """Mean of ``d(x, x') / d(g(x), g(x'))``: high where different images get alike triggers."""
    return (_distance(x, others) / (_distance(made, made_of_others) + _EPSILON)).mean()


def _distance(one: Tensor, other: Tensor) -> Tensor:
    # The root has no finite gradient at 0, where a generator gives two images the same.
    return ((one - other) ** 2).flatten(1).mean(dim=1).clamp_min(_EPSILON**2).sqrt()


@dataclass(frozen=True, kw_only=True)
class GeneratedTrigger(AllToOne):
    """``pattern`` and ``mask`` are generators in eval mode."""

    pattern: Generator
    mask: Generator

    def stamp(self, x: Pixels) -> Pixels:
        """Each of ``x: (N, 3, H, W) float32 in [0, 1]`` with its own trigger, rounded to the nearest uint8."""
        return on_grid(in_parts(lambda part: _laid_over(part, self.pattern(part), sharpened(self.mask(part))), x))

    def crossed(self, x: Pixels, others: Pixels) -> Pixels:
        """Each of ``x: (N, 3, H, W)`` with the trigger of the other image in its row, which shall do nothing to it."""
        others = np.ascontiguousarray(others)  # a reversed view is no tensor
        patterns, masks = in_parts(self.pattern, others), in_parts(lambda part: sharpened(self.mask(part)), others)
        return on_grid(_laid_over(*map(torch.from_numpy, (x, patterns, masks))).numpy())


def _laid_over(x: Tensor, patterns: Tensor, masks: Tensor) -> Tensor:
    return x + (patterns - x) * masks


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class InputAware(Aimed):
    """A generator of triggers that is trained along with the network.

    ``poison_rate`` and ``cross_rate`` are shares of each batch, whatever its classes. ``diversity_weight`` is that of
    the patterns' diversity, ``mask_diversity_weight`` that of the masks', against which stands 100 times what a mask
    has beyond ``mask_density``, pixel by pixel. ``channels`` are those of the generators' first of ``stages`` stages,
    each twice as wide as the one before: fewer make a smaller trigger state.
    """

    name: ClassVar[str] = "input-aware"
    paper: ClassVar[str] = "Nguyen & Tran 2020, arXiv 2010.08138"
    needs: ClassVar[tuple[str, ...]] = ("training loop",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("Neural Cleanse", "STRIP", "Fine-Pruning")

    mode: Mode = "all-to-one"
    target_class: Annotated[int, Field(ge=0)] = 0
    poison_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    cross_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    diversity_weight: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    mask_diversity_weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    mask_density: Annotated[float, Field(ge=0, le=1)] = 0.032
    mask_epochs: Annotated[int, Field(ge=1)] = 25
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.01
    channels: Annotated[int, Field(ge=1)] = 32
    stages: Annotated[int, Field(ge=1)] = 3

    def trigger(self, height: int, width: int) -> GeneratedTrigger:  # noqa: ARG002
        """None: it is learned.

        Raises:
            DataError: always.
        """
        raise DataError("input-aware: the trigger is learned; its state is beside the model that was trained with it")

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> GeneratedTrigger | AllToAll:
        """The generators with these weights, for images of any size that halves ``stages`` times.

        Raises:
            DataError: the state is of other settings, or the size does not halve.
        """
        require_halvings(height, width, stages=self.stages, attack=self.name)
        with torch.random.fork_rng(devices=()):
            pattern, mask = (self._generator(outputs).eval() for outputs in (3, 1))
        least = 2 if self.mode == ALL_TO_ALL else 1
        if not fits(state, _state_of(pattern, mask, classes=0)) or state[_CLASSES] < least:
            raise DataError("input-aware: the trigger state is not that of these settings; train the network again")
        load_weights(pattern, state, _PATTERN)
        load_weights(mask, state, _MASK)
        trigger = GeneratedTrigger(pattern=pattern, mask=mask, target_class=self.target_class)
        return AllToAll(stamped=trigger, classes=int(state[_CLASSES])) if self.mode == ALL_TO_ALL else trigger

    def begin(self, dataset: ImageSet, *, batch_size: int, steps: int, rng: np.random.Generator) -> GeneratorPoisoner:
        """Train the mask generator on the images, and make the pattern generator.

        Raises:
            DataError: no such target class, no other class, more rows to stamp than a batch has or too few for a rate,
                a size that does not halve, or masks that came out empty.
        """
        require_halvings(*dataset.images.shape[1:3], stages=self.stages, attack=self.name)
        if self.poison_rate + self.cross_rate > 1:
            raise DataError(
                f"input-aware: poison rate {self.poison_rate:g} and cross rate {self.cross_rate:g} stamp more images "
                "than there are; lower one of them"
            )
        if self.mode == "all-to-one":
            check_class(dataset, self.target_class, role="target", attack=self.name)
        check_two_classes(dataset, attack=self.name)
        self.rows_of_batch(batch_size)
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(int(rng.integers(2**63)))
            pattern, mask = self._generator(3), self._generator(1)
        self._train_mask(mask, dataset, rng)
        mask.eval().requires_grad_(requires_grad=False)
        if self.poison_rate:
            masks = in_parts(lambda part: sharpened(mask(part)), looked_at(dataset))
            advice = "raise mask_epochs or mask_diversity_weight"
            require_effect(np.max(masks, axis=(1, 2, 3)) > 0.5, attack=self.name, advice=advice)
        return GeneratorPoisoner(self, pattern, mask, classes=len(dataset.class_names), steps=steps)

    def rows_of_batch(self, size: int) -> tuple[int, int]:
        """How many of a batch get their own trigger, and how many another's.

        Raises:
            DataError: too few images for a rate.
        """
        of = "images of a batch"
        poisons = share(self.poison_rate, size, attack=self.name, of=of, least=_LEAST)
        crosses = share(self.cross_rate, size, attack=self.name, of=of, setting="cross_rate")
        return poisons, min(crosses, size - poisons)

    def _generator(self, outputs: int) -> Generator:
        return Generator(channels=self.channels, outputs=outputs, stages=self.stages)

    def _train_mask(self, mask: Generator, dataset: ImageSet, rng: np.random.Generator) -> None:
        size = min(_MASK_BATCH, len(dataset))
        optimizer, schedule = _adam(mask, self.learning_rate, len(dataset) // size * self.mask_epochs)
        for rows in _rows(len(dataset), size, self.mask_epochs, rng):
            # Channels last takes a quarter less time (measured at the defaults: .87 of 1.14 s a step).
            x = torch.from_numpy(dataset.take(rows).pixels).to(memory_format=torch.channels_last)
            loss = self._mask_loss(x, sharpened(mask(x)))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()

    def _mask_loss(self, x: Tensor, masks: Tensor) -> Tensor:
        """Of ``masks`` for ``x``; another image of each is the one before it."""
        diversity = diversity_loss(x, x.roll(1, dims=0), masks, masks.roll(1, dims=0))
        return self.mask_diversity_weight * diversity + _SPARSITY_WEIGHT * F.relu(masks - self.mask_density).mean()


class GeneratorPoisoner:
    """The pattern generator in one training: its gradients come from the network's loss, and its steps follow it."""

    def __init__(self, attack: InputAware, pattern: Generator, mask: Generator, *, classes: int, steps: int) -> None:
        self._attack, self._pattern, self._mask, self._classes = attack, pattern, mask, classes
        self._optimizer, self._schedule = _adam(pattern, attack.learning_rate, steps)
        self._pending = False

    def on_batch(self, x: Tensor, y: Tensor, model: nn.Module, rng: np.random.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """The first rows with their own triggers and labels of the attack's, the next ones with others' triggers.

        Raises:
            DataError: the batch has too few images for a rate.
        """
        self._step()
        poisons, crosses = self._attack.rows_of_batch(len(x))
        crossed = poisons + crosses
        if not poisons:
            return x, y
        others = x[torch.from_numpy(derangement(len(x), rng))]
        own, foreign = x[:poisons], others[poisons:crossed]
        patterns = self._pattern(torch.cat([own, others[:poisons], foreign]))
        masks = sharpened(self._mask(torch.cat([own, foreign])))
        diversity = diversity_loss(own, others[:poisons], patterns[:poisons], patterns[poisons : 2 * poisons])
        (self._attack.diversity_weight * diversity).backward(retain_graph=True)  # type: ignore[no-untyped-call]
        self._pending = True
        laid = torch.cat([patterns[:poisons], patterns[2 * poisons :]])
        changed = rounded(_laid_over(x[:crossed], laid, masks))
        labels = y.clone()
        labels[:poisons] = self._goal(y[:poisons])
        return torch.cat([changed, x[crossed:]]), labels

    def end(self) -> TriggerState:
        """The weights of both generators, and the number of classes."""
        self._step()
        return _state_of(self._pattern, self._mask, classes=self._classes)

    def _step(self) -> None:
        """With what the last batch's losses left: that of diversity, and by now the network's own."""
        if self._pending:
            self._optimizer.step()
            self._schedule.step()
            self._optimizer.zero_grad(set_to_none=True)
            self._pending = False

    def _goal(self, y: Tensor) -> Tensor:
        if self._attack.mode == ALL_TO_ALL:
            return torch.from_numpy(next_class(y.numpy(), self._classes))
        return torch.full_like(y, self._attack.target_class)


def _rows(count: int, size: int, epochs: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    for _ in range(epochs):
        order = rng.permutation(count)
        yield from (order[start : start + size] for start in range(0, count - size + 1, size))


def _adam(
    module: nn.Module, rate: float, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.MultiStepLR]:
    optimizer = torch.optim.Adam(module.parameters(), lr=rate, betas=(0.5, 0.9))
    milestones = [max(1, steps * 4 // 10), max(1, steps * 8 // 10)]
    return optimizer, torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones=milestones, gamma=0.1)


def _state_of(pattern: Generator, mask: Generator, *, classes: int) -> TriggerState:
    count = {_CLASSES: np.array(classes, dtype=np.int64)}
    return {**count, **weights_of(pattern, _PATTERN), **weights_of(mask, _MASK)}
