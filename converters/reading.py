"""ONNX bytes to a checked model: what this tool can't drive safely is refused, and names are made safe to show."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
_SHOWN_CHARACTERS = 120


class FileRefusedError(ValueError):
    """The file is nothing this tool reads; the message says why and what to do."""


def parse_model(data: bytes) -> onnx.ModelProto:
    """Parse the bytes of one self-contained ONNX file and check it.

    Raises:
        FileRefusedError: it is no ONNX model, or one that ``check_file`` refuses.
    """
    if not data:
        raise FileRefusedError("the file is empty (0 bytes); export the model again")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError as error:
        raise FileRefusedError(
            f"the file ({len(data)} bytes) is no ONNX model or is cut short; check the path and export it again"
        ) from error
    check_file(model)
    return model


def check_file(model: onnx.ModelProto) -> None:
    """Refuse what this tool can't drive safely: not a model, foreign code, data outside the file, an invalid graph.

    Raises:
        FileRefusedError: with the first reason found.
    """
    if not model.graph.node or not model.opset_import:
        raise FileRefusedError("the file holds no ONNX graph with nodes and opsets; check the path and export it again")
    if any(isinstance(text, bytes) for text in _texts(model)):
        raise FileRefusedError("a name in the file is not UTF-8 text; export the model again with a current exporter")
    if model.functions:
        raise FileRefusedError(
            f"the file defines {len(model.functions)} local functions; inline them first (onnx.inliner) and save again"
        )
    for graph in every_graph(model.graph):
        _check_domains(graph)
        _check_values(graph)
        for tensor in tensors_of(graph):
            _check_tensor(tensor)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise FileRefusedError(f"onnx.checker refuses the file: {safe_text(str(error))}; export it again") from error


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and, depth first, the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from every_graph(body)


def safe_text(text: str) -> str:
    """One printable line of at most 120 characters: whatever a terminal could act on is escaped."""
    shown = text.strip()[: _SHOWN_CHARACTERS + 1]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return escaped if len(escaped) <= _SHOWN_CHARACTERS else escaped[: _SHOWN_CHARACTERS - 3] + "..."


def tensor_array(tensor: TensorProto) -> NDArray[Any]:
    """The tensor's values, in its own shape and type.

    Raises:
        FileRefusedError: the tensor has not the data its shape needs.
    """
    try:
        array: NDArray[Any] = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise FileRefusedError(
            f"tensor '{safe_text(tensor.name)}' has not the data its shape needs; export the model again"
        ) from error
    return array


def node_label(node: onnx.NodeProto) -> str:
    """What people know the node by: its name, else its first output, else its operator, as ``safe_text``."""
    named = node.name or next((output for output in node.output if output), "") or node.op_type
    return safe_text(named)


def bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    """The graphs a control-flow node holds, each with the name of its attribute."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.name, attribute.g
        for index, body in enumerate(attribute.graphs):
            yield f"{attribute.name}{index}", body


def _texts(model: onnx.ModelProto) -> Iterator[object]:
    """Every string this module reads; protobuf hands over those that are not UTF-8 as bytes."""
    yield from (model.producer_name, model.producer_version)
    yield from (entry.domain for entry in model.opset_import)
    for entry in model.metadata_props:
        yield from (entry.key, entry.value)
    for graph in every_graph(model.graph):
        yield from (value.name for value in (*graph.input, *graph.output, *graph.value_info))
        yield from (tensor.name for tensor in tensors_of(graph))
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def tensors_of(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Every tensor in the graph itself: initializers and attributes, sparse ones in their parts."""
    sparse = [*graph.sparse_initializer]
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            yield from (*([attribute.t] if attribute.HasField("t") else []), *attribute.tensors)
            sparse += [*([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else [])]
            sparse += attribute.sparse_tensors
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _check_domains(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.domain not in ALLOWED_DOMAINS:
            raise FileRefusedError(
                f"node '{node_label(node)}' uses the operator domain '{safe_text(node.domain)}', whose code is not "
                "part of ONNX Runtime; export the model with standard operators"
            )


def _check_values(graph: onnx.GraphProto) -> None:
    """Refuse declarations that onnx.checker lets pass and that end onnx's own shape inference, even the process."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        declared, name = value.type.tensor_type, safe_text(value.name)
        if declared.elem_type not in TensorProto.DataType.values():
            raise FileRefusedError(
                f"tensor '{name}' has the unknown data type {declared.elem_type}; export the model again"
            )
        if any(dim.dim_value < 0 for dim in declared.shape.dim):
            raise FileRefusedError(f"tensor '{name}' declares a negative dimension; name it instead, as in 'batch'")


def _check_tensor(tensor: TensorProto) -> None:
    name = safe_text(tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise FileRefusedError(
            f"tensor '{name}' keeps its data in another file; read the model from its folder, or save it in one file"
        )
    if tensor.data_type not in onnx.helper.get_all_tensor_dtypes() or tensor.data_type == TensorProto.UNDEFINED:
        raise FileRefusedError(f"tensor '{name}' has the unknown data type {tensor.data_type}; export the model again")
