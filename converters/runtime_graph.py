"""What ONNX Runtime makes of a file before it runs it: the optimized graph, dumped at EXTENDED. No torch here."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native
from pydantic import BaseModel, ConfigDict, Field

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    _native.Fail,
    _native.InvalidArgument,
    _native.InvalidGraph,
    _native.InvalidProtobuf,
    _native.NotImplemented,
    _native.RuntimeException,
)
_FATAL_ONLY = 4
# What no user can make anything of: codes, and where in its own source the runtime was.
_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=[A-Z])")


class RuntimeGraphError(ValueError):
    """ONNX Runtime cannot load the file."""


class GraphOptions(BaseModel):
    """The session options that decide which operators ONNX Runtime makes of a file."""

    model_config = ConfigDict(frozen=True)

    matmulnbits_accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        default=1, description="of the MatMulNBits that INT4 weights are fused into: 1 float32, 4 INT8 activations"
    )

    def entries(self) -> dict[str, str]:
        """The configuration entries of a session with these options."""
        return {"session.qdq_matmulnbits_accuracy_level": str(self.matmulnbits_accuracy_level)}


def runtime_reason(error: Exception) -> str:
    """What an error of the runtime says, on one line."""
    return " ".join(_NOISE.sub("", str(error)).split()).rstrip(".")


def optimized_model(model: bytes, options: GraphOptions | None = None) -> bytes:
    """The graph that ONNX Runtime runs under these options, or the default ones, as a model of its own.

    EXTENDED, not ALL: on x86-64 ALL adds only NCHWc layout nodes, which are not portable and change no integer result.

    Raises:
        RuntimeGraphError: the runtime refused the file.
    """
    with tempfile.TemporaryDirectory(prefix="qdefense-") as folder:
        target = Path(folder) / "optimized.onnx"
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        settings.optimized_model_filepath = str(target)
        settings.log_severity_level = _FATAL_ONLY
        settings.intra_op_num_threads = 1
        for key, value in (options or GraphOptions()).entries().items():
            settings.add_session_config_entry(key, value)
        try:
            onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            raise RuntimeGraphError(f"ONNX Runtime cannot load the file: {runtime_reason(error)}") from error
        return target.read_bytes()
