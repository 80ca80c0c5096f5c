"""The differentiable twin of an ONNX file: FP32, static INT8 (QDQ and QLinear graphs) and dynamic INT8."""

from qdefense.converters.runtime_graph import optimized_model
from qdefense.converters.saturation_probe import runtime_saturates, runtime_saturation
from qdefense.converters.shadow.graph import Shadow, build_shadow
from qdefense.converters.shadow.registry import (
    ShadowError,
    UnsupportedOperatorError,
    operator,
    registered,
)
from qdefense.converters.shadow.saturation import saturating_matmul, saturation_risk

__all__ = [
    "Shadow",
    "ShadowError",
    "UnsupportedOperatorError",
    "build_shadow",
    "operator",
    "optimized_model",
    "registered",
    "runtime_saturates",
    "runtime_saturation",
    "saturating_matmul",
    "saturation_risk",
]
