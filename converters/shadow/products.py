"""Matrix products and sums of products."""

from __future__ import annotations

import torch
from torch import Tensor

from qdefense.converters.shadow.activations import Activation, named_activation
from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Node, operator


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
    return _general_product(node, named_activation(node, node.text("activation", ""), numbers))


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


@operator("Einsum")
def einsum(node: Node) -> Kernel:
    """A sum of products in Einstein's notation."""
    equation = node.text("equation", "").replace(" ", "")
    return lambda *x: torch.einsum(equation, *x)
