"""The differentiable twin of `qdefense.converters.door`: the same numbers, with gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from qdefense.converters.contract import InputContract
from qdefense.converters.door import FLOOR
from qdefense.converters.shadow.rounding import round_value, value_of


class _RoundHalf(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:  # noqa: ARG004
        return value.to(torch.float16).to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:  # noqa: ARG004
        return gradients[0]


def round_half(value: Tensor) -> Tensor:
    """``value`` rounded to float16 and carried on; the gradient passes, whose own rounding would lose small ones.

    In float64, which stands for exact arithmetic, nothing is rounded.
    """
    if value.dtype == torch.float64:
        return value
    result: Tensor = _RoundHalf.apply(value)  # type: ignore[no-untyped-call]
    return result


def enter(x: Tensor, contract: InputContract) -> Tensor:
    """What the file is fed for ``x: (N, 3, H, W) in [0, 1]``, integer codes and float16 carried in x's own type.

    In float64, which stands for exact arithmetic, nothing is rounded.
    """
    value = x.flip(1) if contract.channels == "BGR" else x
    if contract.dtype == "uint8":
        codes = value * 255
        value = codes if value.dtype == torch.float64 else round_value(codes, (0, 255))
    else:
        value = _scaled(value, contract)
        value = round_half(value) if contract.dtype == "float16" else value
    return value.permute(0, 2, 3, 1) if contract.layout == "NHWC" else value


def _scaled(value: Tensor, contract: InputContract) -> Tensor:
    (low, high), mean, std = contract.range, contract.mean, contract.std
    if (low, high) != (0.0, 1.0):
        value = value * _single(high - low, value)
        value = value + _single(low, value) if low else value
    if any(mean):
        value = value - torch.tensor(mean, dtype=torch.float32).to(value.dtype).reshape(1, 3, 1, 1)
    if std != (1.0, 1.0, 1.0):
        value = value / torch.tensor(std, dtype=torch.float32).to(value.dtype).reshape(1, 3, 1, 1)
    return value


def _single(number: float, like: Tensor) -> Tensor:
    # The session's arithmetic is float32: a constant is rounded to it before it is used.
    return torch.tensor(number, dtype=torch.float32).to(like.dtype)


def read_answers(answers: Tensor, scores: Tensor | None, contract: InputContract) -> Tensor:
    """``log max(p, 1e-12)`` of probabilities, anything else as it is.

    With the ``scores`` that the last softmax saw, the gradient is that of their log-softmax: that of a quantized
    probability is 0 wherever it was rounded to 0. In float64, which has no floor, so is the value.
    """
    if contract.head != "softmax":
        return answers
    if scores is not None and answers.dtype == torch.float64:
        return scores.flatten(1).log_softmax(1)
    logs = answers.double().clamp_min(FLOOR).log().to(answers.dtype)
    return logs if scores is None else value_of(logs, scores.flatten(1).log_softmax(1))
