"""A digest of a file's structure without its weights: equal for two trainings of one network under one scheme."""

from __future__ import annotations

import hashlib
import json
from collections import ChainMap
from collections.abc import Sequence
from math import prod
from typing import Any

import onnx
from google.protobuf.message import Message
from onnx import GraphProto, NodeProto, SparseTensorProto, TensorProto, TypeProto

from qdefense.converters.reading import every_graph, parse_model, plain_domain, tensor_array

_SMALL = 64
_WHOLE = frozenset({TensorProto.INT32, TensorProto.INT64})

Scope = ChainMap[str, str | TensorProto]
"""What a name stands for: the digest of how it is computed, or a constant."""


def graph_fingerprint(model: bytes) -> str:
    """sha256 over operators, attributes and how they are connected, as the file ships.

    Names, the order of nodes and initializers, metadata and documentation do not count, nor do the values of constants,
    of which only type and shape do. Whole numbers of at most 64 elements are structure (targets of a reshape, axes,
    pads) and count by value, but not where a quantized operator takes them: a bias is a weight.

    Raises:
        FileRefusedError: see ``parse_model``.
    """
    proto = parse_model(model)
    used = {plain_domain(node.domain) for body in every_graph(proto.graph) for node in body.node}
    versions = sorted([plain_domain(entry.domain), entry.version] for entry in proto.opset_import)
    return _digest("model", [entry for entry in versions if entry[0] in used], _graph(proto.graph, ChainMap(), depth=0))


def _graph(body: GraphProto, outer: Scope, depth: int) -> str:
    """Every node is known by what it does to what: its digest covers those of its inputs."""
    scope = outer.new_child({tensor.name: tensor for tensor in body.initializer})
    scope.update({sparse.values.name: _digest(_sparse(sparse)) for sparse in body.sparse_initializer})
    inputs = [value for value in body.input if value.name not in scope.maps[0]]
    for index, value in enumerate(inputs):
        scope[value.name] = _digest("input", depth, index, _type(value.type))
    nodes = []
    for node in body.node:
        nodes.append(_node(node, scope, depth))
        scope.update({name: _digest("output", nodes[-1], index) for index, name in enumerate(node.output) if name})
    outputs = [_input(value.name, scope, by_value=True) for value in body.output]
    return _digest("graph", [_type(value.type) for value in inputs], sorted(nodes), outputs)


def _node(node: NodeProto, scope: Scope, depth: int) -> str:
    by_value = not _takes_integers(node)
    inputs = [_input(name, scope, by_value=by_value) for name in node.input]
    attributes = {entry.name: _attribute(node, entry, scope, depth) for entry in node.attribute}
    outputs = [bool(name) for name in node.output]
    return _digest("node", plain_domain(node.domain), node.op_type, attributes, inputs, outputs)


def _takes_integers(node: NodeProto) -> bool:
    """Whether small whole numbers among its inputs may be weights: QLinearConv, DequantizeLinear, QGemm and others."""
    return "Linear" in node.op_type or "Integer" in node.op_type or node.op_type.startswith("Q")


def _input(name: str, scope: Scope, *, by_value: bool) -> Any:
    known = scope[name] if name else None
    return _tensor(known, by_value=by_value) if isinstance(known, TensorProto) else known


def _attribute(node: NodeProto, entry: onnx.AttributeProto, scope: Scope, depth: int) -> Any:
    if node.op_type == "Constant" and entry.name in ("value_float", "value_floats"):
        return ["floats", len(entry.floats)]
    if entry.ref_attr_name:
        return ["reference", entry.ref_attr_name]
    return _plain(onnx.helper.get_attribute_value(entry), scope, depth)


def _plain(value: Any, scope: Scope, depth: int) -> Any:
    if isinstance(value, int | float):
        return value
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, Message):
        return _message(value, scope, depth)
    return [_plain(part, scope, depth) for part in value]


def _message(value: Message, scope: Scope, depth: int) -> Any:
    match value:
        case TensorProto():
            return _tensor(value, by_value=True)
        case SparseTensorProto():
            return _sparse(value)
        case GraphProto():
            return _graph(value, scope, depth + 1)
        case _:
            return _type(value)


def _tensor(tensor: TensorProto, *, by_value: bool) -> list[Any]:
    shown: list[Any] = ["tensor", tensor.data_type, list(tensor.dims)]
    if by_value and tensor.data_type in _WHOLE and prod(tensor.dims) <= _SMALL:
        shown.append(tensor_array(tensor).ravel().tolist())
    return shown


def _sparse(sparse: SparseTensorProto) -> list[Any]:
    return ["sparse", sparse.values.data_type, list(sparse.dims)]


def _type(kind: TypeProto) -> list[Any]:
    """Dynamic dimensions are all the same, whatever they are called."""
    dims: Sequence[Any] = kind.tensor_type.shape.dim
    shape = [dim.dim_value if dim.HasField("dim_value") else None for dim in dims]
    return [kind.WhichOneof("value"), kind.tensor_type.elem_type, kind.tensor_type.HasField("shape"), shape]


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
