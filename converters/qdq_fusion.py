"""Which QDQ groups ONNX Runtime turns into one integer kernel: its rules on x86-64, as found by trying (1.32).

What they say of a file is a prediction; ``runtime_facts`` says what the runtime did. The rules:

- Basic level: a quantization moves through operators that only pick or move values (``PASSING``), on either side.
- int8 codes become uint8 where exactly one reader follows. Others stay, and no integer kernel but one of Gemm takes
  them: a residual connection keeps the convolutions around it in float.
- Conv, Gemm and MatMul become integer where input and output are both uint8 then. Without any QuantizeLinear behind
  it Gemm becomes integer for equal signs too, MatMul for uint8 codes, and Conv never.
- A float bias, and float weights of Conv and Gemm, are quantized by the runtime itself, but only where a
  QuantizeLinear follows.
"""

from __future__ import annotations

from math import prod
from typing import Literal

import numpy as np

from qdefense.converters.flat_graph import Graph, Node, Value, type_name
from qdefense.converters.reading import tensor_array
from qdefense.converters.weighted_operators import BYTES, PASSING, Operand

_KERNELS = frozenset({"Conv", "Gemm", "MatMul"})
_RUNTIME_EPSILON = float(np.finfo(np.float32).eps)

Result = Literal["uint8", "int8", "float", "mixed"]
"""What becomes of a layer's output: codes of this type, floats, or codes in one place and floats in another."""


def fuses(graph: Graph, node: Node, weight: Operand) -> bool:
    """Whether the runtime turns this QDQ group into one integer kernel."""
    dequantize = _dequantize_behind(graph, node.input(0))
    codes = dequantize.input(0) if dequantize is not None else None
    if node.operator not in _KERNELS or codes is None or not _is_scalar(graph, dequantize):
        return False
    source, result = settled_type(graph, [codes]), _result(graph, node)
    if source is None or result == "mixed" or not _weights_fit(graph, node, weight, result):
        return False
    if result != "float":
        return source == result == "uint8" and _bias_fits(graph, node, quantized=True)
    if node.operator == "Gemm":
        return source in ("uint8", weight.type) and _bias_fits(graph, node, quantized=False)
    return node.operator == "MatMul" and source == "uint8"


def _dequantize_behind(graph: Graph, value: Value | None) -> Node | None:
    """The DequantizeLinear that this tensor comes from, through operators that a quantization moves through."""
    node = graph.producer.get(value) if value is not None else None
    while node is not None and node.operator in PASSING:
        value = node.input(0)
        node = graph.producer.get(value) if value is not None else None
    return node if node is not None and node.operator == "DequantizeLinear" else None


def settled_type(graph: Graph, codes: list[Value]) -> Literal["uint8", "int8"] | None:
    """The type of these equal codes once the runtime has made unsigned what it can."""
    made = graph.producer.get(codes[0]) if codes else None
    kind = graph.type(codes[0]) if codes else None
    if kind == "uint8":
        return "uint8"
    if kind != "int8":
        return None
    alone = made is not None and made.operator == "QuantizeLinear" and sum(_readings(graph, c) for c in codes) == 1
    return "uint8" if alone else "int8"


def _readings(graph: Graph, codes: Value) -> int:
    """How often the dequantized codes are read; a reader of the codes themselves counts as many."""
    total = 2 * graph.outputs.count(codes)
    for user in graph.consumers.get(codes, []):
        after = user.output(0)
        if user.operator != "DequantizeLinear" or after is None:
            return 2
        total += graph.outputs.count(after) + sum(n.inputs.count(after) for n in graph.consumers.get(after, []))
    return total


def _result(graph: Graph, node: Node) -> Result:
    value, clips, passed = node.output(0), [], set[str]()
    users = _readers(graph, value)
    while len(users) == 1 and value not in graph.outputs and users[0].operator in _FOLLOWED:
        passed.add(users[0].operator)
        clips += [users[0]] if users[0].operator in ("Clip", "Relu") else []
        value = users[0].output(0)
        users = _readers(graph, value)
    quantizers = [user for user in users if user.operator == "QuantizeLinear"]
    codes = [user.output(0) for user in quantizers]
    if not quantizers:
        return "float"
    # Equal quantizers are merged into one. Behind Gemm a Transpose is worked into it, and the weights come first then.
    if value in graph.outputs or len(quantizers) < len(users) or len({user.inputs for user in quantizers}) > 1:
        return "mixed"
    if (node.operator == "Gemm" and "Transpose" in passed) or not all(
        _is_cut_off(graph, quantizers[0], c) for c in clips
    ):
        return "mixed"
    return settled_type(graph, [code for code in codes if code is not None]) or "mixed"


_FOLLOWED = PASSING | {"Clip", "Relu"}


def _readers(graph: Graph, value: Value | None) -> list[Node]:
    return graph.consumers.get(value, []) if value is not None else []


def _weights_fit(graph: Graph, node: Node, weight: Operand, result: Result) -> bool:
    if weight.dequantize is None:
        runtime_quantizes = node.operator in ("Conv", "Gemm") and result != "float"
        return runtime_quantizes and weight.type == "float32" and weight.value in graph.constants
    if weight.type not in BYTES or weight.dequantize.attribute("block_size", 0):
        return False
    # The integer kernels of MatMul take one scale, or one per column.
    shape = graph.shape(weight.value)
    last = shape is not None and weight.dequantize.attribute("axis", 1) in (-1, len(shape) - 1)
    return node.operator != "MatMul" or last or _is_scalar(graph, weight.dequantize)


def _bias_fits(graph: Graph, node: Node, *, quantized: bool) -> bool:
    """Whether the kernel can take the bias: int32 codes, or constants that the runtime quantizes itself."""
    bias = node.input(2) if node.operator != "MatMul" else None
    if bias is None:
        return True
    factors = {a.name: a.f for a in node.proto.attribute if a.name in ("alpha", "beta")}
    if any(factor != 1 for factor in factors.values()):
        return False
    made = graph.producer.get(bias)
    if made is not None and made.operator == "DequantizeLinear":
        return graph.type(made.input(0)) == "int32"
    return quantized and bias in graph.constants


def _is_scalar(graph: Graph, dequantize: Node | None) -> bool:
    shape = graph.shape(dequantize.input(1)) if dequantize is not None else None
    return shape is not None and prod(shape) == 1


def _is_cut_off(graph: Graph, quantizer: Node, activation: Node) -> bool:
    """Whether the quantizer cuts off at least as much as the Relu or Clip before it, so that the runtime drops that."""
    scale, zero = (graph.constants.get(quantizer.input(index) or ("", "")) for index in (1, 2))
    if scale is None or zero is None or type_name(zero.data_type) not in BYTES:
        return False
    low, high = _clip_bounds(graph, activation)
    limits, offset = np.iinfo(tensor_array(zero).dtype), tensor_array(zero).astype(np.float32)
    lowest, highest = (tensor_array(scale) * (np.float32(limit) - offset) for limit in (limits.min, limits.max))
    return not ((low - lowest > _RUNTIME_EPSILON).any() or (highest - high > _RUNTIME_EPSILON).any())


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
