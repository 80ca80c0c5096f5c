"""What a file's answers depend on beside the file: how it is run, on which runtime, on which CPU (law 5)."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

import onnxruntime
from pydantic import BaseModel, ConfigDict, Field

from qdefense.artifact import Artifact
from qdefense.converters.runtime_graph import Arithmetic, GraphOptions, Optimization

_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
_UNCOUPLED_BATCH = 64
_PIXELS_AT_ONCE = 2**19


class SessionProfile(GraphOptions):
    """How the file is run; with the CPU it decides the logits (law 5)."""

    provider: Literal["CPUExecutionProvider"] = "CPUExecutionProvider"
    optimization: Optimization = "all"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1, description="rows per run; files that mix or count rows depend on it")

    def with_changes(self, **changes: object) -> SessionProfile:
        """The same profile but for these fields."""
        return SessionProfile.model_validate({**self.model_dump(), **changes})


class Runtime(BaseModel):
    """The runtime and CPU that gave the answers."""

    model_config = ConfigDict(frozen=True)

    onnxruntime: str
    machine: str
    isa: tuple[str, ...]
    system: str

    @property
    def facts(self) -> dict[str, str]:
        """What of it decides the logits."""
        return {"onnxruntime": self.onnxruntime, "machine": self.machine, "isa": " ".join(self.isa)}


def runtime() -> Runtime:
    """This machine's runtime."""
    return Runtime(
        onnxruntime=onnxruntime.__version__,
        machine=platform.machine(),
        isa=_isa_flags(),
        system=platform.system(),
    )


def _isa_flags() -> tuple[str, ...]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ()
    present = next((set(line.split()) for line in text.splitlines() if line.startswith("flags")), set())
    return tuple(flag for flag in _ISA_FLAGS if flag in present)


def rows_at_once(height: int, width: int) -> int:
    """How many images go through a network together: 64, fewer of large ones, so that memory stays bounded."""
    return max(1, min(_UNCOUPLED_BATCH, _PIXELS_AT_ONCE // (height * width)))


def profile_for(artifact: Artifact, *, threads: int = 1, arithmetic: Arithmetic = "as-run") -> SessionProfile:
    """The file's own batch where it is fixed, 1 where rows of one batch share a scale (dynamic INT8), else up to 64."""
    contract = artifact.contract
    free = 1 if artifact.batch_coupled else rows_at_once(contract.height, contract.width)
    return SessionProfile(threads=threads, batch=artifact.contract.batch or free, arithmetic=arithmetic)
