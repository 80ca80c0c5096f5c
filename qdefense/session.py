"""DeployedSession: the file as ONNX Runtime really runs it, and everything its answers depend on."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qdefense.artifact import Artifact
from qdefense.converters.runtime_graph import RUNTIME_ERRORS, optimized_model
from qdefense.data.images import Pixels

Logits = NDArray[np.float32]
Optimization = Literal["disable", "basic", "extended", "all"]

_LEVELS = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_ISA_FLAGS = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
_UNCOUPLED_BATCH = 64


class SessionError(RuntimeError):
    """ONNX Runtime would not load or run the file, or a tensor cannot be tapped without changing the logits."""


class SessionProfile(BaseModel):
    """How the file is run; with the CPU it decides the logits (law 5)."""

    model_config = ConfigDict(frozen=True)

    provider: Literal["CPUExecutionProvider"] = "CPUExecutionProvider"
    optimization: Optimization = "all"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1, description="rows per run; only dynamic INT8 files answer otherwise in another")


class Runtime(BaseModel):
    """The runtime and CPU that gave the answers."""

    model_config = ConfigDict(frozen=True)

    onnxruntime: str
    machine: str
    isa: tuple[str, ...]
    system: str


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


def profile_for(artifact: Artifact, *, threads: int = 1) -> SessionProfile:
    """Batch 1 where rows of one batch share a scale (dynamic INT8), else rows are run 64 at a time."""
    return SessionProfile(threads=threads, batch=1 if artifact.batch_coupled else _UNCOUPLED_BATCH)


class DeployedSession:
    """The deployed file on the CPU execution provider.

    ``logits(x)`` takes ``x: (N, 3, H, W) float32 in [0, 1]`` and returns ``(N, K) float32``, computed in groups of
    ``profile.batch`` rows. ``forwards`` counts the rows run so far.
    """

    def __init__(self, artifact: Artifact, profile: SessionProfile) -> None:
        self.artifact = artifact
        self.profile = profile
        self.forwards = 0
        self._session = _open(artifact.data, profile.optimization, profile.threads)

    def logits(self, x: Pixels) -> Logits:
        """Logits of a batch of any length.

        Raises:
            SessionError: the runtime refused the input.
        """
        contract = self.artifact.contract
        parts = [self._run(self._session, contract.output_name, rows) for rows in self._groups(x)]
        self.forwards += len(x)
        return np.concatenate(parts) if parts else np.empty((0, contract.classes), dtype=np.float32)

    def activations(self, x: Pixels, tensor: str) -> NDArray[np.generic]:
        """An intermediate tensor of the graph that the runtime really runs.

        The tap is an extra output of the runtime's own optimized graph, so that no fusion is broken by it.

        Raises:
            SessionError: there is no such tensor, or the tapped graph gives other logits than the deployed one.
        """
        model = onnx.load_from_string(optimized_model(self.artifact.data))
        if tensor not in {name for node in model.graph.node for name in node.output}:
            raise SessionError(f"the optimized graph has no tensor {tensor!r}; see `qdefense inspect` for its layers")
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
        tapped = _open(model.SerializeToString(), "disable", self.profile.threads)
        names = [self.artifact.contract.output_name, tensor]
        runs = [self._execute(tapped, names, rows) for rows in self._groups(x)]
        measured = np.concatenate([run[0] for run in runs])
        if self.artifact.integer and not np.array_equal(measured, self.logits(x)):
            raise SessionError(f"tapping {tensor!r} changes the logits; it cannot be read without breaking a fusion")
        return np.concatenate([run[1] for run in runs])

    def _groups(self, x: Pixels) -> list[Pixels]:
        step = self.profile.batch
        return [np.ascontiguousarray(x[start : start + step]) for start in range(0, len(x), step)]

    def _run(self, session: onnxruntime.InferenceSession, output: str, rows: Pixels) -> Logits:
        return np.asarray(self._execute(session, [output], rows)[0], dtype=np.float32)

    def _execute(
        self, session: onnxruntime.InferenceSession, outputs: list[str], rows: Pixels
    ) -> list[NDArray[np.generic]]:
        try:
            return list(session.run(outputs, {self.artifact.contract.input_name: rows}))
        except RUNTIME_ERRORS as error:
            raise SessionError(f"ONNX Runtime refused an input of shape {rows.shape}: {error}") from error


def _open(data: bytes, optimization: Optimization, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = _LEVELS[optimization]
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise SessionError(f"ONNX Runtime cannot load the file: {error}") from error
