"""Percentiles of timings and bootstrap intervals of their medians: plain functions of arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 2000

Medians = NDArray[np.float64]


class Estimate(NamedTuple):
    """A figure and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def percentile(values: ArrayLike, share: float) -> float:
    """The smallest value that at least this share of ``values: (n,)`` do not exceed (nearest rank, no interpolation).

    Raises:
        ValueError: there is no value, one is no finite number, or the share is not in (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}: expected a number above 0, at most 1")
    return float(np.quantile(_checked(values), share, method="inverted_cdf"))


def median_estimate(values: ArrayLike, *, seed: int) -> Estimate:
    """Median of ``values: (n,)``; its interval holds the middle 95 % of the medians of 2,000 resamples.

    Raises:
        ValueError: there is no value, or one is no finite number.
    """
    return _bootstrap(lambda drawn: drawn, seed, _checked(values))


def difference_estimate(values: ArrayLike, base: ArrayLike, *, seed: int) -> Estimate:
    """``median(values) - median(base)``, both ``(n,)``; entry i of each comes from round i, and rounds are resampled.

    What slowed a round slowed both.

    Raises:
        ValueError: there is no value, one is no finite number, or the lengths differ.
    """
    return _bootstrap(lambda drawn, under: drawn - under, seed, *_paired(values, base))


def ratio_estimate(values: ArrayLike, base: ArrayLike, *, seed: int) -> Estimate:
    """``median(values) / median(base)``, as `difference_estimate` has the difference.

    Raises:
        ValueError: as there, or a base is not above 0.
    """
    own, under = _paired(values, base)
    if under.min() <= 0:
        raise ValueError("base: a ratio needs values above 0")
    return _bootstrap(lambda drawn, below: drawn / below, seed, own, under)


def _bootstrap(combine: Callable[..., Medians], seed: int, *samples: NDArray[np.float64]) -> Estimate:
    rng = np.random.default_rng(seed)
    count = len(samples[0])
    rows = rng.integers(0, count, (RESAMPLES, count))
    whole = combine(*(np.median(sample, keepdims=True) for sample in samples))
    low, high = np.quantile(combine(*(np.median(sample[rows], axis=1) for sample in samples)), [0.025, 0.975])
    return Estimate(float(whole[0]), float(low), float(high))


def _paired(values: ArrayLike, base: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    own, under = _checked(values), _checked(base)
    if len(own) != len(under):
        raise ValueError(f"{len(own)} values and {len(under)} of the base: expected one of each a round")
    return own, under


def _checked(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise ValueError("expected a row of at least one number, all of them finite")
    return array
