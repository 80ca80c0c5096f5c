"""Whether memory ran out: torch, ONNX Runtime and protobuf tell of it by the text of other errors alone."""

from __future__ import annotations

_TOLD = ("allocate memory", "alloc failed", "bad_alloc", "out of memory")
"""torch; protobuf; ONNX Runtime; all of them now and then."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is of missing memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(told in str(error) for told in _TOLD):
            return True
        error = error.__cause__
    return False
