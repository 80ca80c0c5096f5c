"""The error function to the bit as ONNX Runtime computes it: what an exact pass takes for a Gelu.

Its kernel evaluates N. Juffa's polynomials in fused multiply-adds (onnxruntime 1.32, mlas/lib/erf.cpp names them).
"""

from __future__ import annotations

from math import sqrt

import numpy as np
import torch
from torch import Tensor

from qdefense.converters.shadow.summation_order import fused


def _single(*numbers: float) -> tuple[float, ...]:
    """The numbers as float32 holds them."""
    return tuple(float(np.float32(number)) for number in numbers)


_SPLIT = 0.921875
_SATURATED = 10.0
_SMALL = _single(-5.99104969e-4, 4.99339588e-3, -2.67667342e-2, 1.12818025e-1, -3.76124859e-1, 1.28379151e-1)
_LARGE = _single(
    1.72948930e-5, -3.83208680e-4, 3.88393435e-3, -2.42545605e-2, 1.06777847e-1, 6.34846687e-1, 1.28717512e-1
)
_EXPONENTIAL = _single(1.38319808e-3, 8.37550033e-3, 4.16689515e-2, 1.66664466e-1, 4.99999851e-1, 1.0, 1.0)
(_LOG2_E,) = _single(1.44269504088896341)
_MINUS_LN_2 = _single(-6.93145752e-1, -1.42860677e-6)


def gelu_in_order(x: Tensor) -> Tensor:
    """``x / 2 (1 + erf(x / sqrt 2))`` of float32, each operation rounded as the runtime rounds it."""
    return x * 0.5 * (error_function(x * sqrt(0.5)) + 1)


def error_function(x: Tensor) -> Tensor:
    """``erf(x)`` of float32: one polynomial up to .92, ``1 - exp(another)`` beyond."""
    size = x.abs().clamp(max=_SATURATED)
    small = fused(_polynomial(_SMALL, size * size), size, size)
    large = 1 - _exponential(-fused(_polynomial(_LARGE, size), size, size))
    return torch.where(size > _SPLIT, large, small) * torch.where(x < 0, -1.0, 1.0)


def _exponential(x: Tensor) -> Tensor:
    power = (_LOG2_E * x.double()).round().float().detach()
    rest = x
    for part in _MINUS_LN_2:
        rest = fused(power, part, rest)
    return torch.ldexp(_polynomial(_EXPONENTIAL, rest), power)


def _polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = fused(value, x, coefficient)
    return value
