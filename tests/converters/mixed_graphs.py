"""Graphs of one integer product each, with u8 activations and s8 weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

K, N, ROWS = 64, 6, 5
OPSETS = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]


def codes(shape: Sequence[int], kind: str, *, seed: int = 0, bits: int = 8) -> NDArray[Any]:
    """Random codes over the whole range of their type, or that of fewer bits."""
    info, shift = np.iinfo(kind), 8 - bits
    drawn = np.random.default_rng(seed).integers(info.min >> shift, (info.max >> shift) + 1, shape)
    return drawn.astype(kind)


def model(
    nodes: Sequence[onnx.NodeProto],
    constants: Mapping[str, NDArray[Any]],
    *,
    given: int = TensorProto.UINT8,
    shape: Sequence[Any] = ("n", K),
    output: int = TensorProto.INT32,
) -> bytes:
    """A model of ``x`` to ``y``."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", given, list(shape))],
        [helper.make_tensor_value_info("y", output, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    return bytes(helper.make_model(graph, opset_imports=OPSETS, ir_version=10).SerializeToString())


def single(op_type: str, inputs: Sequence[str], **attributes: Any) -> onnx.NodeProto:
    """The node ``product`` from its inputs to ``y``."""
    return helper.make_node(op_type, list(inputs), ["y"], name="product", **attributes)


def run(data: bytes, x: NDArray[Any], entries: Mapping[str, str] | None = None) -> NDArray[Any]:
    """What ONNX Runtime answers, unoptimized unless it is given configuration entries."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if entries is None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


def product(op_type: str, *, bits: int = 8) -> tuple[bytes, NDArray[Any]]:
    """One product of every operator that takes u8 and s8 codes, and an input for it."""
    w, x = codes((K, N), "int8", seed=1, bits=bits), codes((ROWS, K), "uint8", seed=2)
    kernel = codes((N, 4, 3, 3), "int8", seed=3, bits=bits)
    images = codes((ROWS, 4, 5, 5), "uint8", seed=4)
    one, zero, low = np.float32(0.01), np.uint8(7), np.zeros((), np.int8)
    scales = np.linspace(0.01, 0.02, N, dtype=np.float32)
    parameters: dict[str, NDArray[Any]] = {
        "xs": np.asarray(one), "xz": np.asarray(zero), "ws": np.asarray(one), "wz": low, "scales": scales,
        "zeros": np.zeros(N, np.int8), "ys": np.asarray(np.float32(1)), "yz": np.asarray(np.uint8(128)),
        "bias": np.zeros(3 * 8, np.float32),
    }  # fmt: skip
    floats = np.random.default_rng(5).random((ROWS, K), dtype=np.float32)
    attention = codes((8, 24), "int8", seed=6, bits=bits)
    linear, image = {**parameters, "w": w}, {**parameters, "w": kernel}
    small: dict[str, Any] = {"shape": ("n", 4, 5, 5)}
    table: dict[str, tuple[onnx.NodeProto, dict[str, NDArray[Any]], NDArray[Any], dict[str, Any]]] = {
        "MatMulInteger": (single("MatMulInteger", ["x", "w", "xz", "wz"]), linear, x, {}),
        "MatMulInteger without zero points": (single("MatMulInteger", ["x", "w"]), linear, x, {}),
        "MatMulInteger per column": (single("MatMulInteger", ["x", "w", "", "zeros"]), linear, x, {}),
        "ConvInteger": (single("ConvInteger", ["x", "w", "xz"], pads=[1, 1, 1, 1]), image, images, small),
        "QLinearConv": (
            single("QLinearConv", ["x", "xs", "xz", "w", "scales", "zeros", "ys", "yz"], pads=[1, 1, 1, 1]),
            image, images, small | {"output": TensorProto.UINT8},
        ),
        "QLinearMatMul": (
            single("QLinearMatMul", ["x", "xs", "xz", "w", "scales", "zeros", "ys", "yz"]),
            linear, x, {"output": TensorProto.UINT8},
        ),
        "QGemm": (
            single("QGemm", ["x", "xs", "xz", "w", "scales", "zeros"], domain="com.microsoft"),
            linear, x, {"output": TensorProto.FLOAT},
        ),
        "MatMulIntegerToFloat": (
            single("MatMulIntegerToFloat", ["x", "w", "xs", "scales", "xz"], domain="com.microsoft"),
            linear, x, {"output": TensorProto.FLOAT},
        ),
        "DynamicQuantizeMatMul": (
            single("DynamicQuantizeMatMul", ["x", "w", "scales"], domain="com.microsoft"),
            linear, floats, {"given": TensorProto.FLOAT, "output": TensorProto.FLOAT},
        ),
        "QAttention": (
            single("QAttention", ["x", "w", "bias", "xs", "ws", "", "xz", "wz"], domain="com.microsoft", num_heads=2),
            {**parameters, "w": attention}, codes((2, 3, 8), "uint8", seed=7),
            {"shape": ("n", 3, 8), "output": TensorProto.FLOAT},
        ),
    }  # fmt: skip
    node, constants, given, how = table[op_type]
    used = {name: value for name, value in constants.items() if name in node.input}
    return model([node], used, **how), given


PRODUCTS = (
    "MatMulInteger", "MatMulInteger without zero points", "MatMulInteger per column", "ConvInteger", "QLinearConv",
    "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QAttention",
)  # fmt: skip
