"""Raising a model's opset, and the proof that it still answers the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import version_converter

from qdefense.converters.contract import InputContract, free_inputs, shape_of
from qdefense.converters.door import fed
from qdefense.converters.narrowing import fixed_values
from qdefense.converters.quantize.preparing import image_input, opset_of
from qdefense.converters.quantize.settings import QuantizationError
from qdefense.converters.reading import safe_text
from qdefense.converters.runtime_graph import RUNTIME_ERRORS, runtime_reason

TOLERANCE = 1e-5
"""Over the largest answer: a converter may write an operator as several."""
_IMAGES = 4
_SIDE = 32


def raised(model: onnx.ModelProto, opset: int, contract: InputContract | None) -> onnx.ModelProto:
    """The model at ``opset`` where its own is lower, once both gave the same answers to random images in ONNX Runtime.

    Raises:
        QuantizationError: the converter fails, or the answers differ or cannot be compared.
    """
    own = opset_of(model)
    if own >= opset:
        return model
    remedy = f"export it at opset {opset}"
    try:
        result = version_converter.convert_version(model, opset)
    except (version_converter.ConvertError, RuntimeError, ValueError) as error:
        reason = safe_text(" ".join(str(error).split()))
        raise QuantizationError(f"the model's opset {own} cannot be raised to {opset}: {reason}; {remedy}") from error
    images = _random_inputs(model, contract)
    try:
        before, after = (_answers(version, images) for version in (model, result))
    except RUNTIME_ERRORS as error:
        reason = safe_text(runtime_reason(error))
        raise QuantizationError(
            f"the model at opset {opset} could not be compared with the one at {own}: {reason}; {remedy}"
        ) from error
    away = max(_distance(left, right) for left, right in zip(before, after))
    if not away <= TOLERANCE:
        raise QuantizationError(
            f"raised from opset {own} to {opset} the model answers differently (by {away:.2g} of its largest answer); "
            f"{remedy}"
        )
    return result


def _random_inputs(model: onnx.ModelProto, contract: InputContract | None) -> dict[str, NDArray[np.generic]]:
    rng = np.random.default_rng(0)
    if contract is not None:
        shape = (contract.batch or _IMAGES, 3, contract.height, contract.width)
        pixels = rng.uniform(size=shape).astype(np.float32)
        return {contract.input_name: fed(pixels, contract), **fixed_values(model, contract)}
    image = image_input(model)
    lengths = [length or (_IMAGES if axis == 0 else _SIDE) for axis, length in enumerate(shape_of(image))]
    return {image.name: rng.uniform(size=lengths).astype(np.float32)}


def _answers(model: onnx.ModelProto, inputs: dict[str, NDArray[np.generic]]) -> list[NDArray[np.generic]]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    wanted = {value.name: inputs[value.name] for value in free_inputs(model.graph) if value.name in inputs}
    return [np.asarray(value) for value in session.run(None, wanted)]


def _distance(left: NDArray[np.generic], right: NDArray[np.generic]) -> float:
    """The largest difference over the largest value; infinite for other shapes, NaN where an answer is none."""
    if left.shape != right.shape:
        return float("inf")
    first, second = left.astype(np.float64), right.astype(np.float64)
    return float(np.abs(first - second).max(initial=0) / max(float(np.abs(first).max(initial=0)), 1e-30))
