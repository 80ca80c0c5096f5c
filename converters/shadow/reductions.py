"""Reductions along axes, positions of extremes, sorting and running sums."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.operands import listing, single
from qdefense.converters.shadow.registry import CODE_RANGES, Kernel, Node, operator

# of a tensor, at least one of its axes, and whether they stay with size 1
Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = x.numel() // max(1, _sum(x, axes, keep).numel())
    return torch.div(_sum(x, axes, keep), count, rounding_mode="trunc")


def _maximum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, _lowest(x.dtype))
    return x.amax(axes, keepdim=keep)


def _minimum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, _highest(x.dtype))
    return x.amin(axes, keepdim=keep)


def _lowest(dtype: torch.dtype) -> float:
    return float("-inf") if dtype.is_floating_point else (0 if dtype == torch.bool else torch.iinfo(dtype).min)


def _highest(dtype: torch.dtype) -> float:
    return float("inf") if dtype.is_floating_point else (1 if dtype == torch.bool else torch.iinfo(dtype).max)


def _of_nothing(x: Tensor, axes: tuple[int, ...], keep: bool, value: float) -> Tensor:
    return torch.full_like(_sum(x, axes, keep), value)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep, dtype=x.dtype)
    return x


def _absolute_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x.abs(), axes, keep)


def _square_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x * x, axes, keep)


def _euclidean_norm(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if not x.is_floating_point():
        return _square_sum(x, axes, keep).double().sqrt().to(x.dtype)
    # its gradient at zero is zero, the square root's is not a number
    norm: Tensor = torch.linalg.vector_norm(x, dim=axes, keepdim=keep)
    return norm


def _logarithm_of_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return _sum(x, axes, keep).log()


def _logarithm_of_exponentials(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.logsumexp(x, axes, keepdim=keep)


_REDUCTIONS: Mapping[str, Reduction] = {
    "ReduceL1": _absolute_sum,
    "ReduceL2": _euclidean_norm,
    "ReduceLogSum": _logarithm_of_sum,
    "ReduceLogSumExp": _logarithm_of_exponentials,
    "ReduceMax": _maximum,
    "ReduceMean": _mean,
    "ReduceMin": _minimum,
    "ReduceProd": _product,
    "ReduceSum": _sum,
    "ReduceSumSquare": _square_sum,
}
# of codes, these are codes again
_ON_CODES = {"ReduceMax", "ReduceMin"}


def _register(op_type: str, reduce: Reduction) -> None:
    @operator(op_type)
    def build(node: Node) -> Kernel:
        if node.element_type(0) in CODE_RANGES and op_type not in _ON_CODES:
            raise node.unsupported("it computes on integer codes")
        return _reduction(node, reduce)

    build.__doc__ = f"{op_type} over some axes, which are an attribute in old opsets and an input in new ones."


def _reduction(node: Node, reduce: Reduction) -> Kernel:
    keep, no_operation = bool(node.integer("keepdims", 1)), bool(node.integer("noop_with_empty_axes", 0))
    axes = listing(node, 1, "axes")

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        chosen = axes(given)
        if chosen:
            return reduce(x, chosen, keep)
        if no_operation or x.ndim == 0:
            # every element is a reduction of its own: what happens before and after it still does
            return reduce(x.unsqueeze(-1), (-1,), False)
        return reduce(x, tuple(range(x.ndim)), keep)

    return kernel


for _name, _reduce in _REDUCTIONS.items():
    _register(_name, _reduce)


@operator("ArgMax")
def arg_max(node: Node) -> Kernel:
    """Position of the largest value along one axis."""
    return _position(node, torch.argmax)


@operator("ArgMin")
def arg_min(node: Node) -> Kernel:
    """Position of the smallest value along one axis."""
    return _position(node, torch.argmin)


def _position(node: Node, find: Callable[..., Tensor]) -> Kernel:
    axis, keep = node.integer("axis", 0), bool(node.integer("keepdims", 1))
    last = bool(node.integer("select_last_index", 0))
    node.emits = (TensorProto.INT64,)
    if last:
        return lambda x: x.shape[axis] - 1 - find(x.flip(axis), axis, keepdim=keep)
    return lambda x: find(x, axis, keepdim=keep)


@operator("TopK")
def top_k(node: Node) -> Kernel:
    """The k largest or smallest values along one axis, and their positions; of equal ones the first come first."""
    axis, largest = node.integer("axis", -1), bool(node.integer("largest", 1))
    count = single(node, 1, "k", 0)
    node.ignore("sorted")
    node.emits = (node.element_type(0) or TensorProto.FLOAT, TensorProto.INT64)

    def kernel(x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        values, positions = x.sort(dim=axis, descending=largest, stable=True)
        wanted = count(given)
        return values.narrow(axis, 0, wanted), positions.narrow(axis, 0, wanted)

    return kernel


@operator("CumSum", since=11)
def cumulative_sum(node: Node) -> Kernel:
    """Running sum along one axis."""
    return _running(node, torch.cumsum, 0)


@operator("CumProd", since=26)
def cumulative_product(node: Node) -> Kernel:
    """Running product along one axis."""
    return _running(node, torch.cumprod, 1)


def _running(node: Node, accumulate: Callable[..., Tensor], neutral: int) -> Kernel:
    exclusive, reverse = bool(node.integer("exclusive", 0)), bool(node.integer("reverse", 0))
    axis = single(node, 1, "", 0)

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        at = axis(given)
        x = x.flip(at) if reverse else x
        if exclusive:
            first = torch.full_like(x.narrow(at, 0, 1), neutral)
            x = torch.cat([first, x.narrow(at, 0, x.shape[at] - 1)], at)
        total = accumulate(x, at, dtype=x.dtype)
        return total.flip(at) if reverse else total

    return kernel
