from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.quantize.int4_codes import Codes, block_codes, channel_codes


def row(*values: float) -> NDArray[np.float32]:
    return np.array([values], np.float32)


def read_back(codes: Codes) -> NDArray[np.float32]:
    """What DequantizeLinear makes of them, element by element, as the ONNX specification has it."""
    values = np.empty(codes.codes.shape, np.float32)
    for place in np.ndindex(values.shape):
        where: Any = (place[codes.axis],)
        if codes.block_size:
            where = tuple(i // codes.block_size if axis == codes.axis else i for axis, i in enumerate(place))
        zero = 0 if codes.zero_points is None else int(codes.zero_points[where])
        values[place] = np.float32(int(codes.codes[place]) - zero) * codes.scales[where]
    assert codes.weight().tolist() == values.tolist()
    return values


def test_symmetric_codes_reach_seven_on_the_largest_weight() -> None:
    found = channel_codes(row(-3.5, 0.0, 0.5, 1.2, 3.5), 0, symmetric=True)
    assert found.codes.tolist() == [[-7, 0, 1, 2, 7]]
    assert found.codes.dtype == np.int8
    assert found.scales.tolist() == [0.5]
    assert found.zero_points is None


def test_symmetric_codes_round_to_even_when_a_weight_lies_halfway() -> None:
    found = channel_codes(row(0.5, 1.5, 2.5, -0.5, -1.5, 7.0), 0, symmetric=True)
    assert found.codes.tolist() == [[0, 2, 2, 0, -2, 7]]


def test_asymmetric_codes_reach_from_lowest_to_highest_weight() -> None:
    found = channel_codes(row(-1.0, 0.0, 0.5, 6.5), 0, symmetric=False)
    assert found.zero_points is not None
    assert (found.scales.tolist(), found.zero_points.tolist()) == ([0.5], [2])
    assert found.codes.tolist() == [[0, 2, 3, 15]]
    assert (found.codes.dtype, found.zero_points.dtype) == (np.uint8, np.uint8)


@pytest.mark.parametrize(("weights", "zero_point", "codes"), [((1.0, 15.0), 0, [1, 15]), ((-15.0, -1.0), 15, [0, 14])])
def test_asymmetric_range_holds_zero_when_all_weights_have_one_sign(
    weights: tuple[float, ...], zero_point: int, codes: list[int]
) -> None:
    found = channel_codes(row(*weights), 0, symmetric=False)
    assert found.zero_points is not None
    assert (found.scales.tolist(), found.zero_points.tolist()) == ([1.0], [zero_point])
    assert found.codes.tolist() == [codes]


def test_channels_have_scales_of_their_own_along_either_axis() -> None:
    weight = np.array([[7.0, 0.8], [-3.5, 1.4]], np.float32)
    assert channel_codes(weight, 0, symmetric=True).scales.tolist() == pytest.approx([1.0, 0.5])
    assert channel_codes(weight, 1, symmetric=True).scales.tolist() == pytest.approx([1.0, 0.2])
    assert channel_codes(weight, 1, symmetric=True).codes.tolist() == [[7, 4], [-4, 7]]


def test_blocks_have_scales_of_their_own_and_the_last_is_shorter() -> None:
    found = block_codes(row(*[7.0] * 16, *[14.0] * 16, 0.7), 1, 16, symmetric=True)
    assert found.scales.tolist() == [pytest.approx([1.0, 2.0, 0.1])]
    assert found.codes.tolist() == [[7] * 33]
    assert (found.axis, found.block_size) == (1, 16)


def test_blocks_go_down_the_columns_of_a_product() -> None:
    weight = np.ones((32, 2), np.float32) * np.float32([7.0, 70.0])
    weight[16:] *= 2
    assert block_codes(weight, 0, 16, symmetric=True).scales.tolist() == [[1.0, 10.0], [2.0, 20.0]]


def test_blocks_are_of_one_place_of_the_kernel_when_it_has_several() -> None:
    weight = np.random.default_rng(0).normal(size=(2, 20, 3, 1)).astype(np.float32)
    found = block_codes(weight, 1, 16, symmetric=False)
    assert found.zero_points is not None
    assert found.scales.shape == found.zero_points.shape == (2, 2, 3, 1)
    low, high = min(weight[1, 16:, 2, 0].min(), 0), max(weight[1, 16:, 2, 0].max(), 0)
    assert found.scales[1, 1, 2, 0] == pytest.approx((high - low) / 15)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tiny", [0.0, 1e-40, -1e-45])
def test_scale_is_one_when_a_channel_or_block_is_zero(symmetric: bool, tiny: float) -> None:
    weight = np.ones((2, 32), np.float32)
    weight[1, :16] = tiny
    blocks = block_codes(weight, 1, 16, symmetric=symmetric)
    weight[1] = tiny
    for found, place in ((blocks, (1, 0)), (channel_codes(weight, 0, symmetric=symmetric), (1,))):
        assert found.scales[place] == 1.0
        assert (read_back(found)[1, :16] == 0).all()
        assert (found.scales > 0).all()


def test_scale_is_finite_when_the_range_of_the_weights_is_not() -> None:
    largest = np.finfo(np.float32).max / 2
    for symmetric in (True, False):
        found = channel_codes(row(largest, -largest), 0, symmetric=symmetric)
        assert np.isfinite(found.scales).all()
        assert np.isfinite(read_back(found)).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("axis", "block_size"), [(0, 0), (1, 0), (1, 16), (0, 16)])
def test_no_weight_is_further_away_than_half_a_scale(symmetric: bool, axis: int, block_size: int) -> None:
    rng = np.random.default_rng(1)
    for shift in (-2.0, 0.0, 0.3, 5.0):
        weight = rng.normal(shift, 1.0, size=(20, 19)).astype(np.float32)
        if block_size:
            found = block_codes(weight, axis, block_size, symmetric=symmetric)
            scales = np.repeat(found.scales, block_size, axis=axis).take(range(weight.shape[axis]), axis=axis)
        else:
            found = channel_codes(weight, axis, symmetric=symmetric)
            scales = np.expand_dims(found.scales, 1 - axis)
        # Asymmetric: a zero point that was rounded by up to a half shifts the ends by as much.
        assert (np.abs(read_back(found) - weight) <= scales * (0.5 if symmetric else 1.0) * 1.0001).all()
        lowest, highest = (-7, 7) if symmetric else (0, 15)
        assert lowest <= found.codes.min() <= found.codes.max() <= highest
        if found.zero_points is not None:
            assert found.zero_points.max() <= 15


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_code_comes_back_when_its_weight_is_quantized_again(symmetric: bool) -> None:
    codes = np.arange(-7, 8) if symmetric else np.arange(16)
    for zero in [0] if symmetric else range(16):
        for scale in (1.0, 0.25, 3.0, 2.0**-20):
            weight = ((codes - zero) * scale).astype(np.float32)[None]
            found = channel_codes(weight, 0, symmetric=symmetric)
            assert found.codes.tolist() == [codes.tolist()]
            assert found.scales.tolist() == [scale]
            assert found.zero_points is None or found.zero_points.tolist() == [zero]
            assert read_back(found).tolist() == weight.tolist()


@pytest.mark.parametrize(("kind", "lowest", "highest"), [(TensorProto.INT4, -8, 7), (TensorProto.UINT4, 0, 15)])
def test_onnx_packs_every_pair_of_codes_into_one_byte_and_back(kind: int, lowest: int, highest: int) -> None:
    pairs = np.stack(np.meshgrid(*[np.arange(lowest, highest + 1)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    for codes in (pairs, pairs.reshape(-1)[:-1]):
        tensor = numpy_helper.from_array(codes.astype(helper.tensor_dtype_to_np_dtype(kind)), "codes")
        assert (tensor.data_type, len(tensor.raw_data)) == (kind, (codes.size + 1) // 2)
        assert numpy_helper.to_array(tensor).astype(int).tolist() == codes.tolist()
