"""Changes of element type, and what an element type is carried as."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.door import round_half
from qdefense.converters.shadow.operands import wrap
from qdefense.converters.shadow.registry import CODE_RANGES, Kernel, Mode, Node, operator

_CARRIED: Mapping[int, torch.dtype] = {
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


def carrier(node: Node, element_type: int, dtype: torch.dtype) -> torch.dtype:
    """The torch type that an ONNX type is carried in where float32 is carried as `dtype`.

    Raises:
        UnsupportedOperatorError: the shadow can't carry that type.
    """
    if element_type in _FLOATS or element_type in CODE_RANGES:
        return dtype
    if element_type not in _CARRIED:
        covered = sorted([*_FLOATS, *CODE_RANGES, *_CARRIED])
        raise node.unsupported(f"its result has element type {element_type}, covered are {covered}")
    return _CARRIED[element_type]


@operator("Cast", per_row=True, needs_mode=True)
def cast(node: Node) -> Kernel:
    """Another element type: float16 is carried as what it rounds to, small integers as codes."""
    node.ignore("saturate", "round_mode")
    return _casting(node, node.integer("to", TensorProto.UNDEFINED))


@operator("CastLike", needs_mode=True)
def cast_like(node: Node) -> Kernel:
    """The element type of the second input."""
    node.ignore("saturate", "round_mode")
    return _casting(node, node.element_type(1) or TensorProto.UNDEFINED)


def _casting(node: Node, target: int) -> Kernel:
    carrier(node, target, torch.float32)
    node.emits = (target,)
    if target == TensorProto.FLOAT16:
        return lambda mode, x, *_: round_half(x.to(mode.dtype))
    if target in CODE_RANGES:
        return lambda mode, x, *_: _codes(mode, x, CODE_RANGES[target])
    return lambda mode, x, *_: x.to(carrier(node, target, mode.dtype))


def _codes(mode: Mode, x: Tensor, limits: tuple[int, int]) -> Tensor:
    # whole numbers keep their low bits, as a C cast does; fractions go towards zero
    whole = x.trunc() if x.is_floating_point() else x
    inside = (whole >= limits[0]) & (whole <= limits[1])
    return torch.where(inside, whole, wrap(whole, limits)).to(mode.dtype)
