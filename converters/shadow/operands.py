"""What operators do to their inputs before they compute: meet, wrap around, be read as lists of integers.

Dynamic INT8 computes one scale and zero point for a whole tensor. The shadow computes them for each image, which
equals the runtime at batch 1. Such a value has the ONNX shape S, () for a fresh scale, and is carried as (N, *S):
the images come first, whatever S is. Where it meets a batch tensor (N, ...) it is spread over that tensor's axes.
"""

from __future__ import annotations

from collections.abc import Callable

from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.registry import CODE_RANGES, UNSIGNED_RANGES, Kernel, Node, ShadowError

Pairwise = Callable[[Tensor, Tensor], Tensor]
_LARGEST = 2**63 - 1
Listing = Callable[[Tensor | None], tuple[int, ...] | None]


def spread(value: Tensor, rank: int) -> Tensor:
    """A per-image value (N, *S) as (N, 1, ..., 1, *S) of the given rank, ready to broadcast against a batch."""
    inner = value.shape[1:]
    surplus = max(0, len(inner) - (rank - 1))
    if any(size != 1 for size in inner[:surplus]):
        raise ValueError(f"a per-image value of shape {tuple(inner)} doesn't fit a batch tensor of rank {rank}")
    kept = inner[surplus:]
    return value.reshape(value.shape[0], *(1,) * (rank - 1 - len(kept)), *kept)


def pairwise(node: Node, function: Pairwise) -> Kernel:
    """The kernel of a broadcasting operator with two inputs, either of which may be per image.

    Integers of up to 16 bits wrap around, as they do in the file.
    """
    function = wrapping(node, function)
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


def wrapping(node: Node, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function, on codes and unsigned integers computed without rounding and wrapped around into their range."""
    kind = node.element_type(0) or TensorProto.UNDEFINED
    if kind in UNSIGNED_RANGES:
        return lambda *numbers: wrap(function(*numbers), UNSIGNED_RANGES[kind])
    if kind not in CODE_RANGES:
        return function
    # products of 16 bit codes have more digits than float32
    return lambda *codes: wrap(function(*(each.double() for each in codes)), CODE_RANGES[kind]).to(codes[0].dtype)


def wrap(values: Tensor, limits: tuple[int, int]) -> Tensor:
    """Whole numbers modulo the size of the range ``low, ..., high``, as integers of so many bits overflow.

    Raises:
        ShadowError: an unsigned 64 bit integer is larger than the shadow can carry.
    """
    low, high = limits
    if high < _LARGEST:
        return (values - low).remainder(high - low + 1) + low
    if bool((values < 0).any()):
        raise ShadowError("an unsigned 64 bit integer passes 2**63, which the shadow can't carry; export it as INT64")
    return values


def listing(node: Node, index: int, attribute: str = "") -> Listing:
    """The integers that a node lists as an attribute, a constant or a computed input: a function of that input.

    The function gives None where neither the attribute nor the input is there.
    """
    fixed = node.integers(attribute) if attribute else None
    if node.has(index) and index not in node.constants:
        return lambda given: None if given is None else tuple(given.reshape(-1).tolist())
    if node.has(index):
        fixed = tuple(int(number) for number in node.constant(index).reshape(-1).tolist())
    return lambda _given: fixed


def single(node: Node, index: int, attribute: str, default: int) -> Callable[[Tensor | None], int]:
    """The integer that a node holds as an attribute, a constant or a computed input: a function of that input."""
    fallback = node.integer(attribute, default) if attribute else default
    numbers = listing(node, index)

    def read(given: Tensor | None) -> int:
        found = numbers(given)
        return found[0] if found else fallback

    return read
