"""Operators that move values without changing them, and those that compute shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.door import round_half
from qdefense.converters.shadow.registry import Kernel, Node, operator

_CASTS: Mapping[int, torch.dtype] = {
    TensorProto.DOUBLE: torch.float64,
    TensorProto.INT64: torch.int64,
    TensorProto.INT32: torch.int32,
    TensorProto.BOOL: torch.bool,
}


@operator("Identity", per_row=True)
def identity(_node: Node) -> Kernel:
    """The input."""
    return lambda x: x


@operator("Dropout")
def dropout(node: Node) -> Kernel:
    """The input: the shadow never trains with dropout."""
    node.ignore("ratio", "seed")
    node.keep_first_output()
    if node.has(2) and bool(node.constant(2)):
        raise node.unsupported("it is in training mode")
    return lambda x, *_: x


@operator("Cast", per_row=True, needs_mode=True)
def cast(node: Node) -> Kernel:
    """Another element type; float16 is carried as what it rounds to, 8 bit integers can't be made."""
    node.ignore("saturate", "round_mode")
    target = node.integer("to", TensorProto.UNDEFINED)
    node.emits = (target,)
    if target == TensorProto.FLOAT:
        return lambda mode, x: x.to(mode.dtype)
    if target == TensorProto.FLOAT16:
        return lambda mode, x: round_half(x.to(mode.dtype))
    if target not in _CASTS:
        covered = sorted([TensorProto.FLOAT, TensorProto.FLOAT16, *_CASTS])
        raise node.unsupported(f"attribute 'to' is element type {target}, covered are {covered}")
    return lambda _mode, x: x.to(_CASTS[target])


@operator("Flatten")
def flatten(node: Node) -> Kernel:
    """A matrix: the axes before `axis`, and the rest."""
    axis = node.integer("axis", 1)

    def kernel(x: Tensor) -> Tensor:
        split = axis + x.ndim if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:split]), math.prod(x.shape[split:]))

    return kernel


@operator("Reshape", per_row=True)
def reshape(node: Node) -> Kernel:
    """Another shape; 0 keeps an axis unless `allowzero` is set."""
    keep_zero = bool(node.integer("allowzero", 0))
    fixed = node.integers("shape") if not node.has(1) else None
    if 1 in node.constants:
        fixed = tuple(int(size) for size in node.constant(1).tolist())

    def kernel(x: Tensor, shape: Tensor | None = None) -> Tensor:
        wanted = fixed or (() if shape is None else tuple(shape.tolist()))
        if node.per_row[0]:
            return x.reshape(x.shape[0], *_resolved(wanted, x.shape[1:], keep_zero=keep_zero))
        return x.reshape(_resolved(wanted, x.shape, keep_zero=keep_zero))

    return kernel


def _resolved(wanted: Sequence[int], shape: Sequence[int], *, keep_zero: bool) -> tuple[int, ...]:
    return tuple(shape[axis] if size == 0 and not keep_zero else size for axis, size in enumerate(wanted))


@operator("Transpose")
def transpose(node: Node) -> Kernel:
    """Permuted axes, reversed where no order is given."""
    order = node.integers("perm")
    return lambda x: x.permute(order if order is not None else tuple(reversed(range(x.ndim))))


@operator("Squeeze", per_row=True)
def squeeze(node: Node) -> Kernel:
    """Axes of size 1 removed."""
    axes, offset = _axes(node), 1 if node.per_row[0] else 0

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        rank = x.ndim - offset
        chosen = range(rank) if axes is None else [axis % rank for axis in axes]
        gone = {axis + offset for axis in chosen if axes is not None or x.shape[axis + offset] == 1}
        return x.squeeze(tuple(gone))

    return kernel


@operator("Unsqueeze", per_row=True)
def unsqueeze(node: Node) -> Kernel:
    """Axes of size 1 inserted."""
    axes, offset = _axes(node) or (), 1 if node.per_row[0] else 0

    def kernel(x: Tensor, *_: Tensor) -> Tensor:
        rank = x.ndim - offset + len(axes)
        for axis in sorted(axis % rank for axis in axes):
            x = x.unsqueeze(axis + offset)
        return x

    return kernel


def _axes(node: Node) -> tuple[int, ...] | None:
    return tuple(node.constant(1).tolist()) if node.has(1) else node.integers("axes")


@operator("Concat")
def concat(node: Node) -> Kernel:
    """Tensors joined along one axis."""
    axis = node.integer("axis", 0)
    return lambda *x: torch.cat(x, axis)


@operator("Shape")
def shape(node: Node) -> Kernel:
    """The input's shape as int64."""
    start, end = node.integer("start", 0), node.optional_integer("end")
    node.emits = (TensorProto.INT64,)
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Gather")
def gather(node: Node) -> Kernel:
    """Slices picked by index along one axis."""
    axis = node.integer("axis", 0)

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.ndim
        positive = torch.where(indices < 0, indices + x.shape[at], indices).long()
        picked = x.index_select(at, positive.reshape(-1))
        return picked.reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1 :]))

    return kernel


@operator("Slice", since=10)
def slice_(node: Node) -> Kernel:
    """Ranges of some axes, given as inputs."""
    starts, ends = node.constant(1).tolist(), node.constant(2).tolist()
    axes = node.constant(3).tolist() if node.has(3) else list(range(len(starts)))
    steps = node.constant(4).tolist() if node.has(4) else [1] * len(starts)
    return lambda x, *_: _sliced(x, starts, ends, axes, steps)


@operator("Slice")
def slice_by_attributes(node: Node) -> Kernel:
    """Ranges of some axes, given as attributes (before opset 10)."""
    starts, ends = node.integers("starts") or (), node.integers("ends") or ()
    axes = node.integers("axes") or tuple(range(len(starts)))
    return lambda x: _sliced(x, starts, ends, axes, [1] * len(starts))


def _sliced(x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Tensor:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = range(x.shape[axis])[start:end:step]
        if step == 1:
            x = x.narrow(axis, chosen.start, len(chosen))
        else:
            x = x.index_select(axis, torch.tensor(chosen, dtype=torch.int64))
    return x
