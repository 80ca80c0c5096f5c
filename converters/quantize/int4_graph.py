"""Graphs whose weights lie on a 4-bit grid, as floats first and packed then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

from qdefense.converters.quantize.int4_codes import Codes, block_codes, channel_codes
from qdefense.converters.quantize.preparing import PRODUCTS
from qdefense.converters.quantize.settings import QuantizationError, Settings
from qdefense.converters.reading import every_graph, safe_text, tensor_array

_IR_VERSION = 10
"""The first that knows 4-bit types."""


def round_weights(model: onnx.ModelProto, settings: Settings) -> dict[str, Codes]:
    """Let every product with a constant float32 weight read one rounded to the grid; the codes by its new name.

    Raises:
        QuantizationError: there is no such product, none has room for a block, or a weight is not finite.
    """
    graph = model.graph
    floats = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    names: dict[tuple[str, int], str] = {}
    found: dict[str, Codes] = {}
    for node in _products(graph):
        weight = floats.get(node.input[1])
        if weight is None or len(weight.dims) < 2:
            continue
        channel, reduction = _axes(node, len(weight.dims))
        name = names.get((weight.name, channel))
        if name is None:
            codes = _codes_of(weight, channel, reduction, settings)
            name = names[weight.name, channel] = _free(f"{weight.name}_int4", _names(graph))
            graph.initializer.append(numpy_helper.from_array(codes.weight(), name))
            found[name] = codes
        node.input[1] = name
    _check_result(found, settings)
    _drop_unused(graph)
    return found


def pack_weights(model: onnx.ModelProto, codes: Mapping[str, Codes]) -> None:
    """Put packed codes behind DequantizeLinear in place of rounded weights and of what a quantizer made of them."""
    graph = model.graph
    origins = {name: name for name in codes}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            origins[node.output[0]] = node.input[0].removesuffix(TENSOR_NAME_QUANT_SUFFIX)
    for node in _products(graph):
        if (origin := origins.get(node.input[1])) in codes:
            node.input[1] = origin
    _drop_unused(graph, codes)
    readers = {name: _stored(graph, name, each) for name, each in codes.items()}
    for node in _products(graph):
        if node.input[1] in readers:
            node.input[1] = readers[node.input[1]].output[0]
    nodes = [*readers.values(), *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    model.ir_version = max(model.ir_version, _IR_VERSION)


def _products(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    yield from (node for node in graph.node if node.op_type in PRODUCTS)


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


def _check_result(found: Mapping[str, Codes], settings: Settings) -> None:
    if not found:
        raise QuantizationError(
            "no Conv, Gemm or MatMul has a constant float32 weight; there is nothing to pack into INT4"
        )
    if settings.block_size is not None and not any(codes.block_size for codes in found.values()):
        raise QuantizationError(
            f"no weight has {settings.block_size} or more values along its reduction axis, so that no block would be "
            "made; leave the block size out"
        )


def _stored(graph: onnx.GraphProto, name: str, codes: Codes) -> onnx.NodeProto:
    """Put codes, scales and zero points into the graph; the node that reads them."""
    kind = TensorProto.INT4 if codes.zero_points is None else TensorProto.UINT4
    taken = _names(graph)
    arrays: list[tuple[str, Any, int]] = [(name, codes.codes, kind)]
    arrays += [(_free(f"{name}_scale", taken), codes.scales, TensorProto.FLOAT)]
    if codes.zero_points is not None:
        arrays += [(_free(f"{name}_zero_point", taken), codes.zero_points, kind)]
    for each, values, element_type in arrays:
        graph.initializer.append(
            numpy_helper.from_array(values.astype(helper.tensor_dtype_to_np_dtype(element_type)), each)
        )
    attributes: dict[str, Any] = {"axis": codes.axis} | ({"block_size": codes.block_size} if codes.block_size else {})
    output = _free(f"{name}_dequantized", taken)
    return helper.make_node("DequantizeLinear", [each for each, _, _ in arrays], [output], name=output, **attributes)


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


def _drop_unused(graph: onnx.GraphProto, unwanted: Container[str] = ()) -> None:
    """Remove the constants that nothing reads, with the DequantizeLinear nodes between, and the unwanted ones."""
    while True:
        used = Counter(_read_names(graph))
        kept = [node for node in graph.node if node.op_type != "DequantizeLinear" or used[node.output[0]]]
        if len(kept) == len(graph.node):
            break
        del graph.node[:]
        graph.node.extend(kept)
    # Files of old list their constants among the inputs, too.
    names = {tensor.name for tensor in graph.initializer}
    dropped = {name for name in names if not used[name] or name in unwanted}
    for values in (graph.initializer, graph.input):
        left = [value for value in values if value.name not in dropped]
        del values[:]
        values.extend(left)


def _read_names(graph: onnx.GraphProto) -> Iterator[str]:
    for part in every_graph(graph):
        yield from (value.name for value in part.output)
        for node in part.node:
            yield from node.input
