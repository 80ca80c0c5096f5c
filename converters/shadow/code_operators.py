"""Operators from codes to codes: elementwise, joins, poolings, tabulated functions, softmax."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.code_parameters import nonzero, output_codes, scalar
from qdefense.converters.shadow.poolings import averaging, max_pool
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Mode, Node, operator
from qdefense.converters.shadow.rounding import Range, round_product, round_quotient, round_sum, round_value, value_of

Parameters = tuple[Tensor, Tensor]
"""A scale and a zero point."""


def _fused(a: Tensor, factor: Tensor, added: Tensor) -> Tensor:
    """``a * factor + added`` rounded once to float32, as a fused multiply-add does."""
    return (a.double() * factor.double() + added.double()).float()


@operator("QLinearAdd", MICROSOFT, needs_mode=True)
def qlinear_add(node: Node) -> Kernel:
    """Sum of two code tensors: each times its scale ratio, zero points folded into one constant, rounded once."""
    limits = output_codes(node, 7, like=0)
    ratio_a, ratio_b = (scalar(node, index) / scalar(node, 6) for index in (1, 4))
    zero_a, zero_b, zero_c = (scalar(node, index) for index in (2, 5, 7))
    offset = zero_c - _fused(zero_a, ratio_a, ratio_b * zero_b)
    factors = (float(ratio_a), float(ratio_b))

    def kernel(mode: Mode, a: Tensor, *rest: Tensor) -> Tensor:
        b = rest[2]
        if mode.exact:
            return round_value(_fused(a, ratio_a, _fused(b, ratio_b, offset)), limits)
        return round_sum(a, b, factors, offset, limits)

    return kernel


@operator("QLinearMul", MICROSOFT)
def qlinear_mul(node: Node) -> Kernel:
    """Product of two code tensors, scaled, zero point added, rounded once."""
    limits = output_codes(node, 7, like=0)
    ratio = scalar(node, 1) * scalar(node, 4) / scalar(node, 6)
    zero_a, zero_b, zero_c = (scalar(node, index) for index in (2, 5, 7))
    return lambda a, _a_scale, _a_zero, b, *_: round_value((a - zero_a) * (b - zero_b) * ratio + zero_c, limits)


def _rescaler(x: Parameters, y: Parameters, limits: Range) -> Callable[[Tensor], Tensor]:
    """How codes of one scale and zero point become codes of another: by way of floats, as the runtime tabulates it."""
    if all(bool(mine == theirs) for mine, theirs in zip(x, y, strict=True)):
        return lambda codes: codes
    return lambda codes: round_quotient((codes - x[1]) * x[0], y[0], y[1], limits)


@operator("QLinearConcat", MICROSOFT)
def qlinear_concat(node: Node) -> Kernel:
    """Code tensors brought to one scale and joined."""
    limits, axis = output_codes(node, 1), node.integer("axis", 0)
    joined = (scalar(node, 0), scalar(node, 1))
    rescalers = [
        _rescaler((scalar(node, at + 1), scalar(node, at + 2)), joined, limits) for at in range(2, len(node.inputs), 3)
    ]

    def kernel(*inputs: Tensor) -> Tensor:
        return torch.cat([rescale(x) for rescale, x in zip(rescalers, inputs[2::3], strict=True)], axis)

    return kernel


@operator("QLinearWhere", MICROSOFT)
def qlinear_where(node: Node) -> Kernel:
    """Codes of one tensor where a condition holds and of another elsewhere, brought to one scale."""
    limits = output_codes(node, 8)
    chosen = (scalar(node, 7), scalar(node, 8))
    left, right = (_rescaler((scalar(node, at), scalar(node, at + 1)), chosen, limits) for at in (2, 5))
    return lambda condition, x, _x_scale, _x_zero, y, *_: torch.where(condition.bool(), left(x), right(y))


def _channels_first(node: Node, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The function of a tensor whose channels may lie on the last axis, by the attribute `channels_last`."""
    if not node.integer("channels_last", 0):
        return function
    return lambda x: function(x.movedim(-1, 1)).movedim(1, -1)


@operator("QLinearGlobalAveragePool", MICROSOFT)
def qlinear_global_average_pool(node: Node) -> Kernel:
    """int32 sum of the codes minus count times zero point, scaled and rounded once."""
    limits = output_codes(node, 4, like=0)
    x_scale, x_zero, y_scale = (scalar(node, index) for index in (1, 2, 3))
    y_zero = nonzero(node.optional_constant(4))

    def pool(x: Tensor) -> Tensor:
        count = x.shape[2:].numel()
        centred = x.sum(tuple(range(2, x.ndim)), keepdim=True) - count * x_zero
        return round_product(centred, x_scale / (y_scale * count), y_zero, limits)

    pooled = _channels_first(node, pool)
    return lambda x, *_: pooled(x)


@operator("QLinearAveragePool", MICROSOFT)
def qlinear_average_pool(node: Node) -> Kernel:
    """Average pooling of codes by way of floats."""
    average, limits = averaging(node), output_codes(node, 4, like=0)
    x_scale, x_zero, y_scale, y_zero = (scalar(node, index) for index in (1, 2, 3, 4))

    def pool(x: Tensor) -> Tensor:
        # unlike the tabulated operators, this kernel adds the zero point before it rounds
        return round_value(average((x - x_zero) * x_scale) / y_scale + y_zero, limits)

    pooled = _channels_first(node, pool)
    return lambda x, *_: pooled(x)


@operator("NhwcMaxPool", MICROSOFT)
def nhwc_max_pool(node: Node) -> Kernel:
    """Maximum of codes in a sliding window, channels last."""
    pool = max_pool(node)
    return lambda x: pool(x.movedim(-1, 1)).movedim(1, -1)


def _through_floats(node: Node, function: Callable[[Tensor], Tensor]) -> Kernel:
    """Codes to floats, a float function, and back to codes: what ONNX Runtime tabulates for these operators."""
    limits = output_codes(node, 4, like=0)
    x_scale, x_zero, y_scale = (scalar(node, index) for index in (1, 2, 3))
    y_zero = nonzero(node.optional_constant(4))
    return lambda x, *_: round_quotient(function((x - x_zero) * x_scale), y_scale, y_zero, limits)


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
    limits = output_codes(node, 4, like=0)
    flattens = node.integer("opset", 13) < 13
    axis = node.integer("axis", 1 if flattens else -1)
    x_scale, y_scale, y_zero = (scalar(node, index) for index in (1, 3, 4))
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
