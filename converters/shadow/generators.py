"""Operators whose values don't come from their inputs: constants of a computed shape, ranges, masks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qdefense.converters.shadow.casting import carrier
from qdefense.converters.shadow.operands import listing, single
from qdefense.converters.shadow.registry import Kernel, Mode, Node, operator


@operator("ConstantOfShape", since=9, needs_mode=True)
def constant_of_shape(node: Node) -> Kernel:
    """One value, zero where none is given, in a tensor of the given shape."""
    node.ignore("value")
    given = node.attributes.get("value")
    kind = given.data_type if isinstance(given, TensorProto) else TensorProto.FLOAT
    value = numpy_helper.to_array(given).item() if isinstance(given, TensorProto) else 0.0
    carrier(node, kind, torch.float32)
    sizes = listing(node, 0)
    node.emits = (kind,)

    def kernel(mode: Mode, shape: Tensor | None = None) -> Tensor:
        return torch.full(sizes(shape) or (), value, dtype=carrier(node, kind, mode.dtype))

    return kernel


@operator("Range", since=11)
def range_(_node: Node) -> Kernel:
    """``start, start + delta, ...`` up to `limit`, which is left out."""

    def kernel(start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
        count = max(0, int(torch.ceil((limit - start).double() / delta.double())))
        return start + torch.arange(count, dtype=start.dtype) * delta

    return kernel


@operator("EyeLike", since=9, needs_mode=True)
def eye_like(node: Node) -> Kernel:
    """Ones on the k-th diagonal of a matrix of the input's shape."""
    offset, kind = node.integer("k", 0), node.integer("dtype", node.element_type(0) or TensorProto.FLOAT)
    carrier(node, kind, torch.float32)
    node.emits = (kind,)

    def kernel(mode: Mode, x: Tensor) -> Tensor:
        rows, columns = torch.arange(x.shape[0]).unsqueeze(1), torch.arange(x.shape[1])
        return (columns - rows == offset).to(carrier(node, kind, mode.dtype))

    return kernel


@operator("Trilu", since=14)
def trilu(node: Node) -> Kernel:
    """The upper or lower triangle of matrices, zero elsewhere."""
    cut: Callable[[Tensor, int], Tensor] = torch.triu if node.integer("upper", 1) else torch.tril
    diagonal = single(node, 1, "", 0)
    return lambda x, given=None: cut(x, diagonal(given))


@operator("OneHot", since=9)
def one_hot(node: Node) -> Kernel:
    """The second of two values where the position along a new axis equals the index, the first elsewhere."""
    axis, depth = node.integer("axis", -1), single(node, 1, "", 0)
    kind = node.element_type(2)
    node.emits = () if kind is None else (kind,)

    def kernel(indices: Tensor, given: Tensor | None, values: Tensor) -> Tensor:
        count = depth(given)
        at = axis % (indices.ndim + 1)
        positions = torch.arange(count).reshape(-1, *(1 for _ in range(indices.ndim - at)))
        positive = torch.where(indices < 0, indices + count, indices)
        return torch.where(positive.unsqueeze(at) == positions, values[1], values[0])

    return kernel
