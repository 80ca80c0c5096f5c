"""Which channels sleep on clean images, and how many can go (Liu et al. 2018): plain functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Pruning:
    """How far it went.

    Attributes:
        pruned: channels, in the order in which they went.
        rights: images answered rightly by what was there before, then after each step that was tried.
    """

    pruned: tuple[int, ...]
    rights: tuple[int, ...]


def channel_sums(activations: NDArray[np.generic]) -> NDArray[np.float64]:
    """Sum of ``activations: (N, C, ...)`` for each channel, over images and places: ``(C,) float64``."""
    axes = (0, *range(2, activations.ndim))
    sums: NDArray[np.float64] = activations.sum(axis=axes, dtype=np.float64)
    return sums


def dormancy_order(means: NDArray[np.float64]) -> NDArray[np.int64]:
    """Channels from the lowest mean activation to the highest; of equal ones the lower number comes first.

    Args:
        means: ``(C,)``, or anything that grows with them, such as sums or the codes of one scale.

    Raises:
        ValueError: a value is not finite: it has no place in an order.
    """
    broken = int((~np.isfinite(means)).sum())
    if broken:
        raise ValueError(f"the mean activation of {broken} of {len(means)} channels is not finite")
    return np.argsort(means, kind="stable").astype(np.int64)


def prune_while_tolerated(
    order: NDArray[np.int64],
    count_right: Callable[[tuple[int, ...]], int],
    *,
    images: int,
    tolerance: float,
    step: int,
    on_step: Callable[[int], None] = lambda _pruned: None,
) -> Pruning:
    """Prune ``step`` channels after another in this order until the accuracy has fallen by ``tolerance``.

    A step stays where ``right before - right now < tolerance * images``; the first that does not is taken back and ends
    it. With a tolerance of 0 nothing is pruned. At least one channel is left.

    Args:
        order: ``(C,)`` channels.
        count_right: how many of the images are answered rightly without these channels.
        images: how many there are.
        tolerance: share of the images, in [0, 1], taken for the decimal number that it is written as.
        step: channels per step.
        on_step: hears how many channels are pruned now.
    """
    rights, pruned = [count_right(())], 0
    limit = Fraction(repr(float(tolerance))) * images
    while limit and pruned + step < len(order):
        rights.append(count_right(tuple(order[: pruned + step].tolist())))
        if rights[0] - rights[-1] >= limit:
            break
        pruned += step
        on_step(pruned)
    return Pruning(pruned=tuple(order[:pruned].tolist()), rights=tuple(rights))
