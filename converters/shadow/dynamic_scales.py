"""Scales and zero points that dynamic quantization computes while the file runs.

ONNX Runtime computes one scale for a whole tensor, and so for a whole batch. The shadow carries one for each image
(see `operands`); the images of a group of `Mode.group` hold the same, computed from all of them, as the runtime's would
be at that batch. No gradient runs through a scale: the dequantized value is the input itself, rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qdefense.converters.shadow.operands import spread
from qdefense.converters.shadow.registry import Mode, Node
from qdefense.converters.shadow.rounding import round_quotient

_UINT8 = (0, 255)


def _row_parameters(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point of each image as ONNX Runtime computes them for batches of a group, both (N,)."""
    # over axes, not over a flattened copy: the memory of x runs channels last
    values, axes = x.detach(), tuple(range(1, x.ndim))
    low, high = values.amin(axes).clamp(max=0), values.amax(axes).clamp(min=0)
    if group > 1:
        low, high = _over_groups(low, torch.amin, group), _over_groups(high, torch.amax, group)
    scale = torch.where(high == low, torch.ones_like(high), (high - low) / 255)
    return scale, torch.round((0 - low / scale).clamp(0, 255))


def _over_groups(values: Tensor, extreme: Callable[[Tensor], Tensor], group: int) -> Tensor:
    """The extreme of each group in the place of each of its values: (N,)."""
    parts = [values[start : start + group] for start in range(0, len(values), group)]
    return torch.cat([extreme(part).expand(len(part)) for part in parts])


def quantize_rows(node: Node, x: Tensor, mode: Mode) -> tuple[Tensor, Tensor, Tensor]:
    """u8 codes, scales and zero points of the images of a batch.

    Raises:
        UnsupportedOperatorError: axis 0 is not the batch.
    """
    if x.ndim < 2 or x.shape[0] != mode.rows:
        raise node.unsupported(f"axis 0 of its input {tuple(x.shape)} is not the batch of {mode.rows} images")
    scale, zero_point = _row_parameters(x, mode.group)
    return round_quotient(x, spread(scale, x.ndim), shift_of_rows(zero_point, x), _UINT8), scale, zero_point


def shift_of_rows(zero_point: Tensor | None, x: Tensor) -> Tensor | None:
    """Zero points of the images, ready to broadcast; None where all are zero, as they are behind a Relu."""
    return None if zero_point is None or not bool(zero_point.any()) else spread(zero_point, x.ndim)
