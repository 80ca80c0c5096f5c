"""Operators that move values without changing them, and those that compute shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.operands import listing
from qdefense.converters.shadow.registry import Kernel, Node, operator


@operator("Identity", per_row=True)
def identity(_node: Node) -> Kernel:
    """The input."""
    return lambda x: x


@operator("Dropout")
def dropout(node: Node) -> Kernel:
    """The input, and a mask that keeps everything: the shadow never trains with dropout.

    Raises:
        UnsupportedOperatorError: the node drops values.
    """
    node.ignore("ratio", "seed")
    ratio = node.optional_constant(1)
    if node.has(2) and bool(node.constant(2)) and (ratio is None or float(ratio) != 0):
        raise node.unsupported("it is in training mode")
    node.emits = (node.element_type(0) or TensorProto.FLOAT, TensorProto.BOOL)
    if len(node.outputs) == 1:
        return lambda x, *_: x
    return lambda x, *_: (x, torch.ones(x.shape, dtype=torch.bool))


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
    sizes = listing(node, 1, "shape")

    def kernel(x: Tensor, shape: Tensor | None = None) -> Tensor:
        wanted = sizes(shape) or ()
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
    axes, offset = listing(node, 1, "axes"), 1 if node.per_row[0] else 0

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        # an empty list says what none says
        rank, named = x.ndim - offset, axes(given) or None
        chosen = range(rank) if named is None else [axis % rank for axis in named]
        gone = {axis + offset for axis in chosen if named is not None or x.shape[axis + offset] == 1}
        return x.squeeze(tuple(gone))

    return kernel


@operator("Unsqueeze", per_row=True)
def unsqueeze(node: Node) -> Kernel:
    """Axes of size 1 inserted."""
    axes, offset = listing(node, 1, "axes"), 1 if node.per_row[0] else 0

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        named = axes(given) or ()
        rank = x.ndim - offset + len(named)
        for axis in sorted(axis % rank for axis in named):
            x = x.unsqueeze(axis + offset)
        return x

    return kernel


@operator("Concat")
def concat(node: Node) -> Kernel:
    """Tensors joined along one axis."""
    axis = node.integer("axis", 1)
    return lambda *x: torch.cat(x, axis)


@operator("Split")
def split(node: Node) -> Kernel:
    """Parts of the given sizes along one axis, else equal ones of which the last may be smaller."""
    axis, sizes = node.integer("axis", 0), listing(node, 1, "split")
    count = node.integer("num_outputs", len(node.outputs))

    def kernel(x: Tensor, given: Tensor | None = None) -> tuple[Tensor, ...]:
        named, total = sizes(given), x.shape[axis]
        each = -(-total // count)
        equal = [max(0, min(each, total - at * each)) for at in range(count)]
        return tuple(x.split_with_sizes(named or equal, axis))

    return kernel


@operator("Expand", since=8)
def expand(node: Node) -> Kernel:
    """Axes of size 1 repeated, by the rules of broadcasting."""
    sizes = listing(node, 1)

    def kernel(x: Tensor, shape: Tensor | None = None) -> Tensor:
        return x.expand(torch.broadcast_shapes(x.shape, sizes(shape) or ()))  # type: ignore[no-untyped-call]

    return kernel


@operator("Tile", since=6)
def tile(node: Node) -> Kernel:
    """Each axis repeated as a whole."""
    repeats = listing(node, 1)
    return lambda x, given=None: x.repeat(repeats(given) or ())


def _blocks(node: Node) -> tuple[int, str]:
    """The size of a block, and whether its cells or the channels come first.

    Raises:
        UnsupportedOperatorError: the mode is neither DCR nor CRD.
    """
    mode = node.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise node.unsupported(f"attribute 'mode' is {mode!r}, expected 'DCR' or 'CRD'")
    return node.integer("blocksize", 1), mode


@operator("DepthToSpace")
def depth_to_space(node: Node) -> Kernel:
    """Channels (N, b b C, H, W) laid out as blocks (N, C, b H, b W)."""
    block, mode = _blocks(node)

    def kernel(x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        inner = channels // block**2
        if mode == "DCR":
            parts = x.reshape(rows, block, block, inner, height, width).permute(0, 3, 4, 1, 5, 2)
        else:
            parts = x.reshape(rows, inner, block, block, height, width).permute(0, 1, 4, 2, 5, 3)
        return parts.reshape(rows, inner, height * block, width * block)

    return kernel


@operator("SpaceToDepth")
def space_to_depth(node: Node) -> Kernel:
    """Blocks (N, C, b H, b W) laid out as channels (N, b b C, H, W)."""
    block, mode = _blocks(node)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)

    def kernel(x: Tensor) -> Tensor:
        rows, channels, height, width = x.shape
        parts = x.reshape(rows, channels, height // block, block, width // block, block).permute(order)
        return parts.reshape(rows, channels * block**2, height // block, width // block)

    return kernel


@operator("Shape")
def shape(node: Node) -> Kernel:
    """The input's shape as int64."""
    start, end = node.integer("start", 0), node.optional_integer("end")
    node.emits = (TensorProto.INT64,)
    return lambda x: torch.tensor(x.shape[start:end], dtype=torch.int64)


@operator("Size")
def size(node: Node) -> Kernel:
    """How many elements the input has, as int64."""
    node.emits = (TensorProto.INT64,)
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)
