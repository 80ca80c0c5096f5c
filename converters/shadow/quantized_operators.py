"""Quantizers and operators on integer codes, with the arithmetic and rounding points of ONNX Runtime's kernels.

Static quantization fixes every scale and zero point at build time. Dynamic quantization computes them per image
(see `operands`); no gradient runs through them, since the dequantized value they give is the input itself, rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.integer_products import (
    IntegerConvolution,
    IntegerProduct,
    RequantizedConvolution,
    mixed_signs,
)
from qdefense.converters.shadow.operands import spread
from qdefense.converters.shadow.poolings import averaging
from qdefense.converters.shadow.registry import CODE_RANGES, MICROSOFT, Kernel, Mode, Node, operator
from qdefense.converters.shadow.rounding import Range, round_product, round_quotient, round_sum, round_value, value_of
from qdefense.converters.shadow.windows import window

_UINT8 = (0, 255)


def _nonzero(zero_point: Tensor | None) -> Tensor | None:
    return None if zero_point is None or not bool(zero_point.any()) else zero_point


def _along(value: Tensor, rank: int, axis: int) -> Tensor:
    """A scalar as it is, a vector laid along one axis."""
    if value.numel() == 1:
        return value.reshape(())
    return value.reshape([-1 if at == axis % rank else 1 for at in range(rank)])


def _output_codes(node: Node, zero_point: int) -> Range:
    """Range of the node's output codes, whose type its zero point has; tells the graph about the type."""
    kind = node.element_type(zero_point) if node.has(zero_point) else None
    kind = kind or node.integer("output_dtype", TensorProto.UNDEFINED) or TensorProto.UINT8
    node.ignore("output_dtype")
    if kind not in CODE_RANGES:
        raise node.unsupported(f"its codes have element type {kind}, covered are {sorted(CODE_RANGES)}")
    node.emits = (kind,)
    return CODE_RANGES[kind]


def _expanded(value: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    if block == 0:
        return _along(value, len(shape), axis)
    return value.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])


@operator("QuantizeLinear", MICROSOFT)
@operator("QuantizeLinear", since=10)
def quantize_linear(node: Node) -> Kernel:
    """``clamp(round(x / scale) + zero_point)`` per tensor, per channel or per block."""
    node.ignore("saturate")
    if node.integer("precision", 0) not in (0, TensorProto.FLOAT):
        raise node.unsupported("attribute 'precision' is not float32")
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    limits = _output_codes(node, 2)
    scale, zero_point = node.constant(1), _nonzero(node.optional_constant(2))

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        shift = None if zero_point is None else _expanded(zero_point, x.shape, axis, block)
        return round_quotient(x, _expanded(scale, x.shape, axis, block), shift, limits)

    return kernel


@operator("DequantizeLinear", MICROSOFT, per_row=True)
@operator("DequantizeLinear", since=10, per_row=True)
def dequantize_linear(node: Node) -> Kernel:
    """``(x - zero_point) * scale`` per tensor, per channel, per block or per image."""
    axis, block = node.integer("axis", 1), node.integer("block_size", 0)
    node.ignore("output_dtype")
    node.emits = (TensorProto.FLOAT,)
    if node.per_row[1]:
        return _dequantize_rows
    scale, zero_point = node.constant(1), _nonzero(node.optional_constant(2))

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        centred = x if zero_point is None else x - _expanded(zero_point, x.shape, axis, block)
        return centred.to(scale.dtype) * _expanded(scale, x.shape, axis, block)

    return kernel


def _dequantize_rows(x: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> Tensor:
    shift = _shift_of_rows(zero_point, x)
    return (x if shift is None else x - shift) * spread(scale, x.ndim)


def _row_parameters(x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each image as ONNX Runtime computes them for a batch of one, both (N,)."""
    # over axes, not over a flattened copy: the memory of x runs channels last
    values, axes = x.detach(), tuple(range(1, x.ndim))
    low, high = values.amin(axes).clamp(max=0), values.amax(axes).clamp(min=0)
    scale = torch.where(high == low, torch.ones_like(high), (high - low) / 255)
    return scale, torch.round((0 - low / scale).clamp(0, 255))


def _quantize_rows(node: Node, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    if x.ndim < 2 or x.shape[0] != mode.rows:
        raise node.unsupported(f"axis 0 of its input {tuple(x.shape)} is not the batch of {mode.rows} images")
    scale, zero_point = _row_parameters(x)
    return round_quotient(x, spread(scale, x.ndim), _shift_of_rows(zero_point, x), _UINT8), scale, zero_point


def _shift_of_rows(zero_point: Tensor | None, x: Tensor) -> Tensor | None:
    """Zero points of the images, ready to broadcast; None where all are zero, as they are behind a Relu."""
    return None if zero_point is None or not bool(zero_point.any()) else spread(zero_point, x.ndim)


@operator("DynamicQuantizeLinear", since=11, needs_mode=True)
def dynamic_quantize_linear(node: Node) -> Kernel:
    """u8 codes, scale and zero point of each image."""
    node.emits = (TensorProto.UINT8, TensorProto.FLOAT, TensorProto.UINT8)
    node.emits_per_row = (False, True, True)
    return lambda mode, x: _quantize_rows(node, x, mode)


def _integer_convolution(
    node: Node, weight: int, zero_point: int, bias: int | None, *, saturates: bool
) -> IntegerConvolution:
    raw = node.constant(weight).contiguous()
    shift = _nonzero(node.optional_constant(zero_point))
    centred = raw if shift is None else raw - _along(shift, raw.ndim, 0)
    if raw.ndim == 4:
        centred = centred.contiguous(memory_format=torch.channels_last)
    offset = node.optional_constant(bias) if bias is not None else None
    groups = node.integer("group", 1)
    # depthwise convolutions have kernels of their own, which don't saturate
    wide = saturates and not (raw.shape[1] == 1 and raw.shape[0] == groups)
    return IntegerConvolution(
        raw, centred, None if offset is None else offset.double(), window(node, raw.shape[2:]), groups, wide
    )


@operator("ConvInteger", since=10, per_row=True, needs_mode=True)
def conv_integer(node: Node) -> Kernel:
    """int32 sums of a convolution; its kernel does not saturate."""
    node.emits = (TensorProto.INT32,)
    convolution = _integer_convolution(node, 1, 3, None, saturates=False)
    shift = _zero_point_of_rows(node, 2)
    return lambda mode, x, _weight, x_zero=None, *_: convolution.sums(x, shift(x, x_zero), mode)


@operator("QLinearConv", since=10, needs_mode=True)
def qlinear_conv(node: Node) -> Kernel:
    """Integer convolution, int32 bias, and one rounding of the scaled sum."""
    limits = _output_codes(node, 7)
    convolution = _integer_convolution(node, 3, 5, 8, saturates=mixed_signs(node, 2, 3))
    factor = node.constant(1) * node.constant(4) / node.constant(6)
    step = RequantizedConvolution(
        convolution,
        _nonzero(node.constant(2)),
        _along(factor, convolution.raw.ndim, 1),
        _nonzero(node.constant(7)),
        limits,
    )
    return lambda mode, x, *_: step(x, mode)


def _integer_product(
    node: Node, left_zero: int, right: int, zero_point: int, bias: int | None = None, *, transposed: bool = False
) -> IntegerProduct:
    raw = node.constant(right) if right in node.constants else None
    shift = _nonzero(node.optional_constant(zero_point))
    offset = node.optional_constant(bias) if bias is not None else None
    return IntegerProduct(
        raw.t().contiguous() if raw is not None and transposed else raw,
        shift if shift is None or shift.numel() > 1 else shift.reshape(()),
        None if offset is None else offset.double(),
        mixed_signs(node, left_zero, right),
    )


def _zero_point_of_rows(node: Node, index: int) -> Callable[[Tensor, Tensor | None], Tensor | None]:
    """How the left zero point meets the left codes: as a scalar, one for each row of a matrix, or per image."""
    if not node.has(index):
        return lambda _codes, _given: None
    if node.per_row[index]:
        return lambda codes, given: _shift_of_rows(given, codes)
    value = _nonzero(node.constant(index))
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
        codes, scale, zero_point = _quantize_rows(node, a, mode)
        sums = product.sums(codes, _shift_of_rows(zero_point, a), b, mode)
        return _scaled(sums, spread(scale, a.ndim) * scale_of_b, bias)

    return kernel


def _scaled(sums: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = sums.float() * scale
    return y if bias is None else y + bias


@operator("QLinearMatMul", MICROSOFT, needs_mode=True)
@operator("QLinearMatMul", since=10, needs_mode=True)
def qlinear_matmul(node: Node) -> Kernel:
    """Integer matrix product and one rounding of the scaled sum."""
    limits = _output_codes(node, 7)
    product, shift = _integer_product(node, 2, 3, 5), _zero_point_of_rows(node, 2)
    factor, y_zero = node.constant(1) * node.constant(4) / node.constant(6), _nonzero(node.constant(7))

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
    limits, y_zero = _output_codes(node, 8), _nonzero(node.constant(8))
    ratio = factor / node.constant(7)

    def kernel(mode: Mode, a: Tensor, *_: Tensor) -> Tensor:
        sums = product.sums(a.t() if left else a, shift(a, None), None, mode)
        return round_product(sums.float(), ratio, y_zero, limits)

    return kernel


def _fused(a: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """``a * factor + added`` rounded once to float32, as a fused multiply-add does."""
    return (a.double() * factor.double() + added.double()).float()


def _scalar(node: Node, index: int) -> Tensor:
    """A scale or zero point of the whole tensor; a zero point that is left out is zero."""
    value = node.optional_constant(index)
    return torch.zeros(()) if value is None else value.reshape(())


@operator("QLinearAdd", MICROSOFT, needs_mode=True)
def qlinear_add(node: Node) -> Kernel:
    """Sum of two code tensors: each times its scale ratio, zero points folded into one constant, rounded once."""
    limits = _output_codes(node, 7)
    ratio_a, ratio_b = (_scalar(node, index) / _scalar(node, 6) for index in (1, 4))
    zero_a, zero_b, zero_c = (_scalar(node, index) for index in (2, 5, 7))
    offset = zero_c - _fused(zero_a, ratio_a, ratio_b * zero_b)
    factors = (float(ratio_a), float(ratio_b))

    def kernel(mode: Mode, a: Tensor, *rest: Tensor) -> Tensor:
        b = rest[2]
        if mode.exact:
            return round_value(_fused(a, ratio_a, _fused(b, ratio_b, offset)), limits)
        return round_sum(a, b, factors, float(offset), limits)

    return kernel


@operator("QLinearMul", MICROSOFT)
def qlinear_mul(node: Node) -> Kernel:
    """Product of two code tensors, scaled, zero point added, rounded once."""
    limits = _output_codes(node, 7)
    ratio = _scalar(node, 1) * _scalar(node, 4) / _scalar(node, 6)
    zero_a, zero_b, zero_c = (_scalar(node, index) for index in (2, 5, 7))
    return lambda a, _a_scale, _a_zero, b, *_: round_value((a - zero_a) * (b - zero_b) * ratio + zero_c, limits)


@operator("QLinearConcat", MICROSOFT)
def qlinear_concat(node: Node) -> Kernel:
    """Code tensors brought to one scale and joined."""
    limits, axis = _output_codes(node, 1), node.integer("axis", 0)
    y_scale, y_zero = _scalar(node, 0), _scalar(node, 1)
    parameters = [(_scalar(node, at + 1), _scalar(node, at + 2)) for at in range(2, len(node.inputs), 3)]

    def rescaled(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if bool(scale == y_scale) and bool(zero_point == y_zero):
            return x
        return round_quotient((x - zero_point) * scale, y_scale, y_zero, limits)

    def kernel(*inputs: Tensor) -> Tensor:
        return torch.cat([rescaled(x, *given) for x, given in zip(inputs[2::3], parameters, strict=True)], axis)

    return kernel


@operator("QLinearGlobalAveragePool", MICROSOFT)
def qlinear_global_average_pool(node: Node) -> Kernel:
    """int32 sum of the codes minus count times zero point, scaled and rounded once."""
    node.require("channels_last", 0)
    limits = _output_codes(node, 4)
    x_scale, x_zero, y_scale = (_scalar(node, index) for index in (1, 2, 3))
    y_zero = _nonzero(node.optional_constant(4))

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        count = x.shape[2:].numel()
        centred = x.sum(tuple(range(2, x.ndim)), keepdim=True) - count * x_zero
        return round_product(centred, x_scale / (y_scale * count), y_zero, limits)

    return kernel


def _through_floats(node: Node, function: Callable[[Tensor], Tensor]) -> Kernel:
    """Codes to floats, a float function, and back to codes: what ONNX Runtime tabulates for these operators."""
    limits = _output_codes(node, 4)
    x_scale, x_zero, y_scale = (_scalar(node, index) for index in (1, 2, 3))
    y_zero = _nonzero(node.optional_constant(4))
    return lambda x, *_: round_quotient(function((x - x_zero) * x_scale), y_scale, y_zero, limits)


@operator("QLinearAveragePool", MICROSOFT)
def qlinear_average_pool(node: Node) -> Kernel:
    """Average pooling of codes by way of floats."""
    node.require("channels_last", 0)
    average, limits = averaging(node), _output_codes(node, 4)
    x_scale, x_zero, y_scale, y_zero = (_scalar(node, index) for index in (1, 2, 3, 4))
    # unlike the tabulated operators, this kernel adds the zero point before it rounds
    return lambda x, *_: round_value(average((x - x_zero) * x_scale) / y_scale + y_zero, limits)


@operator("QLinearLeakyRelu", MICROSOFT)
def qlinear_leaky_relu(node: Node) -> Kernel:
    """LeakyRelu of codes."""
    alpha = node.number("alpha", 0.01)
    return _through_floats(node, lambda x: functional.leaky_relu(x, alpha))


@operator("QLinearSigmoid", MICROSOFT)
def qlinear_sigmoid(node: Node) -> Kernel:
    """Sigmoid of codes."""
    return _through_floats(node, torch.sigmoid)


@operator("QLinearSoftmax", MICROSOFT, needs_mode=True)
def qlinear_softmax(node: Node) -> Kernel:
    """Softmax of codes; the exact pass takes the exponentials from ONNX Runtime's table."""
    limits = _output_codes(node, 4)
    flattens = node.integer("opset", 13) < 13
    axis = node.integer("axis", 1 if flattens else -1)
    x_scale, y_scale, y_zero = (_scalar(node, index) for index in (1, 3, 4))
    steps = torch.floor(1 / y_scale)

    def rows(mode: Mode, x: Tensor) -> Tensor:
        smooth = round_product(torch.softmax(x * x_scale, -1), steps, y_zero, limits)
        if not mode.exact:
            return smooth
        with torch.no_grad():
            parts = _exponentials(x - x.amax(-1, keepdim=True), x_scale)
            table = (parts * steps / _summed_in_order(parts)).round_().add_(y_zero).clamp_(*limits)
        return value_of(table, smooth)

    def kernel(mode: Mode, x: Tensor, *_: Tensor) -> Tensor:
        if flattens:
            return rows(mode, x.flatten(axis % x.ndim)).reshape(x.shape)
        return rows(mode, x.movedim(axis, -1)).movedim(-1, axis)

    return kernel


def _exponentials(below: Tensor, scale: Tensor) -> Tensor:
    """``exp(below * scale)`` in float32, shifted up as far as a float32 sum over the last axis allows."""
    largest = torch.log(torch.tensor(torch.finfo(torch.float32).max / below.shape[-1]))
    shift = (largest.double() - 5).clamp(min=0) / scale.double()
    return torch.exp((below.double() + shift) * scale.double()).float()


def _summed_in_order(parts: Tensor) -> Tensor:
    total = torch.zeros_like(parts[..., :1])
    for index in range(parts.shape[-1]):
        total = total + parts[..., index : index + 1]
    return total
