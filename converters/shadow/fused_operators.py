"""Float operators that ONNX Runtime's optimizer makes of several: convolutions, products, normalisations, gelus."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.activations import gelu_of
from qdefense.converters.shadow.convolutions import convolution
from qdefense.converters.shadow.fused_activations import activation_of_convolution, activation_of_product
from qdefense.converters.shadow.products import general_product
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Node, operator


@operator("FusedConv", MICROSOFT, needs_mode=True)
def fused_conv(node: Node) -> Kernel:
    """A convolution with an optional tensor added and an activation."""
    activate = activation_of_convolution(node)
    return convolution(node, lambda y, added: activate(y if added is None else y + added))


@operator("FusedGemm", MICROSOFT)
def fused_gemm(node: Node) -> Kernel:
    """A Gemm with an activation."""
    return general_product(node, activation_of_product(node))


@operator("FusedMatMul", MICROSOFT)
def fused_matmul(node: Node) -> Kernel:
    """A scaled matrix product; `transBatch` says that the rows come first, before the axes of the batch."""
    rows_first = [bool(node.integer(name, 0)) for name in ("transBatchA", "transBatchB")]
    flips = [bool(node.integer(name, 0)) for name in ("transA", "transB")]
    alpha = node.number("alpha", 1.0)

    def operand(x: Tensor, side: int) -> Tensor:
        x = x.movedim(0, -2) if rows_first[side] else x
        return x.mT if flips[side] and x.ndim > 1 else x

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        product = operand(a, 0) @ operand(b, 1)
        return product if alpha == 1 else alpha * product

    return kernel


@operator("Gelu", MICROSOFT, needs_mode=True)
def gelu(_node: Node) -> Kernel:
    """``x / 2 (1 + erf(x / sqrt 2))``."""
    return gelu_of


@operator("BiasGelu", MICROSOFT, needs_mode=True)
def bias_gelu(_node: Node) -> Kernel:
    """The gelu of a sum."""
    return lambda mode, x, bias: gelu_of(mode, x + bias)


@operator("FastGelu", MICROSOFT)
def fast_gelu(_node: Node) -> Kernel:
    """The gelu by way of tanh, of a sum where there is a bias."""

    def kernel(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.gelu(x if bias is None else x + bias, approximate="tanh")

    return kernel


@operator("QuickGelu", MICROSOFT)
def quick_gelu(node: Node) -> Kernel:
    """``x sigmoid(alpha x)``: a SiLU where alpha is 1."""
    alpha = node.number("alpha", 1.702)
    return lambda x: x * torch.sigmoid(alpha * x) if alpha != 1 else functional.silu(x)


@operator("SkipLayerNormalization", MICROSOFT)
def skip_layer_normalization(node: Node) -> Kernel:
    """The normalisation of a sum along the last axis; output 3 is that sum."""
    _keep_results(node)
    epsilon = node.number("epsilon", 1e-12)

    def kernel(x: Tensor, skip: Tensor, gamma: Tensor, *rest: Tensor | None) -> tuple[Tensor | None, ...]:
        beta, bias = (*rest, None, None)[:2]
        total = x + skip if bias is None else x + skip + bias
        return functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon), None, None, total

    return kernel


@operator("SkipSimplifiedLayerNormalization", MICROSOFT)
def skip_simplified_layer_normalization(node: Node) -> Kernel:
    """A sum over the root of its mean square along the last axis; output 3 is that sum."""
    _keep_results(node)
    epsilon = node.number("epsilon", 1e-12)

    def kernel(x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None) -> tuple[Tensor | None, ...]:
        total = x + skip if bias is None else x + skip + bias
        return _over_root_mean_square(total, -1, epsilon) * gamma, None, None, total

    return kernel


def _keep_results(node: Node) -> None:
    """Refuse the outputs that ONNX Runtime's CPU kernels leave empty."""
    if any(node.outputs[1:3]):
        raise node.unsupported("its mean and deviation are read, which ONNX Runtime doesn't compute on a CPU")


@operator("SimplifiedLayerNormalization")
def simplified_layer_normalization(node: Node) -> Kernel:
    """The axes from the given one on over the root of their mean square: ONNX Runtime's own name for it."""
    node.ignore("stash_type")
    node.keep_first_output()
    axis, epsilon = node.integer("axis", -1), node.number("epsilon", 1e-5)
    return lambda x, scale: _over_root_mean_square(x, axis, epsilon) * scale


def _over_root_mean_square(x: Tensor, axis: int, epsilon: float) -> Tensor:
    axes = tuple(range(axis % x.ndim, x.ndim))
    return x * ((x * x).mean(axes, keepdim=True) + epsilon).rsqrt()
