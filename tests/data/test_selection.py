from __future__ import annotations

import numpy as np
import pytest

from qdefense.data.images import DataError
from qdefense.data.selection import (
    choose_groups,
    choose_rows,
    disjoint_parts,
    numbered_names,
    order_notes,
    to_labels,
    track_groups,
)

GROUPS = np.array([5, 5, 5, 1, 1, 9, 9, 9, 9, 2], dtype=np.int64)


def test_choose_groups_gives_all_rows_in_order_without_a_limit() -> None:
    assert choose_groups(GROUPS, limit=None, seed=3).tolist() == list(range(10))


@pytest.mark.parametrize("seed", range(5))
def test_choose_groups_draws_whole_groups_and_cuts_the_last(seed: int) -> None:
    for limit in range(1, 10):
        rows = choose_groups(GROUPS, limit=limit, seed=seed)
        drawn = GROUPS[rows].tolist()
        assert (len(rows), len(set(rows.tolist())), rows.dtype.name) == (limit, limit, "int64")
        runs = [group for place, group in enumerate(drawn) if place == 0 or drawn[place - 1] != group]
        assert len(runs) == len(set(runs)), "a group comes in one piece"
        assert all(drawn.count(group) == (group == GROUPS).sum() for group in runs[:-1])
        assert all(np.diff(rows[np.array(drawn) == group]).tolist() == [1] * (drawn.count(group) - 1) for group in runs)


def test_choose_groups_begins_alike_when_more_are_drawn() -> None:
    assert choose_groups(GROUPS, limit=4, seed=1).tolist() == choose_groups(GROUPS, limit=99, seed=1)[:4].tolist()


def test_choose_groups_draws_by_the_seed() -> None:
    groups = np.arange(50, dtype=np.int64) // 5
    orders = {tuple(choose_groups(groups, limit=50, seed=seed).tolist()) for seed in range(6)}
    assert len(orders) == 6
    assert sorted(orders.pop()) == list(range(50))


@pytest.mark.parametrize("limit", [0, -1])
def test_choosing_raises_when_limit_is_not_positive(limit: int) -> None:
    with pytest.raises(DataError, match=rf"^limit is {limit}: ask for at least one image, or leave it out"):
        choose_groups(GROUPS, limit=limit, seed=0)
    with pytest.raises(DataError, match=rf"^limit is {limit}: ask for at least one image, or leave it out"):
        choose_rows(10, limit=limit, seed=0)


def test_track_groups_tell_equal_tracks_of_different_classes_apart() -> None:
    assert track_groups(np.array([0, 7, 42]), np.array([13, 13, 99])).tolist() == [13, 700_013, 4_200_099]


@pytest.mark.parametrize(
    "names",
    [
        (),
        ("stop", "yield"),
        ("0", "1", "2"),
        ("0", "10", "11"),
        ("00000", "00001", "00010"),
        ("10", "2", "1"),  # in no order that a program sorts by
        ("1", "10", "2", "x"),
        ("1", "10", "²"),
        ("1" + "0" * 5000, "2"),
    ],
)
def test_order_notes_says_nothing_when_the_order_is_that_of_numbers_or_no_sorted_one(names: tuple[str, ...]) -> None:
    assert order_notes(names) == ()


def test_order_notes_names_the_first_label_that_is_another_class() -> None:
    names = tuple(sorted(str(number) for number in range(12)))
    assert order_notes(names) == (
        "class names are numbers in the order of strings, not of numbers: label 2 is '10'; the model's outputs may be "
        "in numeric order: then name them with --classes",
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("sizes", [(3, 2, 5), (1, 1, 1), (10, 0, 0), (0, 4, 2), (2, 3)])
def test_disjoint_parts_gives_every_part_its_size_without_a_shared_row(sizes: tuple[int, ...], seed: int) -> None:
    parts = disjoint_parts(10, sizes, seed=seed)
    assert tuple(len(part) for part in parts) == sizes
    rows = np.concatenate(parts).tolist()
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(10))
    assert {part.dtype.name for part in parts} == {"int64"}


@pytest.mark.parametrize("seed", range(8))
def test_disjoint_parts_share_no_group(seed: int) -> None:
    groups = np.repeat(np.arange(12, dtype=np.int64) * 7, 5)
    parts = disjoint_parts(60, (20, 10, 20), seed=seed, groups=groups)
    seen = [set(groups[part].tolist()) for part in parts]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert [len(part) for part in parts] == [20, 10, 20]


def test_disjoint_parts_are_shorter_when_one_group_holds_nearly_all() -> None:
    groups = np.array([0] * 9 + [1], dtype=np.int64)
    assert {tuple(len(part) for part in disjoint_parts(10, (3, 3), seed=seed, groups=groups)) for seed in range(9)} == {
        (3, 1), (3, 0)
    }  # fmt: skip


def test_disjoint_parts_draws_from_all_rows_by_the_seed() -> None:
    draws = [disjoint_parts(100, (5, 5), seed=seed) for seed in range(30)]
    assert len({tuple(first.tolist()) for first, _ in draws}) == 30
    assert len({row for pair in draws for part in pair for row in part.tolist()}) > 90
    again = disjoint_parts(100, (5, 5), seed=7)
    assert [part.tolist() for part in again] == [part.tolist() for part in draws[7]]


def test_disjoint_parts_raises_when_there_are_too_few_rows() -> None:
    with pytest.raises(ValueError, match="parts of 3, 8 rows cannot be drawn from 10"):
        disjoint_parts(10, (3, 8), seed=0)


@pytest.mark.parametrize("dtype", ["int8", "uint8", ">i4", "int64", "uint64"])
def test_to_labels_gives_int64_whatever_the_integers_are(dtype: str) -> None:
    labels = to_labels(np.array([3, 0, 127], dtype=dtype), "set")
    assert (labels.tolist(), labels.dtype) == ([3, 0, 127], np.dtype(np.int64))


@pytest.mark.parametrize("largest", [2**63, 2**63 + 5, 2**64 - 1])
def test_to_labels_raises_when_a_label_is_beyond_int64(largest: int) -> None:
    with pytest.raises(DataError, match=rf"^set: largest label is {largest}, which is no class number; is it"):
        to_labels(np.array([0, largest], dtype=np.uint64), "set")


def test_numbered_names_raises_when_no_label_is_a_class_number() -> None:
    with pytest.raises(DataError) as caught:
        numbered_names(np.array([-1, -3, -1]), "set")
    assert str(caught.value) == (
        "set: labels run from -3 to -1, which are no class numbers; number the classes from 0, or give a split that "
        "has labels"
    )


def test_numbered_names_are_those_up_to_the_largest_label() -> None:
    assert numbered_names(np.array([2, 0]), "set") == ("0", "1", "2")
    assert numbered_names(np.array([], dtype=np.int64), "set") == ()
