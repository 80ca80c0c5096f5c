"""What ONNX Runtime makes of a file before it runs it: the optimized graph, dumped at EXTENDED. No torch here."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native

from qdefense.converters.operator_versions import load_refusal

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


def runtime_reason(error: Exception) -> str:
    """What an error of the runtime says, on one line."""
    return " ".join(_NOISE.sub("", str(error)).split()).rstrip(".")


def optimized_model(model: bytes) -> bytes:
    """The graph that ONNX Runtime runs, as a model of its own.

    EXTENDED, not ALL: on x86-64 ALL adds only NCHWc layout nodes, which are not portable and change no integer result.

    Raises:
        RuntimeGraphError: the runtime refused the file.
    """
    with tempfile.TemporaryDirectory(prefix="qdefense-") as folder:
        target = Path(folder) / "optimized.onnx"
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(target)
        options.log_severity_level = _FATAL_ONLY
        options.intra_op_num_threads = 1
        try:
            onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except RUNTIME_ERRORS as error:
            raise RuntimeGraphError(load_refusal(model, runtime_reason(error))) from error
        return target.read_bytes()
