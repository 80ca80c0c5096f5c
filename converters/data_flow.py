"""Where the image goes in the graph: gradient-blind nodes, the way around the weights, structure warnings."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from onnx import helper
from pydantic import BaseModel, ConfigDict

from qdefense.converters.flat_graph import Graph, Node, Value, behind_layout
from qdefense.converters.gradient_blindness import blindness
from qdefense.converters.reading import safe_text, tensor_array
from qdefense.converters.weighted_operators import WEIGHTED

_NODES_SHOWN = 12
_CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})
_SHAPE_READERS = frozenset({"Shape", "Size"})

_COUNTS, _MIXES = (
    "computes with the size of the batch or image",
    "mixes the images of one batch",
)

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

_EXTENT_ONLY = {
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Tile": (1,),
}
"""Inputs that say how large the output is, but not what stands in it."""

_ALONG = {
    **dict.fromkeys(("ArgMax", "ArgMin", "Compress", "GatherElements", "Scatter", "ScatterElements", "Split"), 0),
    **dict.fromkeys(("Concat", "Gather", "QLinearConcat"), 0),
    **dict.fromkeys(("LpNormalization", "TopK"), -1),
}
_ALONG_FROM = {
    **dict.fromkeys(("Hardmax", "LogSoftmax", "QLinearSoftmax", "Softmax"), 1),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), -1),
}
"""Operators that join what lies along an axis, or along this and all later axes, and the axis if none is given."""

_RECURRENT = frozenset({"GRU", "LSTM", "RNN"})
_NEIGHBOURS = frozenset(
    {
        *("AveragePool", "Conv", "ConvInteger", "ConvTranspose", "DeformConv", "FusedConv", "QLinearConv"),
        *("GlobalAveragePool", "GlobalLpPool", "GlobalMaxPool", "GroupNormalization", "InstanceNormalization"),
        *("LRN", "LpPool", "MaxPool", "QLinearAveragePool", "QLinearGlobalAveragePool"),
    }
)
"""Operators that keep to their row, as long as the rows lie along the first axis."""

_FIRST_ROWS = frozenset({"EyeLike", "GatherND", "ReverseSequence", "ScatterND", "Trilu"})
"""Operators that tell one place from another along the first axis."""


class BlindNode(BaseModel):
    """A node between input and output that answers to the image but passes no useful gradient."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str
    reason: str


@dataclass(frozen=True)
class Flow:
    """What depends on the image's pixels: all of it, and the part that goes on to the output."""

    data: frozenset[Value]
    live: frozenset[Value]


def follow_pixels(graph: Graph) -> Flow:
    """Follow the pixels. A shape is no pixel, unless the tensor has as many elements as the pixels say."""
    resized: set[Value] = set()
    while True:
        data = _reach(graph, graph.inputs, shapes_of=resized)
        seeds = [out for node in graph.nodes if _shape_follows(node, data) for out in node.outputs if out is not None]
        grown = _reach(graph, seeds)
        if grown <= resized:
            return Flow(frozenset(data), frozenset(_lead_to_output(graph, data)))
        resized |= grown


def blind_nodes(graph: Graph, flow: Flow) -> Iterator[BlindNode]:
    """The nodes on the pixels' way to the output that pass no useful gradient, in graph order."""
    rows, scales = _count_rows(graph, flow), _kernel_scales(graph, flow)
    for node in graph.nodes:
        if any(out in flow.live for out in node.outputs):
            reason = blindness(graph, node, flow) or _scale_blindness(node, flow, scales)
            if reason is None and node.operator not in _SHAPE_READERS:
                reason = _batch_blindness(graph, node, rows)
            if reason is not None:
                yield BlindNode(name=node.name, operator=safe_text(node.operator), reason=reason)


def bypass(graph: Graph, flow: Flow) -> tuple[int | None, list[str]]:
    """The fewest weighted operators on a way from input to output, and the operators on that way."""
    best: dict[Value, int] = {}
    came: dict[Value, tuple[Value, Node]] = {}
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


def structure_warnings(graph: Graph, depth: int | None, path: list[str]) -> Iterator[str]:
    """What an honest feed-forward classifier has not; ``depth`` and ``path`` are what ``bypass`` answers."""
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


def _shape_follows(node: Node, data: set[Value]) -> bool:
    if node.operator in _DATA_SHAPED:
        return any(value in data for value in (*node.inputs, *node.inner))
    return any(node.input(index) in data for index in _SHAPED_BY.get(node.operator, ()))


def _reach(graph: Graph, seeds: Iterable[Value], shapes_of: set[Value] | None = None) -> set[Value]:
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


def _lead_to_output(graph: Graph, data: set[Value]) -> set[Value]:
    live = {value for value in graph.outputs if value in data}
    waiting = deque(live)
    while waiting:
        node = graph.producer.get(waiting.popleft())
        for value in (*node.inputs, *node.inner) if node is not None else ():
            if value in data and value not in live:
                live.add(value)
                waiting.append(value)
    return live


@dataclass(frozen=True)
class _Rows:
    """What has a shape of the input's making, and what holds numbers that depend on how many rows there are."""

    shaped: set[Value]
    counted: set[Value]


def _count_rows(graph: Graph, flow: Flow) -> _Rows:
    rows = _Rows(_reach(graph, graph.inputs), set())
    before = -1
    while before < len(rows.counted):
        before = len(rows.counted)
        for node in graph.nodes:
            outs = [out for out in node.outputs if out is not None and not graph.any_batch(out)]
            if not any(out in flow.data for out in outs) and _batch_blindness(graph, node, rows) is not None:
                rows.counted.update(outs)
    return rows


def _scale_blindness(node: Node, flow: Flow, scales: set[Value]) -> str | None:
    """Why a DynamicQuantizeLinear hides the image, or None: its scale goes elsewhere than into undoing its codes."""
    if node.operator != "DynamicQuantizeLinear":
        return None
    if any(out in flow.live and out not in scales for out in node.outputs[1:]):
        return "carries the image in its scale, which has no gradient"
    return None


def _batch_blindness(graph: Graph, node: Node, rows: _Rows) -> str | None:
    """Why one image's answer depends on how many or which others share its batch, or None."""
    if all(graph.any_batch(out) for out in node.outputs if out is not None):
        return None
    if node.operator in _SHAPE_READERS:
        return _COUNTS if node.input(0) in rows.shaped else None
    spared = _EXTENT_ONLY.get(node.operator, ())
    given = (*(value for index, value in enumerate(node.inputs) if index not in spared), *node.inner)
    if any(value in rows.counted for value in given):
        return _COUNTS
    return _MIXES if any(_joins_rows(graph, node, index, rows) for index in range(len(node.inputs))) else None


def _joins_rows(graph: Graph, node: Node, index: int, rows: _Rows) -> bool:
    """Whether the node joins or tells apart what lies along the batch axis of this input."""
    value = node.input(index)
    if value not in rows.shaped or graph.any_batch(value):
        return False
    long, rank = graph.batch_axes(value)
    if node.operator == "BatchNormalization" and node.attribute("training_mode", 0):
        return True
    if node.operator == "Einsum":
        return _sums_letters(node, index, long, rank)
    joined: Iterable[int] | None
    if node.operator in WEIGHTED or node.operator in _NEIGHBOURS:
        joined = _kernel_axes(node, index, rank)
    else:
        joined = _joined_axes(graph, node, index)
    if joined is None:
        return bool(long)
    # Of a tensor of unknown rank, the last axis but one may be the batch: activations behind a computed reshape.
    return bool(long & {axis + (rank or 2) if axis < 0 else axis for axis in joined})


def _kernel_axes(node: Node, index: int, rank: int | None) -> Iterable[int]:
    """The axes that a weighted operator sums over, per input."""
    if node.operator in _RECURRENT:
        return {node.attribute("layout", 0)} if index == 0 else ()
    if node.operator in _NEIGHBOURS:
        return range(1, rank or 1)
    if index not in (0, WEIGHTED[node.operator].weight):
        return ()
    flipped = node.attribute("transB" if index else "transA", 0)
    if rank == 1:
        return {0}
    return {-1} if bool(index) == bool(flipped) else {-2}


def _joined_axes(graph: Graph, node: Node, index: int) -> Iterable[int] | None:
    """The axes along which another operator joins the elements of this input; None: all."""
    kind = node.operator
    if index and kind not in ("Concat", "QLinearConcat"):
        return ()
    if kind in _ALONG:
        return {node.attribute("axis", _ALONG[kind])}
    if kind in _ALONG_FROM:
        first = node.attribute("axis", _ALONG_FROM[kind])
        return range(max(first, -_RANK_LIMIT), 0 if first < 0 else _RANK_LIMIT)
    return _chosen_axes(graph, node)


def _chosen_axes(graph: Graph, node: Node) -> Iterable[int] | None:
    kind = node.operator
    if kind.startswith(("Reduce", "QLinearReduce")) or kind == "MeanVarianceNormalization":
        return _reduced_axes(graph, node)
    if kind == "CumSum":
        return _whole_numbers(graph, node, 1, "axis")
    if kind == "Slice":
        return _sliced_axes(graph, node)
    if kind == "Pad":
        return _padded_axes(graph, node)
    return {0} if kind in _FIRST_ROWS else ()


_RANK_LIMIT = 64


def _reduced_axes(graph: Graph, node: Node) -> list[int] | None:
    if node.operator == "MeanVarianceNormalization":
        return _whole_numbers(graph, node, -1, "axes") or [0, 2, 3]
    axes = _whole_numbers(graph, node, 1, "axes")
    return axes or ([] if node.attribute("noop_with_empty_axes", 0) else None)


def _sliced_axes(graph: Graph, node: Node) -> list[int] | None:
    """The axes of which the slice leaves something out: exporters also write slices that do nothing."""
    starts = _whole_numbers(graph, node, 1, "starts")
    ends = _whole_numbers(graph, node, 2, "ends")
    if starts is None or ends is None:
        return None
    axes = _whole_numbers(graph, node, 3, "axes") or list(range(len(starts)))
    steps = _whole_numbers(graph, node, 4, "steps") or [1] * len(starts)
    cuts = zip(axes, starts, ends, steps, strict=False)
    return [axis for axis, start, end, step in cuts if start or step != 1 or end < 2**31 - 1]


def _padded_axes(graph: Graph, node: Node) -> list[int] | None:
    pads = _whole_numbers(graph, node, 1, "pads")
    if pads is None or node.input(3) is not None:
        return None
    half = len(pads) // 2
    return [axis for axis in range(half) if pads[axis] or pads[axis + half]]


def _whole_numbers(graph: Graph, node: Node, index: int, name: str) -> list[int] | None:
    """The integers given as an attribute of this name or as a constant input, or None."""
    for attribute in node.proto.attribute:
        if attribute.name == name:
            return [int(number) for number in helper.get_attribute_value(attribute)]
    value = node.input(index) if index > 0 else None
    if value is not None and graph.any_batch(value):
        return [int(number) for number in graph.folded[value].ravel()]
    tensor = graph.constants.get(value) if value is not None else None
    return None if tensor is None else [int(number) for number in tensor_array(tensor).ravel()]


def _sums_letters(node: Node, index: int, long: set[int], rank: int | None) -> bool:
    """Whether an Einsum sums over a batch axis of this input: its letter is missing in the output."""
    equation = next((a.s.decode(errors="replace") for a in node.proto.attribute if a.name == "equation"), "")
    left, _, right = equation.replace(" ", "").partition("->")
    term = [*left.split(","), *[""] * (index + 1)][index]
    head, dots, tail = term.partition("...")
    if dots and "..." in right:
        term = head + "".join("." for _ in range((rank or 0) - len(head) - len(tail))) + tail
    return any(axis >= len(term) or term[axis] not in right for axis in long)


def _names_on_path(came: dict[Value, tuple[Value, Node]], value: Value) -> list[str]:
    names: list[str] = []
    while value in came:
        value, node = came[value]
        names.append(f"{safe_text(node.operator)} '{node.name}'")
    return ["..."] * (len(names) > _NODES_SHOWN) + names[:_NODES_SHOWN][::-1]


def _is_weighted(node: Node, value: Value, flow: Flow) -> bool:
    """Whether the pixels meet weights here: they come in on one side of the product, a constant on the other.

    What comes in through a bias or a scale meets no weights.
    """
    if node.operator not in WEIGHTED:
        return False
    left, right = node.input(0), node.input(WEIGHTED[node.operator].weight)
    return (value == left and right not in flow.data) or (value == right and left not in flow.data)


def _kernel_scales(graph: Graph, flow: Flow) -> set[Value]:
    """Scales and zero points of DynamicQuantizeLinear that do nothing but undo the quantization of its own codes.

    They depend on the pixels and skip the kernel, in every dynamically quantized file. Used in any other way, they
    are a channel around the weights and count as one.
    """
    found: set[Value] = set()
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


def _takes_codes(graph: Graph, node: Node, codes: Value | None) -> bool:
    if node.operator not in _CODE_READERS or codes is None:
        return False
    return codes in (behind_layout(graph, node.input(0)), behind_layout(graph, node.input(1)))


def _rescales(graph: Graph, node: Node, scale: Value, codes: Value | None, flow: Flow) -> bool:
    """Whether the node is ``scale * constant``, or the product of both sides' scales, and rescales their sums alone."""
    product = node.output(0)
    others = [value for value in node.inputs if value != scale]
    if node.operator != "Mul" or product is None or len(others) != 1:
        return False
    if others[0] in flow.data and not _is_scale(graph, others[0]):
        return False
    if product in graph.outputs:
        return False
    return all(_multiplies_product(graph, user, product, codes) for user in graph.consumers.get(product, []))


def _is_scale(graph: Graph, value: Value) -> bool:
    producer = graph.producer.get(value)
    return producer is not None and producer.operator == "DynamicQuantizeLinear" and producer.output(1) == value


def _multiplies_product(graph: Graph, node: Node, scale: Value, codes: Value | None) -> bool:
    others = [value for value in node.inputs if value is not None and value != scale]
    if node.operator != "Mul" or len(others) != 1:
        return False
    cast = graph.producer.get(others[0])
    kernel = graph.producer.get(cast.input(0) or ("", "")) if cast is not None and cast.operator == "Cast" else None
    return kernel is not None and kernel.operator in WEIGHTED and _takes_codes(graph, kernel, codes)
