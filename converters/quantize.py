"""FP32 ONNX and calibration images to static or dynamic INT8 ONNX: bytes in, the same bytes out for the same input."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnxruntime import quantization

from qdefense.converters.contract import InputContract
from qdefense.converters.door import fed
from qdefense.converters.precision import QUANTIZED_OPERATORS
from qdefense.converters.reading import FileRefusedError, every_graph, parse_model, safe_text
from qdefense.converters.runtime_graph import RuntimeGraphError, optimized_model

Scheme = Literal["int8-static", "int8-dynamic"]
Method = Literal["minmax", "percentile"]

METADATA_KEY = "qdefense.quantization"
MINIMUM_IMAGES = 16
CALIBRATION_BATCH = 64
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
_PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_RUNTIME_KEYS = frozenset({"onnx.infer", "onnx.quant.pre_process"})


class QuantizationError(ValueError):
    """The model or the calibration images can't be quantized as asked; the message says what and what to do."""


def quantize(
    model: bytes,
    scheme: Scheme,
    *,
    calibration: NDArray[np.float32] | None = None,
    per_channel: bool = True,
    reduce_range: bool = True,
    method: Method = "minmax",
    percentile: float = 99.999,
    contract: InputContract | None = None,
) -> bytes:
    """Quantize a single-input float32 file; ``int8-dynamic`` takes no images and none of the static settings.

    Args:
        model: the FP32 file.
        scheme: ``int8-static`` or ``int8-dynamic``.
        calibration: (N, C, H, W) float32 in [0, 1], N >= 16; needed by ``int8-static``.
        contract: how the file is fed with such images; without it the images are fed as they are.
        per_channel: one weight scale per output channel.
        reduce_range: 7-bit weights, which never saturate on a CPU without VNNI.
        method: how activation ranges are read off the calibration images.
        percentile: share of the values inside the range, for ``percentile``.

    Raises:
        QuantizationError: the scheme, the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    if scheme not in get_args(Scheme):
        raise QuantizationError(f"unknown scheme {scheme!r}; choose one of {', '.join(get_args(Scheme))}")
    if scheme == "int8-dynamic":
        return quantize_dynamic(model)
    if calibration is None:
        raise QuantizationError("int8-static needs calibration images; pass a few hundred clean ones")
    return quantize_static(
        model,
        calibration,
        input_name=_image_input(parse_model(model)).name,
        per_channel=per_channel,
        reduce_range=reduce_range,
        method=method,
        percentile=percentile,
        contract=contract,
    )


def quantize_static(
    model: bytes,
    calibration: NDArray[np.float32],
    *,
    input_name: str,
    per_channel: bool = True,
    reduce_range: bool = True,
    method: Method = "minmax",
    percentile: float = 99.999,
    contract: InputContract | None = None,
) -> bytes:
    """Static INT8 in QDQ form: uint8 activations, int8 weights, ranges from ``calibration: (N, C, H, W) in [0, 1]``.

    Raises:
        QuantizationError: the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = _float_model(model)
    _check_settings(proto, per_channel=per_channel, method=method, percentile=percentile)
    images = _check_images(calibration, _image_input(proto), input_name, contract)
    step = _batch(len(images), _image_input(proto))
    record: dict[str, object] = {
        "scheme": "int8-static",
        "per_channel": per_channel,
        "reduce_range": reduce_range,
        "method": method,
        "calibration_sha256": hashlib.sha256(images.tobytes()).hexdigest(),
        "calibration_images": len(images),
    }
    options: dict[str, object] = {"CalibStridedMinMax": step}
    if method == "percentile":
        record["percentile"] = options["CalibPercentile"] = percentile

    def run(source: Path, target: Path) -> None:
        # The histogram calibrator prints its progress, and stdout is where results go.
        with redirect_stdout(io.StringIO()):
            quantization.quantize_static(
                source,
                target,
                _Batches(input_name, images if contract is None else fed(images, contract)),
                quant_format=quantization.QuantFormat.QDQ,
                op_types_to_quantize=list(STATIC_OPERATORS),
                per_channel=per_channel,
                reduce_range=reduce_range,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                calibrate_method=_calibration_method(method),
                calibration_providers=["CPUExecutionProvider"],
                extra_options=options,
            )

    return _convert(proto, run, record)


def quantize_dynamic(model: bytes) -> bytes:
    """Dynamic INT8: uint8 weights with one scale per tensor; activation scales are computed at each run.

    Unsigned weights, because signed ones saturate in ``MatMulInteger`` without VNNI and are several times slower in
    ``ConvInteger``.

    Raises:
        QuantizationError: the model doesn't fit.
        FileRefusedError: the model is no file this tool reads.
    """

    def run(source: Path, target: Path) -> None:
        quantization.quantize_dynamic(source, target, weight_type=quantization.QuantType.QUInt8)

    record: dict[str, object] = {"scheme": "int8-dynamic", "per_channel": False, "reduce_range": False}
    return _convert(_float_model(model), run, record)


def _float_model(model: bytes) -> onnx.ModelProto:
    proto = parse_model(model)
    operators = {node.op_type for graph in every_graph(proto.graph) for node in graph.node}
    if found := sorted(operators & QUANTIZED_OPERATORS):
        raise QuantizationError(f"the model is already quantized (it has {', '.join(found)}); start from the FP32 file")
    if not operators & _PRODUCTS:
        raise QuantizationError("the model has no Conv, Gemm or MatMul; there is nothing to quantize")
    # quant_pre_process swallows a failing session and goes on with a model nobody asked for.
    try:
        optimized_model(model)
    except RuntimeGraphError as error:
        raise QuantizationError(f"{safe_text(str(error))}; export the model again") from error
    return proto


def _image_input(proto: onnx.ModelProto) -> onnx.ValueInfoProto:
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [value for value in proto.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise QuantizationError(f"expected one image input, found {len(inputs)}; cut the graph down to the classifier")
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise QuantizationError(f"input {inputs[0].name!r} is not float32; export the model with a float32 input")
    return inputs[0]


def _check_settings(proto: onnx.ModelProto, *, per_channel: bool, method: str, percentile: float) -> None:
    opset = next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)
    if per_channel and opset < PER_CHANNEL_OPSET:
        raise QuantizationError(
            f"per-channel scales need opset {PER_CHANNEL_OPSET}, the model has {opset}; "
            "export it at a newer opset or quantize per tensor"
        )
    if method not in get_args(Method):
        raise QuantizationError(f"unknown calibration method {method!r}; choose one of {', '.join(get_args(Method))}")
    if method == "percentile" and not 50.0 < percentile <= 100.0:
        raise QuantizationError(f"percentile is {percentile}, not within (50, 100]; 99.999 is usual")


def _check_images(
    calibration: NDArray[np.float32], image: onnx.ValueInfoProto, input_name: str, contract: InputContract | None
) -> NDArray[np.float32]:
    if input_name != image.name:
        raise QuantizationError(f"the model's input is {image.name!r}, not {input_name!r}; name the right one")
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


def _calibration_method(method: Method) -> Any:
    methods = quantization.CalibrationMethod
    return methods.MinMax if method == "minmax" else methods.Percentile


class _Batches(quantization.CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no type information
    """Hands the images to the calibrator one stride at a time, which bounds what its histograms keep in memory."""

    def __init__(self, input_name: str, images: NDArray[np.float32]) -> None:
        self._input_name = input_name
        self._images = images
        self._pending: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self._images)

    def set_range(self, start_index: int, end_index: int) -> None:
        self._pending = self._images[start_index:end_index]

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch, self._pending = self._pending, None
        return None if batch is None else {self._input_name: batch}


def _convert(proto: onnx.ModelProto, run: Callable[[Path, Path], None], record: dict[str, object]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="qdefense-") as folder, _quiet():
        source, prepared, target = (Path(folder, name) for name in ("source.onnx", "prepared.onnx", "quantized.onnx"))
        source.write_bytes(proto.SerializeToString())
        quantization.quant_pre_process(source, prepared, skip_symbolic_shape=_types_are_known(proto))
        run(prepared, target)
        result = onnx.load(target)
    _strip(result)
    _keep_used_opsets(result)
    metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in _RUNTIME_KEYS}
    record["onnxruntime"] = onnxruntime.__version__
    metadata[METADATA_KEY] = json.dumps(record, sort_keys=True, separators=(",", ":"))
    onnx.helper.set_model_props(result, dict(sorted(metadata.items())))
    return _checked(bytes(result.SerializeToString(deterministic=True)))


def _checked(quantized: bytes) -> bytes:
    try:
        parse_model(quantized)
    except FileRefusedError as error:
        raise QuantizationError(
            f"ONNX Runtime's quantizer wrote an invalid file: {error}; take the control flow out of the model first"
        ) from error
    return quantized


def _types_are_known(proto: onnx.ModelProto) -> bool:
    """Whether ONNX's own shape inference reaches every tensor; the symbolic one is slow and seldom needed."""
    try:
        graph = onnx.shape_inference.infer_shapes(proto).graph
    except onnx.shape_inference.InferenceError:
        return False
    known = {value.name for value in (*graph.value_info, *graph.output)}
    return all(name in known for node in graph.node for name in node.output if name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what ONNX Runtime's quantizer logs on the root logger: advice about its own defaults.

    Logging on a root logger without handlers would also install one for the whole process, hence the null handler.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    root.addFilter(_is_foreign)
    try:
        yield
    finally:
        root.removeFilter(_is_foreign)
        root.removeHandler(handler)


_QUANTIZER_FOLDER = str(Path(quantization.__file__).parent)


def _is_foreign(record: logging.LogRecord) -> bool:
    return not record.pathname.startswith(_QUANTIZER_FOLDER)


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, local paths and everything else that tells where and how the file was built."""
    model.ClearField("doc_string")
    for graph in every_graph(model.graph):
        for holder in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
            holder.ClearField("doc_string")
            holder.ClearField("metadata_props")


def _keep_used_opsets(model: onnx.ModelProto) -> None:
    """ONNX Runtime's optimizer imports every domain it knows; keep those that a node uses."""
    used = {node.domain for graph in every_graph(model.graph) for node in graph.node} | {"", "ai.onnx"}
    kept = [entry for entry in model.opset_import if entry.domain in used]
    del model.opset_import[:]
    model.opset_import.extend(kept)
