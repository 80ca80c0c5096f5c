"""Activation functions, and the softmax family."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.error_function import gelu_in_order
from qdefense.converters.shadow.registry import Kernel, Mode, Node, operator

Activation = Callable[[Tensor], Tensor]


@operator("Relu")
def relu(_node: Node) -> Kernel:
    """max(x, 0)."""
    return torch.relu


@operator("LeakyRelu")
def leaky_relu(node: Node) -> Kernel:
    """Keep x, or alpha x below zero."""
    alpha = node.number("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


@operator("PRelu", since=7)
def prelu(_node: Node) -> Kernel:
    """Keep x, or slope x below zero; the slope broadcasts."""
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(node: Node) -> Kernel:
    """Keep x, or ``alpha (exp(x) - 1)`` below zero."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


@operator("Selu", since=6)
def selu(node: Node) -> Kernel:
    """``gamma x``, or ``gamma alpha (exp(x) - 1)`` below zero."""
    alpha, gamma = node.number("alpha", 1.67326319217681884765625), node.number("gamma", 1.05070102214813232421875)
    return lambda x: gamma * functional.elu(x, alpha)


@operator("Celu")
def celu(node: Node) -> Kernel:
    """Keep x, or ``alpha (exp(x / alpha) - 1)`` below zero."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(node: Node) -> Kernel:
    """Keep x above alpha, zero elsewhere."""
    alpha = node.number("alpha", 1.0)
    return lambda x: functional.threshold(x, alpha, 0.0)


@operator("Shrink")
def shrink(node: Node) -> Kernel:
    """Pull x towards zero by `bias`; zero where it is not further away than `lambd`."""
    bias, limit = node.number("bias", 0.0), node.number("lambd", 0.5)

    def kernel(x: Tensor) -> Tensor:
        outer = torch.where(x > limit, x - bias, torch.zeros_like(x))
        return torch.where(x < -limit, x + bias, outer)

    return kernel


@operator("Sigmoid")
def sigmoid(_node: Node) -> Kernel:
    """1 / (1 + exp(-x))."""
    return torch.sigmoid


@operator("HardSigmoid")
def hard_sigmoid(node: Node) -> Kernel:
    """``alpha x + beta`` held between 0 and 1."""
    alpha, beta = node.number("alpha", 0.2), node.number("beta", 0.5)
    return lambda x: (alpha * x + beta).clamp(0, 1)


@operator("HardSwish")
def hard_swish(_node: Node) -> Kernel:
    """``x clamp(x / 6 + 1 / 2, 0, 1)``."""
    return lambda x: x * (x * (1 / 6) + 0.5).clamp(0, 1)


@operator("Swish")
def swish(node: Node) -> Kernel:
    """``x sigmoid(alpha x)``."""
    alpha = node.number("alpha", 1.0)
    return functional.silu if alpha == 1 else lambda x: x * torch.sigmoid(alpha * x)


@operator("Mish")
def mish(_node: Node) -> Kernel:
    """``x tanh(log(1 + exp(x)))``."""
    return lambda x: x * torch.tanh(_softplus(x))


@operator("Softplus")
def softplus(_node: Node) -> Kernel:
    """``log(1 + exp(x))``."""
    return _softplus


def _softplus(x: Tensor) -> Tensor:
    # torch's own softplus is the identity from 20 on
    return torch.logaddexp(x, torch.zeros((), dtype=x.dtype))


@operator("Softsign")
def softsign(_node: Node) -> Kernel:
    """``x / (1 + |x|)``."""
    return functional.softsign


def gelu_of(mode: Mode, x: Tensor) -> Tensor:
    """``x / 2 (1 + erf(x / sqrt 2))``."""
    return gelu_in_order(x) if mode.exact and x.dtype == torch.float32 else functional.gelu(x)


@operator("Gelu", needs_mode=True)
def gelu(node: Node) -> Kernel:
    """``x Phi(x)`` with the normal distribution's Phi, or its approximation by tanh.

    Raises:
        UnsupportedOperatorError: another approximation is asked for.
    """
    approximate = node.text("approximate", "none")
    if approximate not in ("none", "tanh"):
        raise node.unsupported(f"attribute 'approximate' is {approximate!r}, expected 'none' or 'tanh'")
    if approximate == "none":
        return gelu_of
    return lambda _mode, x: functional.gelu(x, approximate="tanh")


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


@operator("Hardmax", since=13)
def hardmax(node: Node) -> Kernel:
    """One at the first of the largest values along one axis, zero elsewhere."""
    axis = node.integer("axis", -1)
    return lambda x: _one_at_largest(x, axis)


@operator("Softmax")
def flattening_softmax(node: Node) -> Kernel:
    """Softmax before opset 13: over all axes from the given one on."""
    return _over_trailing_axes(node, torch.softmax)


@operator("LogSoftmax")
def flattening_log_softmax(node: Node) -> Kernel:
    """LogSoftmax before opset 13: over all axes from the given one on."""
    return _over_trailing_axes(node, torch.log_softmax)


@operator("Hardmax")
def flattening_hardmax(node: Node) -> Kernel:
    """Hardmax before opset 13: over all axes from the given one on."""
    return _over_trailing_axes(node, _one_at_largest)


def _over_trailing_axes(node: Node, function: Callable[[Tensor, int], Tensor]) -> Kernel:
    axis = node.integer("axis", 1)
    return lambda x: function(x.flatten(axis % x.ndim), -1).reshape(x.shape)


def _one_at_largest(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)
