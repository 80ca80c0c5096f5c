"""Where a shadow leaves its session, and which float operators stand before a rounding in the runtime's own graph."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from qdefense.converters.shadow import Shadow
from qdefense.data.images import Pixels
from qdefense.session import DeployedSession, SessionError

_QUANTIZERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear"})
# Outputs that are integer codes: what the runtime rounded.
_ROUNDING = frozenset({*_QUANTIZERS, "QGemm", "ConvInteger", "MatMulInteger"})
SHAPE = frozenset(
    {
        "Cast",
        "Concat",
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "Identity",
        "Pad",
        "Reshape",
        "Shape",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
COMPARISON = frozenset({"Clip", "GlobalMaxPool", "Max", "MaxPool", "Min", "Relu", "Where"})
ROUNDED_ONCE = frozenset({"Add", "Div", "Mul", "Neg", "Sub"})
"""IEEE 754 leaves one answer: these are held to the mark of graphs without float operators, though the issue exempts
them."""
_CODE_OPERATORS = frozenset({"DequantizeLinear", *_QUANTIZERS})


def rounds(node: onnx.NodeProto) -> bool:
    """Whether the node writes integer codes."""
    return node.op_type in _ROUNDING or node.op_type.startswith("QLinear")


def float_operators(model: onnx.ModelProto) -> dict[str, int]:
    """Float operators, other than shape and comparison operators, that a Quantize of the graph depends on."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found: dict[int, onnx.NodeProto] = {}
    pending = [name for node in model.graph.node if node.op_type in _QUANTIZERS for name in node.input[:1]]
    seen: set[str] = set()
    while pending:
        name = pending.pop()
        if name in seen or name not in producers:
            continue
        seen.add(name)
        node = producers[name]
        if not rounds(node) and node.op_type not in SHAPE | COMPARISON | _CODE_OPERATORS:
            found[id(node)] = node
        pending += list(node.input)
    return dict(sorted(Counter(node.op_type for node in found.values()).items()))


def inexact(operators: dict[str, int]) -> dict[str, int]:
    """Those that two right implementations may round differently."""
    return {name: count for name, count in operators.items() if name not in ROUNDED_ONCE}


def parts_at(
    session: DeployedSession, shadow: Shadow, model: onnx.ModelProto, x: Pixels, *, saturate: bool
) -> dict[str, Any] | None:
    """The first operator whose codes the shadow and the session give differently; without codes, whose floats.

    ``x: (N, 3, H, W)`` are images whose logits differ. An operator that only quantizes a float is named with the one
    that computed the float, because that is where the difference came from. None where no tensor that can be tapped
    differs.
    """
    producers = {name: node for node in model.graph.node for name in node.output}
    names = [name for name in shadow.tensor_names if name in producers]
    coded = [name for name in names if rounds(producers[name]) and name == producers[name].output[0]]
    for candidates in (coded, [name for name in names if name not in coded]):
        measured = _tapped(session, x, candidates)
        own = _computed(shadow, x, list(measured), saturate=saturate, group=session.profile.batch)
        apart = {name: difference for name in measured if (difference := _difference(own[name], measured[name]))}
        if apart:
            name = next(iter(apart))
            return {**_named(producers[name], producers), "codes": candidates is coded, **apart[name]}
    return None


def _named(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> dict[str, str | None]:
    source = _computed_by(node, producers) if node.op_type in _QUANTIZERS else node
    rounded_by = None if source is node else node.name
    return {"operator": source.op_type, "node": source.name, "rounded_by": rounded_by}


def _computed_by(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> onnx.NodeProto:
    source = producers.get(node.input[0], node)
    while source.op_type in SHAPE | COMPARISON and source.input and source.input[0] in producers:
        source = producers[source.input[0]]
    return source


def _tapped(session: DeployedSession, x: Pixels, names: list[str]) -> dict[str, NDArray[np.generic]]:
    """What the session gives of these tensors; those that cannot be tapped are left out."""
    try:
        return session.tap(x, names)
    except SessionError:
        found: dict[str, NDArray[np.generic]] = {}
        for name in names:
            with suppress(SessionError):
                found |= session.tap(x, [name])
        return found


def _computed(
    shadow: Shadow, x: Pixels, names: list[str], *, saturate: bool, group: int
) -> dict[str, NDArray[np.generic]]:
    with torch.no_grad():
        values = shadow.activations(torch.from_numpy(x), names, exact=True, saturate=saturate, group=group)
    return {name: value.numpy() for name, value in values.items()}


def _difference(own: NDArray[np.generic], measured: NDArray[np.generic]) -> dict[str, float] | None:
    if own.shape != measured.shape or np.array_equal(own, measured):
        return None
    apart = np.abs(own.astype(np.float64) - measured.astype(np.float64))
    return {"different": float((apart > 0).mean()), "largest": float(apart.max())}
