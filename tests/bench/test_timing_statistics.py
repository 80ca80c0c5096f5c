from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdefense.bench.timing_statistics import difference_estimate, median_estimate, percentile, ratio_estimate

TIMES = st.lists(st.integers(1, 50).map(float), min_size=1, max_size=20)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([5.0], 0.99, 5.0),
        (list(range(1, 101)), 0.5, 50.0),
        (list(range(1, 101)), 0.9, 90.0),
        (list(range(1, 101)), 0.99, 99.0),
        (list(range(1, 101)), 1.0, 100.0),
        (list(range(1, 11)), 0.99, 10.0),
        ([4, 1, 3, 2], 0.5, 2.0),  # 2 of 4 do not exceed it
        ([4, 1, 3, 2], 0.51, 3.0),
    ],
)
def test_percentile_is_the_nearest_rank(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_percentile_raises_when_the_share_is_none(share: float) -> None:
    with pytest.raises(ValueError, match=f"share is {share}: expected a number above 0, at most 1"):
        percentile([1.0], share)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [1.0, float("inf")], [[1.0]]])
def test_statistics_raise_when_a_value_is_no_time(values: list[float]) -> None:
    message = "expected a row of at least one number, all of them finite"
    with pytest.raises(ValueError, match=message):
        percentile(values, 0.5)
    with pytest.raises(ValueError, match=message):
        median_estimate(values, seed=0)
    with pytest.raises(ValueError, match=message):
        difference_estimate([1.0], values, seed=0)


def test_estimates_are_points_when_nothing_varies() -> None:
    assert median_estimate([3.0] * 9, seed=0) == (3.0, 3.0, 3.0)
    assert difference_estimate([5.0] * 4, [2.0] * 4, seed=0) == (3.0, 3.0, 3.0)
    assert ratio_estimate([5.0] * 4, [2.0] * 4, seed=0) == (2.5, 2.5, 2.5)


def test_estimates_equal_the_hand_computed_medians() -> None:
    own, base = [10.0, 30.0, 20.0, 1000.0], [1.0, 2.0, 3.0, 4.0]
    assert median_estimate(own, seed=0).value == 25.0
    assert difference_estimate(own, base, seed=0).value == 22.5
    assert ratio_estimate(own, base, seed=0).value == 10.0


def test_median_interval_of_two_values_is_that_of_its_three_medians() -> None:
    """A resample of (0, 8) has the median 0, 4 or 8 with probabilities 1/4, 1/2, 1/4: the middle 95 % are all."""
    assert median_estimate([0.0, 8.0], seed=0) == (4.0, 0.0, 8.0)


def test_median_interval_covers_the_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = median_estimate(rng.exponential(1.0, 40), seed=seed)
        covered += found.low <= np.log(2) <= found.high
    assert 180 <= covered <= 199


def test_differences_resample_rounds_so_that_a_slow_round_cancels() -> None:
    """The machine slows down tenfold half of the time; the variant always adds 1."""
    base = np.array([1.0, 10.0] * 20)
    found = difference_estimate(base + 1, base, seed=0)
    assert found == pytest.approx((1.0, 1.0, 1.0))
    alone = median_estimate(base, seed=0)
    assert alone.high - alone.low > 5


@given(TIMES, st.integers(0, 5))
def test_estimates_are_the_same_for_the_same_seed_and_lie_in_order(values: list[float], seed: int) -> None:
    found = median_estimate(values, seed=seed)
    assert found == median_estimate(values, seed=seed)
    assert min(values) <= found.low <= found.high <= max(values)
    assert ratio_estimate(values, values, seed=seed) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("own", "base", "message"),
    [
        ([1.0, 2.0], [1.0], "2 values and 1 of the base: expected one of each a round"),
        ([1.0], [0.0], "base: a ratio needs values above 0"),
    ],
)
def test_ratio_raises_when_rounds_or_bases_do_not_fit(own: list[float], base: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ratio_estimate(own, base, seed=0)
