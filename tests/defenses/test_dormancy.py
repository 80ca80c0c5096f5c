from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qdefense.defenses.dormancy import channel_sums, dormancy_order, prune_while_tolerated

ORDER = np.array([2, 0, 3, 1], dtype=np.int64)


def counting(rights: Sequence[int], asked: list[tuple[int, ...]]) -> Callable[[tuple[int, ...]], int]:
    """Answers with one number after the other, and notes what was asked."""
    left = iter(rights)

    def count(channels: tuple[int, ...]) -> int:
        asked.append(channels)
        return next(left)

    return count


def test_channel_sums_are_over_images_and_places() -> None:
    activations = np.array([[[[1, 2], [3, 4]], [[0, 0], [0, 5]]], [[[1, 1], [1, 1]], [[7, 0], [0, 0]]]], np.float32)
    assert channel_sums(activations).tolist() == [14, 12]
    assert channel_sums(np.array([[1, 2, 3], [4, 5, 6]])).tolist() == [5, 7, 9]


def test_channel_sums_hold_more_than_the_codes_type() -> None:
    codes = np.full((2, 3, 40, 40), 255, np.uint8)
    assert channel_sums(codes).tolist() == [255 * 3200] * 3


def test_dormancy_order_rises_and_puts_the_lower_number_first_in_a_tie() -> None:
    assert dormancy_order(np.array([0.5, 0.0, 2.0, -1.0, 0.0])).tolist() == [3, 1, 4, 0, 2]
    assert dormancy_order(np.zeros(5)).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_dormancy_order_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(ValueError, match=r"^the mean activation of 1 of 3 channels is not finite$"):
        dormancy_order(np.array([1.0, value, 0.0]))


def test_pruning_takes_back_the_step_that_costs_the_tolerance() -> None:
    asked: list[tuple[int, ...]] = []
    heard: list[int] = []
    found = prune_while_tolerated(
        ORDER, counting([90, 89, 87, 86], asked), images=100, tolerance=0.04, step=1, on_step=heard.append
    )
    assert (found.pruned, found.rights) == ((2, 0), (90, 89, 87, 86))
    assert asked == [(), (2,), (2, 0), (2, 0, 3)]
    assert heard == [1, 2]


def test_pruning_compares_with_the_start_and_not_with_the_step_before() -> None:
    found = prune_while_tolerated(ORDER, counting([90, 88, 86, 90], []), images=100, tolerance=0.03, step=1)
    assert (found.pruned, found.rights) == ((2,), (90, 88, 86)), (
        "4 points in all, 2 in each step; the first fall ends it"
    )


def test_pruning_goes_on_where_the_accuracy_rises() -> None:
    found = prune_while_tolerated(ORDER, counting([90, 95, 99, 88], []), images=100, tolerance=0.04, step=1)
    assert (found.pruned, found.rights) == ((2, 0, 3), (90, 95, 99, 88))


def test_pruning_leaves_a_channel_however_little_it_costs() -> None:
    found = prune_while_tolerated(ORDER, counting([90] * 9, []), images=100, tolerance=1, step=1)
    assert found.pruned == (2, 0, 3)
    assert prune_while_tolerated(ORDER, counting([90] * 9, []), images=100, tolerance=1, step=2).pruned == (2, 0)
    assert prune_while_tolerated(ORDER, counting([90], []), images=100, tolerance=1, step=4).pruned == ()
    assert prune_while_tolerated(ORDER[:1], counting([90], []), images=100, tolerance=1, step=1).pruned == ()


def test_pruning_prunes_nothing_when_nothing_is_tolerated() -> None:
    asked: list[tuple[int, ...]] = []
    found = prune_while_tolerated(ORDER, counting([90], asked), images=100, tolerance=0, step=1)
    assert (found.pruned, found.rights, asked) == ((), (90,), [()])


@pytest.mark.parametrize(("lost", "pruned"), [(6, (2,)), (7, ())])
def test_pruning_takes_the_tolerance_for_the_decimal_that_it_is_written_as(lost: int, pruned: tuple[int, ...]) -> None:
    # 0.07 * 100 is 7.000000000000001 in floats, which would let the seventh image go
    rights = [90, 90 - lost, 0]
    assert prune_while_tolerated(ORDER, counting(rights, []), images=100, tolerance=0.07, step=1).pruned == pruned
