"""Trigger states as bytes: a NumPy archive of plain arrays, never a pickle; equal states give equal bytes."""

from __future__ import annotations

import io
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.attacks.interfaces import TriggerState
from qdefense.data.images import DataError, first_line

_OF_FOREIGN_ARCHIVES = (
    *(OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error),
    *(RuntimeError, NotImplementedError),  # encrypted, or compressed by what is not known here
    *(MemoryError, OverflowError, tokenize.TokenError, SyntaxError),  # headers that tell of no array that could be
)


def pack_state(state: TriggerState) -> bytes:
    """The state as an ``.npz``, its arrays in the order of their names.

    Raises:
        ValueError: an array holds Python objects.
    """
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **{name: state[name] for name in sorted(state)})
    return buffer.getvalue()


def unpack_state(data: bytes) -> TriggerState:
    """The state that `pack_state` packed.

    Raises:
        DataError: the bytes are no archive of plain arrays.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(data)), np.load(io.BytesIO(data), allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except _OF_FOREIGN_ARCHIVES as error:
        raise DataError(f"the trigger state is unreadable ({first_line(error)}); train the network again") from error


def fits(state: TriggerState, like: Mapping[str, NDArray[Any]]) -> bool:
    """Whether a state has the names, types and shapes of ``like``, and no number in it is NaN or infinite."""
    return set(state) == set(like) and all(_fits(state[name], wanted) for name, wanted in like.items())


def _fits(found: Any, wanted: NDArray[Any]) -> bool:
    """What a foreign archive holds may be no array at all."""
    if not isinstance(found, np.ndarray) or found.dtype != wanted.dtype or found.shape != wanted.shape:
        return False
    return found.dtype.kind != "f" or bool(np.isfinite(found).all())
