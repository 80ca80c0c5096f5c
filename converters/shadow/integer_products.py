"""Convolutions and matrix products of integer codes: exact sums, saturating sums, and their gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qdefense.converters.shadow.convolutions import convolve
from qdefense.converters.shadow.registry import Mode, Node
from qdefense.converters.shadow.rounding import Range, inside, round_product, value_of
from qdefense.converters.shadow.saturation import OverflowingPairs, overflowing_pairs, saturation_error
from qdefense.converters.shadow.windows import Window, slid

# float32 holds every integer up to here, so a sum whose terms stay below it is exact in any order
_EXACT_IN_FLOAT32 = 2**24
_WRAPS_AROUND = 2**31


def mixed_signs(node: Node, zero_point: int, right: int) -> bool:
    """Whether the operands are u8 activations and s8 weights, the only pair whose kernels saturate.

    The type of the activations is that of their zero point, where there is one.
    """
    left = node.element_type(zero_point if node.has(zero_point) else 0)
    return left == TensorProto.UINT8 and node.element_type(right) == TensorProto.INT8


def largest_sum(weight: Tensor, bias: Tensor | None, axes: tuple[int, ...]) -> float:
    """Upper bound of every partial sum of 8 bit codes times `weight`, reduced over `axes`."""
    total = weight.detach().double().abs().sum(axes) * 255
    return float((total if bias is None else total + bias.detach().double().abs()).max())


def refuse_wrapping(node: Node, bound: float) -> None:
    """Refuse sums that may leave int32: the kernels wrap around there, a step that no gradient sees.

    Raises:
        ShadowError: ``bound``, of `largest_sum`, is too large.
    """
    if bound >= _WRAPS_AROUND:
        raise node.corrupt("its sums can leave 32 bits, where they wrap around, which is not covered")


@dataclass(frozen=True)
class IntegerConvolution:
    """A convolution with constant weights.

    Attributes:
        raw: (O, C / groups, ...) float32, the weights' codes.
        weight: the codes minus their zero point.
        bias: (O,) float64 codes, or None.
        sliding: strides, padding, dilations.
        groups: channel groups.
        saturates: the kernel that runs it without VNNI saturates.
    """

    raw: Tensor
    weight: Tensor
    bias: Tensor | None
    sliding: Window
    groups: int
    saturates: bool

    @cached_property
    def bound(self) -> float:
        """No partial sum is larger."""
        return largest_sum(self.weight, self.bias, tuple(range(1, self.weight.ndim)))

    @property
    def fits_float32(self) -> bool:
        """Whether float32 sums are exact."""
        return self.bound < _EXACT_IN_FLOAT32

    @property
    def is_trained(self) -> bool:
        """Whether gradients of the weights or the bias are wanted."""
        return self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)

    @cached_property
    def single_bias(self) -> Tensor | None:
        """The bias in float32."""
        return None if self.bias is None else self.bias.float()

    @cached_property
    def group_pairs(self) -> list[list[OverflowingPairs]]:
        """The pairs that can overflow, group by group, in (kh, kw, cin) order."""
        return [
            overflowing_pairs(group.movedim(1, -1).reshape(group.shape[0], -1).t())
            for group in self.raw.chunk(self.groups)
        ]

    def sums(self, codes: Tensor, zero_point: Tensor | None, mode: Mode) -> Tensor:
        """The int32 sums, as float32 or, where that would round, float64.

        Args:
            codes: (N, C, ...) raw codes.
            zero_point: of the codes; None where it is zero.
            mode: exact and saturate decide.
        """
        centred = codes if zero_point is None else codes - zero_point
        if mode.exact and not self.fits_float32:
            y = convolve(centred.double(), self.weight.double(), self.bias, self.sliding, self.groups)
        else:
            y = convolve(centred, self.weight, self.single_bias, self.sliding, self.groups)
        if mode.saturate and self.saturates and any(self.group_pairs):
            return y + self.error(codes, zero_point, y.shape)
        return y

    @torch.no_grad()
    def error(self, codes: Tensor, zero_point: Tensor | None, shape: torch.Size) -> Tensor:
        """What clipping adds to the sums, in the shape of the result."""
        padding = self.sliding.padding(codes.shape[2:])
        padded = padding.apply(codes, 0.0 if zero_point is None else float(zero_point))
        parts = [
            self._group_error(part, pairs, shape)
            for part, pairs in zip(padded.chunk(self.groups, 1), self.group_pairs, strict=True)
        ]
        return torch.cat(parts, 1)

    def _group_error(self, codes: Tensor, pairs: list[OverflowingPairs], shape: torch.Size) -> Tensor:
        columns = self.raw.shape[0] // self.groups
        if not pairs:
            return torch.zeros(shape[0], columns, *shape[2:], dtype=torch.float64)
        error = saturation_error(_patches(codes, self.sliding), pairs, columns)
        return error.reshape(columns, shape[0], *shape[2:]).transpose(0, 1)


def _patches(codes: Tensor, sliding: Window) -> Tensor:
    """What each output sees of padded codes, in the order of the kernels: ((kh, kw, cin), (N, out...))."""
    rank = len(sliding.kernel)
    outputs, cells = range(2, 2 + rank), range(2 + rank, 2 + 2 * rank)
    depth = math.prod(sliding.kernel) * codes.shape[1]
    return slid(codes, sliding).permute(*cells, 1, 0, *outputs).reshape(depth, -1)


class _ConvolveAndRound(Function):
    @staticmethod
    def forward(ctx: Any, codes: Tensor, step: RequantizedConvolution, mode: Mode) -> Tensor:
        sums = step.convolution.sums(codes, step.x_zero_point, mode)
        unclipped = sums.float().mul_(step.factor).round_()
        if step.y_zero_point is not None:
            unclipped += step.y_zero_point
        ctx.save_for_backward(codes, unclipped)
        ctx.step = step
        return unclipped.clamp(*step.limits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        codes, unclipped = ctx.saved_tensors
        return ctx.step.pull_back(codes, inside(gradients[0], unclipped, ctx.step.limits)), None, None


@dataclass(frozen=True)
class RequantizedConvolution:
    """An integer convolution whose sums are scaled and rounded to codes: one step forward, one back.

    Attributes:
        convolution: the sums.
        x_zero_point: of the input; None where it is zero.
        factor: (O, 1, ...) float32, input scale times weight scale over output scale.
        y_zero_point: of the output; None where it is zero.
        limits: smallest and largest output code.
    """

    convolution: IntegerConvolution
    x_zero_point: Tensor | None
    factor: Tensor
    y_zero_point: Tensor | None
    limits: Range

    @cached_property
    def scaled_weight(self) -> Tensor:
        """The weights times the factor, through which gradients run."""
        return self.convolution.weight * self.factor.reshape(-1, *(1,) * (self.convolution.weight.ndim - 1))

    def __call__(self, codes: Tensor, mode: Mode) -> Tensor:
        """The output codes."""
        if self.convolution.is_trained:
            sums = self.convolution.sums(codes, self.x_zero_point, mode).float()
            return round_product(sums, self.factor, self.y_zero_point, self.limits)
        result: Tensor = _ConvolveAndRound.apply(codes, self, mode)  # type: ignore[no-untyped-call]
        return result

    def pull_back(self, codes: Tensor, gradient: Tensor) -> Tensor:
        """The gradient of the input codes from that of the sums, clipped already and not yet scaled."""
        sliding = self.convolution.sliding
        padding = sliding.padding(codes.shape[2:])
        rank = len(padding.begin)
        inner, grown = (padding.begin, codes) if padding.symmetric else ((0,) * rank, padding.apply(codes))
        found: Tensor = torch.ops.aten.convolution_backward(
            gradient, grown, self.scaled_weight, None, sliding.strides, inner, sliding.dilations,
            False, [0] * rank, self.convolution.groups, [True, False, False],
        )[0]  # fmt: skip
        if padding.symmetric:
            return found
        inside_padding = (slice(begin, begin + size) for begin, size in zip(padding.begin, codes.shape[2:]))
        return found[(slice(None), slice(None), *inside_padding)]


@dataclass(frozen=True)
class IntegerProduct:
    """A matrix product whose right operand may be constant.

    Attributes:
        raw: (..., K, N) codes of a constant right operand, None where the graph computes it.
        zero_point: of the right operand, ready to broadcast; None where it is zero.
        bias: (N,) or (M, N) float64 codes, or None.
        saturates: the kernel that runs it without VNNI saturates.
    """

    raw: Tensor | None
    zero_point: Tensor | None
    bias: Tensor | None
    saturates: bool

    @cached_property
    def weight(self) -> Tensor | None:
        """The constant right operand minus its zero point."""
        return None if self.raw is None else self._centred(self.raw)

    @cached_property
    def bound(self) -> float | None:
        """No partial sum is larger, whatever the left codes are; ``None`` where the right ones are computed."""
        if self.weight is None:
            return None
        bias = None if self.bias is None else self.bias.abs().max()
        return largest_sum(self.weight, bias, (-2,))

    @property
    def fits_float32(self) -> bool:
        """Whether float32 sums are exact, whatever the left codes are."""
        return self.bound is not None and self.bound < _EXACT_IN_FLOAT32

    @cached_property
    def pairs(self) -> list[OverflowingPairs]:
        """The pairs of one constant matrix that can overflow; those of a batch are found when it is used."""
        return [] if self.raw is None or self.raw.ndim > 2 else overflowing_pairs(self.raw)

    def sums(self, codes: Tensor, zero_point: Tensor | None, right: Tensor | None, mode: Mode) -> Tensor:
        """The int32 sums of (..., M, K) codes and (..., K, N) right codes, as float32 or float64.

        Args:
            codes: raw left codes.
            zero_point: of the left codes, ready to broadcast; None where it is zero.
            right: raw right codes where they are not constant, None where they are.
            mode: exact and saturate decide.
        """
        centred = codes if zero_point is None else codes - zero_point
        raw = self._right(right)
        weight = self._centred(raw) if self.weight is None else self.weight
        if mode.exact and not self.fits_float32:
            centred, weight = centred.double(), weight.double()
        y = centred @ weight
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        if mode.saturate and self.saturates and (raw.ndim > 2 or self.raw is None or self.pairs):
            return value_of(y + self.error(codes, raw).reshape(y.shape), y)
        return y

    @torch.no_grad()
    def error(self, codes: Tensor, right: Tensor) -> Tensor:
        """What clipping adds to the sums."""
        if right.ndim == 2:
            pairs = self.pairs if self.raw is not None else overflowing_pairs(right)
            return saturation_error(codes.reshape(-1, codes.shape[-1]).t().contiguous(), pairs, right.shape[-1]).t()
        batch: torch.Size = torch.broadcast_shapes(codes.shape[:-2], right.shape[:-2])  # type: ignore[no-untyped-call]
        lefts = codes.expand(*batch, *codes.shape[-2:]).reshape(-1, *codes.shape[-2:])
        rights = right.expand(*batch, *right.shape[-2:]).reshape(-1, *right.shape[-2:])
        return torch.stack(
            [saturation_error(a.t().contiguous(), overflowing_pairs(b), b.shape[-1]).t() for a, b in zip(lefts, rights)]
        )

    def _right(self, given: Tensor | None) -> Tensor:
        found = given if self.raw is None else self.raw
        if found is None:
            raise ValueError("the right operand is neither constant nor given")
        return found

    def _centred(self, right: Tensor) -> Tensor:
        return right if self.zero_point is None else right - self.zero_point
