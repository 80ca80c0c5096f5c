"""Outlier statistics of what a scan measures per class: plain functions of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

CONSISTENCY = 1.4826
"""Makes the MAD of normal data estimate its standard deviation."""


def scaled_mad(values: NDArray[np.float64]) -> tuple[float, float]:
    """Median and scaled median absolute deviation of ``values: (K,)``.

    ``median = med(v)``, ``mad = 1.4826 * med(|v - median|)``. A right-censored value is ``+inf``: it counts by its
    rank alone, which both medians allow while fewer than half of the values are censored.

    Raises:
        ValueError: half of the values or more are censored, or one is NaN.
    """
    if np.isnan(values).any():
        raise ValueError(f"no median: {np.isnan(values).sum()} of {len(values)} values are NaN")
    if 2 * np.isinf(values).sum() >= len(values):
        raise ValueError(f"no median: {np.isinf(values).sum()} of {len(values)} values are censored")
    median = float(np.median(values))
    return median, CONSISTENCY * float(np.median(np.abs(values - median)))


def low_side_indices(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Anomaly index of each value on the low side: ``(median - v) / mad``, 0 where ``v`` is above the median.

    Raises:
        ValueError: the MAD is 0, so that the index is undefined, or too many values are censored.
    """
    median, mad = scaled_mad(values)
    if mad == 0:
        raise ValueError("the median absolute deviation is 0: the values do not differ, so no index is defined")
    return np.maximum((median - values) / mad, 0.0)


def high_side_indices(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Anomaly index of each value on the high side: ``(v - median) / mad``, 0 where ``v`` is below the median.

    Raises:
        ValueError: the MAD is 0, so that the index is undefined, or a value is not finite.
    """
    if not np.isfinite(values).all():
        raise ValueError(f"{np.sum(~np.isfinite(values))} of {len(values)} values are not finite")
    return low_side_indices(-values)
