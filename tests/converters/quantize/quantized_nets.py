"""Small float classifiers to quantize, images for them, and what is read back from the files."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.reading import tensor_array

CLASSES, SIDE = 3, 8
LEVELS = {
    "disable": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}


def small_net(*, opset: int = 21, batch: int | str = "batch", activation: str = "Relu") -> onnx.ModelProto:
    """(x - mean) / std, two convolutions with a residual addition, pooling, one fully connected layer."""
    rng = np.random.default_rng(7)
    tensors, nodes = [], []

    def const(name: str, array: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(array, name))
        return name

    def normal(name: str, *shape: int) -> str:
        return const(name, (rng.normal(size=shape) * 0.4).astype(np.float32))

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes))

    const("mean", np.full((1, 3, 1, 1), 0.45, np.float32))
    const("std", np.full((1, 3, 1, 1), 0.25, np.float32))
    node("Sub", ["image", "mean"], "centred")
    node("Div", ["centred", "std"], "scaled")
    node("Conv", ["scaled", normal("w1", 4, 3, 3, 3), normal("b1", 4)], "conv1", pads=[1] * 4)
    node(activation, ["conv1"], "relu1", domain="com.microsoft" if activation == "Gelu" else "")
    node("Conv", ["relu1", normal("w2", 4, 4, 3, 3), normal("b2", 4)], "conv2", pads=[1] * 4)
    node("Add", ["conv2", "relu1"], "sum")
    node("Relu", ["sum"], "relu2")
    node("GlobalAveragePool", ["relu2"], "pooled")
    node("Flatten", ["pooled"], "flat")
    node("Gemm", ["flat", normal("w3", CLASSES, 4), normal("b3", CLASSES)], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets[: 2 if activation == "Gelu" else 1], ir_version=8)


def wide_net(*, opset: int = 21, seed: int = 5) -> onnx.ModelProto:
    """Every kind of product: a stem, a plain, a depthwise and a grouped convolution, Gemm both ways round, MatMul.

    20 channels are one block of 16 and 4 more.
    """
    rng = np.random.default_rng(seed)
    tensors, nodes = [], []

    def normal(name: str, *shape: int) -> str:
        fan_in = np.prod(shape) / max(shape[0], 1)
        tensors.append(numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32), name))
        return name

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes))

    node("Conv", ["image", normal("stem_w", 20, 3, 3, 3), normal("stem_b", 20)], "stem", pads=[1] * 4)
    node("Relu", ["stem"], "relu1")
    node("Conv", ["relu1", normal("plain_w", 20, 20, 3, 3)], "plain", pads=[1] * 4)
    node("Relu", ["plain"], "relu2")
    node("Conv", ["relu2", normal("depthwise_w", 20, 1, 3, 3)], "depthwise", pads=[1] * 4, group=20)
    node("Conv", ["depthwise", normal("grouped_w", 40, 10, 1, 1), normal("grouped_b", 40)], "grouped", group=2)
    node("Relu", ["grouped"], "relu3")
    node("GlobalAveragePool", ["relu3"], "pooled")
    node("Flatten", ["pooled"], "flat")
    node("Gemm", ["flat", normal("gemm_w", 36, 40), normal("gemm_b", 36)], "gemm", transB=1)
    node("Relu", ["gemm"], "relu4")
    node("Gemm", ["relu4", normal("plain_gemm_w", 36, 20), normal("plain_gemm_b", 20)], "plain_gemm")
    node("Relu", ["plain_gemm"], "relu5")
    node("MatMul", ["relu5", normal("matmul_w", 20, CLASSES)], "logits")
    graph = helper.make_graph(
        nodes,
        "wide",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def images(count: int = 32, seed: int = 0) -> NDArray[np.float32]:
    coarse = np.random.default_rng(seed).uniform(size=(count, 3, 2, 2))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


def logits(model: bytes, x: NDArray[np.float32], level: str = "all") -> NDArray[np.float32]:
    """The answers at an optimization level; a fused MatMulNBits keeps its activations in float."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = LEVELS[level]
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"image": x})[0]
    return result


def relative_error(model: bytes, quantized: bytes) -> float:
    """The root mean square of the logits' difference, over their standard deviation."""
    expected, got = (logits(file, images(64, seed=1)) for file in (model, quantized))
    return float(np.sqrt(np.mean((got - expected) ** 2)) / expected.std())


def metadata(model: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}


def constants(model: bytes) -> dict[str, NDArray[Any]]:
    """The initializers by name; 4-bit codes are widened to 8 bits."""
    tensors = onnx.load_from_string(model).graph.initializer
    narrow = {TensorProto.INT4: np.int8, TensorProto.UINT4: np.uint8}
    arrays = {tensor.name: (tensor_array(tensor), tensor.data_type) for tensor in tensors}
    return {name: array.astype(narrow.get(kind, array.dtype)) for name, (array, kind) in arrays.items()}


def weight_types(model: bytes) -> set[str]:
    """The types of all constants that a product could multiply by: those of two axes or more."""
    tensors = onnx.load_from_string(model).graph.initializer
    return {TensorProto.DataType.Name(tensor.data_type) for tensor in tensors if len(tensor.dims) > 1}


NET = small_net().SerializeToString()
WIDE = wide_net().SerializeToString()
