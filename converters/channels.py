"""The channels of a network's last feature map, and the initializers that silence one of them when they are zeroed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from math import nan

from onnx import TensorProto

from qdefense.converters.data_flow import follow_pixels
from qdefense.converters.flat_graph import Graph, Node, Value, behind_layout, flatten
from qdefense.converters.reading import parse_model, safe_text, tensor_array
from qdefense.converters.weighted_operators import WEIGHTED

_BIAS = {"Conv": 2, "ConvInteger": None, "QLinearConv": 8}
"""Convolutions, and where they take their bias; that of ConvInteger is added by a node behind it."""

_SUMS = {"Add": (), "QLinearAdd": (0, 3), "Sum": ()}
"""Sums, and where they take their summands; without a place all inputs are some."""

_GATES = frozenset({"HardSigmoid", "QLinearSigmoid", "Sigmoid"})
_KEEP_ZERO = frozenset(
    {
        *("AveragePool", "Cast", "Celu", "Clip", "DequantizeLinear", "Dropout", "Elu", "Gelu", "GlobalAveragePool"),
        *("GlobalMaxPool", "HardSwish", "Identity", "LeakyRelu", "MaxPool", "Mish", "PRelu", "QLinearAveragePool"),
        *("QLinearGlobalAveragePool", "QLinearLeakyRelu", "QuantizeLinear", "QuickGelu", "ReduceMean", "Relu", "Selu"),
        *("Softsign", "Swish", "Tanh"),
    }
)
"""Operators that answer a channel of zeros with zeros, and mix no channels of a feature map."""

_AVERAGES = frozenset(
    {"AveragePool", "GlobalAveragePool", "QLinearAveragePool", "QLinearGlobalAveragePool", "ReduceMean"}
)
_MAP_RANK = 4


class ChannelError(ValueError):
    """No channel of a last feature map can be silenced; the message says where the graph is in the way."""


@dataclass(frozen=True, order=True)
class ChannelParameter:
    """An initializer with one entry, or slice, for each channel along ``axis``."""

    initializer: str
    axis: int


@dataclass(frozen=True, kw_only=True)
class FeatureMap:
    """The last tensor ``(N, C, H, W)`` on the way to the last weights.

    Attributes:
        channels: C.
        tensors: names of the tensors that hold it before it is averaged over its places, the last first; later ones in
            this list are not yet quantized, pooled or rectified.
        parameters: where all entries of a channel in these are zero, so is the channel.
    """

    channels: int
    tensors: tuple[str, ...]
    parameters: tuple[ChannelParameter, ...]


def last_feature_map(model: bytes, output: str) -> FeatureMap:
    """Find the feature map that the last layer with weights reads, and what would silence its channels.

    From the map back towards the image: a convolution is silenced by its weights and its bias, a normalization by its
    scale and its shift, a sum by all its summands. A residual sum with an identity shortcut leads on to the
    convolutions before it, up to the one that the shortcut starts from.

    Args:
        model: the bytes of a model that `reading.check_file` lets pass.
        output: the name of the output that holds the class scores.

    Raises:
        ChannelError: no feature map leads to the output by itself, or something on the way from the convolutions to it
            moves or mixes channels, answers zeros with something else, or is no initializer of its own.
    """
    graph = flatten(parse_model(model))
    carrying = follow_pixels(graph).data - _scales(graph)
    end = next((value for value in graph.outputs if value[1] == output), None)
    if end is None:
        raise ChannelError(f"the file has no output '{safe_text(output)}'")
    found = _map_behind(graph, carrying, end)
    dims = _dims(graph, found)
    channels = dims[1] if len(dims) == _MAP_RANK else 0
    if channels < 1:
        raise ChannelError(f"the graph does not say how many channels '{safe_text(found[1])}' has")
    parameters = dict.fromkeys(_Silencers(graph, carrying, channels).of(found))
    return FeatureMap(channels=channels, tensors=tuple(_holders(graph, carrying, found)), parameters=tuple(parameters))


def _map_behind(graph: Graph, carrying: Set[Value], value: Value) -> Value:
    """The first tensor of four axes behind the last weights, before it was transposed."""
    weighted = False
    while not weighted or len(_dims(graph, value)) != _MAP_RANK:
        node = graph.producer.get(value)
        before = [] if node is None else _carriers(node, carrying)
        if node is None or not before:
            raise ChannelError("no feature map of four axes (N, C, H, W) leads to the last layer with weights")
        if len(before) != 1:
            raise ChannelError(
                f"the way back from the class scores forks at node '{node.name}' ({safe_text(node.operator)}) before "
                "it reaches a feature map: no last convolution feeds the last weights by itself"
            )
        weighted = weighted or _is_weighted(node, carrying)
        value = before[0]
    while value in graph.producer and graph.producer[value].operator in ("Transpose", "Identity"):
        value = _carriers(graph.producer[value], carrying)[0]
    return value


def _is_weighted(node: Node, carrying: Set[Value]) -> bool:
    return node.operator in WEIGHTED and node.input(WEIGHTED[node.operator].weight) not in carrying


def _scales(graph: Graph) -> set[Value]:
    """Scales and zero points that dynamic quantization reads off the image: they carry none of it."""
    found: set[Value] = set()
    for node in graph.nodes:
        if node.operator == "DynamicQuantizeLinear":
            found.update(value for value in node.outputs[1:] if value is not None)
        elif node.operator == "Mul" and found.intersection(node.inputs):
            others = [value for value in node.inputs if value not in found]
            found.update(value for value in node.outputs if value is not None and _are_constant(graph, others))
    return found


def _are_constant(graph: Graph, values: Iterable[Value | None]) -> bool:
    return all(behind_layout(graph, value) in graph.constants for value in values)


def _carriers(node: Node, carrying: Set[Value]) -> list[Value]:
    """The inputs that carry the image."""
    inputs = dict.fromkeys((*node.inputs, *node.inner))
    return [value for value in inputs if value is not None and value in carrying]


def _dims(graph: Graph, value: Value) -> list[int]:
    """Dimensions as far as they are known, -1 for the others; none where not even their number is."""
    kind = graph.infos.get(value)
    if kind is None or not kind.tensor_type.HasField("shape"):
        return []
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.tensor_type.shape.dim]


def _holders(graph: Graph, carrying: Set[Value], value: Value) -> list[str]:
    """The tensor and those that it is made of one by one, up to where the map is computed; none that is an average.

    An average has the mean of what it is taken of, but for the rounding of its own codes.
    """
    names = []
    while True:
        if not value[0]:
            names.append(value[1])
        node = graph.producer.get(value)
        before = [] if node is None or node.operator not in _KEEP_ZERO else _carriers(node, carrying)
        if node is None or len(before) != 1:
            return names
        if node.operator in _AVERAGES:
            names = []
        value = before[0]


@dataclass(frozen=True)
class _Silencers:
    """Goes back from a feature map to what makes it."""

    graph: Graph
    carrying: Set[Value]
    channels: int

    def of(self, value: Value) -> Iterator[ChannelParameter]:
        """What to zero so that a channel of this tensor is zero."""
        pending, seen = [value], set()
        while pending:
            value = pending.pop()
            if value in seen:
                continue
            seen.add(value)
            node = self.graph.producer.get(value)
            if node is None:
                raise ChannelError(f"the last feature map contains the input '{safe_text(value[1])}' itself")
            yield from self._own(node)
            pending += reversed(self._before(node))

    def _own(self, node: Node) -> Iterator[ChannelParameter]:
        """The initializers of this very node that have to be zero."""
        if node.operator in _BIAS:
            yield self._parameter(node, node.input(WEIGHTED[node.operator].weight), axis=0)
            bias = _BIAS[node.operator]
            if bias is not None and node.input(bias) is not None:
                yield self._parameter(node, node.input(bias), axis=0)
        elif node.operator == "BatchNormalization":
            yield from (self._parameter(node, node.input(index), axis=0) for index in (1, 2))
        elif node.operator in _SUMS:
            yield from (self._summand(node, value) for value in self._summands(node) if value not in self.carrying)

    def _before(self, node: Node) -> list[Value]:
        """The inputs that have to be silent, too."""
        if node.operator in _BIAS or node.operator == "BatchNormalization":
            return []
        carriers = _carriers(node, self.carrying)
        if node.operator in _SUMS:
            return [value for value in self._summands(node) if value in self.carrying]
        if node.operator == "Mul":
            # One silent factor is enough, and of x sigmoid(x), or a map and its gate, the gate never is.
            carriers = [value for value in carriers if not self._is_gate(value)][:1]
        if not carriers or node.operator not in _KEEP_ZERO | {"Mul"} or self._moves_zero(node):
            raise ChannelError(
                f"node '{node.name}' ({safe_text(node.operator)}) lies between the last convolution and the last "
                "weights, and may mix channels or answer a silent one with something else than zeros"
            )
        return carriers[:1]

    def _summands(self, node: Node) -> list[Value]:
        places = _SUMS[node.operator] or range(len(node.inputs))
        return [value for value in map(node.input, places) if value is not None]

    def _moves_zero(self, node: Node) -> bool:
        """Whether it clips to an interval that 0 is not in, or may not be in."""
        if node.operator != "Clip":
            return False
        low, high = (self._bound(node, index, name) for index, name in ((1, "min"), (2, "max")))
        return not ((low is None or low <= 0) and (high is None or high >= 0))

    def _bound(self, node: Node, index: int, name: str) -> float | None:
        """NaN where it is made at run time; an attribute before opset 11."""
        value = node.input(index)
        if value is None:
            return next((part.f for part in node.proto.attribute if part.name == name), None)
        constant = self.graph.constants.get(value)
        return float(tensor_array(constant).item()) if constant is not None else nan

    def _is_gate(self, value: Value) -> bool:
        node = self.graph.producer.get(value)
        while node is not None and node.operator in ("DequantizeLinear", "QuantizeLinear"):
            before = node.input(0)
            node = self.graph.producer.get(before) if before is not None else None
        return node is not None and node.operator in _GATES

    def _summand(self, node: Node, value: Value) -> ChannelParameter:
        """A constant that is added to ``(N, C, H, W)``: its channels are the third axis from the right, as summed."""
        origin = self._origin(value)
        tensor = self.graph.constants.get(origin) if origin is not None else None
        shape = self.graph.shape(value)
        if shape is None or tensor is None:
            return self._parameter(node, value)
        axis = len(shape) - _MAP_RANK + 1
        if axis < 0 or shape[axis] != self.channels:
            raise self._has_no_channels(node, tensor)
        return self._parameter(node, value, axis=axis if list(tensor.dims) == shape else None)

    def _has_no_channels(self, node: Node, tensor: TensorProto) -> ChannelError:
        return ChannelError(
            f"node '{node.name}' ({safe_text(node.operator)}) takes '{safe_text(tensor.name)}' of shape "
            f"{tuple(tensor.dims)}, which has no axis of {self.channels} channels"
        )

    def _parameter(self, node: Node, value: Value | None, axis: int | None = None) -> ChannelParameter:
        """The initializer behind a value, and its axis of the channels: the only one as long where none is given."""
        origin = self._origin(value)
        tensor = self.graph.constants.get(origin) if origin is not None else None
        what = f"node '{node.name}' ({safe_text(node.operator)})"
        if tensor is None or origin is None or origin in self.graph.producer:
            raise ChannelError(f"{what} takes a weight that is no initializer of the file, so it can't be changed")
        name = safe_text(tensor.name)
        axes = [index for index, size in enumerate(tensor.dims) if size == self.channels and axis in (None, index)]
        if len(axes) != 1:
            raise self._has_no_channels(node, tensor)
        if len(self.graph.consumers[origin]) > 1:
            raise ChannelError(f"{what} shares '{name}' with other nodes, which would lose the channel with it")
        return ChannelParameter(tensor.name, axes[0])

    def _origin(self, value: Value | None) -> Value | None:
        behind = behind_layout(self.graph, value)
        node = self.graph.producer.get(behind) if behind is not None else None
        if node is not None and node.operator == "DequantizeLinear":
            return behind_layout(self.graph, node.input(0))
        return behind
