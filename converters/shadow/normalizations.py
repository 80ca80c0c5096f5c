"""Normalisations: with stored statistics, with those of the input, by a norm, by neighbouring channels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.registry import Kernel, Mode, Node, operator
from qdefense.converters.shadow.summation_order import batch_norm_in_order, layer_norm_in_order


@operator("BatchNormalization", since=7, needs_mode=True)
def batch_normalization(node: Node) -> Kernel:
    """Normalisation with stored mean and variance."""
    node.require("training_mode", 0)
    node.require("spatial", 1)
    node.ignore("momentum")
    node.keep_first_output()
    epsilon = node.number("epsilon", 1e-5)

    def kernel(mode: Mode, x: Tensor, *parameters: Tensor) -> Tensor:
        scale, bias, mean, variance = parameters
        if mode.exact:
            return batch_norm_in_order(x, scale, bias, mean, variance, epsilon)
        return functional.batch_norm(x, mean, variance, scale, bias, training=False, eps=epsilon)

    return kernel


@operator("BatchNormalization", needs_mode=True)
def old_batch_normalization(node: Node) -> Kernel:
    """Normalisation with stored mean and variance, before opset 7."""
    if not node.integer("is_test", 0):
        raise node.unsupported("attribute 'is_test' is 0, only 1 is covered")
    node.ignore("consumed_inputs")
    return batch_normalization(node)


@operator("InstanceNormalization", since=6)
def instance_normalization(node: Node) -> Kernel:
    """Each image's channels, normalised with their own mean and variance."""
    epsilon = node.number("epsilon", 1e-5)
    return lambda x, scale, bias: torch.group_norm(x, x.shape[1], scale, bias, epsilon)


@operator("GroupNormalization", since=21)
def group_normalization(node: Node) -> Kernel:
    """Groups of channels, normalised with each image's mean and variance; scale and bias are per channel."""
    groups, epsilon = _groups(node), node.number("epsilon", 1e-5)
    node.ignore("stash_type")
    return lambda x, scale, bias: torch.group_norm(x, groups, scale, bias, epsilon)


@operator("GroupNormalization", since=18)
def group_normalization_by_group(node: Node) -> Kernel:
    """Groups of channels, normalised with each image's mean and variance; scale and bias are per group."""
    groups, epsilon = _groups(node), node.number("epsilon", 1e-5)

    def kernel(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        size = x.shape[1] // groups
        return torch.group_norm(x, groups, scale.repeat_interleave(size), bias.repeat_interleave(size), epsilon)

    return kernel


def _groups(node: Node) -> int:
    groups = node.optional_integer("num_groups")
    if not groups or groups < 1:
        raise node.unsupported(f"attribute 'num_groups' is {groups}, expected at least 1")
    return groups


@operator("LayerNormalization", since=1, needs_mode=True)
def layer_normalization(node: Node) -> Kernel:
    """The axes from the given one on, normalised with their own mean and variance.

    The further outputs are that mean and one over that standard deviation.
    """
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)
    node.ignore("stash_type")

    def kernel(mode: Mode, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> tuple[Tensor, ...]:
        y = _layer_norm_in_order(x, scale, bias, axis, epsilon) if mode.exact else None
        y = _layer_norm(x, scale, bias, axis, epsilon) if y is None else y
        return (y, *_statistics(x, axis, epsilon)) if len(node.outputs) > 1 else (y,)

    return kernel


def _layer_norm(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float) -> Tensor:
    shape = x.shape[axis:]
    if scale.shape == shape and (bias is None or bias.shape == shape):
        return functional.layer_norm(x, shape, scale, bias, epsilon)
    y = functional.layer_norm(x, shape, None, None, epsilon) * scale
    return y if bias is None else y + bias


def _layer_norm_in_order(x: Tensor, scale: Tensor, bias: Tensor | None, axis: int, epsilon: float) -> Tensor | None:
    last = axis % x.ndim == x.ndim - 1 and scale.shape == x.shape[-1:]
    if not last or bias is None or bias.shape != scale.shape or x.dtype != torch.float32:
        return None
    return layer_norm_in_order(x, scale, bias, epsilon)


def _statistics(x: Tensor, axis: int, epsilon: float) -> tuple[Tensor, Tensor]:
    axes = tuple(range(axis % x.ndim, x.ndim))
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return mean, (variance + epsilon).rsqrt()


@operator("RMSNormalization", since=23)
def rms_normalization(node: Node) -> Kernel:
    """The axes from the given one on over the root of their mean square."""
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)
    node.ignore("stash_type")

    def kernel(x: Tensor, scale: Tensor) -> Tensor:
        mean_square = (x * x).mean(tuple(range(axis % x.ndim, x.ndim)), keepdim=True)
        return x / (mean_square + epsilon).sqrt() * scale

    return kernel


@operator("LpNormalization")
def lp_normalization(node: Node) -> Kernel:
    """X over its 1- or 2-norm along one axis; zero where that is zero.

    Raises:
        UnsupportedOperatorError: another norm is asked for.
    """
    axis, power = node.integer("axis", -1), node.integer("p", 2)
    if power not in (1, 2):
        raise node.unsupported(f"attribute 'p' is {power}, expected 1 or 2")

    def kernel(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, power, axis, keepdim=True)
        return x / torch.where(norm == 0, torch.ones_like(norm), norm)

    return kernel


@operator("LRN")
def local_response_normalization(node: Node) -> Kernel:
    """``x / (bias + alpha / size * sum of squares)^beta``, the sum over `size` neighbouring channels."""
    alpha, beta, bias = node.number("alpha", 1e-4), node.number("beta", 0.75), node.number("bias", 1.0)
    size = node.optional_integer("size")
    if not size or size < 1:
        raise node.unsupported(f"attribute 'size' is {size}, expected at least 1")
    before = (size - 1) // 2

    def kernel(x: Tensor) -> Tensor:
        channels = x.shape[1]
        spread = (0, 0) * (x.ndim - 2) + (before, size - 1 - before)
        squares = functional.pad(x * x, spread)
        total = sum((squares.narrow(1, at, channels) for at in range(1, size)), squares.narrow(1, 0, channels))
        return x / (bias + alpha / size * total).pow(beta)

    return kernel


@operator("MeanVarianceNormalization", since=9)
def mean_variance_normalization(node: Node) -> Kernel:
    """X less its mean over its standard deviation along some axes."""
    axes = node.integers("axes") or (0, 2, 3)

    def kernel(x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + _LEAST_DEVIATION)

    return kernel


_LEAST_DEVIATION = 1e-9
