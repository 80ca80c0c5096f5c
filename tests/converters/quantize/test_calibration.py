from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.converters.quantize import QuantizationError, quantize

from .quantized_nets import NET, constants, images, small_net


@pytest.mark.parametrize(("batch", "count"), [("batch", 17), ("batch", 100), (1, 17), (4, 16)])
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_quantize_uses_every_image_when_count_is_odd(batch: Any, count: int, method: Any) -> None:
    calibration = images(count)
    calibration[:-1] *= 0.1
    model = small_net(batch=batch).SerializeToString()
    quantized = quantize(model, "int8-static", calibration=calibration, method=method)
    tensors = constants(quantized)
    reach = (255 - int(tensors["scaled_zero_point"])) * float(tensors["scaled_scale"])
    assert reach == pytest.approx((calibration.max() - 0.45) / 0.25, rel=0.02)


def refused(match: str, calibration: NDArray[Any], model: bytes = NET) -> None:
    with pytest.raises(QuantizationError, match=match) as caught:
        quantize(model, "int8-static", calibration=calibration)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(32, 3, 8), (32, 3, 8, 9), (32, 1, 8, 8), (32, 8, 8, 3)])
def test_quantize_static_refuses_when_shape_differs(shape: tuple[int, ...]) -> None:
    refused(r"calibration has shape \(32, .*the model's input is \[None, 3, 8, 8\]", np.zeros(shape, "f4"))


def test_quantize_static_refuses_when_dtype_differs() -> None:
    refused("calibration is uint8, not float32; scale", np.zeros((32, 3, 8, 8), np.uint8))


def test_quantize_static_refuses_when_images_are_few() -> None:
    refused("calibration has 15 images, fewer than 16; use", calibration=images(15))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantize_static_refuses_when_pixels_are_not_finite(value: float) -> None:
    broken = images()
    broken[3, 0, 0, 0] = value
    refused("NaN or infinite pixels; check", broken)


@pytest.mark.parametrize(("factor", "shift"), [(255.0, 0.0), (1.0, -0.5)])
def test_quantize_static_refuses_when_pixels_leave_the_unit_range(factor: float, shift: float) -> None:
    refused(
        r"pixels in \[.*\], outside \[0, 1\]; divide by 255",
        images() * np.float32(factor) + np.float32(shift),
    )


def test_quantize_static_refuses_when_count_does_not_fill_fixed_batches() -> None:
    refused("batch is fixed at 3 and calibration has 32 images; use", images(), small_net(batch=3).SerializeToString())
