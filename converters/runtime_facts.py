"""What ONNX Runtime makes of a file on this CPU: read off its own optimized graph, not predicted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import onnx
from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.flat_graph import Graph, Node, flatten
from qdefense.converters.precision import Layer, integer_share
from qdefense.converters.reading import FileRefusedError, bodies, count_operators, every_graph, safe_text
from qdefense.converters.runtime_graph import GraphOptions, RuntimeGraphError, dumped_model
from qdefense.converters.saturation_probe import runtime_saturation
from qdefense.converters.weight_saturation import can_saturate
from qdefense.converters.weighted_operators import WEIGHTED, has_integer_kernel, operands

Level = Literal["basic", "extended", "all"]
LEVELS: tuple[Level, ...] = get_args(Level)
_TAG = "layer#{}#"
_TAGS = re.compile(r"layer#(\d+)#")
_SAME_KERNEL = {"DynamicQuantizeMatMul": "MatMulInteger", "MatMulIntegerToFloat": "MatMulInteger"}
"""Operators without a probe of their own, and the one whose product they run."""


class LayerRun(BaseModel):
    """What runs in place of one shipped layer.

    ``operator`` is null where nothing of its own is left: folded into a constant, merged with an equal layer, or part
    of a larger operator. ``can_saturate`` holds for its kernel on a CPU without VNNI, ``saturates`` for this CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    operator: str | None
    integer: bool
    can_saturate: bool
    saturates: bool
    accuracy_level: int | None = Field(
        default=None, description="of MatMulNBits: at 4 it quantizes its activations to INT8 at run time"
    )


class LevelEffect(BaseModel):
    """What one level of graph optimization changes against the one below it, as counts of nodes by operator."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Level
    nodes: int
    removed: dict[str, int]
    added: dict[str, int]


class RuntimeFacts(BaseModel):
    """The graph that ONNX Runtime runs, against the file that ships; the shares are those of what really runs.

    ``operators`` and ``layers`` are those at EXTENDED; layers stand in the order of ``Inspection.layers``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    operators: dict[str, int]
    levels: tuple[LevelEffect, ...] = Field(description="from the lowest to the highest")
    layers: tuple[LayerRun, ...]
    integer_mac_share: float | None
    integer_weight_share: float | None
    float_layers: tuple[str, ...] = Field(description="layers whose weights are stored as integers, run in float")
    saturation_layers: tuple[str, ...] = Field(description="layers whose weights can saturate on this CPU")


def runtime_facts(proto: onnx.ModelProto, layers: Sequence[Layer]) -> RuntimeFacts:
    """Let ONNX Runtime load the file and look at what it made of it; no image is run.

    Args:
        proto: the model, as ``parse_model`` gave it.
        layers: what ``weighted_layers`` says of it.

    Raises:
        FileRefusedError: ONNX Runtime can't load the file.
    """
    tagged = _tagged(proto)
    counts = {"shipped": count_operators(proto.graph)}
    extended = Graph()
    for level in LEVELS:
        optimized = _optimized(tagged, level)
        counts[level] = count_operators(optimized.graph)
        if level == "extended":
            extended = flatten(optimized)
    found, strangers = _nodes_by_tag(extended)
    runs = tuple(_run(extended, layer, found.get(index)) for index, layer in enumerate(layers))
    # What a stranger multiplies was in the layers that are gone, nobody knows in which.
    known = not (strangers and any(run.operator is None for run in runs))
    kept = [(layer, run.integer) for layer, run in zip(layers, runs, strict=True) if run.operator is not None]
    return RuntimeFacts(
        operators=counts["extended"],
        levels=tuple(_effects(counts)),
        layers=runs,
        integer_mac_share=integer_share([(layer.macs, integer) for layer, integer in kept]) if known else None,
        integer_weight_share=integer_share([(layer.weights, integer) for layer, integer in kept]) if known else None,
        float_layers=tuple(layer.name for layer, integer in kept if _stored_as_integers(layer) and not integer),
        saturation_layers=tuple(run.name for run in runs if run.saturates),
    )


def runtime_operators(model: bytes) -> dict[str, int]:
    """Node counts by operator of the graph that ONNX Runtime runs.

    Raises:
        FileRefusedError: ONNX Runtime can't load the file.
    """
    return count_operators(_optimized(model, "extended").graph)


def _optimized(model: bytes, level: Level) -> onnx.ModelProto:
    try:
        return onnx.load_from_string(dumped_model(model, GraphOptions(), level))
    except RuntimeGraphError as error:
        raise FileRefusedError(f"{safe_text(str(error))}; export the model again or use another onnxruntime") from error


def _stored_as_integers(layer: Layer) -> bool:
    return layer.weights > 0 and layer.weight_type is not None and "int" in layer.weight_type


def _tagged(proto: onnx.ModelProto) -> bytes:
    """The file with every layer named by its place: the runtime's fusions keep names, and a file's own may repeat."""
    twin = onnx.ModelProto()
    twin.CopyFrom(proto)
    for graph in every_graph(twin.graph):
        for node in graph.node:
            node.name = ""
    for index, node in enumerate(_weighted(twin.graph)):
        node.name = _TAG.format(index)
    return bytes(twin.SerializeToString())


def _weighted(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The weighted operators in the order of the flat graph: what stands in a node's bodies comes before it."""
    for node in graph.node:
        for _, body in bodies(node):
            yield from _weighted(body)
        if node.op_type in WEIGHTED:
            yield node


def _nodes_by_tag(graph: Graph) -> tuple[dict[int, Node], bool]:
    """The node that runs for each layer; and whether there are weighted operators that stand for none of them."""
    found: dict[int, Node] = {}
    strangers = False
    for node in graph.nodes:
        if node.operator in WEIGHTED:
            tags = [int(tag) for tag in _TAGS.findall(node.proto.name)]
            found.update(dict.fromkeys(tags, node))
            strangers = strangers or not tags
    return found, strangers


def _run(graph: Graph, layer: Layer, node: Node | None) -> LayerRun:
    if node is None:
        return LayerRun(name=layer.name, operator=None, integer=False, can_saturate=False, saturates=False)
    activation, weight = operands(graph, node)
    integer = has_integer_kernel(node, weight)
    risky = integer and can_saturate(graph, node, activation, weight)
    return LayerRun(
        name=layer.name,
        operator=safe_text(node.operator),
        integer=integer,
        can_saturate=risky,
        saturates=risky and _SAME_KERNEL.get(node.operator, node.operator) in runtime_saturation(),
        accuracy_level=node.attribute("accuracy_level", 0) if node.operator == "MatMulNBits" else None,
    )


def _effects(counts: dict[str, dict[str, int]]) -> Iterator[LevelEffect]:
    below = Counter(counts["shipped"])
    for level in LEVELS:
        here = Counter(counts[level])
        removed, added = dict(sorted((below - here).items())), dict(sorted((here - below).items()))
        yield LevelEffect(level=level, nodes=here.total(), removed=removed, added=added)
        below = here
