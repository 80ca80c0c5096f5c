"""What ONNX Runtime makes of a file before it runs it: the optimized graph, dumped at EXTENDED. No torch here."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Literal

import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as _native
from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.exact_products import exact_model
from qdefense.converters.operator_versions import load_refusal

RUNTIME_ERRORS: tuple[type[Exception], ...] = (
    _native.Fail,
    _native.InvalidArgument,
    _native.InvalidGraph,
    _native.InvalidProtobuf,
    _native.NotImplemented,
    _native.RuntimeException,
)
Arithmetic = Literal["as-run", "exact"]
Optimization = Literal["disable", "basic", "extended", "all"]

_LEVELS = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_FATAL_ONLY = 4
# What no user can make anything of: codes, and where in its own source the runtime was.
_NOISE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : |/onnxruntime_src/\S+:\d+ .*?\)(?: const)? (?=[A-Z])")


class RuntimeGraphError(ValueError):
    """ONNX Runtime cannot load the file."""


class GraphOptions(BaseModel):
    """What of a session decides which operators run, and in which arithmetic."""

    model_config = ConfigDict(frozen=True)

    arithmetic: Arithmetic = Field(
        default="as-run", description="exact: no product of u8 and s8 codes is clipped to int16, whatever the CPU"
    )
    matmulnbits_accuracy_level: Literal[0, 1, 2, 3, 4] = Field(
        default=1,
        description="session.qdq_matmulnbits_accuracy_level, of products with INT4 weights: 1 float32 activations, "
        "4 hidden INT8 ones, which is ONNX Runtime's own default",
    )


def runtime_reason(error: Exception) -> str:
    """What an error of the runtime says, on one line."""
    return " ".join(_NOISE.sub("", str(error)).split()).rstrip(".")


def session_options(
    options: GraphOptions, optimization: Optimization, *, threads: int = 1
) -> onnxruntime.SessionOptions:
    """ONNX Runtime's settings; exact arithmetic is none of them but another graph, see `optimized_model`."""
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = _LEVELS[optimization]
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = _FATAL_ONLY
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(options.matmulnbits_accuracy_level))
    return settings


def open_session(
    model: bytes, options: GraphOptions, optimization: Optimization, *, threads: int = 1
) -> onnxruntime.InferenceSession:
    """A session of these bytes.

    Raises:
        RuntimeGraphError: the runtime refused them.
    """
    return _loaded(model, session_options(options, optimization, threads=threads))


def optimized_model(
    model: bytes, options: GraphOptions | None = None, *, optimization: Optimization = "extended"
) -> bytes:
    """The graph that ONNX Runtime runs under these options, or the default ones, as a model of its own.

    EXTENDED at most, not ALL: on x86-64 ALL adds only NCHWc layout nodes, which are not portable and change no integer
    result. In exact arithmetic its products of u8 and s8 codes are rewritten, which holds on every CPU;
    ``session.x64quantprecision`` does the same on AVX2, but stops at some files (see the decision record).

    Raises:
        RuntimeGraphError: the runtime refused the file.
        UnsupportedArithmeticError: the graph has no exact form.
    """
    chosen = options or GraphOptions()
    optimized = dumped_model(model, chosen, "extended" if optimization == "all" else optimization)
    return exact_model(optimized).data if chosen.arithmetic == "exact" else optimized


def dumped_model(model: bytes, options: GraphOptions, optimization: Optimization) -> bytes:
    """The graph that this very level makes, in the file's own arithmetic; that of ``all`` is not portable.

    Raises:
        RuntimeGraphError: the runtime refused the file.
    """
    with tempfile.TemporaryDirectory(prefix="qdefense-") as folder:
        target = Path(folder) / "optimized.onnx"
        settings = session_options(options, optimization)
        settings.optimized_model_filepath = str(target)
        _loaded(model, settings)
        return target.read_bytes()


def is_settled(optimized: bytes, options: GraphOptions) -> bool:
    """Whether optimizing a graph of `optimized_model` once more leaves its nodes as they are."""
    again = optimized_model(optimized, options)
    return _nodes(again) == _nodes(optimized)


def _nodes(model: bytes) -> list[bytes]:
    graph = onnx.load_from_string(model).graph
    return sorted(node.SerializeToString(deterministic=True) for node in graph.node)


def _loaded(model: bytes, settings: onnxruntime.SessionOptions) -> onnxruntime.InferenceSession:
    try:
        return onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
    except RUNTIME_ERRORS as error:
        raise RuntimeGraphError(load_refusal(model, runtime_reason(error))) from error
