"""Resampling of axes by nearest, linear and cubic interpolation, with the positions that ONNX Runtime computes.

Every mode is separable: each axis is resampled alone, nearest by picking cells, the others by a matrix
(output cells, input cells) of weights that the sizes and the scale alone decide.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.operands import listing
from qdefense.converters.shadow.registry import NARROW_FLOATS, Kernel, Node, operator
from qdefense.converters.shadow.rounding import value_of

_Array = NDArray[np.float32]
_MODES = ("nearest", "linear", "cubic")
_INTERPOLATED = {TensorProto.UNDEFINED, TensorProto.FLOAT, TensorProto.DOUBLE, *NARROW_FLOATS}
_BYTES = {TensorProto.UINT8, TensorProto.INT8}
_IMAGES = 4
_POLICIES = ("stretch", "not_larger", "not_smaller")


@dataclass(frozen=True)
class Sampling:
    """How one node interpolates, whatever the sizes are."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    exclude_outside: bool = False
    antialias: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class Axis:
    """What becomes of one axis."""

    size: int
    count: int
    scale: float
    start: float = 0.0
    end: float = 1.0


_Ratio = Callable[[_Array, Axis], _Array]


def _half_pixel(x: _Array, axis: Axis) -> _Array:
    return (x + np.float32(0.5)) / np.float32(axis.scale) - np.float32(0.5)


def _asymmetric(x: _Array, axis: Axis) -> _Array:
    return x / np.float32(axis.scale)


def _aligned(x: _Array, axis: Axis) -> _Array:
    return x * np.float32(axis.size - 1) / np.float32(axis.count - 1) if axis.count > 1 else x * 0


def _pytorch_half_pixel(x: _Array, axis: Axis) -> _Array:
    return _half_pixel(x, axis) if axis.count > 1 else x * 0


def _symmetric(x: _Array, axis: Axis) -> _Array:
    adjustment = np.float32(axis.count) / (np.float32(axis.scale) * np.float32(axis.size))
    offset = np.float32(axis.size / 2) * (1 - adjustment)
    # here the runtime computes in float64
    return (np.float64(offset) + (x + np.float64(0.5)) / np.float64(axis.scale) - 0.5).astype(np.float32)


def _half_pixel_unshifted(x: _Array, axis: Axis) -> _Array:
    return (x + np.float32(0.5)) / np.float32(axis.scale)


def _cropped(x: _Array, axis: Axis) -> _Array:
    last, start, end = np.float32(axis.size - 1), np.float32(axis.start), np.float32(axis.end)
    if axis.count > 1:
        return start * last + x * (end - start) * last / np.float32(axis.count - 1)
    return x * 0 + np.float32(0.5) * (start + end) * last


_COORDINATES: Mapping[str, _Ratio] = {
    "half_pixel": _half_pixel,
    "asymmetric": _asymmetric,
    "align_corners": _aligned,
    "pytorch_half_pixel": _pytorch_half_pixel,
    "half_pixel_symmetric": _symmetric,
    "tf_crop_and_resize": _cropped,
    "tf_half_pixel_for_nn": _half_pixel_unshifted,
}
_NEAREST: Mapping[str, Callable[[_Array, Axis], _Array]] = {
    # what is less than a millionth above the middle counts as the middle
    "round_prefer_floor": lambda x, _axis: np.floor(x) + (x - np.floor(x) - np.float32(0.5) >= np.float32(1e-6)),
    "round_prefer_ceil": lambda x, _axis: np.floor(x + np.float32(0.5)),
    "floor": lambda x, _axis: np.floor(x),
    "ceil": lambda x, _axis: np.ceil(x),
    # ONNX Runtime's meaning of operators older than opset 11
    "simple": lambda x, axis: np.ceil(x) if axis.scale < 1 else np.floor(x),
}


def _positions(sampling: Sampling, axis: Axis) -> _Array:
    return _COORDINATES[sampling.coordinates](np.arange(axis.count, dtype=np.float32), axis).astype(np.float32)


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _sources(sampling: Sampling, axis: Axis) -> Tensor:
    """The cell that each output cell of a nearest resampling comes from."""
    found = _NEAREST[sampling.nearest](_positions(sampling, axis), axis)
    return torch.from_numpy(found.clip(0, axis.size - 1).astype(np.int64))


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _outside(sampling: Sampling, axis: Axis) -> Tensor | None:
    """Which output cells lie outside the input and get the extrapolation value."""
    if sampling.coordinates != "tf_crop_and_resize":
        return None
    positions = _positions(sampling, axis)
    found = torch.from_numpy((positions < 0) | (positions > axis.size - 1))
    return found if bool(found.any()) else None


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _weights(sampling: Sampling, axis: Axis) -> Tensor:
    """(count, size) float64: what each output cell takes from each input cell."""
    positions = _positions(sampling, axis).astype(np.float64)
    shrink = min(1.0, axis.scale) if sampling.antialias else 1.0
    reach = int(np.ceil((2 if sampling.mode == "cubic" else 1) / shrink))
    taps = np.floor(positions).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    share = _share(sampling, (taps - positions[:, None]) * shrink)
    if sampling.exclude_outside:
        share = np.where((taps >= 0) & (taps < axis.size), share, 0.0)
    if sampling.exclude_outside or sampling.antialias:
        total = share.sum(1, keepdims=True)
        share = share / np.where(total == 0, 1, total)
    weights = np.zeros((axis.count, axis.size))
    np.add.at(weights, (np.arange(axis.count)[:, None], taps.clip(0, axis.size - 1)), share)
    return torch.from_numpy(weights)


def _share(sampling: Sampling, distance: NDArray[np.float64]) -> NDArray[np.float64]:
    """The interpolation kernel at a distance in cells."""
    x, a = np.abs(distance), sampling.cubic
    if sampling.mode == "linear":
        falling: NDArray[np.float64] = np.maximum(1 - x, 0)
        return falling
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    share: NDArray[np.float64] = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    return share


def resample(x: Tensor, sampling: Sampling, axes: Mapping[int, Axis]) -> Tensor:
    """`x` with some axes resampled; what lies outside the input is filled with the extrapolation value."""
    for at, axis in axes.items():
        if sampling.mode == "nearest":
            x = x.index_select(at, _sources(sampling, axis))
        else:
            weights = _weights(sampling, axis).to(x.dtype)
            x = (x.movedim(at, -1) @ weights.t()).movedim(-1, at)
        outside = _outside(sampling, axis)
        if outside is not None:
            mask = outside.reshape(-1, *(1 for _ in range(x.ndim - 1 - at)))
            x = torch.where(mask, torch.full((), sampling.extrapolation, dtype=x.dtype), x)
    return x


@functools.lru_cache(maxsize=256)
@torch.inference_mode(False)
def _neighbours(sampling: Sampling, axis: Axis) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two cells that each output cell lies between, and float32 shares of both, as ONNX Runtime computes them."""
    positions = _positions(sampling, axis).clip(0, axis.size - 1)
    first = positions.astype(np.int64)
    second = np.minimum(first + 1, axis.size - 1)
    shares = (
        np.where(first == second, np.float32(0.5), np.abs(positions - at.astype(np.float32))) for at in (second, first)
    )
    near, far = (torch.from_numpy(share.astype(np.float32)) for share in shares)
    return (torch.from_numpy(first), torch.from_numpy(second)), (near, far)


def _between_codes(x: Tensor, sampling: Sampling, rows: Axis, columns: Axis) -> Tensor:
    """Codes between two rows and two columns, in the order of ONNX Runtime's sum; fractions go towards zero."""
    (above, below), (upper, lower) = _neighbours(sampling, rows)
    (left, right), (near, far) = _neighbours(sampling, columns)
    top, bottom = x.index_select(2, above), x.index_select(2, below)
    upper, lower = upper.unsqueeze(1), lower.unsqueeze(1)
    total = near * upper * top.index_select(3, left) + far * upper * top.index_select(3, right)
    total = total + near * lower * bottom.index_select(3, left)
    total = total + far * lower * bottom.index_select(3, right)
    return value_of(total.detach().trunc(), total)


_Resample = Callable[[Tensor, Sampling, Mapping[int, Axis]], Tensor]


def _resampler(node: Node, sampling: Sampling) -> _Resample:
    """How a node's values are resampled: codes between two rows and two columns become codes again.

    Raises:
        UnsupportedOperatorError: integers are interpolated otherwise.
    """
    kind = node.element_type(0) or TensorProto.UNDEFINED
    if sampling.mode == "nearest" or kind in _INTERPOLATED:
        return resample
    refused = node.unsupported("it interpolates integers, which is covered for 8 bits and mode 'linear' over (H, W)")
    plain = sampling.mode == "linear" and not sampling.antialias and sampling.coordinates != "tf_crop_and_resize"
    if kind not in _BYTES or not plain:
        raise refused

    def resample_codes(x: Tensor, sampling: Sampling, axes: Mapping[int, Axis]) -> Tensor:
        if x.ndim != _IMAGES or not axes.keys() <= {2, 3}:
            raise refused
        rows, columns = (axes.get(at, Axis(x.shape[at], x.shape[at], 1.0)) for at in (2, 3))
        return _between_codes(x, sampling, rows, columns)

    return resample_codes


def _scaled(sizes: Sequence[int], scales: Sequence[float]) -> dict[int, Axis]:
    """The axes that scales change, each count rounded down."""
    counts = [int(np.float32(scale) * np.float32(size)) for size, scale in zip(sizes, scales, strict=True)]
    found = enumerate(zip(sizes, counts, scales, strict=True))
    return {at: Axis(size, count, scale) for at, (size, count, scale) in found if scale != 1}


@operator("Upsample", since=9)
@operator("Resize", since=10)
def old_resize(node: Node) -> Kernel:
    """Resampling by scales that are an input (Upsample, and Resize of opset 10)."""
    sampling, scales = _old_sampling(node), _numbers(node, 1)
    resampled = _resampler(node, sampling)
    return lambda x, given=None: resampled(x, sampling, _scaled(x.shape, scales(given)))


@operator("Upsample", since=7)
def upsample_by_attribute(node: Node) -> Kernel:
    """Resampling by scales that are an attribute (before opset 9)."""
    sampling, scales = _old_sampling(node), node.numbers("scales")
    resampled = _resampler(node, sampling)
    return lambda x: resampled(x, sampling, _scaled(x.shape, scales))


def _old_sampling(node: Node) -> Sampling:
    mode = node.text("mode", "nearest")
    if mode not in ("nearest", "linear"):
        raise node.unsupported(f"attribute 'mode' is {mode!r}, expected 'nearest' or 'linear'")
    return Sampling(mode, "asymmetric", "simple")


def _numbers(node: Node, index: int) -> Callable[[Tensor | None], tuple[float, ...]]:
    """The numbers in an input that may be left out, constant or computed: a function of that input."""
    if index in node.constants:
        fixed = tuple(node.constant(index).reshape(-1).tolist())
        return lambda _given: fixed
    return lambda given: () if given is None else tuple(given.reshape(-1).tolist())


@operator("Resize", since=11)
def resize(node: Node) -> Kernel:
    """Resampling to given sizes, or by given scales."""
    sampling, chosen = _sampling(node), node.integers("axes")
    policy = node.text("keep_aspect_ratio_policy", "stretch")
    if policy not in _POLICIES:
        raise node.unsupported(f"attribute 'keep_aspect_ratio_policy' is {policy!r}, expected one of {_POLICIES}")
    resampled = _resampler(node, sampling)
    regions, scales, sizes = _numbers(node, 1), _numbers(node, 2), listing(node, 3)

    def kernel(
        x: Tensor, region: Tensor | None = None, scale: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        at = tuple(axis % x.ndim for axis in chosen) if chosen is not None else tuple(range(x.ndim))
        wanted = _Wanted(scales(scale), sizes(size) or (), regions(region), policy)
        return resampled(x, sampling, _resized([x.shape[axis] for axis in at], at, wanted))

    return kernel


@dataclass(frozen=True)
class _Wanted:
    """What the inputs of one pass ask for."""

    scales: tuple[float, ...]
    sizes: tuple[int, ...]
    region: tuple[float, ...]
    policy: str


def _resized(have: Sequence[int], at: Sequence[int], wanted: _Wanted) -> dict[int, Axis]:
    scales, counts = _scales_and_counts(have, wanted)
    half = len(wanted.region) // 2
    found = {}
    for index, axis in enumerate(at):
        # an axis that keeps its scale is not cropped either
        if scales[index] != 1 or counts[index] != have[index]:
            ends = (wanted.region[index], wanted.region[half + index]) if half else (0.0, 1.0)
            found[axis] = Axis(have[index], counts[index], scales[index], *ends)
    return found


def _scales_and_counts(have: Sequence[int], wanted: _Wanted) -> tuple[list[float], list[int]]:
    if not wanted.sizes:
        scales = list(wanted.scales)
        return scales, [int(np.float32(scale) * np.float32(size)) for size, scale in zip(have, scales, strict=True)]
    ratios = [float(np.float32(count) / np.float32(size)) for size, count in zip(have, wanted.sizes, strict=True)]
    if wanted.policy == "stretch":
        return ratios, list(wanted.sizes)
    ratio = min(ratios) if wanted.policy == "not_larger" else max(ratios)
    return [ratio] * len(have), [int(np.float32(ratio) * np.float32(size) + np.float32(0.5)) for size in have]


def _sampling(node: Node) -> Sampling:
    """The interpolation that a node's attributes ask for.

    Raises:
        UnsupportedOperatorError: an attribute has a value that ONNX doesn't know.
    """
    mode = node.text("mode", "nearest")
    coordinates = node.text("coordinate_transformation_mode", "half_pixel")
    nearest = node.text("nearest_mode", "round_prefer_floor")
    choices = (("mode", mode, _MODES), ("coordinate_transformation_mode", coordinates, tuple(_COORDINATES)),
               ("nearest_mode", nearest, tuple(_NEAREST)))  # fmt: skip
    for name, value, known in choices:
        if value not in known:
            raise node.unsupported(f"attribute {name!r} is {value!r}, expected one of {known}")
    return Sampling(
        mode,
        coordinates,
        nearest,
        node.number("cubic_coeff_a", -0.75),
        bool(node.integer("exclude_outside", 0)),
        bool(node.integer("antialias", 0)),
        node.number("extrapolation_value", 0.0),
    )
