"""Precision, layer by layer: scheme, granularity, multiply-accumulates, integer share and int16 saturation."""

from __future__ import annotations

from math import prod
from typing import Literal

from onnx import TensorProto
from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.flat_graph import Graph, Node, behind_layout
from qdefense.converters.qdq_fusion import fuses, settled_type
from qdefense.converters.reading import safe_text
from qdefense.converters.weight_saturation import can_saturate
from qdefense.converters.weighted_operators import (
    BYTES,
    WEIGHTED,
    Operand,
    count_macs,
    has_integer_kernel,
    operands,
)

QUANTIZED_OPERATORS = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits", "QuantizeLinear"}
)
"""Operators that no float file holds."""

LayerScheme = Literal["fp32", "int8-static", "int8-dynamic", "int4", "int4-a8", "other"]
FileScheme = Literal["fp32", "int8-static", "int8-dynamic", "int4", "int4-a8", "mixed", "other"]
Granularity = Literal["per-tensor", "per-channel", "per-block"]


class Layer(BaseModel):
    """One weighted operator (or product of two activations) of the shipped graph.

    ``scheme`` is how its numbers are stored: ``int4-a8`` has INT4 weights and static INT8 activations, ``int4`` float
    activations. ``integer`` is a prediction: ONNX Runtime runs it as one integer kernel. ``macs`` are
    multiply-accumulates for one image, null where a shape is unknown. ``can_saturate`` means that two neighbouring
    products can exceed int16 on a CPU without VNNI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    scheme: LayerScheme
    weight_type: str | None
    activation_type: str | None
    macs: int | None
    weights: int
    integer: bool
    can_saturate: bool
    granularity: Granularity | None = Field(default=None, description="of the weights' scales; null without any")
    block_size: int | None = Field(default=None, description="weights that share a scale, where they come in blocks")


def weighted_layers(graph: Graph) -> list[Layer]:
    """The weighted operators in graph order."""
    return [_layer(graph, node) for node in graph.nodes if node.operator in WEIGHTED]


def file_scheme(layers: list[Layer]) -> FileScheme:
    """The scheme all layers with weights share: ``mixed`` if they differ, ``other`` if there are none."""
    schemes = {layer.scheme for layer in layers if layer.weights}
    if not schemes:
        return "other"
    return schemes.pop() if len(schemes) == 1 else "mixed"


_FINEST_FIRST: tuple[Granularity, ...] = ("per-block", "per-channel", "per-tensor")


def file_granularity(layers: list[Layer]) -> Granularity | None:
    """The finest granularity of any layer's weights, or None without any."""
    found = {layer.granularity for layer in layers if layer.weights}
    return next((finest for finest in _FINEST_FIRST if finest in found), None)


def integer_share(amounts: list[tuple[int | None, bool]]) -> float | None:
    """The integer part of all amounts, in [0, 1]; None where an amount is unknown or all are zero."""
    known = [(amount, integer) for amount, integer in amounts if amount is not None]
    total = sum(amount for amount, _ in known)
    if len(known) < len(amounts) or total == 0:
        return None
    return sum(amount for amount, integer in known if integer) / total


def _layer(graph: Graph, node: Node) -> Layer:
    activation, weight = operands(graph, node)
    integer = has_integer_kernel(node, weight) or fuses(graph, node, weight)
    # Of two activations, the runtime makes the second unsigned, too, where it can.
    computed = [] if weight.value is None or weight.constant is not None else [weight.value]
    unsigned = settled_type(graph, computed) == "uint8"
    packed = node.operator == "MatMulNBits"
    weights = 0 if weight.constant is None else prod(weight.constant.dims)
    granularity, block = _scales(graph, node, weight)
    weight_type = f"uint{node.attribute('bits', 4)}" if packed else weight.type
    return Layer(
        name=node.name,
        operator=safe_text(node.operator),
        scheme=_layer_scheme(weight_type, activation.type, at_run_time=_scale_at_run_time(graph, node, activation)),
        weight_type=weight_type,
        activation_type=activation.type,
        macs=count_macs(graph, node),
        weights=node.attribute("K", 0) * node.attribute("N", 0) if packed else weights,
        integer=integer,
        can_saturate=integer and not unsigned and can_saturate(graph, node, activation, weight),
        granularity=granularity,
        block_size=block,
    )


def _layer_scheme(weight: str | None, activation: str | None, *, at_run_time: bool) -> LayerScheme:
    if weight in BYTES and (activation in BYTES or at_run_time):
        return "int8-dynamic" if at_run_time else "int8-static"
    if weight in ("int4", "uint4") and not at_run_time:
        if activation in BYTES:
            return "int4-a8"
        return "int4" if activation == "float32" else "other"
    return "fp32" if weight == activation == "float32" else "other"


def _scale_at_run_time(graph: Graph, node: Node, activation: Operand) -> bool:
    source = behind_layout(graph, activation.value)
    maker = graph.producer.get(source) if source is not None else None
    return node.operator == "DynamicQuantizeMatMul" or (maker is not None and maker.operator == "DynamicQuantizeLinear")


def _scales(graph: Graph, node: Node, weight: Operand) -> tuple[Granularity | None, int | None]:
    """The granularity of constant weights and, where they come in blocks, the size of these."""
    if weight.constant is None:
        return None, None
    dequantize = weight.dequantize
    block = node.attribute("block_size", 0) if node.operator == "MatMulNBits" else 0
    block = dequantize.attribute("block_size", 0) if dequantize is not None else block
    if block:
        return "per-block", block
    index = WEIGHTED[node.operator].scale
    where = dequantize.input(1) if dequantize is not None else None if index is None else node.input(index)
    scale = graph.constants.get(where) if where is not None else None
    if scale is None:
        return None, None
    return ("per-channel" if prod(scale.dims) > 1 else "per-tensor"), None


_SCALE_INPUTS: dict[str, tuple[int, ...]] = {
    "ConvInteger": (2, 3),
    "DequantizeLinear": (1, 2),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearAveragePool": (1, 2, 3, 4),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearGlobalAveragePool": (1, 2, 3, 4),
    "QLinearLeakyRelu": (1, 2, 3, 4),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearSigmoid": (1, 2, 3, 4),
    "QuantizeLinear": (1, 2),
}

_NOT_PARAMETERS = frozenset({TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING})


def count_parameters(graph: Graph) -> int:
    """The elements of all constants but scales, zero points and shapes."""
    scales = {node.input(index) for node in graph.nodes for index in _SCALE_INPUTS.get(node.operator, ())}
    for node in graph.nodes:
        makers = [graph.producer.get(value) for value in node.inputs if value is not None]
        if node.operator == "Mul" and any(m is not None and m.operator == "DynamicQuantizeLinear" for m in makers):
            scales.update(node.inputs)
    counted = [tensor for value, tensor in graph.constants.items() if value not in scales]
    return sum(prod(tensor.dims) for tensor in counted if tensor.data_type not in _NOT_PARAMETERS)
