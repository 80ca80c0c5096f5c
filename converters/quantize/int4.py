"""INT4: packed 4-bit weights behind DequantizeLinear, with float or static INT8 activations.

ONNX Runtime's own weight-only quantizer knows MatMul alone; its static one has no blocks for convolutions and no
asymmetric weights per channel. Hence the weights are packed here, and only activations are left to the runtime.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from qdefense.converters.contract import InputContract
from qdefense.converters.quantize.calibration import Calibration
from qdefense.converters.quantize.int4_codes import Codes, block_codes, channel_codes
from qdefense.converters.quantize.opset import raised
from qdefense.converters.quantize.preparing import PRODUCTS, convert, float_model, image_input
from qdefense.converters.quantize.settings import QuantizationError, Settings
from qdefense.converters.quantize.static import run_static
from qdefense.converters.reading import every_graph, safe_text, tensor_array

OPSET = 21
"""The first whose DequantizeLinear knows 4-bit types and blocks."""
_IR_VERSION = 10
"""The first that knows 4-bit types."""


def quantize_int4(
    model: bytes,
    settings: Settings,
    *,
    contract: InputContract | None = None,
) -> bytes:
    """4-bit weights of Conv, Gemm and MatMul; activations and everything else stay in float.

    A layer with fewer than ``block_size`` values along its reduction axis (a depthwise convolution, say) has a scale
    per channel in a blocked file, too.

    Raises:
        QuantizationError: the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = raised(float_model(model), OPSET, contract)

    def run(source: Path, target: Path) -> None:
        result = onnx.load(source)
        _pack(result, _floats(result), settings)
        onnx.save(result, target)

    return convert(proto, run, settings.record())


def quantize_int4_a8(
    model: bytes,
    calibration: NDArray[np.float32],
    settings: Settings,
    *,
    contract: InputContract | None = None,
) -> bytes:
    """The 4-bit weights of `quantize_int4` with static uint8 activations, in QDQ format; biases stay in float.

    Raises:
        QuantizationError: the images or the model don't fit.
        FileRefusedError: the model is no file this tool reads.
    """
    proto = float_model(model)
    images = Calibration(calibration, image_input(proto), contract)
    proto = raised(proto, OPSET, contract)

    def run(source: Path, target: Path) -> None:
        # A bias in int32 would be on the grid of its input's scale and its weights', which a block has many of.
        run_static(
            source, target, images, settings, weights=quantization.QuantType.QInt8, options={"QuantizeBias": False}
        )
        result = onnx.load(target)
        _pack(result, _floats(onnx.load(source)), settings)
        onnx.save(result, target)

    return convert(proto, run, settings.record() | images.record())


def _floats(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.FLOAT}


def _pack(model: onnx.ModelProto, floats: dict[str, TensorProto], settings: Settings) -> None:
    """Give every product with a constant weight a packed one; ``floats`` are the weights before any quantization."""
    graph = model.graph
    origins = {name: name for name in floats}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            origins[node.output[0]] = node.input[0].removesuffix(TENSOR_NAME_QUANT_SUFFIX)
    packed: dict[tuple[str, int], str] = {}
    added: list[onnx.NodeProto] = []
    blocks = 0
    for node in graph.node:
        weight = floats.get(origins.get(node.input[1], "")) if node.op_type in PRODUCTS else None
        if weight is None or len(weight.dims) < 2:
            continue
        channel, reduction = _axes(node, len(weight.dims))
        if (weight.name, channel) not in packed:
            codes = _codes_of(weight, channel, reduction, settings)
            blocks += codes.block_size > 0
            output, dequantize = _stored(graph, weight.name, codes)
            packed[weight.name, channel] = output
            added.append(dequantize)
        node.input[1] = packed[weight.name, channel]
    _check_result(packed, blocks, settings)
    nodes = [*added, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    _drop_unused(graph)
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _axes(node: onnx.NodeProto, rank: int) -> tuple[int, int]:
    """The weight's axes of output channels and of reduction."""
    if node.op_type == "Conv":
        return 0, 1
    transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
    return (0, 1) if transposed else (rank - 1, rank - 2)


def _codes_of(weight: TensorProto, channel: int, reduction: int, settings: Settings) -> Codes:
    values, symmetric = tensor_array(weight), bool(settings.symmetric)
    if not np.isfinite(values).all():
        raise QuantizationError(
            f"weight '{safe_text(weight.name)}' has NaN or infinite values; train or export the model again"
        )
    size = settings.block_size
    if size is not None and values.shape[reduction] >= size:
        return block_codes(values, reduction, size, symmetric=symmetric)
    return channel_codes(values, channel, symmetric=symmetric)


def _stored(graph: onnx.GraphProto, weight: str, codes: Codes) -> tuple[str, onnx.NodeProto]:
    """Put codes, scales and zero points into the graph; the node that reads them, and its output."""
    kind = TensorProto.INT4 if codes.zero_points is None else TensorProto.UINT4
    taken = _names(graph)
    arrays = [("int4", codes.codes, kind), ("scale", codes.scales, TensorProto.FLOAT)]
    arrays += [] if codes.zero_points is None else [("zero_point", codes.zero_points, kind)]
    inputs = []
    for ending, values, element_type in arrays:
        name = _free(f"{weight}_{ending}", taken)
        dtype = helper.tensor_dtype_to_np_dtype(element_type)
        graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
        inputs.append(name)
    output = _free(f"{weight}_dequantized", taken)
    attributes = {"axis": codes.axis} | ({"block_size": codes.block_size} if codes.block_size else {})
    return output, helper.make_node("DequantizeLinear", inputs, [output], name=output, **attributes)


def _names(graph: onnx.GraphProto) -> set[str]:
    found: set[str] = set()
    for part in every_graph(graph):
        found.update(value.name for value in (*part.input, *part.output, *part.initializer))
        for node in part.node:
            found.update((node.name, *node.input, *node.output))
    return found


def _free(wanted: str, taken: set[str]) -> str:
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _check_result(packed: dict[tuple[str, int], str], blocks: int, settings: Settings) -> None:
    if not packed:
        raise QuantizationError(
            "no Conv, Gemm or MatMul has a constant float32 weight; there is nothing to pack into INT4"
        )
    if settings.block_size is not None and not blocks:
        raise QuantizationError(
            f"no weight has {settings.block_size} or more values along its reduction axis, so that no block would be "
            "made; leave the block size out"
        )


def _drop_unused(graph: onnx.GraphProto) -> None:
    """Remove the float or int8 forms of packed weights, with the nodes that read them, unless something else does."""
    while True:
        used = Counter(_read_names(graph))
        kept = [node for node in graph.node if node.op_type != "DequantizeLinear" or used[node.output[0]]]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    for values in (graph.initializer, graph.input):
        constants = {tensor.name for tensor in graph.initializer}
        left = [value for value in values if used[value.name] or value.name not in constants]
        del values[:]
        values.extend(left)


def _read_names(graph: onnx.GraphProto) -> Iterator[str]:
    for part in every_graph(graph):
        yield from (value.name for value in part.output)
        for node in part.node:
            yield from node.input
