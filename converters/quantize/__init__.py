"""FP32 ONNX to quantized ONNX: bytes in, the same bytes out for the same input.

============== ======================================== ================================================
scheme         weights                                  activations
============== ======================================== ================================================
int8-static    int8 or uint8, per channel or tensor     int8 or uint8, ranges from calibration images
int8-dynamic   uint8 or int8, per tensor                uint8, a scale of each batch's own
int4           INT4 or UINT4, per channel or block      float
int4-a8        as int4                                  uint8, ranges from calibration images
============== ======================================== ================================================
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from qdefense.converters.contract import InputContract
from qdefense.converters.quantize.calibration import MINIMUM_IMAGES
from qdefense.converters.quantize.dynamic import quantize_dynamic
from qdefense.converters.quantize.int4 import quantize_int4, quantize_int4_a8
from qdefense.converters.quantize.preparing import METADATA_KEY
from qdefense.converters.quantize.settings import (
    BlockSize,
    Format,
    Method,
    QuantizationError,
    Scheme,
    Settings,
    Types,
    settings_of,
)
from qdefense.converters.quantize.static import STATIC_OPERATORS, quantize_static

__all__ = [
    "METADATA_KEY",
    "MINIMUM_IMAGES",
    "STATIC_OPERATORS",
    "BlockSize",
    "Format",
    "Method",
    "QuantizationError",
    "Scheme",
    "Settings",
    "Types",
    "quantize",
    "quantize_as",
    "quantize_dynamic",
    "quantize_int4",
    "quantize_int4_a8",
    "quantize_static",
    "settings_of",
]


def quantize(
    model: bytes,
    scheme: Scheme,
    *,
    calibration: NDArray[np.float32] | None = None,
    contract: InputContract | None = None,
    format: Format | None = None,  # noqa: A002 (what ONNX Runtime and the command line call it)
    types: Types | None = None,
    per_channel: bool | None = None,
    reduce_range: bool | None = None,
    method: Method | None = None,
    percentile: float | None = None,
    block_size: BlockSize | None = None,
    symmetric: bool | None = None,
) -> bytes:
    """Quantize a float32 file; settings left out are the scheme's defaults, and `Settings` says what they are.

    Args:
        model: the FP32 file.
        scheme: what becomes of weights and activations.
        calibration: (N, C, H, W) float32 in [0, 1], N >= 16; needed by ``int8-static`` and ``int4-a8``.
        contract: how the file is fed with such images; without it the images are fed as they are.
        format: ``qdq`` (default) or ``qoperator``, of ``int8-static``.
        types: of activations and weights, of the INT8 schemes: u8s8, s8s8, u8u8; the default is u8s8, dynamic u8u8.
        per_channel: one weight scale per output channel, the default but for ``int8-dynamic``.
        reduce_range: 7-bit signed weights, which never saturate on a CPU without VNNI; the default.
        method: how activation ranges are read off the calibration images, ``minmax`` by default.
        percentile: share of the values inside the range, for ``percentile``; 99.999 by default.
        block_size: one weight scale for so many neighbours (16 or 32) along Cin or K, of the INT4 schemes.
        symmetric: 4-bit weights without a zero point, the default.

    Raises:
        QuantizationError: the scheme, the settings, the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    given = {
        "format": format,
        "types": types,
        "per_channel": per_channel,
        "reduce_range": reduce_range,
        "method": method,
        "percentile": percentile,
        "block_size": block_size,
        "symmetric": symmetric,
    }
    return quantize_as(model, settings_of(scheme, **given), calibration=calibration, contract=contract)


def quantize_as(
    model: bytes,
    settings: Settings,
    *,
    calibration: NDArray[np.float32] | None = None,
    contract: InputContract | None = None,
) -> bytes:
    """The same for settings that are at hand, so that their name is known before the work.

    Raises:
        QuantizationError: the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    if settings.scheme == "int8-dynamic":
        return quantize_dynamic(model, settings)
    if settings.scheme == "int4":
        return quantize_int4(model, settings, contract=contract)
    if calibration is None:
        raise QuantizationError(f"{settings.scheme} needs calibration images; pass a few hundred clean ones")
    of_images = quantize_static if settings.scheme == "int8-static" else quantize_int4_a8
    return of_images(model, calibration, settings, contract=contract)
