"""Fine-tuning of a file's weights on clean images through its trainable shadow, some channels held at zero."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qdefense.converters.channels import ChannelParameter
from qdefense.converters.shadow import Shadow
from qdefense.data.images import ImageSet, to_pixels
from qdefense.defenses.inversion import NoGradientError
from qdefense.session import rows_at_once


@dataclass(frozen=True, kw_only=True)
class TuningSchedule:
    """Stochastic gradient descent on the cross-entropy, its learning rate on a cosine over the epochs."""

    epochs: int
    learning_rate: float
    momentum: float
    weight_decay: float
    batch_size: int


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """What a fine-tuning was: its gradient steps, and the mean cross-entropy over each epoch, as it was trained on."""

    steps: int = 0
    losses: tuple[float, ...] = ()

    @property
    def ran_away(self) -> bool:
        """Whether the last epoch's loss is above the first one's: steps so large that each made up for the other."""
        return len(self.losses) > 1 and not self.losses[-1] <= self.losses[0]


@torch.no_grad()
def silence(shadow: Shadow, parameters: Iterable[ChannelParameter], channels: Collection[int]) -> None:
    """Zero the entries of these channels in a shadow's parameters."""
    rows = torch.tensor(sorted(channels), dtype=torch.int64)
    for parameter in parameters:
        # Not a product with a mask, which would leave minus zeros, and NaN where it is one.
        shadow.parameters_by_initializer[parameter.initializer].index_fill_(parameter.axis, rows, 0.0)


def fine_tune(
    shadow: Shadow,
    images: ImageSet,
    schedule: TuningSchedule,
    rng: np.random.Generator,
    *,
    silent: Sequence[ChannelParameter],
    channels: Collection[int],
    on_epoch: Callable[[int], None] = lambda _done: None,
) -> Tuning:
    """Train every weight that takes a gradient; the silent channels are zeroed anew after each step.

    The shadow rounds to the file's grid in each pass, with a straight-through gradient; statistics of a normalization
    stay as they are.

    Raises:
        NoGradientError: no weight has a gradient, it is zero in every step, or it is not finite.
    """
    weights = [weight for weight in shadow.parameters() if weight.requires_grad]
    if not schedule.epochs:
        return Tuning()
    if not weights:
        raise NoGradientError("no weight of the shadow takes one")
    optimizer = torch.optim.SGD(
        weights, lr=schedule.learning_rate, momentum=schedule.momentum, weight_decay=schedule.weight_decay
    )
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=schedule.epochs)
    steps, alive, losses = 0, False, []
    for epoch in range(schedule.epochs):
        total = 0.0
        for rows in np.split(
            rng.permutation(len(images)), range(schedule.batch_size, len(images), schedule.batch_size)
        ):
            optimizer.zero_grad()
            total += len(rows) * _add_gradients(shadow, images.take(rows))
            alive = _check_gradients(weights) or alive
            optimizer.step()
            silence(shadow, silent, channels)
            steps += 1
        cosine.step()
        losses.append(total / len(images))
        on_epoch(epoch + 1)
    if not alive:
        raise NoGradientError("the gradient of the loss in the weights is zero at every step")
    return Tuning(steps=steps, losses=tuple(losses))


def _add_gradients(shadow: Shadow, batch: ImageSet) -> float:
    """The batch's mean cross-entropy, whose gradients are added; large images go through a few at a time."""
    pixels, labels = torch.from_numpy(to_pixels(batch.images)), torch.from_numpy(batch.labels)
    step, total = rows_at_once(*pixels.shape[2:]), 0.0
    for part, wanted in zip(torch.split(pixels, step), torch.split(labels, step), strict=True):
        loss = F.cross_entropy(shadow(part), wanted, reduction="sum") / len(pixels)
        if not loss.requires_grad:
            raise NoGradientError("the shadow's answers do not depend on its weights differentiably")
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _check_gradients(weights: Sequence[Tensor]) -> bool:
    """Whether any gradient is not zero.

    Raises:
        NoGradientError: one is not finite.
    """
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
        raise NoGradientError("it is not finite; lower the learning rate")
    return any(bool(gradient.any()) for gradient in gradients)
