"""Trigger inversion by gradient descent through the shadow: mask and pattern for one class, under an adaptive cost."""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qdefense.data.images import Pixels, on_grid
from qdefense.session import rows_at_once

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow


class NoGradientError(RuntimeError):
    """The loss has no usable gradient in the input: absent, zero everywhere, or not finite."""


@dataclass(frozen=True, kw_only=True)
class MaskedPattern:
    """``stamp(x) = (1 - mask) * x + mask * pattern``; ``mask: (1, H, W)``, ``pattern: (3, H, W)``, both in [0, 1]."""

    mask: Pixels
    pattern: Pixels

    @property
    def norm(self) -> float:
        """L1 norm of the mask, in pixels."""
        return float(np.abs(self.mask).sum(dtype=np.float64))

    @property
    def trigger_id(self) -> str:
        """Digest of mask and pattern, rounded to the uint8 grid."""
        body = on_grid(self.mask).tobytes() + on_grid(self.pattern).tobytes()
        return hashlib.sha256(body).hexdigest()[:16]

    def stamp(self, x: Pixels) -> Pixels:
        """Stamp ``x: (N, 3, H, W) float32 in [0, 1]`` and round to what a uint8 image can hold."""
        return on_grid((1 - self.mask) * x + self.mask * self.pattern)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the inversion is driven; the defaults are those of the published code.

    The cost starts at 0 and becomes ``initial_cost`` after ``patience`` steps in a row at ``attack_success``; from then
    on ``patience`` steps at it multiply the cost by ``multiplier``, ``patience`` steps below divide it by
    ``multiplier ** 1.5``.
    """

    steps: int
    learning_rate: float = 0.1
    betas: tuple[float, float] = (0.5, 0.9)
    batch_size: int = 32
    initial_cost: float = 1e-3
    multiplier: float = 2.0
    patience: int = 5
    attack_success: float = 0.99


@dataclass
class CostController:
    """The adaptive weight of the mask's norm."""

    schedule: Schedule
    cost: float = 0.0
    _above: int = field(default=0, init=False)
    _below: int = field(default=0, init=False)

    def update(self, success: float) -> None:
        """Take one step's attack success into account."""
        reached = success >= self.schedule.attack_success
        self._above, self._below = (self._above + 1, 0) if reached else (0, self._below + 1)
        if self._above >= self.schedule.patience:
            self._above = 0
            self.cost = self.cost * self.schedule.multiplier if self.cost else self.schedule.initial_cost
        elif self._below >= self.schedule.patience:
            self._below = 0
            self.cost /= self.schedule.multiplier**1.5


class PassAverage:
    """Mean of the last ``length`` mini-batches' success, 0 until there are so many.

    The published code averages over a pass of 1,000 images before it decides. One mini-batch of 32 is no substitute:
    "32 of 32, five times in a row" and "a miss, five times in a row" balance at a success of .978, so that it would
    settle below the .99 by which its triggers are judged on the session.
    """

    def __init__(self, length: int) -> None:
        self._recent: deque[float] = deque(maxlen=length)

    def add(self, success: float) -> float:
        """Take in one mini-batch and return the average."""
        self._recent.append(success)
        whole = len(self._recent) == self._recent.maxlen
        return sum(self._recent) / len(self._recent) if whole else 0.0


@dataclass(frozen=True, kw_only=True)
class Inversion:
    """One run's finds: every improvement, smallest mask first, and what it ended at, successful or not."""

    candidates: list[MaskedPattern]
    last: MaskedPattern


def invert_trigger(
    shadow: Shadow, images: Pixels, target_class: int, schedule: Schedule, rng: np.random.Generator
) -> Inversion:
    """Every improvement found in one run, and its last state.

    Minimises ``CE(f(x'), t) + cost * ||m||_1`` over ``m = tanh(a) / 2 + 1/2`` and ``p = tanh(b) / 2 + 1/2`` with
    ``x' = (1 - m) x + m p``; a step is one Adam update on one mini-batch of ``images: (N, 3, H, W)``. The success that
    drives the cost is the average over the last pass through the images; a pair is kept when that average reached the
    wanted success and its mask is the smallest so far.

    Raises:
        NoGradientError: the classification loss gives the input no gradient.
    """
    shape = images.shape[1:]
    raw_mask, raw_pattern = _start(rng, (1, 1, *shape[1:])), _start(rng, (1, *shape))
    optimizer = torch.optim.Adam([raw_mask, raw_pattern], lr=schedule.learning_rate, betas=schedule.betas)
    controller = CostController(schedule)
    targets = torch.full((schedule.batch_size,), target_class)
    kept: list[MaskedPattern] = []
    recent = PassAverage(-(-len(images) // schedule.batch_size))
    alive = False
    for rows in _mini_batches(len(images), schedule, rng):
        mask, pattern = torch.tanh(raw_mask) / 2 + 0.5, torch.tanh(raw_pattern) / 2 + 0.5
        stamped = (1 - mask) * torch.from_numpy(images[rows]) + mask * pattern
        logits, gradient = _answers_and_gradient(shadow, stamped, targets)
        alive = alive or bool(gradient.any())
        success = recent.add(float((logits.argmax(1) == target_class).float().mean()))
        norm = float(mask.detach().sum(dtype=torch.float64))
        if success >= schedule.attack_success and (not kept or norm < kept[-1].norm):
            kept.append(_snapshot(mask, pattern))
        controller.update(success)
        optimizer.zero_grad()
        torch.autograd.backward([stamped, controller.cost * mask.sum()], [gradient, None])
        optimizer.step()
    if not alive:
        raise NoGradientError("the gradient of the loss is zero at every step")
    final = (torch.tanh(raw) / 2 + 0.5 for raw in (raw_mask, raw_pattern))
    return Inversion(candidates=kept[::-1], last=_snapshot(*final))


def _start(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensor:
    uniform = rng.random(shape) * (1 - 1e-3) + 5e-4
    return torch.from_numpy(np.arctanh(2 * uniform - 1).astype(np.float32)).requires_grad_()


def _mini_batches(count: int, schedule: Schedule, rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Rows of each step's mini-batch: passes over freshly shuffled images, wrapped to the number of steps."""
    wanted = schedule.steps * schedule.batch_size
    passes = [rng.permutation(count) for _ in range(-(-wanted // count))]
    return list(np.concatenate(passes)[:wanted].reshape(schedule.steps, schedule.batch_size))


def _answers_and_gradient(shadow: Shadow, stamped: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of their mean cross-entropy in the input; large images go through a few at a time."""
    step = rows_at_once(*stamped.shape[2:])
    logits, gradients = [], []
    for part, wanted in zip(torch.split(stamped, step), torch.split(targets, step), strict=True):
        answers = cast("Tensor", shadow(part))
        loss = F.cross_entropy(answers, wanted)
        gradients.append(_input_gradient(loss, part) * (len(part) / len(stamped)))
        logits.append(answers.detach())
    return torch.cat(logits), torch.cat(gradients)


def _input_gradient(loss: Tensor, stamped: Tensor) -> Tensor:
    if not loss.requires_grad:
        raise NoGradientError("the shadow's logits do not depend on its input differentiably")
    (gradient,) = torch.autograd.grad(loss, stamped, retain_graph=True, allow_unused=True)
    if gradient is None:
        raise NoGradientError("the shadow's logits do not depend on its input differentiably")
    if not bool(torch.isfinite(gradient).all()):
        raise NoGradientError("the gradient of the loss is not finite")
    return gradient


def _snapshot(mask: Tensor, pattern: Tensor) -> MaskedPattern:
    return MaskedPattern(mask=mask.detach()[0].numpy().copy(), pattern=pattern.detach()[0].numpy().copy())
