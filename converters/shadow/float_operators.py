"""Operators on float tensors: convolutions, products, normalisation, activations, pooling, reductions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.operands import pairwise
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Node, operator
from qdefense.converters.shadow.windows import Padding, Window, window

Activation = Callable[[Tensor], Tensor]


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, sliding: Window, groups: int) -> Tensor:
    """The convolution of `x`: (N, C, ...) with `weight`: (O, C / groups, ...)."""
    padding = sliding.padding(x.shape[2:])
    inner = padding.begin if padding.symmetric else (0,) * len(padding.begin)
    if not padding.symmetric:
        x = padding.apply(x)
    return torch.convolution(x, weight, bias, sliding.strides, inner, sliding.dilations, False, (0,), groups)


def _convolution(node: Node, finish: Callable[[Tensor, Tensor | None], Tensor]) -> Kernel:
    sliding = window(node, node.constant_shape(1)[2:])
    groups = node.integer("group", 1)

    def kernel(x: Tensor, weight: Tensor, bias: Tensor | None = None, added: Tensor | None = None) -> Tensor:
        return finish(convolve(x, weight, bias, sliding, groups), added)

    return kernel


@operator("Conv")
def conv(node: Node) -> Kernel:
    """Convolution over any number of axes."""
    return _convolution(node, lambda y, _added: y)


@operator("FusedConv", MICROSOFT)
def fused_conv(node: Node) -> Kernel:
    """ONNX Runtime's convolution with an optional tensor added and an activation."""
    activate = _activation(node, node.text("activation", ""), node.numbers("activation_params"))
    return _convolution(node, lambda y, added: activate(y if added is None else y + added))


def _activation(node: Node, name: str, numbers: tuple[float, ...]) -> Activation:
    makers: Mapping[str, Callable[..., Activation]] = {
        "": lambda: lambda x: x,
        "Relu": lambda: torch.relu,
        "Sigmoid": lambda: torch.sigmoid,
        "Tanh": lambda: torch.tanh,
        "LeakyRelu": lambda alpha=0.01: lambda x: functional.leaky_relu(x, alpha),
        "Clip": lambda low=-math.inf, high=math.inf: lambda x: x.clamp(low, high),
        "HardSigmoid": lambda alpha=0.2, beta=0.5: lambda x: (alpha * x + beta).clamp(0, 1),
    }
    if name not in makers:
        raise node.unsupported(f"activation {name!r} is not one of {sorted(filter(None, makers))}")
    return makers[name](*numbers)


def _general_product(node: Node, activate: Activation) -> Kernel:
    left, right = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    alpha, beta = node.number("alpha", 1.0), node.number("beta", 1.0)

    def kernel(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        a, b = a.t() if left else a, b.t() if right else b
        if c is None:
            return activate(alpha * (a @ b) if alpha != 1 else a @ b)
        return activate(torch.addmm(c, a, b, beta=beta, alpha=alpha))

    return kernel


@operator("Gemm")
def gemm(node: Node) -> Kernel:
    """``alpha A B + beta C``."""
    node.ignore("broadcast")
    return _general_product(node, lambda y: y)


@operator("FusedGemm", MICROSOFT)
def fused_gemm(node: Node) -> Kernel:
    """ONNX Runtime's Gemm with an activation."""
    given = ("activation_alpha", "activation_beta", "activation_gamma")
    numbers = tuple(node.number(name, 0.0) for name in given if name in node.attributes)
    return _general_product(node, _activation(node, node.text("activation", ""), numbers))


@operator("MatMul")
def matmul(_node: Node) -> Kernel:
    """Matrix product with numpy's broadcasting."""
    return lambda a, b: a @ b


@operator("FusedMatMul", MICROSOFT)
def fused_matmul(node: Node) -> Kernel:
    """ONNX Runtime's scaled matrix product with transposed operands."""
    node.require("transBatchA", 0)
    node.require("transBatchB", 0)
    left, right = bool(node.integer("transA", 0)), bool(node.integer("transB", 0))
    alpha = node.number("alpha", 1.0)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        product = (a.mT if left else a) @ (b.mT if right else b)
        return product if alpha == 1 else alpha * product

    return kernel


@operator("Add", per_row=True)
def add(node: Node) -> Kernel:
    """Sum."""
    return pairwise(node, torch.add)


@operator("Sub", per_row=True)
def sub(node: Node) -> Kernel:
    """Difference."""
    return pairwise(node, torch.sub)


@operator("Mul", per_row=True)
def mul(node: Node) -> Kernel:
    """Product, element by element."""
    return pairwise(node, torch.mul)


@operator("Div", per_row=True)
def div(node: Node) -> Kernel:
    """Quotient; integers are divided towards zero."""
    return pairwise(node, _divide)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return a / b if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Relu")
def relu(_node: Node) -> Kernel:
    """max(x, 0)."""
    return torch.relu


@operator("LeakyRelu")
def leaky_relu(node: Node) -> Kernel:
    """Keep x, or alpha x below zero."""
    return _activation(node, "LeakyRelu", (node.number("alpha", 0.01),))


@operator("Sigmoid")
def sigmoid(_node: Node) -> Kernel:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid


@operator("Clip")
def clip(node: Node) -> Kernel:
    """Hold x between two bounds, which are attributes before opset 11 and inputs since."""
    low, high = (
        float(node.constant(index)) if node.has(index) else node.number(name, default)
        for index, name, default in ((1, "min", -math.inf), (2, "max", math.inf))
    )
    return lambda x, *_: x.clamp(low, high)


@operator("BatchNormalization", since=7)
def batch_normalization(node: Node) -> Kernel:
    """Normalisation with stored mean and variance."""
    node.require("training_mode", 0)
    node.ignore("momentum", "spatial")
    node.keep_first_output()
    epsilon = node.number("epsilon", 1e-5)

    def kernel(x: Tensor, *parameters: Tensor) -> Tensor:
        scale, bias, mean, variance = parameters
        return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)

    return kernel


@operator("Softmax", since=13)
def softmax(node: Node) -> Kernel:
    """exp(x) over its sum along one axis."""
    axis = node.integer("axis", -1)
    return lambda x: torch.softmax(x, axis)


@operator("LogSoftmax", since=13)
def log_softmax(node: Node) -> Kernel:
    """Logarithm of the softmax along one axis."""
    axis = node.integer("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


@operator("Softmax")
def flattening_softmax(node: Node) -> Kernel:
    """Softmax before opset 13: over all axes from the given one on."""
    axis = node.integer("axis", 1)
    return lambda x: torch.softmax(x.flatten(axis % x.ndim), -1).reshape(x.shape)


@operator("LogSoftmax")
def flattening_log_softmax(node: Node) -> Kernel:
    """LogSoftmax before opset 13: over all axes from the given one on."""
    axis = node.integer("axis", 1)
    return lambda x: torch.log_softmax(x.flatten(axis % x.ndim), -1).reshape(x.shape)


@operator("ReduceMean")
def reduce_mean(node: Node) -> Kernel:
    """Mean over some axes, which are an attribute before opset 18 and an input since."""
    keep, no_operation = bool(node.integer("keepdims", 1)), bool(node.integer("noop_with_empty_axes", 0))
    given = node.constant(1).tolist() if node.has(1) else node.integers("axes")
    if not given and no_operation:
        return lambda x, *_: x
    return lambda x, *_: x.mean(tuple(given) if given else tuple(range(x.ndim)), keepdim=keep)


@operator("GlobalAveragePool")
def global_average_pool(_node: Node) -> Kernel:
    """Mean over the spatial axes, which stay with size 1."""
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True)


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
        UnsupportedOperatorError: the window is dilated, or has more than three axes.
    """
    sliding = window(node)
    count_padding = bool(node.integer("count_include_pad", 0))
    if any(dilation != 1 for dilation in sliding.dilations):
        raise node.unsupported(f"attribute 'dilations' is {sliding.dilations}, only 1 is covered")
    total: Activation = _by_rank(node, sliding, _TOTALS)(sliding.kernel, sliding.strides)

    def function(x: Tensor) -> Tensor:
        padding = sliding.padding(x.shape[2:])
        counted = padding.apply(torch.ones_like(x[:1, :1]), 1.0 if count_padding else 0.0)
        return total(_filled(x, sliding, 0.0)) / total(_grown(counted, sliding, x.shape[2:], padding, 0.0))

    return function


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
