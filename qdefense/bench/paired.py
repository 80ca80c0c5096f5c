"""The mean of paired differences and how sure it is. Plain functions of arrays.

With three networks a bootstrap draws from ten different resamples, and its interval is hardly ever wider than the three
differences themselves; Student's t says how little three are.
"""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtrit


def mean_difference(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95
) -> tuple[float, tuple[float, float] | None]:
    """``mean(after - before)`` and its interval ``mean -+ t * sd / sqrt(n)``, where t has n - 1 degrees of freedom.

    ``None`` in place of the interval of one pair, and of differences that are all the same: they have no spread to go
    by, which is no sign that the next one would be the same.

    Args:
        before: (N,) one figure per network.
        after: (N,) those of the same networks in the same order.
        confidence: of the interval, between 0 and 1.

    Raises:
        ValueError: there is no pair, the lengths differ, or a figure is not finite.
    """
    first, second = (np.asarray(values, dtype=np.float64) for values in (before, after))
    if first.ndim != 1 or first.shape != second.shape or not len(first):
        raise ValueError(f"{first.shape} figures before and {second.shape} after are no pairs")
    difference = second - first
    if not np.isfinite(difference).all():
        raise ValueError("a figure is not finite: it has no difference")
    mean = float(difference.mean())
    if np.ptp(difference) < _SAME:
        return mean, None
    half = student_quantile((1 + confidence) / 2, len(difference) - 1) * float(difference.std(ddof=1))
    half /= sqrt(len(difference))
    return mean, (mean - half, mean + half)


_SAME = 1e-12
"""Figures are rates of at most millions: differences closer than that differ by rounding alone."""


def student_quantile(probability: float, degrees: int) -> float:
    """The quantile of Student's t distribution, for a probability of at least one half; 4.303 for .975 and 2.

    Raises:
        ValueError: the probability is not in [0.5, 1), or there is no degree of freedom.
    """
    if not 0.5 <= probability < 1 or degrees < 1:
        raise ValueError(f"no quantile at {probability} with {degrees} degrees of freedom")
    return float(stdtrit(degrees, probability))
