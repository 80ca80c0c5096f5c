"""Cells added to, or cut off, the ends of axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.operands import listing
from qdefense.converters.shadow.registry import Kernel, Node, operator

_Mode = Literal["reflect", "edge", "wrap"]
_MODES = ("constant", "reflect", "edge", "wrap")
# cells before and after each axis
_Ends = Sequence[tuple[int, int]]


@operator("Pad", since=11)
def pad(node: Node) -> Kernel:
    """Cells added at both ends of axes, which are all unless they are listed; negative counts cut off."""
    mode, pads, axes = _mode(node), listing(node, 1), listing(node, 3)

    def kernel(
        x: Tensor, given: Tensor | None = None, value: Tensor | None = None, chosen: Tensor | None = None
    ) -> Tensor:
        fill = 0 if value is None else value.reshape(-1)[0].item()
        return _padded(x, _by_axis(pads(given) or (), axes(chosen), x.ndim), mode, fill)

    return kernel


@operator("Pad", since=2)
def pad_by_attributes(node: Node) -> Kernel:
    """Cells added at both ends of all axes, given as attributes (before opset 11)."""
    mode, pads, fill = _mode(node), node.integers("pads") or (), node.number("value", 0.0)
    return lambda x: _padded(x, _by_axis(pads, None, x.ndim), mode, fill)


def _mode(node: Node) -> str:
    mode = node.text("mode", "constant")
    if mode not in _MODES:
        raise node.unsupported(f"attribute 'mode' is {mode!r}, expected one of {_MODES}")
    return mode


def _by_axis(pads: Sequence[int], axes: Sequence[int] | None, rank: int) -> _Ends:
    ends = [(0, 0)] * rank
    half = len(pads) // 2
    for at, axis in enumerate(range(half) if axes is None else axes):
        ends[axis] = (pads[at], pads[half + at])
    return ends


def _padded(x: Tensor, ends: _Ends, mode: str, fill: float) -> Tensor:
    if mode == "constant":
        return functional.pad(x, [count for pair in reversed(ends) for count in pair], value=fill)
    for axis, (before, after) in enumerate(ends):
        if before or after:
            x = x.index_select(axis, _sources(x.shape[axis], before, after, cast("_Mode", mode)))
    return x


def _sources(size: int, before: int, after: int, mode: _Mode) -> Tensor:
    """Which cell each cell of a padded axis comes from; what is cut off is cut off first."""
    cells = np.arange(size)[max(0, -before) : size - max(0, -after)]
    return torch.from_numpy(np.pad(cells, (max(0, before), max(0, after)), mode=mode))


@operator("CenterCropPad", since=18)
def center_crop_pad(node: Node) -> Kernel:
    """Axes cut or filled with zeros, at both ends alike, to the given sizes."""
    axes, sizes = node.integers("axes"), listing(node, 1)

    def kernel(x: Tensor, given: Tensor | None = None) -> Tensor:
        ends = [(0, 0)] * x.ndim
        for axis, wanted in zip(range(x.ndim) if axes is None else axes, sizes(given) or (), strict=True):
            missing = wanted - x.shape[axis]
            first = missing // 2 if missing >= 0 else -(-missing // 2)
            ends[axis] = (first, missing - first)
        return _padded(x, ends, "constant", 0)

    return kernel
