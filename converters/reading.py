"""ONNX bytes to a checked model: what this tool can't drive safely is refused, and names are made safe to show."""

from __future__ import annotations

import errno
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
LARGEST_FILE = 2**31 - 1
"""Bytes; protobuf reads no more."""
_SHOWN_CHARACTERS = 120
# What people name .onnx by mistake: how it begins, from which byte on, what it is, and what to do.
_FOREIGN = (
    (0, b"version https://git-lfs", "a pointer of Git LFS", "fetch the model itself with git lfs pull"),
    (0, b"<", "a web page or XML", "it may be the error page of a download; fetch the model again"),
    (0, b"{", "JSON", "check the path"),
    (0, b"PK\x03\x04", "a zip archive, such as torch.save writes", "unpack it, or export the network with torch.onnx"),
    (0, b"\x80", "a pickle, such as torch.save wrote", "export the network with torch.onnx"),
    (0, b"\x1f\x8b", "compressed with gzip", "unpack it"),
    (0, b"\x89PNG", "a PNG picture", "check the path"),
    (0, b"\xff\xd8\xff", "a JPEG picture", "check the path"),
    (0, b"\x89HDF", "an HDF5 file, such as Keras writes", "export the network with tf2onnx"),
    (4, b"TFL3", "a TensorFlow Lite model", "export the network with tf2onnx"),
    (4, b"ORTM", "in the format of ONNX Runtime Mobile", "give the .onnx file that it was made from"),
)


class FileRefusedError(ValueError):
    """The file is nothing this tool reads; the message says why and what to do."""


def read_file(path: Path) -> bytes:
    """The bytes of a file that could be a model.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which could go on forever.
        FileRefusedError: it is larger than 2 GB.
    """
    facts = path.stat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        raise OSError(errno.EINVAL, "is no regular file", str(path))
    if facts.st_size > LARGEST_FILE:
        raise FileRefusedError(
            f"the file has {facts.st_size:,} bytes, and an ONNX model at most 2 GB; keep the weights in external data"
        )
    return path.read_bytes()


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
        raise FileRefusedError(_no_model(data)) from error
    check_file(model)
    return model


def _no_model(data: bytes) -> str:
    for start, magic, kind, remedy in _FOREIGN:
        if data[start:].startswith(magic):
            return f"the file ({len(data)} bytes) is {kind}, no ONNX model; {remedy}"
    return f"the file ({len(data)} bytes) is no ONNX model or is cut short; check the path and export it again"


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
    versions = {entry.domain: entry.version for entry in model.opset_import}
    for graph in every_graph(model.graph):
        _check_domains(graph, versions)
        _check_values(graph)
        for tensor in tensors_of(graph):
            _check_tensor(tensor)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        from qdefense.converters.operator_versions import first_problem  # noqa: PLC0415 (reads with this module)

        reason = first_problem(model) or safe_text(" ".join(str(error).split()).rstrip("."))
        raise FileRefusedError(f"onnx.checker refuses the file: {reason}; export it again") from error


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and, depth first, the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for _, body in bodies(node):
            yield from every_graph(body)


def count_operators(graph: onnx.GraphProto) -> dict[str, int]:
    """How many nodes of each operator there are, those in the bodies of control flow included."""
    counts = Counter(safe_text(node.op_type) for body in every_graph(graph) for node in body.node)
    return dict(sorted(counts.items()))


def safe_text(text: str) -> str:
    """One printable line of at most 120 characters: whatever a terminal could act on is escaped."""
    shown = text.strip()[: _SHOWN_CHARACTERS + 1]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return escaped if len(escaped) <= _SHOWN_CHARACTERS else escaped[: _SHOWN_CHARACTERS - 3] + "..."


def plain_domain(name: str) -> str:
    """The operator domain under one name: that of ONNX itself has two."""
    return "" if name == "ai.onnx" else name


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


def _check_domains(graph: onnx.GraphProto, versions: Mapping[str, int]) -> None:
    for node in graph.node:
        if node.domain not in ALLOWED_DOMAINS:
            raise FileRefusedError(
                f"node '{node_label(node)}' uses operator '{safe_text(node.op_type)}' of domain "
                f"'{safe_text(node.domain)}', opset {versions.get(node.domain, 'not stated')}, whose code is not part "
                "of ONNX Runtime; export the model with standard operators"
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
