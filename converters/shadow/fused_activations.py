"""The activations that ONNX Runtime fuses into a convolution or a Gemm, by the name of their operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.registry import Node

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Fused:
    """An activation: the names of its numbers, in order, and the function of those numbers."""

    numbers: tuple[str, ...]
    function: Callable[..., Tensor]


_HELD_BY_BOTH: dict[str, _Fused] = {
    "Relu": _Fused((), torch.relu),
    "Sigmoid": _Fused((), torch.sigmoid),
    "Tanh": _Fused((), torch.tanh),
    "LeakyRelu": _Fused(("alpha",), functional.leaky_relu),
    "HardSigmoid": _Fused(("alpha", "beta"), lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1)),
}
_OF_CONVOLUTIONS: Mapping[str, _Fused] = _HELD_BY_BOTH | {
    "Clip": _Fused(("min", "max"), torch.clamp),
    "HardSwish": _Fused((), lambda x: x * (x / 6 + 0.5).clamp(0, 1)),
}
_OF_PRODUCTS: Mapping[str, _Fused] = _HELD_BY_BOTH | {
    "Elu": _Fused(("alpha",), functional.elu),
    "Selu": _Fused(("alpha", "gamma"), lambda x, alpha, gamma: gamma * functional.elu(x, alpha)),
    "Celu": _Fused(("alpha",), functional.celu),
    "Softplus": _Fused((), functional.softplus),
    "Softsign": _Fused((), functional.softsign),
    "ThresholdedRelu": _Fused(("alpha",), lambda x, alpha: functional.threshold(x, alpha, 0.0)),
    "ScaledTanh": _Fused(("alpha", "beta"), lambda x, alpha, beta: alpha * torch.tanh(beta * x)),
    "ParametricSoftplus": _Fused(("alpha", "beta"), lambda x, alpha, beta: alpha * functional.softplus(beta * x)),
}


def activation_of_convolution(node: Node) -> Activation:
    """The activation of a FusedConv, whose numbers are a list.

    Raises:
        UnsupportedOperatorError: ONNX Runtime fuses no such activation, or it has other numbers.
    """
    fused, given = _named(node, _OF_CONVOLUTIONS), node.numbers("activation_params")
    if fused.numbers and len(given) != len(fused.numbers):
        raise node.unsupported(f"'activation_params' is {given}, its activation takes {fused.numbers}")
    numbers = given if fused.numbers else ()
    return lambda x: fused.function(x, *numbers)


def activation_of_product(node: Node) -> Activation:
    """The activation of a FusedGemm, whose numbers are attributes of their own.

    Raises:
        UnsupportedOperatorError: ONNX Runtime fuses no such activation, or one of its numbers is missing.
    """
    fused = _named(node, _OF_PRODUCTS)
    node.ignore("activation_alpha", "activation_beta", "activation_gamma")
    missing = [name for name in fused.numbers if f"activation_{name}" not in node.attributes]
    if missing:
        raise node.unsupported(f"attribute 'activation_{missing[0]}' is missing, which its activation takes")
    numbers = tuple(node.number(f"activation_{name}", 0.0) for name in fused.numbers)
    return lambda x: fused.function(x, *numbers)


def _named(node: Node, table: Mapping[str, _Fused]) -> _Fused:
    name = node.text("activation", "")
    if name and name not in table:
        raise node.unsupported(f"activation {name!r} is not one of {sorted(table)}")
    return table[name] if name else _Fused((), lambda x: x)
