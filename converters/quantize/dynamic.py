"""Dynamic INT8: integer weights, and activations whose scale is computed at each run."""

from __future__ import annotations

from pathlib import Path

from onnxruntime import quantization

from qdefense.converters.quantize.preparing import convert, float_model, runtime_failure_told
from qdefense.converters.quantize.settings import Settings, settings_of

_WEIGHTS = {"u8u8": quantization.QuantType.QUInt8, "u8s8": quantization.QuantType.QInt8}
_USUAL = settings_of("int8-dynamic")


def quantize_dynamic(model: bytes, settings: Settings = _USUAL) -> bytes:
    """Dynamic INT8: uint8 activations; weights unsigned unless the types are u8s8, with one scale per tensor.

    Unsigned weights are the default, because signed ones saturate in ``MatMulInteger`` without VNNI and are several
    times slower in ``ConvInteger``. ``per_channel`` is of MatMul and Gemm: ONNX Runtime's quantizer gives a Conv one
    scale per tensor whatever is asked for.

    Raises:
        QuantizationError: the model doesn't fit.
        FileRefusedError: the model is no file this tool reads.
    """

    def run(source: Path, target: Path) -> None:
        with runtime_failure_told():
            quantization.quantize_dynamic(
                source,
                target,
                weight_type=_WEIGHTS[settings.types or "u8u8"],
                per_channel=settings.per_channel,
                reduce_range=settings.reduce_range,
            )

    return convert(float_model(model), run, settings.record())
