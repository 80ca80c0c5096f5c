from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnxruntime
import pytest

from qdefense.converters.inspection import inspect_model
from qdefense.converters.quantize import quantize, quantize_dynamic

from .quantized_nets import LEVELS, NET, WIDE, constants, images, logits, metadata, relative_error, weight_types


def test_quantize_dynamic_uses_integer_kernels_with_unsigned_weights() -> None:
    found = inspect_model(quantize_dynamic(NET))
    assert (found.scheme, found.weight_types, found.integer_mac_share) == ("int8-dynamic", ("uint8",), 1.0)


@pytest.mark.parametrize("types", ["u8u8", "u8s8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_dynamic_has_the_types_of_its_name_and_keeps_the_logits(types: Any, per_channel: bool) -> None:
    made = quantize(WIDE, "int8-dynamic", types=types, per_channel=per_channel)
    assert weight_types(made) == {"UINT8" if types == "u8u8" else "INT8"}
    assert 0 < relative_error(WIDE, made) < 0.06
    assert {len(logits(made, images(2), level)) for level in LEVELS} == {2}
    range_ = "full" if types == "u8u8" else "reduced"
    granularity = "per-channel-matmul" if per_channel else "per-tensor"
    record = json.loads(metadata(made)["qdefense.quantization"])
    assert record.get("name") == (None if types == "u8u8" else f"int8-dynamic-{types}-{granularity}-{range_}")


@pytest.mark.parametrize("types", ["u8u8", "u8s8"])
def test_quantize_dynamic_has_channels_in_products_and_none_in_convolutions_as_its_name_says(types: Any) -> None:
    sizes = {name: array.size for name, array in scales(quantize(WIDE, "int8-dynamic", types=types, per_channel=True))}
    assert {name: size for name, size in sizes.items() if size > 1} == {
        "gemm_w_scale": 36,
        "plain_gemm_w_scale": 20,
        "matmul_w_scale": 3,
    }
    assert {"stem_w_scale", "plain_w_scale", "depthwise_w_scale", "grouped_w_scale"} <= set(sizes)


def scales(model: bytes) -> list[tuple[str, Any]]:
    """Of weights; a Gemm became a MatMul of the transposed weight."""
    found = {name.replace("_Transposed", ""): array for name, array in constants(model).items()}
    return [(name, array) for name, array in found.items() if name.endswith("_w_scale")]


def test_quantize_dynamic_has_scales_above_zero() -> None:
    for name, array in scales(quantize(WIDE, "int8-dynamic", types="u8s8")):
        assert (array > 0).all(), name


def test_quantize_dynamic_stays_within_seven_bits_when_signed_range_is_reduced() -> None:
    reduced, full = (
        quantize(WIDE, "int8-dynamic", types="u8s8", reduce_range=reduce_range) for reduce_range in (True, False)
    )
    assert [largest_weight(file) for file in (reduced, full)] == [64, 127]
    assert inspect_model(reduced).saturation_layers == ()
    assert inspect_model(full).saturation_layers != ()


def largest_weight(model: bytes) -> int:
    weights = [array for array in constants(model).values() if array.dtype == np.int8 and array.ndim > 1]
    return max(int(np.abs(weight.astype(int)).max()) for weight in weights)


def test_quantize_dynamic_records_no_images() -> None:
    made = quantize(NET, "int8-dynamic", calibration=images())
    record = json.loads(metadata(made)["qdefense.quantization"])
    assert record == {
        "scheme": "int8-dynamic",
        "per_channel": False,
        "reduce_range": False,
        "onnxruntime": onnxruntime.__version__,
    }
    assert made == quantize_dynamic(NET)
