"""Which rows of a set to read, and what its classes are called when the file does not say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import DataError, Labels, quoted

MAX_UNNAMED_CLASSES = 65_536
_TRACKS_PER_CLASS = 100_000


def choose_rows(total: int, *, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers to read: all in order, or the first ``limit`` of a permutation (files are often sorted by class).

    Returns:
        ``(min(total, limit),) int64 in [0, total)``, without repeats.

    Raises:
        DataError: ``limit`` is not positive.
    """
    if limit is None:
        return np.arange(total, dtype=np.int64)
    _require_positive(limit)
    return np.random.default_rng(seed).permutation(total).astype(np.int64)[:limit]


def choose_groups(groups: NDArray[np.int64], *, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers to read where rows belong together: all in order, or whole groups, shuffled, until ``limit``.

    Args:
        groups: ``(N,) int64``, the group of each row.
        limit: read this many rows; the last group drawn is cut. ``None`` reads all.
        seed: of the draw.

    Returns:
        ``(min(N, limit),) int64``, without repeats, group by group.

    Raises:
        DataError: ``limit`` is not positive.
    """
    if limit is None:
        return np.arange(len(groups), dtype=np.int64)
    _require_positive(limit)
    distinct, group_of_row = np.unique(groups, return_inverse=True)
    places = np.random.default_rng(seed).permutation(len(distinct))
    return np.argsort(places[group_of_row], kind="stable").astype(np.int64)[:limit]


def disjoint_parts(
    total: int, sizes: Sequence[int], *, seed: int, groups: NDArray[np.int64] | None = None
) -> tuple[NDArray[np.int64], ...]:
    """Rows for several parts, drawn from all rows, so that no two parts share a row or a group.

    All rows are shuffled, a group staying together, and cut in proportion to the sizes, never within a group; each
    part is drawn from its own piece.

    Args:
        total: number of rows to draw from.
        sizes: how many rows each part wants, at most ``total`` together.
        seed: of the draw.
        groups: ``(total,) int64``, the group of each row; ``None`` where rows stand for themselves.

    Returns:
        For each size up to so many rows, ``int64 in [0, total)`` without repeats; fewer where groups are large.

    Raises:
        ValueError: the sizes ask for more rows than there are.
    """
    if sum(sizes) > total:
        raise ValueError(f"parts of {', '.join(map(str, sizes))} rows cannot be drawn from {total}")
    rng = np.random.default_rng(seed)
    _, group_of_row = np.unique(np.arange(total) if groups is None else groups, return_inverse=True)
    places = rng.permutation(int(group_of_row.max(initial=-1)) + 1)[group_of_row]
    order, starts = np.argsort(places, kind="stable"), np.flatnonzero(np.diff(np.sort(places))) + 1
    wanted = [total * reached // max(sum(sizes), 1) for reached in np.cumsum(sizes)[:-1]]
    ends = np.append(starts, total)[np.searchsorted(starts, wanted)]
    pieces = np.split(order, ends)
    return tuple(rng.permutation(piece)[:size].astype(np.int64) for piece, size in zip(pieces, sizes, strict=True))


def track_groups(labels: Labels, tracks: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups of GTSRB images: ``label * 100000 + track``, because tracks are counted anew in each class."""
    groups: NDArray[np.int64] = labels * _TRACKS_PER_CLASS + tracks
    return groups


def _require_positive(limit: int) -> None:
    if limit <= 0:
        raise DataError(f"limit is {limit}: ask for at least one image, or leave it out to read them all")


def to_labels(numbers: NDArray[np.integer[Any]], source: str) -> Labels:
    """Labels of any integer type as ``(N,) int64``.

    Raises:
        DataError: a label is larger than that.
    """
    _require_class_number(int(numbers.max(initial=0)), np.iinfo(np.int64).max, source)
    return numbers.astype(np.int64, copy=False)


def numbered_names(labels: Labels, source: str) -> tuple[str, ...]:
    """Class names "0" to "K-1", where K - 1 is the largest label of the whole split.

    Raises:
        DataError: the largest label cannot be a class number, or none can.
    """
    largest = int(labels.max(initial=-1))
    _require_class_number(largest, MAX_UNNAMED_CLASSES - 1, source)
    if len(labels) and largest < 0:
        raise DataError(
            f"{source}: labels run from {labels.min()} to {largest}, which are no class numbers; number the classes "
            "from 0, or give a split that has labels"
        )
    return tuple(str(number) for number in range(largest + 1))


def _require_class_number(largest: int, most: int, source: str) -> None:
    if largest > most:
        raise DataError(f"{source}: largest label is {largest}, which is no class number; is it the label column?")


def order_notes(names: Sequence[str]) -> tuple[str, ...]:
    """A note where class names are numbers that stand in the order of strings: "10" before "2"."""
    numbers = all(name.isascii() and name.isdigit() and len(name) < 20 for name in names)
    if not numbers or list(names) != sorted(names) or list(names) == sorted(names, key=int):
        return ()
    first = next(place for place, name in enumerate(sorted(names, key=int)) if name != names[place])
    return (
        f"class names are numbers in the order of strings, not of numbers: label {first} is {quoted(names[first])}; "
        "the model's outputs may be in numeric order: then name them with --classes",
    )
