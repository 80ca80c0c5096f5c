"""Convolutions and matrix products of integer codes, with the rounding points of ONNX Runtime's kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.code_parameters import along, nonzero, output_codes
from qdefense.converters.shadow.dynamic_scales import quantize_rows, shift_of_rows
from qdefense.converters.shadow.integer_products import (
    IntegerConvolution,
    IntegerProduct,
    RequantizedConvolution,
    mixed_signs,
    refuse_wrapping,
)
from qdefense.converters.shadow.operands import spread
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Mode, Node, operator
from qdefense.converters.shadow.rounding import round_product
from qdefense.converters.shadow.windows import window


def _integer_convolution(
    node: Node, weight: int, zero_point: int, bias: int | None, *, saturates: bool
) -> IntegerConvolution:
    raw = node.constant(weight).contiguous()
    shift = nonzero(node.optional_constant(zero_point))
    centred = raw if shift is None else raw - along(shift, raw.ndim, 0)
    if raw.ndim == 4:
        centred = centred.contiguous(memory_format=torch.channels_last)
    offset = node.optional_constant(bias) if bias is not None else None
    groups = node.integer("group", 1)
    # depthwise convolutions have kernels of their own, which don't saturate
    wide = saturates and not (raw.shape[1] == 1 and raw.shape[0] == groups)
    made = IntegerConvolution(
        raw, centred, None if offset is None else offset.double(), window(node, raw.shape[2:]), groups, wide
    )
    refuse_wrapping(node, made.bound)
    return made


@operator("ConvInteger", since=10, per_row=True, needs_mode=True)
def conv_integer(node: Node) -> Kernel:
    """int32 sums of a convolution; its kernel does not saturate."""
    node.emits = (TensorProto.INT32,)
    convolution = _integer_convolution(node, 1, 3, None, saturates=False)
    shift = _zero_point_of_rows(node, 2)
    return lambda mode, x, _weight, x_zero=None, *_: convolution.sums(x, shift(x, x_zero), mode)


@operator("QLinearConv", MICROSOFT, needs_mode=True)
@operator("QLinearConv", since=10, needs_mode=True)
def qlinear_conv(node: Node) -> Kernel:
    """Integer convolution, int32 bias, and one rounding of the scaled sum; the runtime's own may have channels last."""
    limits = output_codes(node, 7)
    convolution = _integer_convolution(node, 3, 5, 8, saturates=mixed_signs(node, 2, 3))
    factor = node.constant(1) * node.constant(4) / node.constant(6)
    step = RequantizedConvolution(
        convolution,
        nonzero(node.constant(2)),
        along(factor, convolution.raw.ndim, 1),
        nonzero(node.constant(7)),
        limits,
    )
    if node.domain == MICROSOFT and node.integer("channels_last", 0):
        return lambda mode, x, *_: step(x.movedim(-1, 1), mode).movedim(1, -1)
    return lambda mode, x, *_: step(x, mode)


def _integer_product(
    node: Node, left_zero: int, right: int, zero_point: int, bias: int | None = None, *, transposed: bool = False
) -> IntegerProduct:
    raw = node.constant(right) if right in node.constants else None
    if raw is not None and raw.ndim < 2:
        raise node.unsupported("its right operand is a vector, which is not covered")
    shift = nonzero(node.optional_constant(zero_point))
    offset = node.optional_constant(bias) if bias is not None else None
    made = IntegerProduct(
        raw.t().contiguous() if raw is not None and transposed else raw,
        shift if shift is None or shift.numel() > 1 else shift.reshape(()),
        None if offset is None else offset.double(),
        mixed_signs(node, left_zero, right),
    )
    refuse_wrapping(node, made.bound or 0.0)
    return made


def _zero_point_of_rows(node: Node, index: int) -> Callable[[Tensor, Tensor | None], Tensor | None]:
    """How the left zero point meets the left codes: as a scalar, one for each row of a matrix, or per image."""
    if not node.has(index):
        return lambda _codes, _given: None
    if node.per_row[index]:
        return lambda codes, given: shift_of_rows(given, codes)
    value = nonzero(node.constant(index))
    if value is not None and value.ndim < 2:
        value = value.reshape(()) if value.numel() == 1 else value.reshape(-1, 1)
    return lambda _codes, _given: value


@operator("MatMulInteger", since=10, per_row=True, needs_mode=True)
def matmul_integer(node: Node) -> Kernel:
    """int32 sums of a matrix product."""
    node.emits = (TensorProto.INT32,)
    product, shift = _integer_product(node, 2, 1, 3), _zero_point_of_rows(node, 2)
    return lambda mode, a, b, a_zero=None, *_: product.sums(a, shift(a, a_zero), b, mode)


@operator("MatMulIntegerToFloat", MICROSOFT, per_row=True, needs_mode=True)
def matmul_integer_to_float(node: Node) -> Kernel:
    """int32 sums, scaled to floats, plus a bias."""
    node.emits = (TensorProto.FLOAT,)
    product, shift = _integer_product(node, 4, 1, 5), _zero_point_of_rows(node, 4)
    scale_of_b = node.constant(3)

    def kernel(mode: Mode, a: Tensor, b: Tensor | None, a_scale: Tensor, *rest: Tensor | None) -> Tensor:
        _, a_zero, _, bias = (*rest, None, None, None)[:4]
        scale = spread(a_scale, a.ndim) if node.per_row[2] else a_scale
        return _scaled(product.sums(a, shift(a, a_zero), b, mode), scale * scale_of_b, bias)

    return kernel


@operator("DynamicQuantizeMatMul", MICROSOFT, needs_mode=True)
def dynamic_quantize_matmul(node: Node) -> Kernel:
    """A float matrix quantized per image, times an integer one, scaled to floats, plus a bias."""
    node.emits = (TensorProto.FLOAT,)
    signed = node.element_type(1) == TensorProto.INT8
    product, scale_of_b = replace(_integer_product(node, 0, 1, 3), saturates=signed), node.constant(2)

    def kernel(mode: Mode, a: Tensor, b: Tensor | None, *rest: Tensor | None) -> Tensor:
        _, _, bias = (*rest, None, None)[:3]
        codes, scale, zero_point = quantize_rows(node, a, mode)
        sums = product.sums(codes, shift_of_rows(zero_point, a), b, mode)
        return _scaled(sums, spread(scale, a.ndim) * scale_of_b, bias)

    return kernel


def _scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = sums.float() * scale
    return y if bias is None else y + bias


@operator("QLinearMatMul", since=10, needs_mode=True)
def qlinear_matmul(node: Node) -> Kernel:
    """Integer matrix product and one rounding of the scaled sum."""
    limits = output_codes(node, 7)
    product, shift = _integer_product(node, 2, 3, 5), _zero_point_of_rows(node, 2)
    factor, y_zero = node.constant(1) * node.constant(4) / node.constant(6), nonzero(node.constant(7))

    def kernel(mode: Mode, a: Tensor, *rest: Tensor | None) -> Tensor:
        return round_product(product.sums(a, shift(a, None), rest[2], mode).float(), factor, y_zero, limits)

    return kernel


@operator("QGemm", MICROSOFT, needs_mode=True)
def qgemm(node: Node) -> Kernel:
    """Integer Gemm with an int32 C; codes where an output scale is given, floats otherwise."""
    left, right = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    node.constant(3)
    product, shift = _integer_product(node, 2, 3, 5, 6, transposed=right), _zero_point_of_rows(node, 2)
    factor = node.number("alpha", 1.0) * node.constant(1) * node.constant(4)
    if not node.has(7):
        node.emits = (TensorProto.FLOAT,)
        return lambda mode, a, *_: product.sums(a.t() if left else a, shift(a, None), None, mode).float() * factor
    limits, y_zero = output_codes(node, 8), nonzero(node.constant(8))
    ratio = factor / node.constant(7)

    def kernel(mode: Mode, a: Tensor, *_: Tensor) -> Tensor:
        sums = product.sums(a.t() if left else a, shift(a, None), None, mode)
        return round_product(sums.float(), ratio, y_zero, limits)

    return kernel
