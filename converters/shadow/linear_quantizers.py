"""QuantizeLinear, DequantizeLinear and DynamicQuantizeLinear with the arithmetic of ONNX Runtime's kernels."""

from __future__ import annotations

from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.code_parameters import expanded, nonzero, output_codes
from qdefense.converters.shadow.constants import type_name
from qdefense.converters.shadow.door import round_half
from qdefense.converters.shadow.dynamic_scales import quantize_rows, shift_of_rows
from qdefense.converters.shadow.operands import spread
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Node, operator
from qdefense.converters.shadow.rounding import round_quotient


@operator("QuantizeLinear", MICROSOFT)
@operator("QuantizeLinear", since=10)
def quantize_linear(node: Node) -> Kernel:
    """``clamp(round(x / scale) + zero_point)`` per tensor, per channel or per block."""
    node.ignore("saturate")
    if node.integer("precision", 0) not in (0, TensorProto.FLOAT):
        raise node.unsupported("attribute 'precision' is not float32")
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    limits = output_codes(node, 2)
    scale, zero_point = node.constant(1), nonzero(node.optional_constant(2))

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        shift = None if zero_point is None else expanded(zero_point, x.shape, axis, block)
        return round_quotient(x, expanded(scale, x.shape, axis, block), shift, limits)

    return kernel


@operator("DequantizeLinear", MICROSOFT, per_row=True)
@operator("DequantizeLinear", since=10, per_row=True)
def dequantize_linear(node: Node) -> Kernel:
    """``(x - zero_point) * scale`` per tensor, per channel, per block or per image; float16 where its scale is that."""
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    kind = node.integer("output_dtype", 0) or node.element_type(1) or TensorProto.FLOAT
    if kind not in (TensorProto.FLOAT, TensorProto.FLOAT16):
        raise node.unsupported(f"its result has element type {type_name(kind)}, covered are FLOAT and FLOAT16")
    node.emits = (kind,)
    if node.per_row[1]:
        return _dequantize_rows
    scale, zero_point = node.constant(1), nonzero(node.optional_constant(2))

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        factor = expanded(scale, x.shape, axis, block)
        if zero_point is None:
            y = x.to(scale.dtype) * factor
        else:
            y = (x - expanded(zero_point, x.shape, axis, block)).to(scale.dtype).mul_(factor)
        return round_half(y) if kind == TensorProto.FLOAT16 else y

    return kernel


def _dequantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    shift = shift_of_rows(zero_point, x)
    return (x if shift is None else x - shift) * spread(scale, x.ndim)


@operator("DynamicQuantizeLinear", since=11, needs_mode=True)
def dynamic_quantize_linear(node: Node) -> Kernel:
    """u8 codes, scale and zero point of each image."""
    node.emits = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
    node.emits_per_row = (False, True, True)
    return lambda mode, x: quantize_rows(node, x, mode)
