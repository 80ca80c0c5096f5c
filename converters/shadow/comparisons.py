"""Comparisons and logic; what they give has no gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.registry import Kernel, Node, operator

_PAIRWISE: Mapping[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {
    "And": (7, torch.logical_and),
    "Equal": (7, torch.eq),
    "Greater": (7, torch.gt),
    "GreaterOrEqual": (12, torch.ge),
    "Less": (7, torch.lt),
    "LessOrEqual": (12, torch.le),
    "Or": (7, torch.logical_or),
    "Xor": (7, torch.logical_xor),
}


def _register(op_type: str, since: int, function: Callable[[Tensor, Tensor], Tensor]) -> None:
    @operator(op_type, since=since)
    def build(node: Node) -> Kernel:
        node.emits = (TensorProto.BOOL,)
        return function

    build.__doc__ = f"{op_type} of two tensors, element by element."


for _name, (_since, _function) in _PAIRWISE.items():
    _register(_name, _since, _function)


@operator("Not")
def not_(_node: Node) -> Kernel:
    """Negation."""
    return torch.logical_not


@operator("IsNaN", since=9)
def is_nan(node: Node) -> Kernel:
    """Where x is not a number."""
    node.emits = (TensorProto.BOOL,)
    return torch.isnan


@operator("IsInf", since=10)
def is_inf(node: Node) -> Kernel:
    """Where x is infinite, of both signs or of one."""
    negative, positive = bool(node.integer("detect_negative", 1)), bool(node.integer("detect_positive", 1))
    node.emits = (TensorProto.BOOL,)

    def kernel(x: Tensor) -> Tensor:
        found = torch.isinf(x)
        return found & (((x < 0) & negative) | ((x > 0) & positive))

    return kernel


@operator("Where", since=9)
def where(node: Node) -> Kernel:
    """The second input where the first is true, the third elsewhere."""
    kind = node.element_type(1)
    node.emits = () if kind is None else (kind,)
    return torch.where
