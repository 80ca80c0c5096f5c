"""The model's door: from RGB images in [0, 1] to what a file is fed, and from what it answers to log-probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.converters.contract import ContractError, InputContract

FLOOR = 1e-12
"""Probabilities below it are read as it: the logarithm of an exact 0 would be no number."""
SUM_TOLERANCE = 0.1
"""How far the probabilities of a median image may sum to something else than 1; INT8 rounds each to 1/256."""


class HeadError(ContractError):
    """The answers are not what the contract's head says."""


def fed(x: NDArray[np.float32], contract: InputContract) -> NDArray[Any]:
    """What the file is fed for ``x: (N, 3, H, W) float32 in [0, 1]``, in its own layout, order, range and type.

    ``uint8`` files get ``rint(255 x)``. A contract without a change gives ``x`` itself.
    """
    value: NDArray[Any] = x[:, ::-1] if contract.channels == "BGR" else x
    if contract.dtype == "uint8":
        value = np.clip(np.rint(value * np.float32(255)), 0, 255).astype(np.uint8)
    else:
        value = _scaled(value, contract)
        value = value.astype(np.float16) if contract.dtype == "float16" else value
    if contract.layout == "NHWC":
        value = value.transpose(0, 2, 3, 1)
    return value if value is x else np.ascontiguousarray(value)


def _scaled(value: NDArray[np.float32], contract: InputContract) -> NDArray[np.float32]:
    (low, high), mean, std = contract.range, contract.mean, contract.std
    if (low, high) != (0.0, 1.0):
        value = value * np.float32(high - low)
        value = value + np.float32(low) if low else value
    if any(mean):
        value = value - np.array(mean, dtype=np.float32).reshape(1, 3, 1, 1)
    if std != (1.0, 1.0, 1.0):
        value = value / np.array(std, dtype=np.float32).reshape(1, 3, 1, 1)
    return value


def read_answers(answers: NDArray[Any], contract: InputContract) -> NDArray[np.float32]:
    """Logits or log-probabilities of ``answers: (N, K)``; probabilities become ``log max(p, 1e-12)``.

    The logarithm is taken in float64, so that the shadow's is the same number.
    """
    if contract.head != "softmax":
        return answers.astype(np.float32, copy=False)
    logs: NDArray[np.float32] = np.log(np.maximum(answers.astype(np.float64), FLOOR)).astype(np.float32)
    return logs


def check_head(logs: NDArray[np.float32], contract: InputContract) -> None:
    """Compare a sample of read answers, ``(N, K)``, with what the contract says they are.

    Raises:
        HeadError: rows of a softmax that do not sum to 1, or logits that are probabilities.
    """
    if not len(logs) or not np.isfinite(logs).all() or contract.head == "sigmoid":
        return
    values = logs.astype(np.float64)
    sums = (values if contract.head == "logits" else np.exp(values)).sum(axis=1)
    away = float(np.median(np.abs(sums - 1)))
    if contract.head == "logits" and values.min() >= 0 and away < SUM_TOLERANCE / 10:
        raise HeadError(
            f"output {contract.output_name!r} is read as logits, but its rows are probabilities that sum to 1; "
            "say --head softmax"
        )
    if contract.head != "logits" and away > SUM_TOLERANCE:
        raise HeadError(
            f"output {contract.output_name!r} is read as {contract.head}, but the probabilities of an image sum to "
            f"{float(np.median(sums)):.3g}; say --head logits"
        )
