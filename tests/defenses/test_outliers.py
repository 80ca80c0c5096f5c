from __future__ import annotations

import numpy as np
import pytest

from qdefense.defenses.outliers import CONSISTENCY, high_side_indices, low_side_indices, scaled_mad

INF = np.inf


@pytest.mark.parametrize(
    ("values", "median", "deviation"),
    [
        ([1, 2, 3, 4, 100], 3.0, 1.0),  # deviations 2 1 0 1 97
        ([4, 1, 3, 2], 2.5, 1.0),  # deviations .5 .5 1.5 1.5
        ([10, 10, 10, 12], 10.0, 0.0),
        ([1, 3, 4, 8, 9, 20, 40], 8.0, 5.0),  # deviations 7 5 4 0 1 12 32
        ([7], 7.0, 0.0),
    ],
)
def test_scaled_mad_equals_the_hand_computed(values: list[float], median: float, deviation: float) -> None:
    assert scaled_mad(np.array(values, dtype=np.float64)) == pytest.approx((median, 1.4826 * deviation))


def test_scaled_mad_estimates_the_standard_deviation_of_normal_data() -> None:
    _, mad = scaled_mad(np.random.default_rng(0).normal(5.0, 3.0, 100_000))
    assert mad == pytest.approx(3.0, rel=0.01)


@pytest.mark.parametrize("huge", [INF, 1e9])
def test_scaled_mad_counts_a_censored_value_by_its_rank(huge: float) -> None:
    # median 4; deviations 3 2 0 1 inf inf: ranked 0 1 2 3
    assert scaled_mad(np.array([1, 2, 4, 5, huge])) == pytest.approx((4.0, CONSISTENCY * 2))
    # median of 1 2 4 6 inf inf is 5; deviations 4 3 1 1 inf inf
    assert scaled_mad(np.array([1, 2, huge, 4, 6, huge])) == pytest.approx((5.0, CONSISTENCY * 3.5))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, INF], "no median: 1 of 2 values are censored"),
        ([1, 2, INF, INF], "no median: 2 of 4 values are censored"),
        ([1, INF, INF], "no median: 2 of 3 values are censored"),
        ([], "no median: 0 of 0 values are censored"),
        ([1, 2, np.nan, 4], "no median: 1 of 4 values are NaN"),
        ([INF, np.nan], "no median: 1 of 2 values are NaN"),
    ],
)
def test_scaled_mad_and_low_side_indices_raise_when_there_is_no_median(values: list[float], message: str) -> None:
    for statistic in (scaled_mad, low_side_indices):
        with pytest.raises(ValueError, match=f"^{message}$"):
            statistic(np.array(values, dtype=np.float64))


def test_scaled_mad_works_when_just_under_half_are_censored() -> None:
    # median 3; deviations 2 1 0 inf inf: the middle one is 2
    assert scaled_mad(np.array([1, 2, 3, INF, INF])) == pytest.approx((3.0, CONSISTENCY * 2))


def test_low_side_indices_reproduce_the_published_figures() -> None:
    """Neural Cleanse's own GTSRB example: median 64.4667, scaled MAD 13.2387, lowest norm 16.12, index 3.652."""
    median, mad, lowest = 64.4667, 13.2387, 16.12
    spread = mad / CONSISTENCY
    norms = np.array([lowest, median - spread, median - 0.5 * spread, median, median + spread / 4, median + spread, 80])
    assert scaled_mad(norms) == pytest.approx((median, mad), abs=1e-9)
    assert low_side_indices(norms)[0] == pytest.approx(3.652, abs=5e-4)


def test_low_side_indices_are_zero_on_and_above_the_median() -> None:
    indices = low_side_indices(np.array([1.0, 2, 3, 4, 100]))
    assert indices == pytest.approx([2 / CONSISTENCY, 1 / CONSISTENCY, 0, 0, 0])


def test_low_side_indices_are_zero_when_a_value_is_censored() -> None:
    indices = low_side_indices(np.array([INF, 1.0, 2, 4, 5]))
    assert indices == pytest.approx([0, 1.5 / CONSISTENCY, 1 / CONSISTENCY, 0, 0])


@pytest.mark.parametrize("values", [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 9.0], [1.0, 2.0, 2.0, 2.0, INF]])
def test_low_side_indices_raise_when_the_mad_is_zero(values: list[float]) -> None:
    with pytest.raises(
        ValueError,
        match=r"^the median absolute deviation is 0: the values do not differ, so no index is defined$",
    ):
        low_side_indices(np.array(values))


def test_high_side_indices_count_what_lies_above_the_median() -> None:
    values = np.array([1.0, 2, 3, 4, 10])
    expected = [0, 0, 0, 1 / 1.4826, 7 / 1.4826]
    np.testing.assert_allclose(high_side_indices(values), expected)


@pytest.mark.parametrize(
    ("values", "reason"),
    [([2.0, 2, 2, 9], "deviation is 0"), ([1.0, 2, np.inf], "1 of 3 values"), ([1.0, np.nan, 3], "1 of 3 values")],
)
def test_high_side_indices_refuse(values: list[float], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        high_side_indices(np.array(values))
