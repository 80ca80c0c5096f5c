"""The float model to be quantized, ONNX Runtime's preparation of it, and what of the result goes into the file."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime
from onnxruntime import quantization

from qdefense.converters.precision import QUANTIZED_OPERATORS
from qdefense.converters.quantize.settings import QuantizationError
from qdefense.converters.reading import FileRefusedError, every_graph, parse_model, safe_text
from qdefense.converters.runtime_graph import RuntimeGraphError, optimized_model, runtime_reason

METADATA_KEY = "qdefense.quantization"
PRODUCTS = frozenset({"Conv", "Gemm", "MatMul"})
_LEFT_BEHIND = Path("sym_shape_infer_temp.onnx")
_RUNTIME_KEYS = frozenset({"onnx.infer", "onnx.quant.pre_process"})


def float_model(model: bytes) -> onnx.ModelProto:
    """The parsed model, once it is known to be in float, to have something to quantize, and to load.

    Raises:
        QuantizationError: one of these does not hold.
        FileRefusedError: it is no file this tool reads.
    """
    proto = parse_model(model)
    operators = {node.op_type for graph in every_graph(proto.graph) for node in graph.node}
    if found := sorted(operators & QUANTIZED_OPERATORS):
        raise QuantizationError(f"the model is already quantized (it has {', '.join(found)}); start from the FP32 file")
    if not operators & PRODUCTS:
        raise QuantizationError("the model has no Conv, Gemm or MatMul; there is nothing to quantize")
    # quant_pre_process swallows a failing session and goes on with a model nobody asked for.
    try:
        optimized_model(model)
    except RuntimeGraphError as error:
        raise QuantizationError(f"{safe_text(str(error))}; export the model again") from error
    return proto


def opset_of(proto: onnx.ModelProto) -> int:
    """The version of ONNX's own operators, 0 where there are none."""
    return next((int(entry.version) for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 0)


def image_input(proto: onnx.ModelProto) -> onnx.ValueInfoProto:
    """The one input, float32, that has to be fed.

    Raises:
        QuantizationError: there are several, or it has another type.
    """
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs: list[onnx.ValueInfoProto] = [value for value in proto.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise QuantizationError(f"expected one image input, found {len(inputs)}; cut the graph down to the classifier")
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT:
        raise QuantizationError(f"input {inputs[0].name!r} is not float32; export the model with a float32 input")
    return inputs[0]


def convert(proto: onnx.ModelProto, run: Callable[[Path, Path], None], record: dict[str, object]) -> bytes:
    """Prepare the model (shapes, folded constants and normalizations), let ``run(source, target)`` quantize it, finish.

    The result keeps the model's metadata and holds the record under ``qdefense.quantization``.

    Raises:
        QuantizationError: ONNX Runtime's quantizer fails, the result is no valid file, or the runtime does not load it.
    """
    with tempfile.TemporaryDirectory(prefix="qdefense-") as folder, _quiet():
        source, prepared, target = (Path(folder, name) for name in ("source.onnx", "prepared.onnx", "quantized.onnx"))
        source.write_bytes(proto.SerializeToString())
        with runtime_failure_told():
            quantization.quant_pre_process(source, prepared, skip_symbolic_shape=_types_are_known(proto))
        run(prepared, target)
        result = onnx.load(target)
    _strip(result)
    _keep_used_opsets(result)
    metadata = {entry.key: entry.value for entry in proto.metadata_props if entry.key not in _RUNTIME_KEYS}
    whole = record | {"onnxruntime": onnxruntime.__version__}
    metadata[METADATA_KEY] = json.dumps(whole, sort_keys=True, separators=(",", ":"))
    onnx.helper.set_model_props(result, dict(sorted(metadata.items())))
    return _checked(bytes(result.SerializeToString(deterministic=True)))


@contextmanager
def runtime_failure_told() -> Iterator[None]:
    """Around ONNX Runtime's quantizer, which asserts and raises bare exceptions where it can't use numbers or shapes.

    Where its shape inference fails, it leaves a file in the working directory, which is removed unless it was there.
    """
    found_before = _LEFT_BEHIND.exists()
    try:
        yield
    except (QuantizationError, FileRefusedError, MemoryError):
        raise
    except Exception as error:
        reason = safe_text(f"{type(error).__name__}: {runtime_reason(error)}")
        raise QuantizationError(
            f"ONNX Runtime's quantizer fails ({reason}); check that the weights, and what they make of the "
            "calibration images, are finite numbers, or choose another scheme"
        ) from error
    finally:
        if not found_before:
            _LEFT_BEHIND.unlink(missing_ok=True)


def _checked(quantized: bytes) -> bytes:
    try:
        parse_model(quantized)
    except FileRefusedError as error:
        raise QuantizationError(
            f"ONNX Runtime's quantizer wrote an invalid file: {error}; take the control flow out of the model first"
        ) from error
    try:
        optimized_model(quantized)
    except RuntimeGraphError as error:
        raise QuantizationError(
            f"the quantized file does not load: {safe_text(str(error))}; choose another scheme or other types"
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
