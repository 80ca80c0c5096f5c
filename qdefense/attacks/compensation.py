"""The compensatory model of LSP (Li et al. 2024, arXiv 2404.12852): how far a trigger's confidence must fall to hide.

Trigger inversion finds, for a class c, a mask m and pattern p with the least

``J(m, p; c) = E[-log f_c((1 - m) x + m p)] + weight * ||m||_1``

and calls c backdoored where the norm ``||m||_1`` is far below that of the other classes. A backdoor stays out of sight
as long as its trigger, of norm ``N_t`` and confidence ``q = E f_t``, costs at least as much as the mask of a benign
class, of norm ``N_b`` and cross-entropy ``c_b``:

``-log q + weight * N_t >= c_b + weight * N_b``

Poisons whose labels are smoothed by ``a`` teach ``q = 1 - a``. They still win while q is above the confidence of
every other class, ``1 / K`` where the rest is spread evenly over ``K`` classes.

Deviation: the paper's text was not at hand; the formulas are a reconstruction from its abstract.
Plain functions of numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple


class Interval(NamedTuple):
    """``low < value <= high`` for a confidence, ``low <= value < high`` for a smoothing."""

    low: float
    high: float


def minimum_rise(
    *, weight: float, benign_norms: Sequence[float], benign_costs: Sequence[float], trigger_norm: float
) -> float:
    """The least cross-entropy of the true trigger that hides it, in nats: ``max(0, weight (N_b - N_t) + c_b)``.

    ``benign_norms`` and ``benign_costs`` are the inverted norms of the benign classes and their cross-entropies, of
    which the medians count; ``weight`` is that of the norm in the defender's loss.

    Raises:
        ValueError: no benign class, or a figure that is negative or not finite.
    """
    figures = (weight, trigger_norm, *benign_norms, *benign_costs)
    if not benign_norms or not benign_costs:
        raise ValueError("no benign class: the model compares the trigger with at least one")
    if not all(math.isfinite(figure) and figure >= 0 for figure in figures):
        raise ValueError(f"weight, norms and costs are finite and not negative, given {figures}")
    return max(0.0, weight * (median(benign_norms) - trigger_norm) + median(benign_costs))


def highest_confidence(rise: float) -> float:
    """``q_max = exp(-rise)``: the highest confidence in the target at which the trigger stays hidden."""
    return math.exp(-rise)


def confidence_drop(rise: float) -> float:
    """``1 - q_max``: by how much at least the confidence of an ideal backdoor, 1, must change."""
    return -math.expm1(-rise)


def feasible_confidences(rise: float, *, classes: int) -> Interval | None:
    """``(1 / K, q_max]``: hidden, and still the most likely class; ``None`` where there is no such confidence.

    Raises:
        ValueError: fewer than two classes.
    """
    if classes < 2:
        raise ValueError(f"a backdoor needs at least 2 classes, given {classes}")
    low, high = 1 / classes, highest_confidence(rise)
    return Interval(low, high) if low < high else None


def feasible_smoothings(rise: float, *, classes: int) -> Interval | None:
    """``[1 - q_max, (K - 1) / K)``: the smoothings that teach a feasible confidence; ``None`` where there is none.

    Raises:
        ValueError: fewer than two classes.
    """
    if feasible_confidences(rise, classes=classes) is None:
        return None
    return Interval(confidence_drop(rise), (classes - 1) / classes)
