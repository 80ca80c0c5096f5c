"""Weights to 4-bit codes, scales and zero points: plain functions of arrays."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LOWEST, HIGHEST = -7, 7
"""Symmetric codes: -8 is left out, so that both signs reach equally far."""
LEVELS = 15
"""The largest asymmetric code."""


@dataclass(frozen=True, kw_only=True)
class Codes:
    """``weight = (codes - zero_points) * scales``, as DequantizeLinear reads them.

    ``codes`` have the weight's shape, int8 in [-7, 7] or uint8 in [0, 15]. With ``block_size`` 0 ``scales: (C,)`` go
    along ``axis``; else they have the weight's shape but for ``axis``, where each is that of ``block_size`` neighbours,
    the last of fewer. ``zero_points`` are of that shape, too, uint8 in [0, 15]; None without.
    """

    codes: NDArray[np.integer[Any]]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8] | None
    axis: int
    block_size: int

    def weight(self) -> NDArray[np.float32]:
        """The weight on its grid, in float32."""
        zero_points = np.zeros_like(self.scales) if self.zero_points is None else self.zero_points.astype(np.float32)
        scales, zeros = (self._spread(each) for each in (self.scales, zero_points))
        rounded: NDArray[np.float32] = (self.codes.astype(np.float32) - zeros) * scales
        return rounded

    def _spread(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        if not self.block_size:
            return values.reshape([-1 if axis == self.axis else 1 for axis in range(self.codes.ndim)])
        return np.repeat(values, self.block_size, axis=self.axis).take(range(self.codes.shape[self.axis]), self.axis)


def channel_codes(weight: NDArray[np.float32], axis: int, *, symmetric: bool) -> Codes:
    """One scale for all weights that share a place on ``axis``: ``max|w| / 7``, or ``(max - min) / 15`` with 0 inside.

    A channel of zeros gets the scale 1.
    """
    others = tuple(place for place in range(weight.ndim) if place != axis)
    codes, scales, zero_points = _codes(weight, others, symmetric=symmetric)
    return Codes(
        codes=codes,
        scales=scales.reshape(-1),
        zero_points=None if zero_points is None else zero_points.reshape(-1),
        axis=axis,
        block_size=0,
    )


def block_codes(weight: NDArray[np.float32], axis: int, block_size: int, *, symmetric: bool) -> Codes:
    """One scale for each ``block_size`` neighbours along ``axis``, by the same rule; the last block may be shorter."""
    length = weight.shape[axis]
    # Zeros at the end widen no range: it always holds 0.
    filling = [(0, -length % block_size if place == axis else 0) for place in range(weight.ndim)]
    padded = np.pad(weight, filling)
    shape = (*weight.shape[:axis], -1, block_size, *weight.shape[axis + 1 :])
    codes, scales, zero_points = _codes(padded.reshape(shape), (axis + 1,), symmetric=symmetric)
    return Codes(
        codes=np.ascontiguousarray(codes.reshape(padded.shape).take(range(length), axis=axis)),
        scales=scales.squeeze(axis + 1),
        zero_points=None if zero_points is None else zero_points.squeeze(axis + 1),
        axis=axis,
        block_size=block_size,
    )


def _codes(
    weight: NDArray[np.float32], group: tuple[int, ...], *, symmetric: bool
) -> tuple[NDArray[np.integer[Any]], NDArray[np.float32], NDArray[np.uint8] | None]:
    """Codes, and scales and zero points with the axes of a group kept as 1."""
    wide = weight.astype(np.float64)
    low = np.minimum(wide.min(axis=group, keepdims=True), 0)
    high = np.maximum(wide.max(axis=group, keepdims=True), 0)
    if symmetric:
        scales = _scales(np.maximum(-low, high) / HIGHEST)
        return np.clip(np.rint(wide / scales), LOWEST, HIGHEST).astype(np.int8), scales, None
    scales = _scales((high - low) / LEVELS)
    zero_points = np.clip(np.rint(-low / scales), 0, LEVELS)
    codes = np.clip(np.rint(wide / scales) + zero_points, 0, LEVELS)
    return codes.astype(np.uint8), scales, zero_points.astype(np.uint8)


def _scales(exact: NDArray[np.float64]) -> NDArray[np.float32]:
    """In float32; 1 where nothing is left of a scale, which must not be 0 and whose weights are 0 then."""
    return np.where(exact < np.finfo(np.float32).tiny, 1.0, exact).astype(np.float32)
