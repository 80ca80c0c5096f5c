"""Rounding to integer codes with a straight-through gradient inside the clipping range.

Codes are float32 tensors that hold exact integers. `torch.round` rounds half to even, as ONNX Runtime does.
Each backward pass is one fused mask, and one product where a scale is involved.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

Range = tuple[int, int]


def inside(gradient: Tensor, unclipped: Tensor, limits: Range) -> Tensor:
    """The gradient where the rounded code lies inside its range, zero elsewhere."""
    low, high = limits
    # hardtanh's own backward is open at both ends; codes are integers, so half a code makes it closed
    masked: Tensor = torch.ops.aten.hardtanh_backward(gradient, unclipped, low - 0.5, high + 0.5)
    return masked


class _RoundValue(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, limits: Range) -> Tensor:
        unclipped = torch.round(value)
        ctx.save_for_backward(unclipped)
        ctx.limits = limits
        return unclipped.clamp(*limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (unclipped,) = ctx.saved_tensors
        return inside(gradients[0], unclipped, ctx.limits), None


class _RoundProduct(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: Tensor, zero_point: Tensor | None, limits: Range) -> Tensor:
        unclipped = (value * factor).round_()
        if zero_point is not None:
            unclipped += zero_point
        ctx.save_for_backward(unclipped, factor)
        ctx.limits = limits
        return unclipped.clamp(*limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        unclipped, factor = ctx.saved_tensors
        return inside(gradients[0], unclipped, ctx.limits).mul_(factor), None, None, None


class _RoundQuotient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, divisor: Tensor, zero_point: Tensor | None, limits: Range) -> Tensor:
        unclipped = (value / divisor).round_()
        if zero_point is not None:
            unclipped += zero_point
        ctx.save_for_backward(unclipped, divisor)
        ctx.limits = limits
        return unclipped.clamp(*limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        unclipped, divisor = ctx.saved_tensors
        return inside(gradients[0], unclipped, ctx.limits).div_(divisor), None, None, None


class _RoundSum(Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, factors: tuple[float, float], offset: Tensor, limits: Range) -> Tensor:
        # torch fuses these multiplications and additions where the CPU can, as ONNX Runtime's kernel does
        unclipped = torch.add(offset, b, alpha=factors[1])
        if a.shape == b.shape:
            unclipped.add_(a, alpha=factors[0]).round_()
        else:
            unclipped = torch.add(unclipped, a, alpha=factors[0]).round_()
        ctx.save_for_backward(unclipped)
        ctx.factors, ctx.limits, ctx.shapes = factors, limits, (a.shape, b.shape)
        return unclipped.clamp(*limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (unclipped,) = ctx.saved_tensors
        masked = inside(gradients[0], unclipped, ctx.limits)
        wanted = zip(ctx.needs_input_grad, ctx.factors, ctx.shapes, strict=False)
        a, b = ((masked * factor).sum_to_size(shape) if needed else None for needed, factor, shape in wanted)
        return a, b, None, None, None


class _ValueOf(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, gradient_of: Tensor) -> Tensor:  # noqa: ARG004
        return value.view_as(value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # noqa: ARG004
        return None, gradients[0]


def round_value(value: Tensor, limits: Range) -> Tensor:
    """``clamp(round(value), low, high)``; the gradient is 1 inside the range, 0 outside."""
    result: Tensor = _RoundValue.apply(value, limits)  # type: ignore[no-untyped-call]
    return result


def round_product(value: Tensor, factor: Tensor, zero_point: Tensor | None, limits: Range) -> Tensor:
    """``clamp(round(value * factor) + zero_point, low, high)``; the gradient is `factor` inside the range."""
    result: Tensor = _RoundProduct.apply(value, factor, zero_point, limits)  # type: ignore[no-untyped-call]
    return result


def round_quotient(value: Tensor, divisor: Tensor, zero_point: Tensor | None, limits: Range) -> Tensor:
    """``clamp(round(value / divisor) + zero_point, low, high)``; the gradient is 1 / `divisor` inside the range."""
    result: Tensor = _RoundQuotient.apply(value, divisor, zero_point, limits)  # type: ignore[no-untyped-call]
    return result


def round_sum(a: Tensor, b: Tensor, factors: tuple[float, float], offset: Tensor, limits: Range) -> Tensor:
    """``clamp(round(a * factors[0] + b * factors[1] + offset), low, high)`` for tensors that broadcast.

    `offset` is a scalar tensor. The gradients are the factors inside the range.
    """
    result: Tensor = _RoundSum.apply(a, b, factors, offset, limits)  # type: ignore[no-untyped-call]
    return result


def value_of(value: Tensor, gradient_of: Tensor) -> Tensor:
    """`value`, with the gradient of `gradient_of`."""
    result: Tensor = _ValueOf.apply(value, gradient_of)  # type: ignore[no-untyped-call]
    return result
