"""Scales of changed integer weights computed anew, by the rule that the file's own scales follow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from onnx import TensorProto
from onnxruntime.quantization.quant_utils import compute_scale_zp
from torch import Tensor
from torch.nn import functional

from qdefense.converters.reading import safe_text
from qdefense.converters.shadow.registry import Constant
from qdefense.converters.shadow.weights import FollowingBias, Grid, Weight, Weights

_SAME_SCALE = 1e-6


class WriteBackError(ValueError):
    """The parameters can't be put into the file; the message says which, why, and what to do."""


@dataclass(frozen=True)
class Rescaling:
    """Scales computed anew.

    Attributes:
        parameters: new scales and zero points by initializer.
        weights: by initializer, the weights and biases whose codes stand for something else now, on their new grids.
    """

    parameters: Mapping[str, Constant]
    weights: Mapping[str, Weight]


def rescaled(weights: Weights, values: Mapping[str, Tensor], readers: Mapping[str, int]) -> Rescaling:
    """New scales for the integer weights among `values`, and for the biases behind them.

    Symmetric weights have ``scale = max |w| / half the range``, others ``scale = (max(w, 0) - min(w, 0)) / range``,
    computed by ONNX Runtime's quantizer per tensor, per channel or per block, as the file has them; the range of codes
    is the one that the file uses. A bias of 32 bits has the scale of the input times that of the weights.

    Args:
        weights: those of the file.
        values: changed weights as real numbers.
        readers: how many inputs of nodes read each initializer of the file.

    Raises:
        WriteBackError: a scale or zero point is no initializer, or others read it too.
    """
    chosen = [weights.trainable[name] for name in values if _has_own_scale(weights.trainable[name])]
    new: dict[str, Constant] = {}
    for weight in chosen:
        new |= _new_parameters(weight, values[weight.initializer], readers)
    for bias in weights.biases:
        if bias.weight in values:
            new |= _new_bias_scale(bias, weights, new)
    moved = {}
    for name, weight in weights.trainable.items():
        grids = tuple(_on(grid, new) for grid in weight.grids)
        if any(now is not before for now, before in zip(grids, weight.grids, strict=True)):
            moved[name] = replace(weight, grids=_agreeing(name, grids))
    return Rescaling(new, moved)


def _has_own_scale(weight: Weight) -> bool:
    return bool(weight.grids) and weight.stored.element_type != TensorProto.INT32


def _new_parameters(weight: Weight, value: Tensor, readers: Mapping[str, int]) -> dict[str, Constant]:
    grid = weight.grids[0]
    (scale,) = grid.factors
    step, shift = _scales_and_zero_points(value, grid)
    new = {name: replace(scale, value=_rounded(step, scale)) for name in _names(weight, readers, scale=True)}
    if bool((shift != grid.shift.reshape(-1)).any()):
        zero_point = grid.zero_point
        if zero_point is None or zero_point.value.numel() != shift.numel():
            raise _no_place(weight, "zero point, which the file leaves out or has once for all channels,")
        value = shift.reshape(zero_point.value.shape)
        new |= {name: replace(zero_point, value=value) for name in _names(weight, readers, scale=False)}
    return new


def _names(weight: Weight, readers: Mapping[str, int], *, scale: bool) -> Iterator[str]:
    """The initializers that hold the weight's scales or zero points, which nothing else may read."""
    found = [grid.factors[0] if scale else grid.zero_point for grid in weight.grids]
    kind = "scale" if scale else "zero point"
    for constant in found:
        if constant is None or constant.initializer is None:
            raise _no_place(weight, f"{kind}, which is no initializer,")
        uses = sum(other is not None and other.initializer == constant.initializer for other in found)
        if readers[constant.initializer] != uses:
            raise _no_place(weight, f"{kind} {safe_text(constant.initializer)!r}, which other nodes read too,")
        yield constant.initializer


def _no_place(weight: Weight, what: str) -> WriteBackError:
    return WriteBackError(
        f"initializer {safe_text(weight.initializer)!r} has a {what} so that no other value can be written; "
        'keep the scales (scales="keep")'
    )


def _scales_and_zero_points(value: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """The scales in the shape that the file has them, and as many zero points in a row."""
    low, high = (np.array(end, dtype=np.int64) for end in grid.limits)
    symmetric = bool((grid.shift == torch.tensor((grid.limits[0] + grid.limits[1]) / 2).round()).all())
    least, largest = _extremes(value.detach().float(), grid)
    pairs = [
        compute_scale_zp(a, b, low, high, symmetric)
        for a, b in zip(least.reshape(-1).numpy(), largest.reshape(-1).numpy(), strict=True)
    ]
    zero_points = torch.tensor([float(zero_point) for zero_point, _ in pairs])
    return torch.tensor([float(scale) for _, scale in pairs]).reshape(least.shape), zero_points


def _extremes(value: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest number of each group that shares a scale, in the shape of the scales."""
    shape = grid.step.shape
    if grid.block:
        axis = grid.axis % value.ndim
        # zeros belong to every range, so they may fill the last block
        missing = shape[axis] * grid.block - value.shape[axis]
        padded = functional.pad(value.movedim(axis, -1), (0, missing)).movedim(-1, axis)
        groups = padded.reshape(*shape[:axis], shape[axis], grid.block, *shape[axis + 1 :])
        return groups.amin(axis + 1), groups.amax(axis + 1)
    channels = value.reshape(1, -1) if shape.numel() == 1 else value.movedim(grid.axis, 0).flatten(1)
    return channels.amin(1).reshape(shape), channels.amax(1).reshape(shape)


def _rounded(step: Tensor, scale: Constant) -> Tensor:
    """What the file's own type makes of a scale."""
    return step.half().float() if scale.element_type == TensorProto.FLOAT16 else step


def _new_bias_scale(bias: FollowingBias, weights: Weights, new: Mapping[str, Constant]) -> dict[str, Constant]:
    """The scale of a dequantized bias, where it was the product of the input's and the weights'."""
    (before,), (own,) = (weights.trainable[name].grids[0].factors for name in (bias.weight, bias.initializer))
    after = new.get(before.initializer or "")
    product = (bias.input_scale.value * before.value).reshape(-1)
    if after is None or own.initializer is None or product.numel() != own.value.numel():
        return {}
    if not torch.allclose(product, own.value.reshape(-1), rtol=_SAME_SCALE, atol=0):
        return {}
    return {own.initializer: replace(own, value=(bias.input_scale.value * after.value).reshape(own.value.shape))}


def _on(grid: Grid, new: Mapping[str, Constant]) -> Grid:
    def now(constant: Constant) -> Constant:
        return new.get(constant.initializer or "", constant)

    zero_point = None if grid.zero_point is None else now(grid.zero_point)
    factors = tuple(now(factor) for factor in grid.factors)
    unchanged = zero_point is grid.zero_point and all(a is b for a, b in zip(factors, grid.factors, strict=True))
    return grid if unchanged else replace(grid, factors=factors, zero_point=zero_point)


def _agreeing(name: str, grids: tuple[Grid, ...]) -> tuple[Grid, ...]:
    if any(not torch.equal(grid.step, grids[0].step) for grid in grids):
        raise WriteBackError(
            f"initializer {safe_text(name)!r} is read by several nodes, whose scales would differ once some of their "
            'weights are recalibrated; change all of these, or keep the scales (scales="keep")'
        )
    return grids
