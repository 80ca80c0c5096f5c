"""What an ONNX file is, read off its graph: precision, integer share, saturation, gradient-blind nodes, structure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import onnx
from pydantic import BaseModel, ConfigDict

from qdefense.converters.data_flow import BlindNode, blind_nodes, bypass, follow_pixels, structure_warnings
from qdefense.converters.flat_graph import FLOATS, Graph, flatten, type_name
from qdefense.converters.precision import (
    FileScheme,
    Granularity,
    Layer,
    count_parameters,
    file_granularity,
    file_scheme,
    integer_share,
    weighted_layers,
)
from qdefense.converters.reading import count_operators, parse_model, safe_text, tensor_array
from qdefense.converters.runtime_facts import runtime_operators

__all__ = ["BlindNode", "Inspection", "Layer", "inspect_model", "runtime_operators"]


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


def inspect_model(model: bytes) -> Inspection:
    """Read everything off the file as it ships; nothing in it is run. ``runtime_facts`` says what the runtime does.

    Raises:
        FileRefusedError: see ``parse_model``.
    """
    return inspect_parsed(parse_model(model), size_bytes=len(model))


def inspect_parsed(proto: onnx.ModelProto, *, size_bytes: int) -> Inspection:
    """The same for a model that ``parse_model`` gave."""
    graph = flatten(proto)
    layers = weighted_layers(graph)
    flow = follow_pixels(graph)
    depth, path = bypass(graph, flow)
    return Inspection(
        ir_version=proto.ir_version,
        opsets={safe_text(entry.domain) or "ai.onnx": entry.version for entry in proto.opset_import},
        producer=safe_text(f"{proto.producer_name} {proto.producer_version}"),
        size_bytes=size_bytes,
        operators=count_operators(proto.graph),
        parameters=count_parameters(graph),
        scheme=file_scheme(layers),
        granularity=file_granularity(layers),
        weight_types=_distinct(layer.weight_type for layer in layers),
        activation_types=_distinct(layer.activation_type for layer in layers),
        layers=tuple(layers),
        integer_mac_share=integer_share([(layer.macs, layer.integer) for layer in layers]),
        integer_weight_share=integer_share([(layer.weights, layer.integer) for layer in layers]),
        saturation_layers=tuple(layer.name for layer in layers if layer.can_saturate),
        gradient_blind_nodes=tuple(blind_nodes(graph, flow)),
        bypass_depth=depth,
        structure_warnings=tuple(structure_warnings(graph, depth, path)),
        nonfinite_initializers=tuple(_nonfinite(graph)),
    )


def _distinct(names: Iterable[str | None]) -> tuple[str, ...]:
    return tuple(sorted({name for name in names if name is not None}))


def _nonfinite(graph: Graph) -> Iterator[str]:
    for value, tensor in graph.constants.items():
        if type_name(tensor.data_type) in FLOATS and not np.isfinite(tensor_array(tensor)).all():
            yield safe_text(value[1])
