"""Poolings over a sliding window and over whole planes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.activations import Activation
from qdefense.converters.shadow.registry import Kernel, Node, operator
from qdefense.converters.shadow.windows import Padding, Window, window


@operator("GlobalAveragePool")
def global_average_pool(_node: Node) -> Kernel:
    """Mean over the spatial axes, which stay with size 1."""
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalMaxPool")
def global_max_pool(_node: Node) -> Kernel:
    """Maximum over the spatial axes, which stay with size 1."""
    return lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True)


@operator("GlobalLpPool", since=2)
def global_lp_pool(node: Node) -> Kernel:
    """The p-norm over the spatial axes, which stay with size 1."""
    power = node.integer("p", 2)
    return lambda x: torch.linalg.vector_norm(x, power, tuple(range(2, x.ndim)), keepdim=True)


@operator("MaxPool")
def max_pool(node: Node) -> Kernel:
    """Maximum in a sliding window; works on codes as on floats, padding never wins."""
    node.ignore("storage_order")
    node.keep_first_output()
    sliding = window(node)
    pool: Callable[..., Tensor] = _by_rank(node, sliding, _MAXIMA)

    def kernel(x: Tensor) -> Tensor:
        padded = _filled(x, sliding, -math.inf)
        return pool(padded, sliding.kernel, sliding.strides, 0, sliding.dilations)

    return kernel


@operator("AveragePool")
def average_pool(node: Node) -> Kernel:
    """Mean in a sliding window."""
    return averaging(node)


def averaging(node: Node) -> Activation:
    """The average pooling of a node as a function of its input.

    Raises:
        UnsupportedOperatorError: the window has more than three axes.
    """
    sliding = window(node)
    count_padding = bool(node.integer("count_include_pad", 0))
    total = _total(node, sliding)

    def function(x: Tensor) -> Tensor:
        padding = sliding.padding(x.shape[2:])
        counted = padding.apply(torch.ones_like(x[:1, :1]), 1.0 if count_padding else 0.0)
        return total(_filled(x, sliding, 0.0)) / total(_grown(counted, sliding, x.shape[2:], padding, 0.0))

    return function


@operator("LpPool", since=2)
def lp_pool(node: Node) -> Kernel:
    """The p-norm in a sliding window."""
    power, sliding = node.integer("p", 2), window(node)
    total = _total(node, sliding)

    def kernel(x: Tensor) -> Tensor:
        sums = total(_filled(x.abs().pow(power), sliding, 0.0))
        # the root has no gradient at zero
        inner = torch.where(sums > 0, sums, torch.ones_like(sums)).pow(1 / power)
        return torch.where(sums > 0, inner, torch.zeros_like(sums))

    return kernel


def _filled(x: Tensor, sliding: Window, value: float) -> Tensor:
    padding = sliding.padding(x.shape[2:])
    return _grown(padding.apply(x, value), sliding, x.shape[2:], padding, value)


def _grown(padded: Tensor, sliding: Window, sizes: torch.Size, padding: Padding, value: float) -> Tensor:
    """Cells that rounding the output size up adds behind the padding."""
    counts = sliding.outputs(sizes, padding)
    needed = [(count - 1) * stride + extent for count, stride, extent in zip(counts, sliding.strides, sliding.extent)]
    missing = tuple(max(0, cells - have) for cells, have in zip(needed, padded.shape[2:]))
    return Padding((0,) * len(missing), missing).apply(padded, value)


def _by_rank(node: Node, sliding: Window, functions: Mapping[int, Callable[..., Any]]) -> Callable[..., Any]:
    rank = len(sliding.kernel)
    if rank not in functions:
        raise node.unsupported(f"it pools over {rank} axes, at most 3 are covered")
    return functions[rank]


_MAXIMA: Mapping[int, Callable[..., Tensor]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}


def _total(node: Node, sliding: Window) -> Activation:
    """Sums in a sliding window, as a function of the padded tensor."""
    maker = _by_rank(node, sliding, _TOTALS)
    if any(dilation != 1 for dilation in sliding.dilations):
        return partial(_total_of_scattered_cells, sliding)
    total: Activation = maker(sliding.kernel, sliding.strides)
    return total


def _total_of_scattered_cells(sliding: Window, x: Tensor) -> Tensor:
    ones = torch.ones((1, 1, *sliding.kernel), dtype=x.dtype)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums = torch.convolution(
        planes, ones, None, sliding.strides, (0,) * len(sliding.kernel), sliding.dilations, False, (0,), 1
    )
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _total_of_one_axis(kernel: tuple[int, ...], strides: tuple[int, ...]) -> Activation:
    planar = _total_of_axes(functional.avg_pool2d, (1, *kernel), (1, *strides))
    return lambda x: planar(x.unsqueeze(-2)).squeeze(-2)


def _total_of_axes(pool: Callable[..., Tensor], kernel: tuple[int, ...], strides: tuple[int, ...]) -> Activation:
    return lambda x: pool(x, kernel, strides, divisor_override=1)


_TOTALS: Mapping[int, Callable[..., Activation]] = {
    1: _total_of_one_axis,
    2: partial(_total_of_axes, functional.avg_pool2d),
    3: partial(_total_of_axes, functional.avg_pool3d),
}
