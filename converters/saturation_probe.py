"""Whether the u8 x s8 kernels of ONNX Runtime saturate in int16 on this CPU: measured, without torch."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from qdefense.converters.lone_operator import run_alone

_REDUCTION, _COLUMNS = 256, 8


@functools.cache
def runtime_saturation() -> frozenset[str]:
    """Names of the operators whose u8 x s8 kernels saturate here: measured on this CPU with this ONNX Runtime."""
    return frozenset(name for name, probe in _PROBES.items() if probe())


def runtime_saturates() -> bool:
    """Whether any u8 x s8 kernel of ONNX Runtime saturates on this CPU."""
    return bool(runtime_saturation())


def _codes_and_weights() -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    codes = np.full((4, _REDUCTION), 255, dtype=np.uint8)
    weights = np.full((_REDUCTION, _COLUMNS), 127, dtype=np.int8)
    weights[:, 1::2] = -128
    return codes, weights


def _run(
    node: onnx.NodeProto, constants: dict[str, NDArray[Any]], codes: NDArray[np.uint8], output: int
) -> NDArray[np.float64]:
    answer = run_alone(node, {"codes": codes}, constants, output=output)
    return answer.astype(np.float64).reshape(len(codes), _COLUMNS)


def _parameters(weights: NDArray[np.int8], y_scale: float) -> dict[str, NDArray[Any]]:
    return {
        "one": np.array(1, dtype=np.float32),
        "zero": np.array(0, dtype=np.uint8),
        "weights": weights,
        "weights_zero": np.array(0, dtype=np.int8),
        "y_scale": np.array(y_scale, dtype=np.float32),
        "middle": np.array(128, dtype=np.uint8),
    }


def _integer_saturates(op_type: str) -> bool:
    codes, weights = _codes_and_weights()
    exact = codes.astype(np.float64) @ weights.astype(np.float64)
    if op_type == "ConvInteger":
        codes, weights = _as_convolution(codes, weights)
    node = helper.make_node(op_type, ["codes", "weights", "zero", "weights_zero"], ["result"])
    return not np.array_equal(_run(node, _parameters(weights, 1.0), codes, TensorProto.INT32), exact)


def _requantized_saturates(op_type: str, domain: str) -> bool:
    codes, weights = _codes_and_weights()
    exact = codes.astype(np.float64) @ weights.astype(np.float64)
    scale = float(np.abs(exact).max() / 120)
    names = ["codes", "one", "zero", "weights", "one", "weights_zero", "y_scale", "middle"]
    if op_type == "QGemm":
        names.insert(6, "")
    if op_type == "QLinearConv":
        codes, weights = _as_convolution(codes, weights)
    node = helper.make_node(op_type, names, ["result"], domain=domain)
    found = _run(node, _parameters(weights, scale), codes, TensorProto.UINT8)
    return float(np.abs(found - 128 - exact / scale).max()) > 1


def _as_convolution(codes: NDArray[np.uint8], weights: NDArray[np.int8]) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    return codes.reshape(4, -1, 1, 1), np.ascontiguousarray(weights.T.reshape(_COLUMNS, -1, 1, 1))


_PROBES: dict[str, Callable[[], bool]] = {
    "MatMulInteger": functools.partial(_integer_saturates, "MatMulInteger"),
    "ConvInteger": functools.partial(_integer_saturates, "ConvInteger"),
    "QLinearConv": functools.partial(_requantized_saturates, "QLinearConv", ""),
    "QLinearMatMul": functools.partial(_requantized_saturates, "QLinearMatMul", ""),
    "QGemm": functools.partial(_requantized_saturates, "QGemm", "com.microsoft"),
}
