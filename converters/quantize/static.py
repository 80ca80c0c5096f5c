"""Static INT8: ranges of activations from calibration images, computed by ONNX Runtime's quantizer."""

from __future__ import annotations

import io
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime import quantization

from qdefense.converters.contract import InputContract
from qdefense.converters.quantize.calibration import Calibration
from qdefense.converters.quantize.preparing import (
    convert,
    float_model,
    image_input,
    opset_of,
    runtime_failure_told,
)
from qdefense.converters.quantize.settings import QuantizationError, Settings, settings_of

PER_CHANNEL_OPSET = 13

# Every operator here has an integer kernel, or passes codes on unchanged, in ONNX Runtime's CPU provider. Normalization
# layers, Softmax and Where are left out: they run in float either way, and their constants and outputs would only lose.
STATIC_OPERATORS = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "Flatten",
    "Gather",
    "Gemm",
    "GlobalAveragePool",
    "LeakyRelu",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Resize",
    "Sigmoid",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)

_TYPES = {"s": quantization.QuantType.QInt8, "u": quantization.QuantType.QUInt8}
_FORMATS = {"qdq": quantization.QuantFormat.QDQ, "qoperator": quantization.QuantFormat.QOperator}
_METHODS = {
    "minmax": quantization.CalibrationMethod.MinMax,
    "percentile": quantization.CalibrationMethod.Percentile,
}
_USUAL = settings_of("int8-static")


def quantize_static(
    model: bytes,
    calibration: NDArray[np.float32],
    settings: Settings = _USUAL,
    *,
    contract: InputContract | None = None,
) -> bytes:
    """Static INT8, with ranges from ``calibration: (N, C, H, W) in [0, 1]``.

    Raises:
        QuantizationError: the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = float_model(model)
    _check_opset(proto, settings)
    images = Calibration(calibration, image_input(proto), contract)

    def run(source: Path, target: Path) -> None:
        options = _weight_options(source, settings)
        run_static(source, target, images, settings, weights=_TYPES[str(settings.types)[2]], options=options)

    return convert(proto, run, settings.record() | images.record())


def run_static(
    source: Path,
    target: Path,
    images: Calibration,
    settings: Settings,
    *,
    weights: quantization.QuantType,
    options: Mapping[str, object],
) -> None:
    """ONNX Runtime's static quantizer, from one file to another, with uint8 activations unless the types say signed."""
    calibrating: dict[str, object] = {"CalibStridedMinMax": images.step}
    if settings.percentile is not None:
        calibrating["CalibPercentile"] = settings.percentile
    operators = _operators(source, settings)
    # The histogram calibrator prints its progress, and stdout is where results go.
    with redirect_stdout(io.StringIO()), runtime_failure_told():
        quantization.quantize_static(
            source,
            target,
            images,
            quant_format=_FORMATS[settings.format or "qdq"],
            op_types_to_quantize=operators,
            per_channel=settings.per_channel,
            reduce_range=settings.reduce_range,
            activation_type=_TYPES[(settings.types or "u8")[0]],
            weight_type=weights,
            calibrate_method=_METHODS[settings.method or "minmax"],
            calibration_providers=["CPUExecutionProvider"],
            extra_options=calibrating | dict(options),
        )


def _operators(source: Path, settings: Settings) -> list[str]:
    """What is quantized: in the operator format no Resize of a mode that ONNX Runtime has for floats only."""
    float_only = settings.format == "qoperator" and any(map(_needs_floats, onnx.load(source).graph.node))
    return [name for name in STATIC_OPERATORS if not (float_only and name == "Resize")]


def _needs_floats(node: onnx.NodeProto) -> bool:
    said = {attribute.name: attribute for attribute in node.attribute}
    cubic, smooth = "mode" in said and said["mode"].s == b"cubic", "antialias" in said and said["antialias"].i != 0
    return node.op_type == "Resize" and (cubic or smooth)


def _check_opset(proto: onnx.ModelProto, settings: Settings) -> None:
    opset = opset_of(proto)
    if settings.per_channel and opset < PER_CHANNEL_OPSET:
        raise QuantizationError(
            f"per-channel scales need opset {PER_CHANNEL_OPSET}, the model has {opset}; "
            "export it at a newer opset or quantize per tensor"
        )


def _weight_options(source: Path, settings: Settings) -> dict[str, object]:
    """Unsigned weights per channel: QLinearConv takes one zero point for all channels, hence symmetric ones.

    In the operator format the quantizer would also store a convolution's weights as int8, whatever was asked for.
    """
    if settings.types != "u8u8" or not settings.per_channel:
        return {}
    options: dict[str, object] = {"WeightSymmetric": True}
    if settings.format == "qoperator":
        unsigned: list[dict[str, Any]] = [{"axis": 0, "quant_type": _TYPES["u"], "symmetric": True}]
        graph = onnx.load(source).graph
        floats = {tensor.name for tensor in graph.initializer}
        kernels = [node.input[1] for node in graph.node if node.op_type == "Conv"]
        options["TensorQuantOverrides"] = {name: unsigned for name in kernels if name in floats}
    return options
