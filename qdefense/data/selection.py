"""Which rows of a set to read, and what its classes are called when the file does not say."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import DataError, Labels

MAX_UNNAMED_CLASSES = 65_536


def choose_rows(total: int, *, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Row numbers to read: all in order, or the first ``limit`` of a permutation (files are often sorted by class).

    Returns:
        ``(min(total, limit),) int64 in [0, total)``, without repeats.

    Raises:
        DataError: ``limit`` is not positive.
    """
    if limit is None:
        return np.arange(total, dtype=np.int64)
    if limit <= 0:
        raise DataError(f"limit is {limit}: ask for at least one image, or leave it out to read them all")
    return np.random.default_rng(seed).permutation(total).astype(np.int64)[:limit]


def numbered_names(labels: Labels, source: str) -> tuple[str, ...]:
    """Class names "0" to "K-1", where K - 1 is the largest label of the whole split.

    Raises:
        DataError: the largest label cannot be a class number.
    """
    largest = int(labels.max(initial=-1))
    if largest >= MAX_UNNAMED_CLASSES:
        raise DataError(f"{source}: largest label is {largest}, which is no class number; is it the label column?")
    return tuple(str(number) for number in range(largest + 1))
