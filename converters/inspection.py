"""What an ONNX file is, read off its graph: precision, integer share, saturation, gradient-blind nodes, structure."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from pydantic import BaseModel, ConfigDict

from qdefense.converters.runtime_graph import RuntimeGraphError, optimized_model

ALLOWED_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.microsoft.nchwc"})
QUANTIZED_OPERATORS = frozenset(
    {"ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "MatMulNBits", "QuantizeLinear"}
)
_SHOWN_CHARACTERS = 120
_NODES_SHOWN = 12

FileScheme = Literal["fp32", "int8-static", "int8-dynamic", "mixed", "other"]
Granularity = Literal["per-tensor", "per-channel", "per-block"]
_Value = tuple[str, str]
"""A tensor: the path of the graph that defines it, and its name there."""


class FileRefusedError(ValueError):
    """The file is nothing this tool reads; the message says why and what to do."""


class Layer(BaseModel):
    """One weighted operator (or product of two activations) of the shipped graph.

    ``macs`` are multiply-accumulates for one image, null where a shape is unknown. ``integer`` means that both operands
    are 8-bit and that nothing keeps ONNX Runtime from its integer kernel. ``can_saturate`` means that two neighbouring
    products can exceed int16 on a CPU without VNNI.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    scheme: Literal["fp32", "int8-static", "int8-dynamic", "other"]
    weight_type: str | None
    activation_type: str | None
    macs: int | None
    weights: int
    integer: bool
    can_saturate: bool


class BlindNode(BaseModel):
    """A node between input and output that answers to the image but passes no useful gradient."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    reason: str


class Inspection(BaseModel):
    """Facts of one file. Strings from the file are escaped to one printable line each.

    ``parameters`` counts the elements of all constants but scales, zero points and shapes. ``bypass_depth`` is the
    smallest number of weighted operators between the input and the output, null when the output ignores the input.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ir_version: int
    opsets: dict[str, int]
    producer: str
    size_bytes: int
    operators: dict[str, int]
    parameters: int
    scheme: FileScheme
    granularity: Granularity | None
    weight_types: tuple[str, ...]
    activation_types: tuple[str, ...]
    layers: tuple[Layer, ...]
    integer_mac_share: float | None
    integer_weight_share: float | None
    saturation_layers: tuple[str, ...]
    gradient_blind_nodes: tuple[BlindNode, ...]
    bypass_depth: int | None
    structure_warnings: tuple[str, ...]
    nonfinite_initializers: tuple[str, ...]


# --- reading the file -------------------------------------------------------------------------------------------------


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
        for tensor in _tensors(graph):
            _check_tensor(tensor)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise FileRefusedError(f"onnx.checker refuses the file: {safe_text(str(error))}; export it again") from error


def every_graph(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """The graph and, depth first, the bodies of its control flow."""
    yield graph
    for node in graph.node:
        for _, body in _bodies(node):
            yield from every_graph(body)


def safe_text(text: str) -> str:
    """One printable line of at most 120 characters: whatever a terminal could act on is escaped."""
    shown = text.strip()[: _SHOWN_CHARACTERS + 1]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in shown)
    return escaped if len(escaped) <= _SHOWN_CHARACTERS else escaped[: _SHOWN_CHARACTERS - 3] + "..."


def _bodies(node: onnx.NodeProto) -> Iterator[tuple[str, onnx.GraphProto]]:
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
        yield from (tensor.name for tensor in _tensors(graph))
        for node in graph.node:
            yield from (node.name, node.op_type, node.domain, *node.input, *node.output)
            yield from (attribute.name for attribute in node.attribute)


def _tensors(graph: onnx.GraphProto) -> Iterator[TensorProto]:
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
                f"node '{_label(node)}' uses the operator domain '{safe_text(node.domain)}', whose code is not part of "
                "ONNX Runtime; export the model with standard operators"
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
            f"tensor '{name}' keeps its data in another file; save the model in one file, without external data"
        )
    if tensor.data_type not in onnx.helper.get_all_tensor_dtypes() or tensor.data_type == TensorProto.UNDEFINED:
        raise FileRefusedError(f"tensor '{name}' has the unknown data type {tensor.data_type}; export the model again")


def _label(node: onnx.NodeProto) -> str:
    named = node.name or next((output for output in node.output if output), "") or node.op_type
    return safe_text(named)


# --- the inspection ---------------------------------------------------------------------------------------------------


def inspect_model(model: bytes) -> Inspection:
    """Read everything off the file as it ships; nothing in it is run.

    Raises:
        FileRefusedError: see ``parse_model``.
    """
    proto = parse_model(model)
    graph = _flatten(proto)
    layers, scales = _layers(graph)
    flow = _data_flow(graph)
    depth, path = _bypass(graph, flow)
    return Inspection(
        ir_version=proto.ir_version,
        opsets={safe_text(entry.domain) or "ai.onnx": entry.version for entry in proto.opset_import},
        producer=safe_text(f"{proto.producer_name} {proto.producer_version}"),
        size_bytes=len(model),
        operators=_count_operators(proto.graph),
        parameters=_parameters(graph),
        scheme=_scheme(layers),
        granularity=_granularity(scales),
        weight_types=_distinct(layer.weight_type for layer in layers),
        activation_types=_distinct(layer.activation_type for layer in layers),
        layers=tuple(layers),
        integer_mac_share=_share([(layer.macs, layer.integer) for layer in layers]),
        integer_weight_share=_share([(layer.weights, layer.integer) for layer in layers]),
        saturation_layers=tuple(layer.name for layer in layers if layer.can_saturate),
        gradient_blind_nodes=tuple(_blind_nodes(graph, flow)),
        bypass_depth=depth,
        structure_warnings=tuple(_warnings(graph, depth, path)),
        nonfinite_initializers=tuple(_nonfinite(graph)),
    )


def runtime_operators(model: bytes) -> dict[str, int]:
    """Node counts by operator of the graph that ONNX Runtime runs, which says what is really integer on this CPU.

    Raises:
        FileRefusedError: ONNX Runtime can't load the file.
    """
    try:
        optimized = optimized_model(model)
    except RuntimeGraphError as error:
        raise FileRefusedError(f"{safe_text(str(error))}; export the model again or use another onnxruntime") from error
    return _count_operators(onnx.load_from_string(optimized).graph)


def _count_operators(graph: onnx.GraphProto) -> dict[str, int]:
    counts = Counter(safe_text(node.op_type) for body in every_graph(graph) for node in body.node)
    return dict(sorted(counts.items()))


def _distinct(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if name is not None}))


def _share(amounts: list[tuple[int | None, bool]]) -> float | None:
    known = [(amount, integer) for amount, integer in amounts if amount is not None]
    total = sum(amount for amount, _ in known)
    if len(known) < len(amounts) or total == 0:
        return None
    return sum(amount for amount, integer in known if integer) / total


def _scheme(layers: list[Layer]) -> FileScheme:
    schemes = {layer.scheme for layer in layers if layer.weights}
    if not schemes:
        return "other"
    return schemes.pop() if len(schemes) == 1 else "mixed"


_FINEST_FIRST: tuple[Granularity, ...] = ("per-block", "per-channel", "per-tensor")


def _granularity(scales: list[Granularity]) -> Granularity | None:
    return next((finest for finest in _FINEST_FIRST if finest in scales), None)


def _nonfinite(graph: _Graph) -> Iterator[str]:
    for value, tensor in graph.constants.items():
        if _type_name(tensor.data_type) in _FLOATS and not np.isfinite(_array(tensor)).all():
            yield safe_text(value[1])


def _warnings(graph: _Graph, depth: int | None, path: list[str]) -> Iterator[str]:
    if depth is None:
        yield "the output doesn't depend on the input; nothing measured on this file means anything"
    if depth == 0:
        yield (
            "bypass depth 0: the image reaches the output without passing a weighted operator, through "
            f"{', '.join(path)}; compare the graph with the one that was exported"
        )
    flow = [f"{node.operator} '{node.name}'" for node in graph.nodes if node.operator in _CONTROL_FLOW]
    if flow:
        shown = ", ".join(flow[:_NODES_SHOWN] + ["..."] * (len(flow) > _NODES_SHOWN))
        yield f"control flow in a feed-forward classifier: {shown}; find out who put it there"


# --- one flat list of nodes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Node:
    """A node with its tensors resolved; for control flow ``inner`` holds what its bodies hand back."""

    name: str
    operator: str
    domain: str
    proto: onnx.NodeProto
    inputs: tuple[_Value | None, ...]
    outputs: tuple[_Value | None, ...]
    inner: tuple[_Value, ...] = ()

    def input(self, index: int) -> _Value | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def output(self, index: int) -> _Value | None:
        return self.outputs[index] if index < len(self.outputs) else None

    def attribute(self, name: str, default: int) -> int:
        return next((int(a.i) for a in self.proto.attribute if a.name == name), default)


@dataclass
class _Graph:
    """The model with its control-flow bodies inlined, and the inferred type and shape of each tensor."""

    nodes: list[_Node] = field(default_factory=list)
    constants: dict[_Value, TensorProto] = field(default_factory=dict)
    inputs: list[_Value] = field(default_factory=list)
    outputs: list[_Value] = field(default_factory=list)
    infos: dict[_Value, onnx.TypeProto] = field(default_factory=dict)
    batch: int = 1
    producer: dict[_Value, _Node] = field(default_factory=dict)
    consumers: dict[_Value, list[_Node]] = field(default_factory=lambda: defaultdict(list))

    def add(self, node: _Node) -> None:
        self.nodes.append(node)
        for value in dict.fromkeys((*node.inputs, *node.inner)):
            if value is not None:
                self.consumers[value].append(node)
        for value in node.outputs:
            if value is not None:
                self.producer[value] = node

    def shape(self, value: _Value | None) -> list[int] | None:
        """The tensor's dimensions, or None if one of them is unknown."""
        if value in self.constants:
            return list(self.constants[value].dims)
        return _dims(self.infos.get(value)) if value is not None else None

    def type(self, value: _Value | None) -> str | None:
        """The tensor's element type, such as ``float32`` or ``uint8``, or None if unknown."""
        if value in self.constants:
            return _type_name(self.constants[value].data_type)
        if value in self.infos and self.infos[value].tensor_type.elem_type:
            return _type_name(self.infos[value].tensor_type.elem_type)
        return None


def _dims(kind: onnx.TypeProto | None) -> list[int] | None:
    if kind is None or not kind.tensor_type.HasField("shape"):
        return None
    dims = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]
    return None if min(dims, default=0) < 0 else dims


_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64"})


def _type_name(kind: int) -> str:
    if kind not in TensorProto.DataType.values():
        return f"type {kind}"
    name = str(TensorProto.DataType.Name(kind))
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(name, name.lower())


def _array(tensor: TensorProto) -> NDArray[Any]:
    try:
        array: NDArray[Any] = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise FileRefusedError(
            f"tensor '{safe_text(tensor.name)}' has not the data its shape needs; export the model again"
        ) from error
    return array


def _flatten(model: onnx.ModelProto) -> _Graph:
    graph = _Graph()
    free = _free_inputs(model.graph)
    graph.batch = _fixed_batch(free)
    visible = _inline(graph, model.graph, _Scope(), {})
    graph.inputs = [visible[value.name] for value in free]
    graph.outputs = [visible[value.name] for value in model.graph.output if value.name in visible]
    graph.infos = _infer_types(model)
    return graph


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


def _inline(graph: _Graph, body: onnx.GraphProto, scope: _Scope, outer: dict[str, _Value]) -> dict[str, _Value]:
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


def _resolve(graph: _Graph, proto: onnx.NodeProto, scope: _Scope, index: int, visible: dict[str, _Value]) -> _Node:
    inputs = tuple(visible.get(name) if name else None for name in proto.input)
    outputs = tuple((scope.path, name) if name else None for name in proto.output)
    name = safe_text(f"{scope.shown}{_label(proto)}")
    inner: list[_Value] = []
    for turn, (attribute, body) in enumerate(_bodies(proto)):
        inside = _Scope(f"{scope.path}{index}.{turn}/", f"{name}/{attribute}/")
        inner += _inline_body(graph, body, inside, visible, inputs)
    return _Node(name, proto.op_type, proto.domain, proto, inputs, outputs, tuple(inner))


def _inline_body(
    graph: _Graph, body: onnx.GraphProto, scope: _Scope, outer: dict[str, _Value], given: tuple[_Value | None, ...]
) -> list[_Value]:
    """Inline one control-flow body; what a loop carries round may come from its inputs or from its own last turn."""
    seen = _inline(graph, body, scope, outer)
    results = [seen[value.name] for value in body.output if value.name in seen]
    entries = tuple((scope.path, value.name) for value in _free_inputs(body))
    if entries:
        graph.add(_Node(safe_text(scope.shown), "", "", onnx.NodeProto(), (*given, *results), entries))
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


def _infer_types(model: onnx.ModelProto) -> dict[_Value, onnx.TypeProto]:
    """Types and shapes at batch 1, from the graph alone: what the file itself declares could be wrong.

    Without onnx's own data propagation, which allocates an object per element of whatever a hostile file declares;
    reshapes to a computed shape are followed by folding the little shape arithmetic that exporters write.
    """
    twin = _shape_twin(model)
    while True:
        try:
            inferred = onnx.shape_inference.infer_shapes(twin).graph
        except onnx.shape_inference.InferenceError:
            return {}
        values = (*inferred.input, *inferred.output, *inferred.value_info)
        infos = {("", value.name): value.type for value in values}
        if not _fold_shapes(twin.graph, infos):
            return infos


def _shape_twin(model: onnx.ModelProto) -> onnx.ModelProto:
    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    for value in _free_inputs(twin.graph):
        dims = value.type.tensor_type.shape.dim
        if dims and not dims[0].HasField("dim_value"):
            dims[0].dim_value = 1
    for graph in every_graph(twin.graph):
        del graph.value_info[:]
        for node in graph.node:
            _use_shape_twin(node)
    for value in twin.graph.output:
        value.type.tensor_type.ClearField("shape")
    return twin


def _fold_shapes(graph: onnx.GraphProto, infos: dict[_Value, onnx.TypeProto]) -> bool:
    """Replace nodes that compute with known shapes by their values; whether there were any."""
    known = {tensor.name: _array(tensor) for tensor in graph.initializer if _is_small(tensor)}
    left: list[onnx.NodeProto] = []
    for node in graph.node:
        value = next((_array(t) for t in _constant(node) if _is_small(t)), None) if node.op_type == "Constant" else None
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
    return changed


_FOLDED_SIZE = 64


def _is_small(tensor: TensorProto) -> bool:
    return tensor.data_type in (TensorProto.INT64, TensorProto.INT32) and prod(tensor.dims) <= _FOLDED_SIZE


def _fold(
    node: onnx.NodeProto, known: dict[str, NDArray[Any]], infos: dict[_Value, onnx.TypeProto]
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
    axes = (
        [int(attributes["axis"].i)]
        if "axis" in attributes
        else [*attributes["axes"].ints]
        if "axes" in attributes
        else []
    )
    try:
        return _fold_values(node.op_type, given, axes)
    except (IndexError, ValueError):
        return None


def _fold_values(operator: str, given: list[NDArray[Any]], attribute: list[int]) -> NDArray[Any] | None:
    data, *more = given
    axes = tuple(attribute or (more[0].ravel().tolist() if more else ()))
    if operator == "Concat":
        return np.concatenate(given, attribute[0])
    if operator == "Gather" and more:
        return np.asarray(np.take(data, more[0], attribute[0] if attribute else 0))
    if operator == "Unsqueeze":
        return np.expand_dims(data, axes)
    if operator == "Squeeze":
        return np.squeeze(data, axes or None)
    if operator == "Slice" and data.ndim == 1 and len(more) >= 2:
        return data[int(more[0].item()) : int(more[1].item()) : int(more[3].item()) if len(more) > 3 else 1]
    return data if operator in ("Identity", "Cast") else None


def _use_shape_twin(node: onnx.NodeProto) -> None:
    """Turn a runtime operator that ONNX has no schema for into a standard one with the same output shape."""
    if node.domain == "com.microsoft" and node.op_type in _SHAPE_TWINS:
        node.op_type, positions = _SHAPE_TWINS[node.op_type]
        node.domain = ""
        node.input[:] = [node.input[index] for index in positions if index < len(node.input)]


# --- precision, layer by layer ----------------------------------------------------------------------------------------

_Family = Literal["conv", "transposed", "gemm", "matmul", "other"]


@dataclass(frozen=True)
class _Kind:
    """A weighted operator: activations are input 0; ``scale`` is where an integer kernel takes its weights' scale.

    ConvInteger and MatMulInteger take no scale but a zero point of the same size.
    """

    family: _Family
    weight: int = 1
    scale: int | None = None


_WEIGHTED = {
    "Attention": _Kind("other"),
    "Conv": _Kind("conv"),
    "ConvInteger": _Kind("conv", scale=3),
    "ConvTranspose": _Kind("transposed"),
    "DeformConv": _Kind("other"),
    "DynamicQuantizeMatMul": _Kind("matmul", scale=2),
    "Einsum": _Kind("other"),
    "FusedConv": _Kind("conv"),
    "FusedGemm": _Kind("gemm"),
    "FusedMatMul": _Kind("other"),
    "GRU": _Kind("other"),
    "Gemm": _Kind("gemm"),
    "LSTM": _Kind("other"),
    "MatMul": _Kind("matmul"),
    "MatMulInteger": _Kind("matmul", scale=3),
    "MatMulIntegerToFloat": _Kind("matmul", scale=3),
    "MatMulNBits": _Kind("other"),
    "QAttention": _Kind("other"),
    "QGemm": _Kind("gemm", weight=3, scale=4),
    "QLinearConv": _Kind("conv", weight=3, scale=4),
    "QLinearMatMul": _Kind("matmul", weight=3, scale=4),
    "RNN": _Kind("other"),
}
_QDQ_KERNELS = frozenset({"Conv", "Gemm", "MatMul"})
_BYTES = frozenset({"int8", "uint8"})
_LAYOUT = frozenset({"Flatten", "Gather", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


@dataclass(frozen=True)
class _Operand:
    """One side of a product: the codes (or floats) behind its DequantizeLinear, and that node."""

    value: _Value | None
    type: str | None
    dequantize: _Node | None
    constant: TensorProto | None


def _layers(graph: _Graph) -> tuple[list[Layer], list[Granularity]]:
    layers: list[Layer] = []
    scales: list[Granularity] = []
    for node in graph.nodes:
        if node.operator in _WEIGHTED:
            activation = _operand(graph, node.input(0))
            weight = _operand(graph, node.input(_WEIGHTED[node.operator].weight))
            layers.append(_layer(graph, node, activation, weight))
            scale = _scale_granularity(graph, node, weight)
            scales += [] if scale is None or weight.constant is None else [scale]
    return layers, scales


def _layer(graph: _Graph, node: _Node, activation: _Operand, weight: _Operand) -> Layer:
    scheme = _layer_scheme(graph, node, activation, weight)
    integer = scheme in ("int8-static", "int8-dynamic")
    packed = node.operator == "MatMulNBits"
    weights = 0 if weight.constant is None else prod(weight.constant.dims)
    return Layer(
        name=node.name,
        operator=safe_text(node.operator),
        scheme=scheme,
        weight_type=f"uint{node.attribute('bits', 4)}" if packed else weight.type,
        activation_type=activation.type,
        macs=_macs(graph, node),
        weights=node.attribute("K", 0) * node.attribute("N", 0) if packed else weights,
        integer=integer,
        can_saturate=integer and _can_saturate(graph, node, activation, weight),
    )


def _operand(graph: _Graph, value: _Value | None) -> _Operand:
    behind = _behind_layout(graph, value)
    node = graph.producer.get(behind) if behind is not None else None
    if node is None or node.operator != "DequantizeLinear":
        return _Operand(value, graph.type(value), None, _constant_behind(graph, behind))
    codes = node.input(0)
    kind = graph.type(codes) or graph.type(node.input(2))
    # A transposed or reshaped DequantizeLinear output keeps the runtime from fusing: only a direct one is its node.
    return _Operand(codes, kind, node if behind == value else None, _constant_behind(graph, codes))


def _constant_behind(graph: _Graph, value: _Value | None) -> TensorProto | None:
    """The constant a value is made of, through layout changes and a QuantizeLinear of float weights."""
    behind = _behind_layout(graph, value)
    node = graph.producer.get(behind) if behind is not None else None
    if node is not None and node.operator == "QuantizeLinear":
        behind = _behind_layout(graph, node.input(0))
    return graph.constants.get(behind) if behind is not None else None


def _behind_layout(graph: _Graph, value: _Value | None) -> _Value | None:
    while value is not None and value in graph.producer and graph.producer[value].operator in _LAYOUT:
        value = graph.producer[value].input(0)
    return value


def _layer_scheme(
    graph: _Graph, node: _Node, activation: _Operand, weight: _Operand
) -> Literal["fp32", "int8-static", "int8-dynamic", "other"]:
    kernel = _WEIGHTED[node.operator].scale is not None and weight.type in _BYTES
    if kernel or _fuses_to_integer(graph, node, activation, weight):
        return "int8-dynamic" if _scale_at_run_time(graph, node, activation) else "int8-static"
    floats = activation.type == weight.type == "float32" and node.operator != "MatMulNBits"
    return "fp32" if floats else "other"


def _scale_at_run_time(graph: _Graph, node: _Node, activation: _Operand) -> bool:
    source = _behind_layout(graph, activation.value)
    maker = graph.producer.get(source) if source is not None else None
    return node.operator == "DynamicQuantizeMatMul" or (maker is not None and maker.operator == "DynamicQuantizeLinear")


def _fuses_to_integer(graph: _Graph, node: _Node, activation: _Operand, weight: _Operand) -> bool:
    """Whether the runtime turns this QDQ group into one integer kernel.

    A convolution needs a QuantizeLinear behind each use of its output; Gemm and MatMul have integer kernels that
    answer in float.
    """
    both = activation.dequantize is not None and weight.dequantize is not None
    if node.operator not in _QDQ_KERNELS or not both or {activation.type, weight.type} - _BYTES:
        return False
    return node.operator != "Conv" or _only_quantized(graph, node.output(0))


def _only_quantized(graph: _Graph, value: _Value | None) -> bool:
    users = graph.consumers.get(value, []) if value is not None else []
    if not users or value in graph.outputs:
        return False
    for user in users:
        after = user.output(0)
        vanishing = user.operator in ("Relu", "Clip") and _quantization_clips(graph, user) and after is not None
        if user.operator != "QuantizeLinear" and not (vanishing and _only_quantized(graph, after)):
            return False
    return True


_RUNTIME_EPSILON = float(np.finfo(np.float32).eps)


def _quantization_clips(graph: _Graph, activation: _Node) -> bool:
    """Whether the QuantizeLinear behind a Relu or Clip cuts off at least as much, so that the runtime drops it."""
    low, high = _clip_bounds(graph, activation)
    for user in graph.consumers.get(activation.output(0) or ("", ""), []):
        scale, zero = (graph.constants.get(user.input(index) or ("", "")) for index in (1, 2))
        if user.operator != "QuantizeLinear" or scale is None or zero is None:
            return False
        if _type_name(zero.data_type) not in _BYTES:
            return False
        limits, offset = np.iinfo(_array(zero).dtype), _array(zero).astype(np.float32)
        lowest, highest = (_array(scale) * (np.float32(limit) - offset) for limit in (limits.min, limits.max))
        if (low - lowest > _RUNTIME_EPSILON).any() or (highest - high > _RUNTIME_EPSILON).any():
            return False
    return True


def _clip_bounds(graph: _Graph, activation: _Node) -> tuple[float, float]:
    """The lowest and the highest value that passes; an unknown bound lets nothing pass."""
    if activation.operator == "Relu":
        return 0.0, np.inf
    attributes = {attribute.name: attribute.f for attribute in activation.proto.attribute}
    bounds = [attributes.get("min", -np.inf), attributes.get("max", np.inf)]
    for index, unknown in enumerate((np.inf, -np.inf)):
        given = activation.input(index + 1)
        if given is not None:
            constant = graph.constants.get(given)
            single = constant is not None and prod(constant.dims) == 1
            bounds[index] = float(_array(constant).item()) if constant is not None and single else unknown
    return bounds[0], bounds[1]


def _scale_granularity(graph: _Graph, node: _Node, weight: _Operand) -> Granularity | None:
    dequantize = weight.dequantize
    if (dequantize is not None and dequantize.attribute("block_size", 0)) or node.operator == "MatMulNBits":
        return "per-block"
    index = _WEIGHTED[node.operator].scale
    where = dequantize.input(1) if dequantize is not None else None if index is None else node.input(index)
    scale = graph.constants.get(where) if where is not None else None
    if scale is None:
        return None
    return "per-channel" if prod(scale.dims) > 1 else "per-tensor"


def _macs(graph: _Graph, node: _Node) -> int | None:
    """Multiply-accumulates for one image, from the shapes at batch 1 (or at the file's fixed batch, divided by it)."""
    kind = _WEIGHTED[node.operator]
    left, right, out = graph.shape(node.input(0)), graph.shape(node.input(kind.weight)), graph.shape(node.output(0))
    if kind.family == "conv" and right and out:
        total = prod(out) * prod(right[1:])
    elif kind.family == "transposed" and right and left:
        total = prod(left) * prod(right[1:])
    elif kind.family == "gemm" and right and left and len(left) == 2:
        total = left[1 if node.attribute("transA", 0) else 0] * prod(right)
    elif kind.family == "matmul" and left and out is not None:
        total = prod(out) * left[-1]
    elif node.operator == "MatMulNBits" and left:
        total = prod(left) * node.attribute("N", 0)
    else:
        return None
    return total // graph.batch


def _can_saturate(graph: _Graph, node: _Node, activation: _Operand, weight: _Operand) -> bool:
    """Whether two neighbouring u8 x s8 products can exceed int16.

    Signed activations count too: the runtime turns them into unsigned ones and keeps the weights. ConvInteger and
    depthwise convolutions have kernels of their own, which don't saturate (measured on AVX2).
    """
    if weight.type != "int8" or node.operator == "ConvInteger" or _is_depthwise(graph, node):
        return False
    if _WEIGHTED[node.operator].scale is not None and activation.type == "int8":
        return False
    if weight.constant is None or weight.constant.data_type != TensorProto.INT8:
        # Codes that are computed at run time may be any.
        return True
    codes = _array(weight.constant)
    return codes.size > 0 and _pair_overflows(_reduction_rows(node, codes))


def _is_depthwise(graph: _Graph, node: _Node) -> bool:
    kind = _WEIGHTED[node.operator]
    shape = graph.shape(node.input(kind.weight))
    return kind.family == "conv" and shape is not None and shape[:2] == [node.attribute("group", 1), 1]


def _reduction_rows(node: _Node, codes: NDArray[Any]) -> NDArray[Any]:
    """The weights as (outputs, K), K in the order of the kernel's dot product: (kh, kw, cin) or the inner dimension."""
    family = _WEIGHTED[node.operator].family
    if family == "conv" and codes.ndim > 2:
        return np.moveaxis(codes, 1, -1).reshape(codes.shape[0], -1)
    if codes.ndim < 2 or (family == "gemm" and node.attribute("transB", 0)):
        return np.atleast_2d(codes).reshape(-1, np.atleast_2d(codes).shape[-1])
    return np.moveaxis(codes, -2, -1).reshape(-1, codes.shape[-2])


def _pair_overflows(rows: NDArray[Any]) -> bool:
    wide = rows.astype(np.int32)
    pairs = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2))).reshape(wide.shape[0], -1, 2)
    highest = np.maximum(pairs, 0).sum(axis=2) * 255
    lowest = np.minimum(pairs, 0).sum(axis=2) * 255
    return bool((highest > 32767).any() or (lowest < -32768).any())


_SCALE_INPUTS: dict[str, tuple[int, ...]] = {
    "ConvInteger": (2, 3),
    "DequantizeLinear": (1, 2),
    "DynamicQuantizeMatMul": (2, 3),
    "MatMulInteger": (2, 3),
    "MatMulIntegerToFloat": (2, 3, 4, 5),
    "QGemm": (1, 2, 4, 5, 7, 8),
    "QLinearAdd": (1, 2, 4, 5, 6, 7),
    "QLinearAveragePool": (1, 2, 3, 4),
    "QLinearConv": (1, 2, 4, 5, 6, 7),
    "QLinearGlobalAveragePool": (1, 2, 3, 4),
    "QLinearLeakyRelu": (1, 2, 3, 4),
    "QLinearMatMul": (1, 2, 4, 5, 6, 7),
    "QLinearMul": (1, 2, 4, 5, 6, 7),
    "QLinearSigmoid": (1, 2, 3, 4),
    "QuantizeLinear": (1, 2),
}


def _parameters(graph: _Graph) -> int:
    scales = {node.input(index) for node in graph.nodes for index in _SCALE_INPUTS.get(node.operator, ())}
    for node in graph.nodes:
        makers = [graph.producer.get(value) for value in node.inputs if value is not None]
        if node.operator == "Mul" and any(m is not None and m.operator == "DynamicQuantizeLinear" for m in makers):
            scales.update(node.inputs)
    counted = [tensor for value, tensor in graph.constants.items() if value not in scales]
    return sum(prod(tensor.dims) for tensor in counted if tensor.data_type not in _NOT_PARAMETERS)


_NOT_PARAMETERS = frozenset({TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING})


# --- where the image goes ---------------------------------------------------------------------------------------------

_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_SHAPE_READERS = frozenset({"Shape", "Size"})

_COMPARE, _LOGIC, _INDEX, _STEP = (
    "compares",
    "combines truth values or bits",
    "answers with an index",
    "is a step function",
)
_SELECT, _AT = (
    "chooses by a condition that depends on the image",
    "reads or writes at a place that depends on the image",
)
_BRANCH = "branches or iterates on the image"

_BLIND_INPUTS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "IsInf", "IsNaN"), (_COMPARE, None)),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), (_LOGIC, None)),
    **dict.fromkeys(("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"), (_LOGIC, None)),
    **dict.fromkeys(("ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Unique"), (_INDEX, None)),
    **dict.fromkeys(("Ceil", "Floor", "Hardmax", "Mod", "Round", "Sign"), (_STEP, None)),
    **dict.fromkeys(("Bernoulli", "Binarizer", "Multinomial", "Shrink", "ThresholdedRelu"), (_STEP, None)),
    **dict.fromkeys(("QLinearWhere", "Where", "If"), (_SELECT, (0,))),
    **dict.fromkeys(("Loop", "Scan"), (_BRANCH, None)),
    **dict.fromkeys(("Compress", "Gather", "GatherElements", "GatherND", "MaxUnpool"), (_AT, (1,))),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND", "SequenceAt", "Tile", "Trilu"), (_AT, (1,))),
    **dict.fromkeys(("ConstantOfShape", "OneHot"), (_AT, (0,))),
    **dict.fromkeys(("Expand", "Reshape"), (_AT, (1,))),
    "Pad": (_AT, (1, 3)),
    "Range": (_AT, None),
    "Slice": (_AT, (1, 2, 3, 4)),
    "TopK": (_AT, (1,)),
}
"""Operators without a useful gradient, why, and the inputs that matter (None: any)."""

_BLIND_OUTPUTS = {"TopK": 1, "MaxPool": 1}
_SMOOTH_ML_OPERATORS = frozenset({"FeatureVectorizer", "LinearRegressor", "Normalizer", "Scaler"})
_DATA_SHAPED = frozenset({"Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique"})
_SHAPED_BY = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Pad": (1, 3),
    "Range": (0, 1, 2),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
}
"""Operators whose output shape depends on the values of these inputs."""


@dataclass(frozen=True)
class _Flow:
    """What depends on the image's pixels: all of it, and the part that goes on to the output."""

    data: frozenset[_Value]
    live: frozenset[_Value]


def _data_flow(graph: _Graph) -> _Flow:
    """Follow the pixels. A shape is no pixel, unless the tensor has as many elements as the pixels say."""
    resized: set[_Value] = set()
    while True:
        data = _reach(graph, graph.inputs, shapes_of=resized)
        seeds = [out for node in graph.nodes if _shape_follows(node, data) for out in node.outputs if out is not None]
        grown = _reach(graph, seeds)
        if grown <= resized:
            return _Flow(frozenset(data), frozenset(_lead_to_output(graph, data)))
        resized |= grown


def _shape_follows(node: _Node, data: set[_Value]) -> bool:
    if node.operator in _DATA_SHAPED:
        return any(value in data for value in (*node.inputs, *node.inner))
    return any(node.input(index) in data for index in _SHAPED_BY.get(node.operator, ()))


def _reach(graph: _Graph, seeds: Iterable[_Value], shapes_of: set[_Value] | None = None) -> set[_Value]:
    """All that depends on the seeds; given ``shapes_of``, the shapes of other tensors than these count as constant."""
    reached, waiting = set(seeds), deque(seeds)
    while waiting:
        value = waiting.popleft()
        for node in graph.consumers.get(value, []):
            if shapes_of is not None and node.operator in _SHAPE_READERS and value not in shapes_of:
                continue
            fresh = [out for out in node.outputs if out is not None and out not in reached]
            reached.update(fresh)
            waiting.extend(fresh)
    return reached


def _lead_to_output(graph: _Graph, data: set[_Value]) -> set[_Value]:
    live = {value for value in graph.outputs if value in data}
    waiting = deque(live)
    while waiting:
        node = graph.producer.get(waiting.popleft())
        for value in (*node.inputs, *node.inner) if node is not None else ():
            if value in data and value not in live:
                live.add(value)
                waiting.append(value)
    return live


def _blind_nodes(graph: _Graph, flow: _Flow) -> Iterator[BlindNode]:
    for node in graph.nodes:
        if any(out in flow.live for out in node.outputs):
            reason = _blindness(graph, node, flow)
            if reason is not None:
                yield BlindNode(name=node.name, operator=safe_text(node.operator), reason=reason)


def _blindness(graph: _Graph, node: _Node, flow: _Flow) -> str | None:
    """Why no useful gradient passes the node on the pixels' way, or None."""
    given = [value for value in (*node.inputs, *node.inner) if value in flow.data]
    if not given:
        return None
    if node.domain == "ai.onnx.ml" and node.operator not in _SMOOTH_ML_OPERATORS:
        return "has no gradient"
    if node.operator in ("Cast", "CastLike") and _cast_target(graph, node) not in _FLOATS:
        return "casts to integer or bool"
    index = _BLIND_OUTPUTS.get(node.operator, len(node.outputs))
    if any(out in flow.live for out in node.outputs[index : index + 1]):
        return _INDEX
    reason, positions = _BLIND_INPUTS.get(node.operator, (None, None))
    if positions is None or any(node.input(position) in flow.data for position in positions):
        return reason
    return None


def _cast_target(graph: _Graph, node: _Node) -> str | None:
    if node.operator == "CastLike":
        return graph.type(node.input(1))
    return _type_name(node.attribute("to", TensorProto.UNDEFINED))


def _bypass(graph: _Graph, flow: _Flow) -> tuple[int | None, list[str]]:
    """The fewest weighted operators on a way from input to output, and the operators on that way."""
    best: dict[_Value, int] = {}
    came: dict[_Value, tuple[_Value, _Node]] = {}
    waiting = deque((0, value) for value in graph.inputs if value in flow.live)
    best.update({value: 0 for _, value in waiting})
    scales = _kernel_scales(graph, flow)
    while waiting:
        depth, value = waiting.popleft()
        if depth > best[value] or value in scales:
            continue
        for node in graph.consumers.get(value, []):
            cost = int(_is_weighted(node, value, flow))
            for out in node.outputs:
                if out in flow.live and out is not None and depth + cost < best.get(out, len(graph.nodes) + 1):
                    best[out], came[out] = depth + cost, (value, node)
                    waiting.append((depth + cost, out)) if cost else waiting.appendleft((depth, out))
    ends = [value for value in graph.outputs if value in best]
    if not ends:
        return None, []
    end = min(ends, key=lambda value: best[value])
    return best[end], _names_on_path(came, end)


def _names_on_path(came: dict[_Value, tuple[_Value, _Node]], value: _Value) -> list[str]:
    names: list[str] = []
    while value in came:
        value, node = came[value]
        names.append(f"{safe_text(node.operator)} '{node.name}'")
    return ["..."] * (len(names) > _NODES_SHOWN) + names[:_NODES_SHOWN][::-1]


def _is_weighted(node: _Node, value: _Value, flow: _Flow) -> bool:
    """Whether the pixels meet weights here: they come in on one side of the product, a constant on the other.

    What comes in through a bias or a scale meets no weights.
    """
    if node.operator not in _WEIGHTED:
        return False
    left, right = node.input(0), node.input(_WEIGHTED[node.operator].weight)
    return (value == left and right not in flow.data) or (value == right and left not in flow.data)


def _kernel_scales(graph: _Graph, flow: _Flow) -> set[_Value]:
    """Scales and zero points of DynamicQuantizeLinear that do nothing but undo the quantization of its own codes.

    They depend on the pixels and skip the kernel, in every dynamically quantized file. Used in any other way, they
    are a channel around the weights and count as one.
    """
    found: set[_Value] = set()
    for node in graph.nodes:
        if node.operator == "DynamicQuantizeLinear" and len(node.outputs) == 3:
            codes, scale, zero = node.outputs
            if scale is not None and all(
                _takes_codes(graph, user, codes) or _rescales(graph, user, scale, codes, flow)
                for user in graph.consumers.get(scale, [])
            ):
                found.add(scale)
            if zero is not None and all(_takes_codes(graph, user, codes) for user in graph.consumers.get(zero, [])):
                found.add(zero)
    return found


_CODE_READERS = frozenset({"ConvInteger", "DequantizeLinear", "MatMulInteger", "MatMulIntegerToFloat"})


def _takes_codes(graph: _Graph, node: _Node, codes: _Value | None) -> bool:
    return node.operator in _CODE_READERS and codes is not None and _behind_layout(graph, node.input(0)) == codes


def _rescales(graph: _Graph, node: _Node, scale: _Value, codes: _Value | None, flow: _Flow) -> bool:
    """Whether the node is ``scale * constant`` and multiplies nothing but products of these codes."""
    product = node.output(0)
    others = [value for value in node.inputs if value != scale]
    if node.operator != "Mul" or product is None or len(others) != 1 or others[0] in flow.data:
        return False
    if product in graph.outputs:
        return False
    return all(_multiplies_product(graph, user, product, codes) for user in graph.consumers.get(product, []))


def _multiplies_product(graph: _Graph, node: _Node, scale: _Value, codes: _Value | None) -> bool:
    others = [value for value in node.inputs if value is not None and value != scale]
    if node.operator != "Mul" or len(others) != 1:
        return False
    cast = graph.producer.get(others[0])
    kernel = graph.producer.get(cast.input(0) or ("", "")) if cast is not None and cast.operator == "Cast" else None
    return kernel is not None and kernel.operator in _WEIGHTED and _takes_codes(graph, kernel, codes)
