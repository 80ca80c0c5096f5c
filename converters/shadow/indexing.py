"""Operators that pick elements by position, and those that put elements into place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from qdefense.converters.shadow.operands import listing
from qdefense.converters.shadow.registry import Kernel, Node, operator

_REDUCTIONS: Mapping[str, str] = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _positive(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices).long()


@operator("Gather")
def gather(node: Node) -> Kernel:
    """Slices picked by index along one axis."""
    axis = node.integer("axis", 0)
    if 1 in node.constants and node.constant_shape(1) == ():
        position = int(node.constant(1))
        return lambda x, *_: x.select(axis, position)

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.ndim
        picked = x.index_select(at, _positive(indices, x.shape[at]).reshape(-1))
        return picked.reshape((*x.shape[:at], *indices.shape, *x.shape[at + 1 :]))

    return kernel


@operator("GatherElements", since=11)
def gather_elements(node: Node) -> Kernel:
    """Elements picked by their position along one axis."""
    axis = node.integer("axis", 0)
    return lambda x, indices: x.gather(axis, _positive(indices, x.shape[axis]))


@operator("GatherND", since=11)
def gather_nd(node: Node) -> Kernel:
    """Slices picked by their positions along the first axes behind the batch."""
    batch = node.integer("batch_dims", 0)

    def kernel(x: Tensor, indices: Tensor) -> Tensor:
        lead, outer = x.shape[:batch], indices.shape[batch:-1]
        planes = x.reshape(-1, *x.shape[batch:])
        positions = indices.long().reshape(planes.shape[0], -1, indices.shape[-1])
        rows = torch.arange(planes.shape[0]).unsqueeze(1).expand(positions.shape[:2])
        picked = planes[(rows, *positions.unbind(-1))]
        return picked.reshape(*lead, *outer, *picked.shape[2:])

    return kernel


@operator("Scatter", since=9)
@operator("ScatterElements", since=11)
def scatter_elements(node: Node) -> Kernel:
    """Elements put into place, or combined with what is there, by their position along one axis."""
    axis, reduction = node.integer("axis", 0), _reduction(node)

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        positions = _positive(indices, x.shape[axis])
        if reduction is None:
            return x.scatter(axis, positions, updates)
        return x.scatter_reduce(axis, positions, updates, reduction)

    return kernel


@operator("ScatterND", since=11)
def scatter_nd(node: Node) -> Kernel:
    """Slices put into place, or combined with what is there, by their positions along the first axes."""
    reduction = _reduction(node)

    def kernel(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        depth = indices.shape[-1]
        slices = x.reshape(_product(x.shape[:depth]), -1)
        rows = _rows(indices.reshape(-1, depth), x.shape[:depth])
        fresh = updates.reshape(rows.numel(), slices.shape[1])
        if reduction is None:
            return slices.index_copy(0, rows, fresh).reshape(x.shape)
        return slices.scatter_reduce(0, rows.unsqueeze(1).expand_as(fresh), fresh, reduction).reshape(x.shape)

    return kernel


def _reduction(node: Node) -> str | None:
    """What torch calls the reduction of a scatter; None puts values into place.

    Raises:
        UnsupportedOperatorError: the reduction is unknown.
    """
    name = node.text("reduction", "none")
    if name != "none" and name not in _REDUCTIONS:
        raise node.unsupported(f"attribute 'reduction' is {name!r}, expected one of {['none', *_REDUCTIONS]}")
    return _REDUCTIONS.get(name)


def _product(sizes: Sequence[int]) -> int:
    result = 1
    for size in sizes:
        result *= size
    return result


def _rows(positions: Tensor, sizes: Sequence[int]) -> Tensor:
    """Positions (K, depth) in axes of the given sizes as positions in one flat axis (K,)."""
    rows = torch.zeros(positions.shape[0], dtype=torch.int64)
    for at, size in enumerate(sizes):
        rows = rows * size + _positive(positions[:, at], size)
    return rows


@operator("Compress", since=9)
def compress(node: Node) -> Kernel:
    """The slices along one axis, or the elements, where a condition holds."""
    axis = node.optional_integer("axis")

    def kernel(x: Tensor, condition: Tensor) -> Tensor:
        positions = condition.nonzero().reshape(-1)
        return x.reshape(-1).index_select(0, positions) if axis is None else x.index_select(axis, positions)

    return kernel


@operator("Slice", since=10)
def slice_(node: Node) -> Kernel:
    """Ranges of some axes, given as inputs."""
    first, last, chosen, stride = (listing(node, index) for index in (1, 2, 3, 4))

    def kernel(x: Tensor, *given: Tensor | None) -> Tensor:
        starts, ends, axes, steps = (
            read(given[at] if at < len(given) else None) for at, read in enumerate((first, last, chosen, stride))
        )
        count = len(starts or ())
        return _sliced(x, starts or (), ends or (), axes or range(count), steps or (1,) * count)

    return kernel


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
