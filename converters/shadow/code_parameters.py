"""Scales, zero points and code ranges, as the operators on integer codes read them from their nodes."""

from __future__ import annotations

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.registry import CODE_RANGES, Node
from qdefense.converters.shadow.rounding import Range


def nonzero(zero_point: Tensor | None) -> Tensor | None:
    """A zero point, None where it is zero and need not be subtracted."""
    return None if zero_point is None or not bool(zero_point.any()) else zero_point


def along(value: Tensor, rank: int, axis: int) -> Tensor:
    """A scalar as it is, a vector laid along one axis."""
    if value.numel() == 1:
        return value.reshape(())
    return value.reshape([-1 if at == axis % rank else 1 for at in range(rank)])


def output_codes(node: Node, zero_point: int, like: int | None = None) -> Range:
    """Range of the node's output codes; tells the graph about their type.

    Args:
        node: the node.
        zero_point: position of the output's zero point, which has that type.
        like: position of an input whose type the output has where the zero point is left out.
    """
    kind = node.element_type(zero_point if node.has(zero_point) or like is None else like)
    kind = kind or node.integer("output_dtype", TensorProto.UNDEFINED) or TensorProto.UINT8
    node.ignore("output_dtype")
    if kind not in CODE_RANGES:
        raise node.unsupported(f"its codes have element type {kind}, covered are {sorted(CODE_RANGES)}")
    node.emits = (kind,)
    return CODE_RANGES[kind]


def expanded(value: Tensor, shape: torch.Size, axis: int, block: int) -> Tensor:
    """A scale or zero point as a tensor of `shape` meets it: per tensor, per channel or, with a block, per block."""
    if block == 0:
        return along(value, len(shape), axis)
    return value.repeat_interleave(block, axis).narrow(axis, 0, shape[axis])


def scalar(node: Node, index: int) -> Tensor:
    """A scale or zero point of the whole tensor; a zero point that is left out is zero."""
    value = node.optional_constant(index)
    return torch.zeros(()) if value is None else value.reshape(())
