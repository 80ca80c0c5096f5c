"""Convolutions and their transposes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from qdefense.converters.shadow.registry import Kernel, Mode, Node, operator
from qdefense.converters.shadow.summation_order import convolve_in_order
from qdefense.converters.shadow.windows import Padding, Window, window

_MOST_AXES = 3
_CHANNELS_OF_A_BLOCK = 8


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sliding: Window, groups: int) -> Tensor:
    """The convolution of `x`: (N, C, ...) with `weight`: (O, C / groups, ...)."""
    padding, strides = sliding.padding(x.shape[2:]), sliding.strides
    inner = padding.begin if padding.symmetric else (0,) * len(padding.begin)
    if not padding.symmetric:
        x = padding.apply(x)
    if groups == 1 and not any(inner) and _overruns(weight):
        x, strides = x[tuple(slice(None, None, step) for step in (1, 1, *strides))], (1,) * len(strides)
    return torch.convolution(x, weight, bias, strides, inner, sliding.dilations, False, (0,), groups)


def _overruns(weight: Tensor) -> bool:
    """Whether the gradient of a kernel may be written past the end of a buffer where the stride is above 1.

    oneDNN's AVX2 kernel does that for 1x1 kernels on fewer channels than a block, channels last: heap corruption, a
    hang or a wrong gradient (its issue 6035). Picking the cells first is the same convolution, with stride 1.
    """
    return weight.requires_grad and math.prod(weight.shape[2:]) == 1 and weight.shape[1] < _CHANNELS_OF_A_BLOCK


def _weight_window(node: Node) -> Window:
    """The window of a node whose kernel is its second input.

    Raises:
        UnsupportedOperatorError: neither the weight nor `kernel_shape` is known at build time, or there are more than
            three spatial axes.
    """
    known = 1 in node.constants or "kernel_shape" not in node.attributes
    sliding = window(node, node.constant_shape(1)[2:] if known else None)
    if len(sliding.kernel) > _MOST_AXES:
        raise node.unsupported(f"it slides over {len(sliding.kernel)} axes, at most {_MOST_AXES} are covered")
    return sliding


def convolution(node: Node, finish: Callable[[Tensor, Tensor | None], Tensor]) -> Kernel:
    """The convolution of a node; `finish` takes its result and the fourth input, where there is one."""
    sliding = _weight_window(node)
    groups, stored = node.integer("group", 1), 1 in node.constants and node.constants[1].initializer == node.inputs[1]

    def kernel(
        mode: Mode, x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None
    ) -> Tensor:
        y = convolve_in_order(x, weight, bias, sliding, groups, stored=stored) if mode.exact else None
        return finish(convolve(x, weight, bias, sliding, groups) if y is None else y, added)

    return kernel


@operator("Conv", needs_mode=True)
def conv(node: Node) -> Kernel:
    """Convolution over one to three axes."""
    return convolution(node, lambda y, _added: y)


@operator("ConvTranspose")
def conv_transpose(node: Node) -> Kernel:
    """The transpose of a convolution; `output_shape` takes the place of the padding."""
    sliding = _weight_window(node)
    groups, rank = node.integer("group", 1), len(sliding.kernel)
    extra = node.integers("output_padding") or (0,) * rank
    shape = node.integers("output_shape")
    if len(extra) != rank or (shape is not None and len(shape) < rank):
        raise node.unsupported(f"'output_padding' {extra} or 'output_shape' {shape} don't fit kernel {sliding.kernel}")

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        padding = _removed(sliding, x.shape[2:], extra, None if shape is None else shape[-rank:])
        return _transposed(x, weight, bias, sliding, groups, extra, padding)

    return kernel


def _removed(sliding: Window, sizes: torch.Size, extra: tuple[int, ...], shape: tuple[int, ...] | None) -> Padding:
    """Cells that are cut off both ends of the full result, whose size `output_shape` or `auto_pad` may set."""
    if shape is None and sliding.auto_pad in ("NOTSET", "VALID"):
        return sliding.padding(sizes)
    stated = shape is not None
    if shape is None:
        shape = tuple(size * stride for size, stride in zip(sizes, sliding.strides, strict=True))
    cells = zip(sizes, sliding.strides, sliding.extent, extra, shape, strict=True)
    total = [(size - 1) * stride + more + extent - wanted for size, stride, extent, more, wanted in cells]
    small = tuple(max(0, count) // 2 for count in total)
    large = tuple(max(0, count) - less for count, less in zip(total, small, strict=True))
    begin, end = (small, large) if sliding.auto_pad == "SAME_UPPER" else (large, small)
    # a result smaller than a stated size grows at its end; ONNX Runtime leaves one that `auto_pad` would have grown
    return Padding(begin, tuple(cells + min(0, count) * stated for cells, count in zip(end, total, strict=True)))


def _transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sliding: Window,
    groups: int,
    extra: tuple[int, ...],
    padding: Padding,
) -> Tensor:
    zeros = (0,) * len(extra)
    if padding.symmetric and not any(extra):
        return torch.convolution(
            x, weight, bias, sliding.strides, padding.begin, sliding.dilations, True, zeros, groups
        )
    full = torch.convolution(x, weight, None, sliding.strides, zeros, sliding.dilations, True, zeros, groups)
    removed = Padding(
        tuple(-cells for cells in padding.begin), tuple(more - cells for more, cells in zip(extra, padding.end))
    )
    y = removed.apply(full)
    return y if bias is None else y + bias.reshape(-1, *(1 for _ in extra))
