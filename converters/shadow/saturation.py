"""The int16 saturation of u8 x s8 kernels: its arithmetic and its risk in given weights.

x86 without VNNI multiplies u8 activations with s8 weights by `vpmaddubsw`: two neighbouring products are added in
int16 and clipped to [-32768, 32767] before they reach the int32 accumulator. Neighbours are the entries 2j and 2j + 1
of the reduction axis, which for a convolution runs in (kh, kw, cin) order over raw codes, padding included as the
zero point; the zero-point correction comes after the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

_LOW, _HIGH = -32768, 32767
_ELEMENTS_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class OverflowingPairs:
    """The pairs of one output column that can leave int16 for some u8 codes.

    Attributes:
        column: the output column.
        first: (P,) int64, position of each pair's first entry on the reduction axis; the second follows it.
        weights: (2, P) float32, the two weights of each pair.
    """

    column: int
    first: Tensor
    weights: Tensor


def _overflows(weights: Tensor) -> Tensor:
    padded = functional.pad(weights, (0, 0, 0, weights.shape[0] % 2))
    first, second = padded[0::2], padded[1::2]
    highest = (first.clamp(min=0) + second.clamp(min=0)) * 255
    lowest = (first.clamp(max=0) + second.clamp(max=0)) * 255
    return (highest > _HIGH) | (lowest < _LOW)


def overflowing_pairs(weights: Tensor) -> list[OverflowingPairs]:
    """The pairs of `weights`: (K, N) float32 s8 codes that can overflow, column by column."""
    hot = _overflows(weights)
    found = []
    for column in hot.any(0).nonzero().flatten().tolist():
        first = hot[:, column].nonzero().flatten() * 2
        found.append(OverflowingPairs(column, first, torch.stack([weights[first, column], weights[first + 1, column]])))
    return found


def saturation_risk(weights: NDArray[np.int8]) -> int:
    """Number of neighbouring pairs that some u8 activations would push out of int16.

    Args:
        weights: (K, N) int8, K the reduction axis in the kernel's order: (kh, kw, cin) for a convolution.
    """
    return int(_overflows(torch.from_numpy(np.asarray(weights)).float()).sum())


def saturation_error(codes: Tensor, pairs: list[OverflowingPairs], columns: int) -> Tensor:
    """What clipping adds to the exact product.

    Args:
        codes: (K, M) float32 u8 codes, the reduction axis first.
        pairs: the pairs of the weights that can overflow.
        columns: N.

    Returns:
        (N, M) float64: saturated minus exact sums.
    """
    error = torch.zeros(columns, codes.shape[1], dtype=torch.float64)
    for pair in pairs:
        step = max(1, _ELEMENTS_AT_ONCE // len(pair.first))
        for start in range(0, codes.shape[1], step):
            block = codes[:, start : start + step]
            total = block[pair.first] * pair.weights[0, :, None]
            total += block[pair.first + 1] * pair.weights[1, :, None]
            error[pair.column, start : start + step] = (total.clamp(_LOW, _HIGH) - total).sum(0, dtype=torch.float64)
    return error


def saturating_matmul(codes: Tensor, weights: Tensor) -> Tensor:
    """The product of u8 codes and s8 weights as a kernel without VNNI computes it.

    Args:
        codes: (M, K) float32 in [0, 255].
        weights: (K, N) float32 in [-128, 127].

    Returns:
        (M, N) float64, each neighbouring pair of products clipped to int16 before it is summed.
    """
    exact = codes.double() @ weights.double()
    return exact + saturation_error(codes.t().contiguous(), overflowing_pairs(weights), weights.shape[1]).t()
