"""Scales and zero points that no quantizer writes: refused with the node that holds them.

A scale is finite and positive, one for the tensor or one for each channel or block; a zero point has the type of the
codes and the shape of the scale. Scales of weight-only blocks may be zero or negative:
ONNX Runtime's own block quantizer takes the sign of the largest weight, and 0 for a block of zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.operator_versions import quoted
from qdefense.converters.shadow.constants import type_name
from qdefense.converters.shadow.registry import MICROSOFT, Node

Shape = tuple[int | None, ...]
_Layout = Literal["tensor", "channels", "columns", "attribute", "free"]


@dataclass(frozen=True)
class _Group:
    """Positions of one tensor of codes and its parameters; no `codes` for an output."""

    codes: int | None
    scale: int | None
    zero_point: int | None
    layout: _Layout = "tensor"


_BINARY = (_Group(0, 1, 2), _Group(3, 4, 5), _Group(None, 6, 7))
_UNARY = (_Group(0, 1, 2), _Group(None, 3, 4))
_QUANTIZE = (_Group(None, 1, 2, "attribute"),)
_DEQUANTIZE = (_Group(0, 1, 2, "attribute"),)
_GROUPS: Mapping[tuple[str, str], tuple[_Group, ...]] = {
    ("", "QuantizeLinear"): _QUANTIZE,
    ("", "DequantizeLinear"): _DEQUANTIZE,
    ("", "QLinearConv"): (_Group(0, 1, 2), _Group(3, 4, 5, "channels"), _Group(None, 6, 7)),
    ("", "ConvInteger"): (_Group(0, None, 2), _Group(1, None, 3, "channels")),
    ("", "QLinearMatMul"): (_Group(0, 1, 2, "free"), _Group(3, 4, 5, "columns"), _Group(None, 6, 7, "free")),
    ("", "MatMulInteger"): (_Group(0, None, 2, "free"), _Group(1, None, 3, "columns")),
    (MICROSOFT, "QuantizeLinear"): _QUANTIZE,
    (MICROSOFT, "DequantizeLinear"): _DEQUANTIZE,
    (MICROSOFT, "QLinearConv"): (_Group(0, 1, 2), _Group(3, 4, 5, "channels"), _Group(None, 6, 7)),
    (MICROSOFT, "QLinearWhere"): (_Group(1, 2, 3), _Group(4, 5, 6), _Group(None, 7, 8)),
    (MICROSOFT, "QGemm"): (_Group(0, 1, 2), _Group(3, 4, 5, "free"), _Group(None, 7, 8)),
    (MICROSOFT, "MatMulIntegerToFloat"): (_Group(0, 2, 4, "free"), _Group(1, 3, 5, "columns")),
    (MICROSOFT, "DynamicQuantizeMatMul"): (_Group(1, 2, 3, "columns"),),
    (MICROSOFT, "QLinearAdd"): _BINARY,
    (MICROSOFT, "QLinearMul"): _BINARY,
    (MICROSOFT, "QLinearAveragePool"): _UNARY,
    (MICROSOFT, "QLinearGlobalAveragePool"): _UNARY,
    (MICROSOFT, "QLinearLeakyRelu"): _UNARY,
    (MICROSOFT, "QLinearSigmoid"): _UNARY,
    (MICROSOFT, "QLinearSoftmax"): _UNARY,
}


def check_quantization(node: Node, shape_of: Callable[[str], Shape | None]) -> None:
    """Look at the quantization parameters of a node that are known at build time.

    Args:
        node: the node, whatever its operator.
        shape_of: the shape of a tensor that the graph computes, None in it for a free axis, as far as it is known.

    Raises:
        ShadowError: one of them is corrupt.
    """
    for group in _groups(node):
        scale, zero_point = _known(node, group.scale), _known(node, group.zero_point)
        if scale is not None:
            _check_scale(node, group, scale)
        if zero_point is not None:
            _check_zero_point(node, group, zero_point)
        if scale is not None and zero_point is not None and scale.numel() != zero_point.numel():
            raise node.corrupt(
                f"{_named(node, 'zero point', group.zero_point)} has {zero_point.numel()} values and its scale "
                f"{scale.numel()}"
            )
        for value, what, at in ((scale, "scale", group.scale), (zero_point, "zero point", group.zero_point)):
            if value is not None:
                _check_layout(node, group, value, _named(node, what, at), shape_of)


def _groups(node: Node) -> Iterator[_Group]:
    if (node.domain, node.op_type) == (MICROSOFT, "QLinearConcat"):
        yield _Group(None, 0, 1)
        yield from (_Group(at, at + 1, at + 2) for at in range(2, len(node.inputs) - 2, 3))
    yield from _GROUPS.get((node.domain, node.op_type), ())


def _known(node: Node, index: int | None) -> Tensor | None:
    return None if index is None or index not in node.constants else node.constants[index].value


def _named(node: Node, what: str, index: int | None) -> str:
    return f"{what} {quoted(node.inputs[index or 0])}"


def _blocks(node: Node) -> int:
    value = node.attributes.get("block_size", 0)
    return value if isinstance(value, int) else 0


def _check_scale(node: Node, group: _Group, scale: Tensor) -> None:
    named = _named(node, "scale", group.scale)
    if not scale.is_floating_point() or scale.numel() == 0:
        raise node.corrupt(f"{named} has no float values")
    bad = ~torch.isfinite(scale)
    if group.codes is None or not _blocks(node):
        bad |= scale <= 0
    if bool(bad.any()):
        raise node.corrupt(f"{named} holds {float(scale[bad][0])}, expected finite numbers above 0")


def _check_zero_point(node: Node, group: _Group, zero_point: Tensor) -> None:
    named = _named(node, "zero point", group.zero_point)
    kind = node.element_type(group.zero_point or 0)
    codes = None if group.codes is None else node.element_type(group.codes)
    if kind and codes and kind != codes:
        raise node.corrupt(f"{named} has element type {type_name(kind)}, its codes have {type_name(codes)}")
    stated = node.attributes.get("output_dtype", TensorProto.UNDEFINED)
    if group.codes is None and kind and stated and kind != stated:
        raise node.corrupt(
            f"{named} has element type {type_name(kind)}, attribute 'output_dtype' is {type_name(stated)}"
        )
    if kind == TensorProto.INT32 and bool(zero_point.any()):
        raise node.corrupt(f"{named} is not 0, as it must be for codes of type INT32")


def _check_layout(
    node: Node, group: _Group, value: Tensor, named: str, shape_of: Callable[[str], Shape | None]
) -> None:
    if group.layout == "free" or (value.numel() == 1 and value.ndim < 2 and not _blocks(node)):
        return
    if group.layout == "tensor":
        raise node.corrupt(f"{named} has {value.numel()} values, expected one for the whole tensor")
    at = group.codes or 0
    known = None if group.layout != "attribute" and group.codes is None else _known(node, at)
    shape = tuple(known.shape) if known is not None else shape_of(node.inputs[at])
    if group.layout == "attribute":
        _check_axis(node, shape, value, named)
    elif shape and value.ndim < 2:
        channels = shape[0 if group.layout == "channels" else -1]
        if channels not in (None, value.numel()):
            raise node.corrupt(f"{named} has {value.numel()} values, expected 1 or {channels}, one for each channel")


def _check_axis(node: Node, shape: Shape | None, value: Tensor, named: str) -> None:
    axis, block = node.attributes.get("axis", 1), _blocks(node)
    rank = len(shape) if shape is not None else (value.ndim if block else None)
    if rank is not None and not -rank <= axis < rank:
        raise node.corrupt(f"attribute 'axis' is {axis}, and its input has {rank} axes")
    if block < 0:
        raise node.corrupt(f"attribute 'block_size' is {block}, expected a positive number")
    if block and shape is not None:
        at = axis % len(shape)
        length = shape[at]
        wanted = (*shape[:at], None if length is None else ceil(length / block), *shape[at + 1 :])
        if len(wanted) != value.ndim or any(a not in (None, b) for a, b in zip(wanted, value.shape, strict=True)):
            raise node.corrupt(
                f"{named} has shape {tuple(value.shape)}, expected {wanted} for blocks of {block} along axis {axis} of "
                f"{shape}"
            )
    elif not block and value.ndim != 1:
        raise node.corrupt(f"{named} has {value.ndim} axes, expected none or one")
    elif not block and shape is not None and shape[axis] not in (None, value.numel()):
        raise node.corrupt(f"{named} has {value.numel()} values, expected 1 or {shape[axis]}, one for each channel")
