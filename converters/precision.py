"""Precision, layer by layer: scheme, granularity, multiply-accumulates, integer share and int16 saturation."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from pydantic import BaseModel, ConfigDict

from qdefense.converters.flat_graph import Graph, Node, Value, behind_layout, type_name
from qdefense.converters.reading import safe_text, tensor_array

QUANTIZED_OPERATORS = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits", "QuantizeLinear"}
)
"""Operators that no float file holds."""

FileScheme = Literal["fp32", "int8-static", "int8-dynamic", "mixed", "other"]
Granularity = Literal["per-tensor", "per-channel", "per-block"]
_Family = Literal["conv", "transposed", "gemm", "matmul", "other"]


class Layer(BaseModel):
    """One weighted operator (or product of two activations) of the shipped graph.

    ``macs`` are multiply-accumulates for one image, null where a shape is unknown. ``integer`` means that both operands
    are 8-bit and that nothing keeps ONNX Runtime from its integer kernel. ``can_saturate`` means that two neighbouring
    products can exceed int16 on a CPU without VNNI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    scheme: Literal["fp32", "int8-static", "int8-dynamic", "other"]
    weight_type: str | None
    activation_type: str | None
    macs: int | None
    weights: int
    integer: bool
    can_saturate: bool


@dataclass(frozen=True)
class _Kind:
    """A weighted operator: activations are input 0; ``scale`` is where an integer kernel takes its weights' scale.

    ConvInteger and MatMulInteger take no scale but a zero point of the same size.
    """

    family: _Family
    weight: int = 1
    scale: int | None = None


WEIGHTED = {
    "Attention": _Kind("other"),
    "Conv": _Kind("conv"),
    "ConvInteger": _Kind("conv", scale=3),
    "ConvTranspose": _Kind("transposed"),
    "DeformConv": _Kind("other"),
    "DynamicQuantizeMatMul": _Kind("matmul", scale=2),
    "Einsum": _Kind("other"),
    "FusedConv": _Kind("conv"),
    "FusedGemm": _Kind("gemm"),
    "FusedMatMul": _Kind("other"),
    "GRU": _Kind("other"),
    "Gemm": _Kind("gemm"),
    "LSTM": _Kind("other"),
    "MatMul": _Kind("matmul"),
    "MatMulInteger": _Kind("matmul", scale=3),
    "MatMulIntegerToFloat": _Kind("matmul", scale=3),
    "MatMulNBits": _Kind("other"),
    "QAttention": _Kind("other"),
    "QGemm": _Kind("gemm", weight=3, scale=4),
    "QLinearConv": _Kind("conv", weight=3, scale=4),
    "QLinearMatMul": _Kind("matmul", weight=3, scale=4),
    "RNN": _Kind("other"),
}
"""Operators that multiply by weights, or two activations, and where their weights come in."""

_QDQ_KERNELS = frozenset({"Conv", "Gemm", "MatMul"})
_BYTES = frozenset({"int8", "uint8"})


@dataclass(frozen=True)
class _Operand:
    """One side of a product: the codes (or floats) behind its DequantizeLinear, and that node."""

    value: Value | None
    type: str | None
    dequantize: Node | None
    constant: TensorProto | None


def weighted_layers(graph: Graph) -> tuple[list[Layer], list[Granularity]]:
    """The weighted operators in graph order, and the granularity of each constant weight scale among them."""
    layers: list[Layer] = []
    scales: list[Granularity] = []
    for node in graph.nodes:
        if node.operator in WEIGHTED:
            activation = _operand(graph, node.input(0))
            weight = _operand(graph, node.input(WEIGHTED[node.operator].weight))
            layers.append(_layer(graph, node, activation, weight))
            scale = _scale_granularity(graph, node, weight)
            scales += [] if scale is None or weight.constant is None else [scale]
    return layers, scales


def file_scheme(layers: list[Layer]) -> FileScheme:
    """The scheme all layers with weights share: ``mixed`` if they differ, ``other`` if there are none."""
    schemes = {layer.scheme for layer in layers if layer.weights}
    if not schemes:
        return "other"
    return schemes.pop() if len(schemes) == 1 else "mixed"


_FINEST_FIRST: tuple[Granularity, ...] = ("per-block", "per-channel", "per-tensor")


def file_granularity(scales: list[Granularity]) -> Granularity | None:
    """The finest of the granularities, or None without any."""
    return next((finest for finest in _FINEST_FIRST if finest in scales), None)


def integer_share(amounts: list[tuple[int | None, bool]]) -> float | None:
    """The integer part of all amounts, in [0, 1]; None where an amount is unknown or all are zero."""
    known = [(amount, integer) for amount, integer in amounts if amount is not None]
    total = sum(amount for amount, _ in known)
    if len(known) < len(amounts) or total == 0:
        return None
    return sum(amount for amount, integer in known if integer) / total


def _layer(graph: Graph, node: Node, activation: _Operand, weight: _Operand) -> Layer:
    scheme = _layer_scheme(graph, node, activation, weight)
    integer = scheme in ("int8-static", "int8-dynamic")
    packed = node.operator == "MatMulNBits"
    weights = 0 if weight.constant is None else prod(weight.constant.dims)
    return Layer(
        name=node.name,
        operator=safe_text(node.operator),
        scheme=scheme,
        weight_type=f"uint{node.attribute('bits', 4)}" if packed else weight.type,
        activation_type=activation.type,
        macs=_macs(graph, node),
        weights=node.attribute("K", 0) * node.attribute("N", 0) if packed else weights,
        integer=integer,
        can_saturate=integer and _can_saturate(graph, node, activation, weight),
    )


def _operand(graph: Graph, value: Value | None) -> _Operand:
    behind = behind_layout(graph, value)
    node = graph.producer.get(behind) if behind is not None else None
    if node is None or node.operator != "DequantizeLinear":
        return _Operand(value, graph.type(value), None, _constant_behind(graph, behind))
    codes = node.input(0)
    kind = graph.type(codes) or graph.type(node.input(2))
    # A transposed or reshaped DequantizeLinear output keeps the runtime from fusing: only a direct one is its node.
    return _Operand(codes, kind, node if behind == value else None, _constant_behind(graph, codes))


def _constant_behind(graph: Graph, value: Value | None) -> TensorProto | None:
    """The constant a value is made of, through layout changes and a QuantizeLinear of float weights."""
    behind = behind_layout(graph, value)
    node = graph.producer.get(behind) if behind is not None else None
    if node is not None and node.operator == "QuantizeLinear":
        behind = behind_layout(graph, node.input(0))
    return graph.constants.get(behind) if behind is not None else None


def _layer_scheme(
    graph: Graph, node: Node, activation: _Operand, weight: _Operand
) -> Literal["fp32", "int8-static", "int8-dynamic", "other"]:
    kernel = WEIGHTED[node.operator].scale is not None and weight.type in _BYTES
    if kernel or _fuses_to_integer(graph, node, activation, weight):
        return "int8-dynamic" if _scale_at_run_time(graph, node, activation) else "int8-static"
    floats = activation.type == weight.type == "float32" and node.operator != "MatMulNBits"
    return "fp32" if floats else "other"


def _scale_at_run_time(graph: Graph, node: Node, activation: _Operand) -> bool:
    source = behind_layout(graph, activation.value)
    maker = graph.producer.get(source) if source is not None else None
    return node.operator == "DynamicQuantizeMatMul" or (maker is not None and maker.operator == "DynamicQuantizeLinear")


def _fuses_to_integer(graph: Graph, node: Node, activation: _Operand, weight: _Operand) -> bool:
    """Whether the runtime turns this QDQ group into one integer kernel.

    A convolution needs a QuantizeLinear behind each use of its output; Gemm and MatMul have integer kernels that
    answer in float.
    """
    both = activation.dequantize is not None and weight.dequantize is not None
    if node.operator not in _QDQ_KERNELS or not both or {activation.type, weight.type} - _BYTES:
        return False
    return node.operator != "Conv" or _only_quantized(graph, node.output(0))


def _only_quantized(graph: Graph, value: Value | None) -> bool:
    users = graph.consumers.get(value, []) if value is not None else []
    if not users or value in graph.outputs:
        return False
    for user in users:
        after = user.output(0)
        vanishing = user.operator in ("Relu", "Clip") and _quantization_clips(graph, user) and after is not None
        if user.operator != "QuantizeLinear" and not (vanishing and _only_quantized(graph, after)):
            return False
    return True


_RUNTIME_EPSILON = float(np.finfo(np.float32).eps)


def _quantization_clips(graph: Graph, activation: Node) -> bool:
    """Whether the QuantizeLinear behind a Relu or Clip cuts off at least as much, so that the runtime drops it."""
    low, high = _clip_bounds(graph, activation)
    for user in graph.consumers.get(activation.output(0) or ("", ""), []):
        scale, zero = (graph.constants.get(user.input(index) or ("", "")) for index in (1, 2))
        if user.operator != "QuantizeLinear" or scale is None or zero is None:
            return False
        if type_name(zero.data_type) not in _BYTES:
            return False
        limits, offset = np.iinfo(tensor_array(zero).dtype), tensor_array(zero).astype(np.float32)
        lowest, highest = (tensor_array(scale) * (np.float32(limit) - offset) for limit in (limits.min, limits.max))
        if (low - lowest > _RUNTIME_EPSILON).any() or (highest - high > _RUNTIME_EPSILON).any():
            return False
    return True


def _clip_bounds(graph: Graph, activation: Node) -> tuple[float, float]:
    """The lowest and the highest value that passes; an unknown bound lets nothing pass."""
    if activation.operator == "Relu":
        return 0.0, np.inf
    attributes = {attribute.name: attribute.f for attribute in activation.proto.attribute}
    bounds = [attributes.get("min", -np.inf), attributes.get("max", np.inf)]
    for index, unknown in enumerate((np.inf, -np.inf)):
        given = activation.input(index + 1)
        if given is not None:
            constant = graph.constants.get(given)
            single = constant is not None and prod(constant.dims) == 1
            bounds[index] = float(tensor_array(constant).item()) if constant is not None and single else unknown
    return bounds[0], bounds[1]


def _scale_granularity(graph: Graph, node: Node, weight: _Operand) -> Granularity | None:
    dequantize = weight.dequantize
    if (dequantize is not None and dequantize.attribute("block_size", 0)) or node.operator == "MatMulNBits":
        return "per-block"
    index = WEIGHTED[node.operator].scale
    where = dequantize.input(1) if dequantize is not None else None if index is None else node.input(index)
    scale = graph.constants.get(where) if where is not None else None
    if scale is None:
        return None
    return "per-channel" if prod(scale.dims) > 1 else "per-tensor"


def _macs(graph: Graph, node: Node) -> int | None:
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


def _can_saturate(graph: Graph, node: Node, activation: _Operand, weight: _Operand) -> bool:
    """Whether two neighbouring u8 x s8 products can exceed int16.

    Signed activations count too: the runtime turns them into unsigned ones and keeps the weights. ConvInteger and
    depthwise convolutions have kernels of their own, which don't saturate (measured on AVX2).
    """
    if weight.type != "int8" or node.operator == "ConvInteger" or _is_depthwise(graph, node):
        return False
    if WEIGHTED[node.operator].scale is not None and activation.type == "int8":
        return False
    if weight.constant is None or weight.constant.data_type != TensorProto.INT8:
        # Codes that are computed at run time may be any.
        return True
    codes = tensor_array(weight.constant)
    return codes.size > 0 and _pair_overflows(_reduction_rows(node, codes))


def _is_depthwise(graph: Graph, node: Node) -> bool:
    kind = WEIGHTED[node.operator]
    shape = graph.shape(node.input(kind.weight))
    return kind.family == "conv" and shape is not None and shape[:2] == [node.attribute("group", 1), 1]


def _reduction_rows(node: Node, codes: NDArray[Any]) -> NDArray[Any]:
    """The weights as (outputs, K), K in the order of the kernel's dot product: (kh, kw, cin) or the inner dimension."""
    family = WEIGHTED[node.operator].family
    if family == "conv" and codes.ndim > 2:
        return np.moveaxis(codes, 1, -1).reshape(codes.shape[0], -1)
    if codes.ndim < 2 or (family == "gemm" and node.attribute("transB", 0)):
        return np.atleast_2d(codes).reshape(-1, np.atleast_2d(codes).shape[-1])
    return np.moveaxis(codes, -2, -1).reshape(-1, codes.shape[-2])


def _pair_overflows(rows: NDArray[Any]) -> bool:
    wide = rows.astype(np.int32)
    pairs = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2))).reshape(wide.shape[0], -1, 2)
    highest = np.maximum(pairs, 0).sum(axis=2) * 255
    lowest = np.minimum(pairs, 0).sum(axis=2) * 255
    return bool((highest > 32767).any() or (lowest < -32768).any())


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
