"""Rates and how sure they are: conformal p-values, Wilson intervals, binomial tails, AUROC. Functions of arrays."""

from __future__ import annotations

from bisect import bisect_left
from decimal import ROUND_CEILING, Context
from fractions import Fraction
from math import ceil, exp, floor, fsum, lgamma, log, log1p, sqrt
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

MIN_SKILL = 0.25
"""Below it a model is taken for one that guesses."""


def chance_of(classes: int, labels: ArrayLike | None = None) -> float:
    """What knowing nothing gets right: ``max(1/K, share of the commonest of labels: (N,))``; 1/K without labels."""
    counts = np.bincount(np.asarray([] if labels is None else labels, dtype=np.int64))
    return max(1 / classes, int(counts.max(initial=0)) / max(int(counts.sum()), 1))


def skill(accuracy: float, chance: float) -> float:
    """How far an accuracy is from guessing to perfect: ``(accuracy - chance) / (1 - chance)``; 0 where chance is 1."""
    return (accuracy - chance) / (1 - chance) if chance < 1 else 0.0


def conformal_p(score: float, clean: ArrayLike) -> float:
    """How often a clean model scores at least as high: ``(1 + #{clean >= score}) / (n + 1)``, never below 1/(n + 1).

    It bounds the false-alarm rate where the new model, if clean, is exchangeable with the ``clean: (n,)`` ones.

    Raises:
        ValueError: a score is NaN, or there is no clean one.
    """
    values = _checked(clean, "clean")
    if np.isnan(score):
        raise ValueError("the score is NaN: it has no p-value")
    return (1 + int(np.sum(values >= score))) / (len(values) + 1)


def told_beside(value: float, limit: float) -> str:
    """A figure with two decimals, or as many as show on which side of its limit it lies: 2.003 is not "2.00"."""
    sides = (value > limit, value < limit)
    for decimals in range(2, 7):
        told = f"{value:.{decimals}f}"
        if (float(told) > limit, float(told) < limit) == sides:
            return told
    return repr(float(value))


def alarm_rank(rate: float, n: int) -> int:
    """``k = floor(rate * (n + 1))``: a score above the k-th largest of n clean ones has a p-value of at most ``rate``.

    0 where n is too small for the rate. ``rate`` is taken for the decimal number that it is written as, so that 0.05
    of 20 is 1.

    Raises:
        ValueError: the rate is not between 0 and 1, or n is negative.
    """
    if n < 0:
        raise ValueError(f"n is {n}: a number of models is not negative")
    return floor(_decimal(rate) * (n + 1))


def models_needed(rate: float) -> int:
    """The fewest clean models that can promise this false-alarm rate: ``ceil(1 / rate) - 1``.

    Raises:
        ValueError: the rate is not between 0 and 1.
    """
    return ceil(1 / _decimal(rate)) - 1


def rounded_up(rate: float) -> str:
    """Two significant digits and never less than the rate itself: 1/23 is "0.044", for 0.043 would claim too much."""
    return format(Context(prec=2, rounding=ROUND_CEILING).create_decimal(repr(float(rate))), "f")


def wilson_interval(hits: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the proportion ``hits / n``, which stays in [0, 1] and is no point at 0 or n hits.

    Raises:
        ValueError: n is not positive, or hits are not between 0 and n.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} of {n} is no proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share, weight = hits / n, z * z / n
    middle = (share + weight / 2) / (1 + weight)
    half = z * sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # Rounding may leave the exact bounds of no hit and of nothing but hits.
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == n else middle + half)


def binomial_tail(hits: int, n: int, rate: float) -> float:
    """How often ``n`` independent trials with this rate give at least ``hits``: the exact one-sided p-value.

    ``P(X >= hits) = sum_{i >= hits} C(n, i) rate^i (1 - rate)^(n - i)``.

    Raises:
        ValueError: hits are not between 0 and n, or the rate is not above 0 and at most 1.
    """
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} is no proportion")
    if not 0 < rate <= 1:
        raise ValueError(f"rate is {rate}: expected a number between 0 and 1")
    if hits == 0 or rate == 1:
        return 1.0
    # In logarithms: the binomial coefficients of a few thousand trials are larger than any float.
    whole, hit, miss = lgamma(n + 1), log(rate), log1p(-rate)
    terms = (exp(whole - lgamma(i + 1) - lgamma(n - i + 1) + i * hit + (n - i) * miss) for i in range(hits, n + 1))
    return min(fsum(terms), 1.0)


def least_alarm(n: int, rate: float, level: float) -> int | None:
    """The fewest hits of ``n`` with ``binomial_tail(hits, n, rate) <= level``; None where not even n of them have that.

    Raises:
        ValueError: the rate is not above 0 and at most 1.
    """
    found = bisect_left(range(n + 1), True, key=lambda hits: binomial_tail(hits, n, rate) <= level)
    return found if found <= n else None


def auroc(positive: ArrayLike, negative: ArrayLike) -> float:
    """Share of pairs in which the positive scores higher than the negative; a tie counts half.

    Raises:
        ValueError: a score is NaN, or one side is empty.
    """
    upper, lower = _checked(positive, "positive"), np.sort(_checked(negative, "negative"))
    below, up_to = (int(np.searchsorted(lower, upper, side=side).sum()) for side in _SIDES)
    return (below + up_to) / (2 * len(upper) * len(lower))


_SIDES: tuple[Literal["left", "right"], ...] = ("left", "right")


def _checked(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or np.isnan(array).any():
        raise ValueError(f"{name}: expected a row of at least one score, none of them NaN")
    return array


def _decimal(rate: float) -> Fraction:
    if not 0 < rate < 1:
        raise ValueError(f"rate is {rate}: expected a number between 0 and 1")
    return Fraction(repr(float(rate)))
