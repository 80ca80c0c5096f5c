"""Matrix products and sums of products."""

from __future__ import annotations

import torch
from torch import Tensor

from qdefense.converters.shadow.activations import Activation
from qdefense.converters.shadow.registry import Kernel, Node, operator


def general_product(node: Node, activate: Activation) -> Kernel:
    """The Gemm of a node, with an activation."""
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
    return general_product(node, lambda y: y)


@operator("MatMul")
def matmul(_node: Node) -> Kernel:
    """Matrix product with numpy's broadcasting."""
    return lambda a, b: a @ b


@operator("Einsum")
def einsum(node: Node) -> Kernel:
    """A sum of products in Einstein's notation."""
    equation = node.text("equation", "").replace(" ", "")
    return lambda *x: torch.einsum(equation, *x)
