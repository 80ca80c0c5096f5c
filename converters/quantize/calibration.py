"""Calibration images: whether they fit the model, and how they are handed to ONNX Runtime's calibrator."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization

from qdefense.converters.contract import InputContract
from qdefense.converters.door import fed
from qdefense.converters.quantize.settings import QuantizationError

MINIMUM_IMAGES = 16
CALIBRATION_BATCH = 64


class Calibration(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no type information
    """Hands the images to the calibrator one stride at a time, which bounds what its histograms keep in memory.

    Args:
        images: (N, C, H, W) float32 in [0, 1], N >= 16.
        image: the model's input.
        contract: how the model is fed with such images; without it they are fed as they are.

    Raises:
        QuantizationError: the images don't fit.
    """

    def __init__(self, images: NDArray[np.float32], image: onnx.ValueInfoProto, contract: InputContract | None) -> None:
        checked = _check_images(images, image, contract)
        self.step = _batch(len(checked), image)
        self.sha256 = hashlib.sha256(checked.tobytes()).hexdigest()
        self._input_name = image.name
        self._images = checked if contract is None else fed(checked, contract)
        self._pending: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        """Called by the calibrator before each stride."""
        self._pending = self._images[start_index:end_index]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """Called by the calibrator until it gets None."""
        batch, self._pending = self._pending, None
        return None if batch is None else {self._input_name: batch}

    def record(self) -> dict[str, object]:
        """The images as the file tells of them."""
        return {"calibration_sha256": self.sha256, "calibration_images": len(self)}


def _check_images(
    calibration: NDArray[np.float32], image: onnx.ValueInfoProto, contract: InputContract | None
) -> NDArray[np.float32]:
    dims = [dim.dim_value if dim.HasField("dim_value") else None for dim in image.type.tensor_type.shape.dim]
    if contract is not None:
        dims = [None, 3, contract.height, contract.width]
    shape = calibration.shape
    if len(shape) != 4 or len(dims) != 4 or any(want not in (None, got) for want, got in zip(dims[1:], shape[1:])):
        raise QuantizationError(
            f"calibration has shape {shape}, the model's input is {dims}; give images of that size, or say "
            "--resize bilinear"
        )
    if calibration.dtype != np.float32:
        raise QuantizationError(f"calibration is {calibration.dtype}, not float32; scale the pixels to [0, 1] first")
    if len(calibration) < MINIMUM_IMAGES:
        raise QuantizationError(
            f"calibration has {len(calibration)} images, fewer than {MINIMUM_IMAGES}; use a few hundred"
        )
    if not np.isfinite(calibration).all():
        raise QuantizationError("calibration has NaN or infinite pixels; check how the images were read")
    if calibration.min() < 0.0 or calibration.max() > 1.0:
        raise QuantizationError(
            f"calibration has pixels in [{calibration.min():g}, {calibration.max():g}], outside [0, 1]; "
            "divide by 255 and leave the normalisation to the model"
        )
    return np.ascontiguousarray(calibration)


def _batch(images: int, image: onnx.ValueInfoProto) -> int:
    """The largest batch that divides the set, because the calibrator takes equal strides only."""
    first = image.type.tensor_type.shape.dim[0]
    if not first.HasField("dim_value"):
        return max(size for size in range(1, CALIBRATION_BATCH + 1) if images % size == 0)
    fixed = int(first.dim_value)
    if fixed < 1 or images % fixed:
        raise QuantizationError(
            f"the model's batch is fixed at {fixed} and calibration has {images} images; "
            "use a multiple of it or export with a dynamic batch"
        )
    return fixed
