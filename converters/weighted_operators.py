"""The operators that multiply by weights: where these come in, what stands behind them, how much is multiplied."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from onnx import TensorProto

from qdefense.converters.flat_graph import Graph, Node, Value, behind_layout

Family = Literal["conv", "transposed", "gemm", "matmul", "other"]
BYTES = frozenset({"int8", "uint8"})
PASSING = frozenset({"Dropout", "Identity", "MaxPool", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only pick or move values: ONNX Runtime moves a quantization through them."""


@dataclass(frozen=True)
class Kind:
    """A weighted operator: activations are input 0; ``scale`` is where an integer kernel takes its weights' scale.

    ConvInteger and MatMulInteger take no scale but a zero point of the same size.
    """

    family: Family
    weight: int = 1
    scale: int | None = None


WEIGHTED = {
    "Attention": Kind("other"),
    "Conv": Kind("conv"),
    "ConvInteger": Kind("conv", scale=3),
    "ConvTranspose": Kind("transposed"),
    "DeformConv": Kind("other"),
    "DynamicQuantizeMatMul": Kind("matmul", scale=2),
    "Einsum": Kind("other"),
    "FusedConv": Kind("conv"),
    "FusedGemm": Kind("gemm"),
    "FusedMatMul": Kind("other"),
    "GRU": Kind("other"),
    "Gemm": Kind("gemm"),
    "LSTM": Kind("other"),
    "MatMul": Kind("matmul"),
    "MatMulInteger": Kind("matmul", scale=3),
    "MatMulIntegerToFloat": Kind("matmul", scale=3),
    "MatMulNBits": Kind("other"),
    "QAttention": Kind("other", scale=4),
    "QGemm": Kind("gemm", weight=3, scale=4),
    "QLinearConv": Kind("conv", weight=3, scale=4),
    "QLinearMatMul": Kind("matmul", weight=3, scale=4),
    "RNN": Kind("other"),
}
"""Operators that multiply by weights, or two activations, and where their weights come in."""

INT8_ACTIVATIONS = 4
"""The accuracy level at which MatMulNBits quantizes its activations, at run time, and multiplies integers."""


@dataclass(frozen=True)
class Operand:
    """One side of a product: the codes (or floats) behind its DequantizeLinear, and that node."""

    value: Value | None
    type: str | None
    dequantize: Node | None
    constant: TensorProto | None


def operands(graph: Graph, node: Node) -> tuple[Operand, Operand]:
    """Activations and weights of a weighted operator."""
    return _operand(graph, node.input(0)), _operand(graph, node.input(WEIGHTED[node.operator].weight))


def has_integer_kernel(node: Node, weight: Operand) -> bool:
    """Whether the operator itself, as it stands, multiplies integers."""
    if node.operator == "MatMulNBits":
        return node.attribute("accuracy_level", 0) == INT8_ACTIVATIONS
    return WEIGHTED[node.operator].scale is not None and weight.type in BYTES


def count_macs(graph: Graph, node: Node) -> int | None:
    """Multiply-accumulates for one image, from the shapes at batch 1 (or at the file's fixed batch, divided by it)."""
    kind = WEIGHTED[node.operator]
    left, right, out = graph.shape(node.input(0)), graph.shape(node.input(kind.weight)), graph.shape(node.output(0))
    if kind.family == "conv" and right and out:
        total = prod(out) * prod(right[1:])
    elif kind.family == "transposed" and right and left:
        total = prod(left) * prod(right[1:])
    elif kind.family == "gemm" and right and left and len(left) == 2:
        total = left[1 if node.attribute("transA", 0) else 0] * prod(right)
    elif kind.family == "matmul" and left and out is not None:
        total = prod(out) * left[-1]
    elif node.operator == "MatMulNBits" and left:
        total = prod(left) * node.attribute("N", 0)
    else:
        return None
    return total // graph.batch


def _operand(graph: Graph, value: Value | None) -> Operand:
    node = _dequantize_behind(graph, value)
    if node is None:
        return Operand(value, graph.type(value), None, _constant_behind(graph, value))
    codes = node.input(0)
    return Operand(codes, graph.type(codes) or graph.type(node.input(2)), node, _constant_behind(graph, codes))


def _dequantize_behind(graph: Graph, value: Value | None) -> Node | None:
    """The DequantizeLinear this tensor comes from by picking and moving values alone."""
    while True:
        behind = behind_layout(graph, value)
        node = graph.producer.get(behind) if behind is not None else None
        if node is None or node.operator not in PASSING:
            return node if node is not None and node.operator == "DequantizeLinear" else None
        value = node.input(0)


def _constant_behind(graph: Graph, value: Value | None) -> TensorProto | None:
    """The constant a value is made of, through layout changes and a QuantizeLinear of float weights."""
    behind = behind_layout(graph, value)
    node = graph.producer.get(behind) if behind is not None else None
    if node is not None and node.operator == "QuantizeLinear":
        behind = behind_layout(graph, node.input(0))
    return graph.constants.get(behind) if behind is not None else None
