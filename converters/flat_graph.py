"""An ONNX model as one flat list of nodes: control flow inlined, types and shapes inferred from the graph alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qdefense.converters.reading import bodies, every_graph, node_label, safe_text, tensor_array

Value = tuple[str, str]
"""A tensor: the path of the graph that defines it, and its name there."""

FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})
"""Element types that carry a gradient."""

_MANY_ROWS = 720720 << 10
_FEW = 1 << 20
_TO_THE_END = (2**31 - 1, 2**63 - 1)
"""A batch no honest dimension comes near, divisible by all that reshapes divide by; what is below ``_FEW`` is not it.

The last two are how exporters write an open end.
"""

_LAYOUT = frozenset({"Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class Node:
    """A node with its tensors resolved; for control flow ``inner`` holds what its bodies hand back."""

    name: str
    operator: str
    domain: str
    proto: onnx.NodeProto
    inputs: tuple[Value | None, ...]
    outputs: tuple[Value | None, ...]
    inner: tuple[Value, ...] = ()

    def input(self, index: int) -> Value | None:
        """The input at this position, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def output(self, index: int) -> Value | None:
        """The output at this position, or None where it is left out."""
        return self.outputs[index] if index < len(self.outputs) else None

    def attribute(self, name: str, default: int) -> int:
        """The integer attribute of this name."""
        return next((int(a.i) for a in self.proto.attribute if a.name == name), default)


@dataclass
class Graph:
    """The model with its control-flow bodies inlined, and the inferred type and shape of each tensor."""

    nodes: list[Node] = field(default_factory=list)
    constants: dict[Value, TensorProto] = field(default_factory=dict)
    inputs: list[Value] = field(default_factory=list)
    outputs: list[Value] = field(default_factory=list)
    infos: dict[Value, onnx.TypeProto] = field(default_factory=dict)
    batch: int = 1
    crowded: dict[Value, onnx.TypeProto] = field(default_factory=dict)
    folded: dict[Value, NDArray[Any]] = field(default_factory=dict)
    producer: dict[Value, Node] = field(default_factory=dict)
    consumers: dict[Value, list[Node]] = field(default_factory=lambda: defaultdict(list))

    def add(self, node: Node) -> None:
        """Append the node and enter it as producer and consumer of its tensors."""
        self.nodes.append(node)
        for value in dict.fromkeys((*node.inputs, *node.inner)):
            if value is not None:
                self.consumers[value].append(node)
        for value in node.outputs:
            if value is not None:
                self.producer[value] = node

    def shape(self, value: Value | None) -> list[int] | None:
        """The tensor's dimensions, or None if one of them is unknown."""
        if value in self.constants:
            return list(self.constants[value].dims)
        return _dims(self.infos.get(value)) if value is not None else None

    def batch_axes(self, value: Value | None) -> tuple[set[int], int | None]:
        """The axes as long as the batch, and the rank if known; where the shape is unknown axis 0 is taken for one."""
        kind = self.crowded.get(value) if value is not None else None
        if kind is None or not kind.tensor_type.HasField("shape"):
            return {0}, None
        dims = [dim.dim_value for dim in kind.tensor_type.shape.dim]
        return {axis for axis, size in enumerate(dims) if size >= _FEW or (size < 1 and not axis)}, len(dims)

    def any_batch(self, value: Value | None) -> bool:
        """Whether the tensor is known to hold the same whole numbers, whatever the batch."""
        known = self.folded.get(value) if value is not None else None
        return known is not None and not _counts_rows(known).any()

    def type(self, value: Value | None) -> str | None:
        """The tensor's element type, such as ``float32`` or ``uint8``, or None if unknown."""
        if value in self.constants:
            return type_name(self.constants[value].data_type)
        if value in self.infos and self.infos[value].tensor_type.elem_type:
            return type_name(self.infos[value].tensor_type.elem_type)
        return None


def flatten(model: onnx.ModelProto) -> Graph:
    """The flat graph of a model that ``check_file`` lets pass.

    Raises:
        FileRefusedError: a constant has not the data its shape needs.
    """
    graph = Graph()
    free = _free_inputs(model.graph)
    graph.batch = _fixed_batch(free)
    visible = _inline(graph, model.graph, _Scope(), {})
    graph.inputs = [visible[value.name] for value in free]
    graph.outputs = [visible[value.name] for value in model.graph.output if value.name in visible]
    graph.infos, _ = _infer_types(model, batch=1)
    graph.crowded, graph.folded = _infer_types(model, batch=_MANY_ROWS)
    return graph


def type_name(kind: int) -> str:
    """The element type in numpy's spelling, such as ``float32``; ``type 99`` where ONNX knows none."""
    if kind not in TensorProto.DataType.values():
        return f"type {kind}"
    name = str(TensorProto.DataType.Name(kind))
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def behind_layout(graph: Graph, value: Value | None) -> Value | None:
    """The tensor that this one is made of by changes of layout alone."""
    while value is not None and value in graph.producer and graph.producer[value].operator in _LAYOUT:
        value = graph.producer[value].input(0)
    return value


def _dims(kind: onnx.TypeProto | None) -> list[int] | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]
    return None if min(dims, default=0) < 0 else dims


def _free_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _fixed_batch(inputs: list[onnx.ValueInfoProto]) -> int:
    dims = inputs[0].type.tensor_type.shape.dim if inputs else ()
    return max(1, dims[0].dim_value) if dims and dims[0].HasField("dim_value") else 1


@dataclass(frozen=True)
class _Scope:
    """Where a body stands: ``path`` tells its tensors from all others, ``shown`` is for people."""

    path: str = ""
    shown: str = ""


def _inline(graph: Graph, body: onnx.GraphProto, scope: _Scope, outer: dict[str, Value]) -> dict[str, Value]:
    """Add the body's nodes, in order; returns the names seen at its end."""
    visible = dict(outer)
    for tensor in body.initializer:
        visible[tensor.name] = (scope.path, tensor.name)
        graph.constants[scope.path, tensor.name] = tensor
    for name in (*(value.name for value in _free_inputs(body)), *(s.values.name for s in body.sparse_initializer)):
        visible[name] = (scope.path, name)
    for index, proto in enumerate(body.node):
        node = _resolve(graph, proto, scope, index, visible)
        graph.add(node)
        made = node.output(0)
        if proto.op_type == "Constant" and made is not None:
            graph.constants.update((made, tensor) for tensor in _constant(proto))
        visible.update({value[1]: value for value in node.outputs if value is not None})
    return visible


def _resolve(graph: Graph, proto: onnx.NodeProto, scope: _Scope, index: int, visible: dict[str, Value]) -> Node:
    inputs = tuple(visible.get(name) if name else None for name in proto.input)
    outputs = tuple((scope.path, name) if name else None for name in proto.output)
    name = safe_text(f"{scope.shown}{node_label(proto)}")
    inner: list[Value] = []
    for turn, (attribute, body) in enumerate(bodies(proto)):
        inside = _Scope(f"{scope.path}{index}.{turn}/", f"{name}/{attribute}/")
        inner += _inline_body(graph, body, inside, visible, inputs)
    return Node(name, proto.op_type, proto.domain, proto, inputs, outputs, tuple(inner))


def _inline_body(
    graph: Graph, body: onnx.GraphProto, scope: _Scope, outer: dict[str, Value], given: tuple[Value | None, ...]
) -> list[Value]:
    """Inline one control-flow body; what a loop carries round may come from its inputs or from its own last turn."""
    seen = _inline(graph, body, scope, outer)
    results = [seen[value.name] for value in body.output if value.name in seen]
    entries = tuple((scope.path, value.name) for value in _free_inputs(body))
    if entries:
        graph.add(Node(safe_text(scope.shown), "", "", onnx.NodeProto(), (*given, *results), entries))
    return results


def _constant(node: onnx.NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        if attribute.name == "value":
            yield attribute.t
        elif attribute.name in ("value_float", "value_floats"):
            yield numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.float32))
        elif attribute.name in ("value_int", "value_ints"):
            yield numpy_helper.from_array(np.asarray(onnx.helper.get_attribute_value(attribute), np.int64))


_SHAPE_TWINS: dict[str, tuple[str, tuple[int, ...]]] = {
    "BiasGelu": ("Identity", (0,)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)),
    "FastGelu": ("Identity", (0,)),
    "FusedConv": ("Conv", (0, 1)),
    "FusedGemm": ("Gemm", (0, 1)),
    "Gelu": ("Identity", (0,)),
    "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "QGemm": ("Gemm", (0, 3)),
    "QLinearAdd": ("Add", (0, 3)),
    "QLinearAveragePool": ("AveragePool", (0,)),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "QLinearLeakyRelu": ("LeakyRelu", (0,)),
    "QLinearMul": ("Mul", (0, 3)),
    "QLinearSigmoid": ("Sigmoid", (0,)),
    "QuickGelu": ("Identity", (0,)),
}


def _infer_types(
    model: onnx.ModelProto, *, batch: int
) -> tuple[dict[Value, onnx.TypeProto], dict[Value, NDArray[Any]]]:
    """Types and shapes at this batch, and small constants, from the graph alone: what the file declares could be wrong.

    Without onnx's own data propagation, which allocates an object per element of whatever a hostile file declares;
    reshapes to a computed shape are followed by folding the little shape arithmetic that exporters write.
    """
    twin = _shape_twin(model, batch)
    while True:
        try:
            inferred = onnx.shape_inference.infer_shapes(twin).graph
        except onnx.shape_inference.InferenceError:
            return {}, {}
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        infos = {("", value.name): value.type for value in values}
        changed, known = _fold_shapes(twin.graph, infos)
        if not changed:
            return infos, {("", name): array for name, array in known.items()}


def _shape_twin(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for value in _free_inputs(twin.graph):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = batch
    for graph in every_graph(twin.graph):
        del graph.value_info[:]
        for node in graph.node:
            _use_shape_twin(node)
    for value in twin.graph.output:
        value.type.tensor_type.ClearField("shape")
    return twin


def _fold_shapes(graph: onnx.GraphProto, infos: dict[Value, onnx.TypeProto]) -> tuple[bool, dict[str, NDArray[Any]]]:
    """Replace nodes that compute with known shapes by their values; whether there were any, and all known values."""
    known = {tensor.name: tensor_array(tensor) for tensor in graph.initializer if _is_small(tensor)}
    left: list[onnx.NodeProto] = []
    for node in graph.node:
        value = (
            next((tensor_array(t) for t in _constant(node) if _is_small(t)), None)
            if node.op_type == "Constant"
            else None
        )
        made = _fold(node, known, infos) if value is None else value
        if made is not None and node.output:
            known[node.output[0]] = made
        if value is not None or made is None or not node.output or made.size > _FOLDED_SIZE:
            left.append(node)
        else:
            graph.initializer.append(numpy_helper.from_array(made, node.output[0]))
    changed = len(left) < len(graph.node)
    if changed:
        del graph.node[:]
        graph.node.extend(left)
    return changed, known


_FOLDED_SIZE = 64


def _is_small(tensor: TensorProto) -> bool:
    return tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and prod(tensor.dims) <= _FOLDED_SIZE


def _fold(
    node: onnx.NodeProto, known: dict[str, NDArray[Any]], infos: dict[Value, onnx.TypeProto]
) -> NDArray[Any] | None:
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if node.op_type == "Shape" and node.input:
        dims = _dims(infos.get(("", node.input[0])))
        bounds = [int(attributes[name].i) if name in attributes else None for name in ("start", "end")]
        return None if dims is None else np.array(dims[slice(*bounds)], np.int64)
    values = [known.get(name) for name in node.input]
    given = [value for value in values if value is not None and value.size <= _FOLDED_SIZE]
    whole = "to" not in attributes or attributes["to"].i in (TensorProto.INT64, TensorProto.INT32)
    if not given or len(given) < len(values) or not whole:
        return None
    if node.op_type in _ARITHMETIC and "fmod" not in attributes:
        return _fold_arithmetic(node.op_type, given)
    if node.op_type != "Concat" and any(_counts_rows(value).any() for value in given[1:]):
        # What is read at a place that depends on the batch depends on it, whatever it is at this one.
        return None
    axes = (
        [int(attributes["axis"].i)]
        if "axis" in attributes
        else [*attributes["axes"].ints]
        if "axes" in attributes
        else []
    )
    try:
        return _fold_values(node.op_type, given, axes)
    except (IndexError, OverflowError, ValueError):
        return None


_ARITHMETIC = {"Add": np.add, "Div": np.floor_divide, "Mod": np.mod, "Mul": np.multiply, "Sub": np.subtract}


def _counts_rows(array: NDArray[Any]) -> NDArray[np.bool_]:
    return (array >= _FEW) & ~np.isin(array, _TO_THE_END)


def _fold_arithmetic(operator: str, given: list[NDArray[Any]]) -> NDArray[Any] | None:
    """The answer, unless a number that depends on the batch goes in and comes out as one that doesn't look so."""
    left, right = given[0], given[-1]
    if (operator == "Div" and (left < 0).any()) or (operator in ("Div", "Mod") and (right <= 0).any()):
        return None
    try:
        with np.errstate(over="ignore"):
            made = np.asarray(_ARITHMETIC[operator](left, right))
    except ValueError:
        return None
    mixed = _counts_rows(left) | _counts_rows(right)
    return made if _counts_rows(made)[mixed].all() else None


def _fold_values(operator: str, given: list[NDArray[Any]], attribute: list[int]) -> NDArray[Any] | None:
    data, *more = given
    axes = tuple(attribute or (more[0].ravel().tolist() if more else ()))
    if operator == "Concat":
        return np.concatenate(given, attribute[0])
    if operator == "Gather" and more:
        return np.asarray(np.take(data, more[0], attribute[0] if attribute else 0))
    if operator in ("Squeeze", "Unsqueeze"):
        return np.squeeze(data, axes or None) if operator == "Squeeze" else np.expand_dims(data, axes)
    if operator == "Slice" and data.ndim == 1 and len(more) >= 2:
        return data[int(more[0].item()) : int(more[1].item()) : int(more[3].item()) if len(more) > 3 else 1]
    if operator == "Reshape":
        return data.reshape(more[0].tolist()) if more and (more[0] != 0).all() else None
    return data if operator in ("Identity", "Cast") else None


def _use_shape_twin(node: onnx.NodeProto) -> None:
    """Turn a runtime operator that ONNX has no schema for into a standard one with the same output shape."""
    if node.domain == "com.microsoft" and node.op_type in _SHAPE_TWINS:
        node.op_type, positions = _SHAPE_TWINS[node.op_type]
        node.domain = ""
        node.input[:] = [node.input[index] for index in positions if index < len(node.input)]
