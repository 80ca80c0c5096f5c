"""Changes of element type, and what an element type is carried as."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qdefense.converters.shadow.door import round_half
from qdefense.converters.shadow.operands import wrap
from qdefense.converters.shadow.registry import CODE_RANGES, NARROW_FLOATS, UNSIGNED_RANGES, Kernel, Node, operator
from qdefense.converters.shadow.rounding import value_of

_CARRIED: Mapping[int, torch.dtype] = {
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
    **dict.fromkeys(UNSIGNED_RANGES, torch.int64),
}
_AS_FLOAT = {TensorProto.FLOAT, *NARROW_FLOATS, *CODE_RANGES}


def carrier(node: Node, element_type: int, dtype: torch.dtype) -> torch.dtype:
    """The torch type that an ONNX type is carried in where float32 is carried as `dtype`.

    Raises:
        UnsupportedOperatorError: the shadow can't carry that type.
    """
    if element_type in _AS_FLOAT:
        return dtype
    if element_type not in _CARRIED:
        covered = sorted([*_AS_FLOAT, *_CARRIED])
        raise node.unsupported(f"its result has element type {element_type}, covered are {covered}")
    return _CARRIED[element_type]


@operator("Cast", per_row=True, needs_mode=True)
def cast(node: Node) -> Kernel:
    """Another element type: narrow floats are carried as what they round to, small integers as codes."""
    return _casting(node, node.integer("to", TensorProto.UNDEFINED))


@operator("CastLike", needs_mode=True)
def cast_like(node: Node) -> Kernel:
    """The element type of the second input."""
    return _casting(node, node.element_type(1) or TensorProto.UNDEFINED)


def _casting(node: Node, target: int) -> Kernel:
    saturate, round_mode = bool(node.integer("saturate", 1)), node.text("round_mode", "up")
    carrier(node, target, torch.float32)
    node.emits = (target,)
    if target == TensorProto.FLOAT16:
        return lambda mode, x, *_: round_half(x.to(mode.dtype))
    if target == TensorProto.BFLOAT16:
        return lambda mode, x, *_: _narrowed(x.to(mode.dtype), lambda value: value.to(torch.bfloat16))
    if target in NARROW_FLOATS:
        return lambda mode, x, *_: _narrowed(
            x.to(mode.dtype), lambda value: _stored(value, target, saturate, round_mode)
        )
    if target in CODE_RANGES or target in UNSIGNED_RANGES:
        whole = node.element_type(0) in CODE_RANGES
        limits = {**CODE_RANGES, **UNSIGNED_RANGES}[target]
        return lambda mode, x, *_: _whole(x, limits, whole=whole).to(carrier(node, target, mode.dtype))
    return lambda mode, x, *_: x.to(carrier(node, target, mode.dtype))


def _stored(value: Tensor, target: int, saturate: bool, round_mode: str) -> Tensor:
    array, kind = np.atleast_1d(value.numpy()), helper.tensor_dtype_to_np_dtype(target)
    if target == TensorProto.FLOAT8E8M0:
        narrow = numpy_helper.to_float8e8m0(array, saturate=saturate, round_mode=round_mode)
    else:
        narrow = numpy_helper.saturate_cast(array, kind) if saturate else array.astype(kind)
    return torch.from_numpy(narrow.astype(np.float32)).reshape(value.shape)


def _narrowed(x: Tensor, store: Callable[[Tensor], Tensor]) -> Tensor:
    """What a narrow float rounds to; the gradient passes. In float64, which stands for exact arithmetic, x itself."""
    return x if x.dtype == torch.float64 else value_of(store(x.detach()).to(x.dtype), x)


def _whole(x: Tensor, limits: tuple[int, int], *, whole: bool) -> Tensor:
    """Fractions go towards zero; what is out of range keeps its low bits, as in ONNX Runtime's casts.

    A float beyond 32 bits becomes 0 there.
    """
    x = x.long() if x.dtype == torch.bool else x
    if not x.is_floating_point() or whole:
        inside = (x >= limits[0]) & (x <= limits[1])
        return torch.where(inside, x, wrap(x, limits))
    kept = torch.where(x.abs() < _PAST_32_BITS, x.trunc(), torch.zeros_like(x))
    return wrap(kept.long(), limits)


_PAST_32_BITS = 2.0**31
