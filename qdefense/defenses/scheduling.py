"""Which starts each class of a trigger inversion gets: plain functions of numbers and arrays.

A norm is comparable with another one only if both came out of the same procedure: as many steps, as many starts. Every
start of a plan has the same number of steps, and the statistic is taken over the same starts of every class. What a few
classes get beyond that never enters it (docs/decisions/0016).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

SHARE = 3
"""A screened plan takes at most one part in so many of the exhaustive plan's steps."""

PROMISING = 9
"""One class in so many gets further starts: at 4 starts what `SHARE` leaves beyond one full start of every class."""

LEAST_RESTARTS = 4
"""With fewer no screened plan has room for one whole start of every class."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every class is started ``compared`` times, ``further`` more for the ``promising`` lowest classes; all alike long.

    Attributes:
        steps: gradient steps of each start.
        compared: starts of every class, whose smallest norm enters the statistic.
        promising: number of classes that get further starts.
        further: number of those starts for each of them.
    """

    steps: int
    compared: int
    promising: int = 0
    further: int = 0


def exhaustive_plan(steps: int, restarts: int) -> Plan:
    """Every start of every class."""
    return Plan(steps=steps, compared=restarts)


def screened_plan(classes: int, steps: int, restarts: int) -> Plan:
    """One start of every class and all ``restarts`` of the lowest ones, for a third of the exhaustive plan's steps.

    With m = max(1, K // 9) promising classes of K each start has ``min(steps, K restarts steps / (3 (K + m (restarts -
    1))))`` steps: all of them from 4 restarts and 9 classes on.
    """
    promising = max(1, classes // PROMISING)
    further = restarts - 1
    each = classes * restarts * steps // (SHARE * (classes + promising * further))
    return Plan(steps=min(steps, each), compared=1, promising=promising if further else 0, further=further)


def least_restarts(classes: int) -> int:
    """The fewest with which a screened plan shortens no start: 4 from 9 classes on, 5 of 6 to 8.

    Raises:
        ValueError: fewer than 4 classes, of which a third of the steps never is a whole start of each.
    """
    promising = max(1, classes // PROMISING)
    room = classes - SHARE * promising
    if room < 1:
        raise ValueError(f"{classes} classes leave no room for a screened plan")
    return -(-SHARE * (classes - promising) // room)


def lowest(norms: NDArray[np.float64], count: int) -> list[int]:
    """The ``count`` classes with the smallest of ``norms: (K,)``, ties in class order; those censored are left out."""
    order = np.argsort(norms, kind="stable")
    return [int(target) for target in order[:count] if np.isfinite(norms[target])]
