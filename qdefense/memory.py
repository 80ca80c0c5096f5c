"""How processes that compute hold their memory, and whether it ran out."""

from __future__ import annotations

from collections.abc import Mapping

REUSED: Mapping[str, str] = {"MALLOC_MMAP_THRESHOLD_": f"{2**25}", "MALLOC_TRIM_THRESHOLD_": f"{2**28}"}
"""Environment of a process whose tensors of up to 32 MiB get the memory of earlier ones.

By itself glibc asks the kernel for fresh pages for each, a tenth of an audit's time. No result depends on it; other C
libraries ignore it.
"""

_TOLD = ("allocate memory", "alloc failed", "bad_alloc", "out of memory")
"""torch; protobuf; ONNX Runtime; all of them now and then. They tell of it by the text of other errors alone."""


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, is of missing memory."""
    while error is not None:
        if isinstance(error, MemoryError) or any(told in str(error) for told in _TOLD):
            return True
        error = error.__cause__
    return False
