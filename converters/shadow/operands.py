"""How values that dynamic quantization computes per image meet ordinary tensors.

Dynamic INT8 computes one scale and zero point for a whole tensor. The shadow computes them for each image, which
equals the runtime at batch 1. Such a value has the ONNX shape S, () for a fresh scale, and is carried as (N, *S):
the images come first, whatever S is. Where it meets a batch tensor (N, ...) it is spread over that tensor's axes.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from qdefense.converters.shadow.registry import CODE_RANGES, Kernel, Node


def spread(value: Tensor, rank: int) -> Tensor:
    """A per-image value (N, *S) as (N, 1, ..., 1, *S) of the given rank, ready to broadcast against a batch."""
    inner = value.shape[1:]
    surplus = max(0, len(inner) - (rank - 1))
    if any(size != 1 for size in inner[:surplus]):
        raise ValueError(f"a per-image value of shape {tuple(inner)} doesn't fit a batch tensor of rank {rank}")
    kept = inner[surplus:]
    return value.reshape(value.shape[0], *(1,) * (rank - 1 - len(kept)), *kept)


def pairwise(node: Node, function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    """The kernel of a broadcasting operator with two inputs, either of which may be per image.

    Raises:
        UnsupportedOperatorError: an input is an 8 bit integer, whose arithmetic wraps around.
    """
    if any(kind in CODE_RANGES for kind in node.element_types):
        raise node.unsupported("it computes on integer codes, which wrap around")
    left, right = node.per_row
    if not (left or right):
        return function
    if left and right:
        return lambda a, b: function(spread(a, max(a.ndim, b.ndim)), spread(b, max(a.ndim, b.ndim)))
    # a constant has no axis for the images, a batch tensor has
    surplus = 1 if (1 if left else 0) in node.constants else 0
    if left:
        return lambda a, b: function(spread(a, max(a.ndim, b.ndim + surplus)), b)
    return lambda a, b: function(a, spread(b, max(b.ndim, a.ndim + surplus)))
