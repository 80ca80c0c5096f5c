from __future__ import annotations

import pytest

from qdefense.bench.paired import mean_difference, student_quantile


@pytest.mark.parametrize(
    ("degrees", "value"),
    # Two-sided 95 % points as every table prints them.
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (5, 2.571), (7, 2.365), (10, 2.228), (29, 2.045), (120, 1.980)],
)
def test_student_quantile_gives_the_values_of_the_tables(degrees: int, value: float) -> None:
    assert student_quantile(0.975, degrees) == pytest.approx(value, abs=6e-4)


def test_student_quantile_is_zero_at_the_median() -> None:
    assert student_quantile(0.5, 3) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize(("probability", "degrees"), [(0.4, 3), (1.0, 3), (0.9, 0)])
def test_student_quantile_refuses_what_has_none(probability: float, degrees: int) -> None:
    with pytest.raises(ValueError, match="no quantile"):
        student_quantile(probability, degrees)


def test_mean_difference_of_three_pairs_is_the_one_worked_by_hand() -> None:
    # Differences -1, -2, -3: mean -2, sd 1, half width 4.303 / sqrt(3) = 2.484.
    mean, interval = mean_difference([10, 10, 10], [9, 8, 7])
    assert mean == -2
    assert interval == pytest.approx((-4.484, 0.484), abs=1e-3)


@pytest.mark.parametrize(("before", "after"), [([1.0], [3.0]), ([0.1, 0.2, 0.3], [2.1, 2.2, 2.3])])
def test_mean_difference_has_no_interval_without_spread(before: list[float], after: list[float]) -> None:
    mean, interval = mean_difference(before, after)
    assert mean == pytest.approx(2)
    assert interval is None


@pytest.mark.parametrize(("before", "after"), [([], []), ([1.0], [1.0, 2.0]), ([[1.0]], [[1.0]])])
def test_mean_difference_refuses_what_is_no_pair(before: list[float], after: list[float]) -> None:
    with pytest.raises(ValueError, match="no pairs"):
        mean_difference(before, after)


def test_mean_difference_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not finite"):
        mean_difference([1.0, float("nan")], [1.0, 1.0])
