"""DeployedSession: the file as ONNX Runtime really runs it, and everything its answers depend on."""

from __future__ import annotations

import platform
import threading
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract
from qdefense.converters.door import fed, read_answers
from qdefense.converters.operator_versions import load_refusal
from qdefense.converters.runtime_graph import RUNTIME_ERRORS, optimized_model, runtime_reason
from qdefense.data.images import ImageSet, Pixels, to_pixels

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
_PIXELS_AT_ONCE = 2**19
_IMAGES_AT_ONCE = 256
_TAP_TOLERANCE = 1e-4
"""Of a float graph, over its largest logit: the tap lacks the memory layouts that the deployed session may use."""


class SessionError(RuntimeError):
    """ONNX Runtime would not load or run the file, or a tensor cannot be tapped without changing the logits."""


class SessionProfile(BaseModel):
    """How the file is run; with the CPU it decides the logits (law 5)."""

    model_config = ConfigDict(frozen=True)

    provider: Literal["CPUExecutionProvider"] = "CPUExecutionProvider"
    optimization: Optimization = "all"
    threads: int = Field(default=1, ge=1)
    batch: int = Field(default=1, ge=1, description="rows per run; files that mix or count rows depend on it")


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


def rows_at_once(height: int, width: int) -> int:
    """How many images go through a network together: 64, fewer of large ones, so that memory stays bounded."""
    return max(1, min(_UNCOUPLED_BATCH, _PIXELS_AT_ONCE // (height * width)))


def profile_for(artifact: Artifact, *, threads: int = 1) -> SessionProfile:
    """The file's own batch where it is fixed, 1 where rows of one batch share a scale (dynamic INT8), else up to 64."""
    contract = artifact.contract
    free = 1 if artifact.batch_coupled else rows_at_once(contract.height, contract.width)
    return SessionProfile(threads=threads, batch=artifact.contract.batch or free)


class DeployedSession:
    """The deployed file on the CPU execution provider.

    ``logits(x)`` takes ``x: (N, 3, H, W) float32 in [0, 1]``, RGB, and returns ``(N, K) float32``, computed in groups
    of ``profile.batch`` rows. The contract says how the file is fed and how its answer is read: of a softmax the
    log-probabilities. ``forwards`` counts the rows run so far, those that fill up a fixed batch included.

    Raises:
        SessionError: the runtime cannot load the file, or its batch is fixed at another size than the profile's.
    """

    def __init__(self, artifact: Artifact, profile: SessionProfile) -> None:
        fixed = artifact.contract.batch
        if fixed is not None and fixed != profile.batch:
            raise SessionError(
                f"the file's batch is fixed at {fixed}, the profile's is {profile.batch}; use profile_for"
            )
        self.artifact = artifact
        self.profile = profile
        self.forwards = 0
        self._counting = threading.Lock()
        self._session = _open(artifact.data, profile.optimization, profile.threads)

    def logits(self, x: Pixels, *, contract: InputContract | None = None) -> Logits:
        """Logits of a batch of any length, under the file's own contract or another that fits its graph.

        Raises:
            SessionError: the runtime refused the input, or did not answer with one row of K logits per image.
        """
        read = contract or self.artifact.contract
        parts = [self._run(self._session, [read.output_name], rows, read)[0] for rows in self._groups(x)]
        none = np.empty((0, read.classes), dtype=np.float32)
        return read_answers(np.concatenate([none, *parts]), read)

    def logits_of(self, images: ImageSet, *, contract: InputContract | None = None) -> Logits:
        """Logits of stored images, turned into pixels a part at a time: large sets do not fit in memory as floats."""
        # Whole groups of rows: where a batch shares a scale, its composition is part of the answer.
        step = self.profile.batch * max(1, _IMAGES_AT_ONCE // self.profile.batch)
        parts = [
            self.logits(to_pixels(images.images[start : start + step]), contract=contract)
            for start in range(0, max(len(images), 1), step)
        ]
        return np.concatenate(parts)

    def activations(self, x: Pixels, tensor: str) -> NDArray[np.generic]:
        """An intermediate tensor of the graph that the runtime really runs; a scalar gives one value per group of rows.

        The tap is an extra output of the runtime's own optimized graph, so that no fusion is broken by it.

        Raises:
            SessionError: there is no such tensor, its first axis is not the batch, or the tapped graph gives other
                logits than the deployed one.
        """
        contract = self.artifact.contract
        if tensor == contract.output_name:
            return self.logits(x)
        model = onnx.load_from_string(optimized_model(self.artifact.data))
        if tensor not in {name for node in model.graph.node for name in node.output if name}:
            raise SessionError(f"the optimized graph has no tensor {tensor!r}; see `qdefense inspect` for its layers")
        model.graph.output.append(onnx.ValueInfoProto(name=tensor))
        tapped = _open(model.SerializeToString(), "disable", self.profile.threads)
        groups = self._groups(x)
        runs = [self._run(tapped, [contract.output_name, tensor], rows, contract) for rows in groups]
        if not self._same(read_answers(np.concatenate([run[0] for run in runs]), contract), self.logits(x)):
            raise SessionError(f"tapping {tensor!r} changes the logits; it cannot be read without breaking a fusion")
        return _joined(tensor, [run[1] for run in runs], groups)

    def _same(self, tapped: NDArray[np.generic], deployed: Logits) -> bool:
        if self.artifact.integer:
            return np.array_equal(tapped, deployed, equal_nan=True)
        scale = float(np.abs(deployed).max(initial=0, where=np.isfinite(deployed)))
        return np.allclose(tapped, deployed, rtol=0, atol=_TAP_TOLERANCE * scale, equal_nan=True)

    def _groups(self, x: Pixels) -> list[Pixels]:
        step = self.profile.batch
        return [np.ascontiguousarray(x[start : start + step]) for start in range(0, len(x), step)]

    def _run(
        self, session: onnxruntime.InferenceSession, outputs: list[str], rows: Pixels, contract: InputContract
    ) -> list[NDArray[np.generic]]:
        whole = self._filled(rows)
        images = fed(whole, contract)
        try:
            answers = session.run(outputs, {contract.input_name: images, **self.artifact.fixed_inputs})
        except RUNTIME_ERRORS as error:
            reason = runtime_reason(error)
            raise SessionError(f"ONNX Runtime refused an input of shape {images.shape}: {reason}") from error
        values = [np.asarray(value) for value in answers]
        with self._counting:
            self.forwards += len(whole)
        expected = (len(whole), contract.classes)
        if values[0].shape != expected:
            raise SessionError(
                f"the file answers {len(whole)} images with an output of shape {values[0].shape}, not {expected}; "
                "export it with one row of logits per image"
            )
        return [value[: len(rows)] if value.ndim and len(value) == len(whole) else value for value in values]

    def _filled(self, rows: Pixels) -> Pixels:
        """A last, short group of a fixed batch is filled with copies of its last row, which widen no range."""
        missing = 0 if self.artifact.contract.batch is None else self.profile.batch - len(rows)
        return rows if missing == 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])


def _joined(tensor: str, values: list[NDArray[np.generic]], groups: list[Pixels]) -> NDArray[np.generic]:
    if all(value.ndim == 0 for value in values):
        return np.stack(values)
    if any(value.ndim == 0 or len(value) != len(rows) for value, rows in zip(values, groups, strict=True)):
        raise SessionError(
            f"tensor {tensor!r} has shape {values[0].shape} for {len(groups[0])} images; its first axis must be theirs"
        )
    return np.concatenate(values)


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
        raise SessionError(
            f"{load_refusal(data, runtime_reason(error))}; export it again, or use another onnxruntime"
        ) from error
