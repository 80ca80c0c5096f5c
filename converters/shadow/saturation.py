"""The int16 saturation of u8 x s8 kernels: its arithmetic, its risk in given weights, and whether this CPU has it.

x86 without VNNI multiplies u8 activations with s8 weights by `vpmaddubsw`: two neighbouring products are added in
int16 and clipped to [-32768, 32767] before they reach the int32 accumulator. Neighbours are the entries 2j and 2j + 1
of the reduction axis, which for a convolution runs in (kh, kw, cin) order over raw codes, padding included as the
zero point; the zero-point correction comes after the sum.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor
from torch.nn import functional

_LOW, _HIGH = -32768, 32767
_ELEMENTS_AT_ONCE = 8_000_000
_REDUCTION, _COLUMNS = 256, 8


@dataclass(frozen=True)
class OverflowingPairs:
    """The pairs of one output column that can leave int16 for some u8 codes.

    Attributes:
        column: the output column.
        first: (P,) int64, position of each pair's first entry on the reduction axis; the second follows it.
        weights: (2, P) float32, the two weights of each pair.
    """

    column: int
    first: Tensor
    weights: Tensor


def _overflows(weights: Tensor) -> Tensor:
    padded = functional.pad(weights, (0, 0, 0, weights.shape[0] % 2))
    first, second = padded[0::2], padded[1::2]
    highest = (first.clamp(min=0) + second.clamp(min=0)) * 255
    lowest = (first.clamp(max=0) + second.clamp(max=0)) * 255
    return (highest > _HIGH) | (lowest < _LOW)


def overflowing_pairs(weights: Tensor) -> list[OverflowingPairs]:
    """The pairs of `weights`: (K, N) float32 s8 codes that can overflow, column by column."""
    hot = _overflows(weights)
    found = []
    for column in hot.any(0).nonzero().flatten().tolist():
        first = hot[:, column].nonzero().flatten() * 2
        found.append(OverflowingPairs(column, first, torch.stack([weights[first, column], weights[first + 1, column]])))
    return found


def saturation_risk(weights: NDArray[np.int8]) -> int:
    """Number of neighbouring pairs that some u8 activations would push out of int16.

    Args:
        weights: (K, N) int8, K the reduction axis in the kernel's order: (kh, kw, cin) for a convolution.
    """
    return int(_overflows(torch.from_numpy(np.asarray(weights)).float()).sum())


def saturation_error(codes: Tensor, pairs: list[OverflowingPairs], columns: int) -> Tensor:
    """What clipping adds to the exact product.

    Args:
        codes: (K, M) float32 u8 codes, the reduction axis first.
        pairs: the pairs of the weights that can overflow.
        columns: N.

    Returns:
        (N, M) float64: saturated minus exact sums.
    """
    error = torch.zeros(columns, codes.shape[1], dtype=torch.float64)
    for pair in pairs:
        step = max(1, _ELEMENTS_AT_ONCE // len(pair.first))
        for start in range(0, codes.shape[1], step):
            block = codes[:, start : start + step]
            total = block[pair.first] * pair.weights[0, :, None]
            total += block[pair.first + 1] * pair.weights[1, :, None]
            error[pair.column, start : start + step] = (total.clamp(_LOW, _HIGH) - total).sum(0, dtype=torch.float64)
    return error


def saturating_matmul(codes: Tensor, weights: Tensor) -> Tensor:
    """The product of u8 codes and s8 weights as a kernel without VNNI computes it.

    Args:
        codes: (M, K) float32 in [0, 255].
        weights: (K, N) float32 in [-128, 127].

    Returns:
        (M, N) float64, each neighbouring pair of products clipped to int16 before it is summed.
    """
    exact = codes.double() @ weights.double()
    return exact + saturation_error(codes.t().contiguous(), overflowing_pairs(weights), weights.shape[1]).t()


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


def _run(node: onnx.NodeProto, constants: dict[str, NDArray[Any]], codes: NDArray[np.uint8], output: int) -> Tensor:
    graph = helper.make_graph(
        [node],
        "saturation-probe",
        [helper.make_tensor_value_info("codes", TensorProto.UINT8, codes.shape)],
        [helper.make_tensor_value_info("result", output, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(None, {"codes": codes})[0], dtype=np.float64))


def _parameters(weights: NDArray[np.int8], y_scale: float) -> dict[str, NDArray[Any]]:
    return {
        "one": np.array(1, dtype=np.float32),
        "zero": np.array(0, dtype=np.uint8),
        "weights": weights,
        "weights_zero": np.array(0, dtype=np.int8),
        "y_scale": np.array(y_scale, dtype=np.float32),
        "middle": np.array(128, dtype=np.uint8),
    }


def _matmul_saturates() -> bool:
    codes, weights = _codes_and_weights()
    node = helper.make_node("MatMulInteger", ["codes", "weights", "zero", "weights_zero"], ["result"])
    found = _run(node, _parameters(weights, 1.0), codes, TensorProto.INT32)
    return not torch.equal(found, torch.from_numpy(codes.astype(np.float64) @ weights.astype(np.float64)))


def _requantized_saturates(op_type: str, domain: str) -> bool:
    codes, weights = _codes_and_weights()
    exact = codes.astype(np.float64) @ weights.astype(np.float64)
    scale = float(np.abs(exact).max() / 120)
    names = ["codes", "one", "zero", "weights", "one", "weights_zero", "y_scale", "middle"]
    if op_type == "QGemm":
        names.insert(6, "")
    if op_type == "QLinearConv":
        codes, weights = codes.reshape(4, -1, 1, 1), np.ascontiguousarray(weights.T.reshape(_COLUMNS, -1, 1, 1))
    node = helper.make_node(op_type, names, ["result"], domain=domain)
    found = _run(node, _parameters(weights, scale), codes, TensorProto.UINT8).reshape(4, _COLUMNS)
    return float((found - 128 - torch.from_numpy(exact) / scale).abs().max()) > 1


def _convolution_saturates() -> bool:
    codes, weights = _codes_and_weights()
    kernel = np.ascontiguousarray(weights.T.reshape(_COLUMNS, -1, 1, 1))
    node = helper.make_node("ConvInteger", ["codes", "weights", "zero", "weights_zero"], ["result"])
    found = _run(node, _parameters(kernel, 1.0), codes.reshape(4, -1, 1, 1), TensorProto.INT32).reshape(4, _COLUMNS)
    return not torch.equal(found, torch.from_numpy(codes.astype(np.float64) @ weights.astype(np.float64)))


_PROBES: dict[str, Callable[[], bool]] = {
    "MatMulInteger": _matmul_saturates,
    "ConvInteger": _convolution_saturates,
    "QLinearConv": functools.partial(_requantized_saturates, "QLinearConv", ""),
    "QLinearMatMul": functools.partial(_requantized_saturates, "QLinearMatMul", ""),
    "QGemm": functools.partial(_requantized_saturates, "QGemm", "com.microsoft"),
}
