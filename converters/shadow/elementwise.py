"""Arithmetic, element by element: functions of one tensor, and operators that broadcast."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from qdefense.converters.shadow.operands import pairwise, wrapping
from qdefense.converters.shadow.registry import CODE_RANGES, Kernel, Node, operator

_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Acos": torch.acos,
    "Acosh": torch.acosh,
    "Asin": torch.asin,
    "Asinh": torch.asinh,
    "Atan": torch.atan,
    "Atanh": torch.atanh,
    "Ceil": torch.ceil,
    "Cos": torch.cos,
    "Cosh": torch.cosh,
    "Erf": torch.erf,
    "Exp": torch.exp,
    "Floor": torch.floor,
    "Log": torch.log,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    # half to even, as ONNX says
    "Round": torch.round,
    "Sign": torch.sign,
    "Sin": torch.sin,
    "Sinh": torch.sinh,
    "Sqrt": torch.sqrt,
    "Tan": torch.tan,
    "Tanh": torch.tanh,
}


def _register(op_type: str, function: Callable[[Tensor], Tensor]) -> None:
    @operator(op_type)
    def build(node: Node) -> Kernel:
        return wrapping(node, function)

    build.__doc__ = f"The function {op_type}, element by element."


for _name, _function in _FUNCTIONS.items():
    _register(_name, _function)


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
    whole = node.element_type(0) in CODE_RANGES
    return pairwise(node, functools.partial(_divide, whole=whole))


def _divide(a: Tensor, b: Tensor, *, whole: bool) -> Tensor:
    return a / b if a.is_floating_point() and not whole else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def mod(node: Node) -> Kernel:
    """Remainder, with the sign of the divisor, or with `fmod` that of the dividend."""
    return pairwise(node, torch.fmod if node.integer("fmod", 0) else torch.remainder)


@operator("Pow", since=7)
def pow_(node: Node) -> Kernel:
    """Power; base and exponent may differ in type, the result has the base's."""
    if node.element_type(0) in CODE_RANGES:
        raise node.unsupported("its base is an integer of 16 bits or fewer")
    if 1 in node.constants and node.constants[1].value.numel() == 1 and node.constants[1].value.ndim == 0:
        exponent = node.constant(1).item()
        return lambda x, _: x.pow(exponent) if x.is_floating_point() else _power(x, torch.tensor(exponent))
    return _power


def _power(base: Tensor, exponent: Tensor) -> Tensor:
    if base.is_floating_point():
        return torch.pow(base, exponent.to(base.dtype))
    if exponent.is_floating_point():
        return torch.pow(base.double(), exponent.double()).to(base.dtype)
    return torch.pow(base, exponent)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Kernel:
    return lambda *x: functools.reduce(function, x)


@operator("Max", since=8)
def max_(_node: Node) -> Kernel:
    """Largest of the inputs."""
    return _fold(torch.maximum)


@operator("Min", since=8)
def min_(_node: Node) -> Kernel:
    """Smallest of the inputs."""
    return _fold(torch.minimum)


@operator("Sum", since=8)
def sum_(_node: Node) -> Kernel:
    """Sum of the inputs."""
    return _fold(torch.add)


@operator("Mean", since=8)
def mean(_node: Node) -> Kernel:
    """Mean of the inputs."""
    return lambda *x: functools.reduce(torch.add, x) / len(x)


@operator("Clip", since=11)
def clip(node: Node) -> Kernel:
    """Hold x between two bounds."""
    if any(node.has(index) and index not in node.constants for index in (1, 2)):
        return _clip_between_tensors
    low, high = _bound(node, 1, -math.inf), _bound(node, 2, math.inf)
    if (low, high) == (-math.inf, math.inf):
        return lambda x, *_: x
    return lambda x, *_: x.clamp(*(None if math.isinf(bound) else bound for bound in (low, high)))


def _bound(node: Node, index: int, without: float) -> float:
    value = node.optional_constant(index)
    return without if value is None else value.item()


def _clip_between_tensors(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


@operator("Clip")
def clip_by_attributes(node: Node) -> Kernel:
    """Hold x between two bounds, which are attributes (before opset 11)."""
    low, high = node.number("min", -math.inf), node.number("max", math.inf)
    return lambda x: x.clamp(low, high)
