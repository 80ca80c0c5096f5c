"""INT4: packed 4-bit weights behind DequantizeLinear, with float or static INT8 activations.

ONNX Runtime's own weight-only quantizer knows MatMul alone; its static one has no blocks for convolutions and no
asymmetric weights per channel. Hence the weights are packed here, and only activations are left to the runtime.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization

from qdefense.converters.contract import InputContract
from qdefense.converters.quantize.calibration import Calibration
from qdefense.converters.quantize.int4_graph import pack_weights, round_weights
from qdefense.converters.quantize.opset import raised
from qdefense.converters.quantize.preparing import convert, float_model, image_input
from qdefense.converters.quantize.settings import Settings, settings_of
from qdefense.converters.quantize.static import run_static

OPSET = 21
"""The first whose DequantizeLinear knows 4-bit types and blocks."""
_USUAL, _USUAL_A8 = settings_of("int4"), settings_of("int4-a8")


def quantize_int4(model: bytes, settings: Settings = _USUAL, *, contract: InputContract | None = None) -> bytes:
    """4-bit weights of Conv, Gemm and MatMul outside of branches; activations and everything else stay in float.

    A layer with fewer than ``block_size`` values along its reduction axis (a depthwise convolution, say) has a scale
    per channel in a blocked file, too. A model of an older opset is raised to 21.

    Raises:
        QuantizationError: the model doesn't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = raised(float_model(model), OPSET, contract)

    def run(source: Path, target: Path) -> None:
        result = onnx.load(source)
        pack_weights(result, round_weights(result, settings))
        onnx.save(result, target)

    return convert(proto, run, settings.record())


def quantize_int4_a8(
    model: bytes,
    calibration: NDArray[np.float32],
    settings: Settings = _USUAL_A8,
    *,
    contract: InputContract | None = None,
) -> bytes:
    """The 4-bit weights of `quantize_int4` with static uint8 activations, in QDQ format; biases stay in float.

    The ranges are those of the network with the rounded weights, whose activations differ from the float one's.

    Raises:
        QuantizationError: the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = float_model(model)
    images = Calibration(calibration, image_input(proto), contract)
    proto = raised(proto, OPSET, contract)

    def run(source: Path, target: Path) -> None:
        rounded = onnx.load(source)
        codes = round_weights(rounded, settings)
        onnx.save(rounded, source)
        # A bias in int32 would be on the grid of its input's scale and its weights', which a block has many of.
        run_static(
            source, target, images, settings, weights=quantization.QuantType.QInt8, options={"QuantizeBias": False}
        )
        result = onnx.load(target)
        pack_weights(result, codes)
        onnx.save(result, target)

    return convert(proto, run, settings.record() | images.record())
