"""Penultimate features: what the last layer with weights multiplies into the logits, read off the deployed session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray

from qdefense.converters.reading import bodies, node_label, safe_text, tensor_array
from qdefense.converters.weighted_operators import WEIGHTED
from qdefense.data.images import ImageSet, Pixels, to_pixels
from qdefense.session import DeployedSession, Logits, SessionError
from qdefense.taps import moved_by_inputs

Features = NDArray[np.float32]

_CODES = {
    "MatMulIntegerToFloat": (2, 4),
    "QGemm": (1, 2),
    "QLinearConv": (1, 2),
    "QLinearMatMul": (1, 2),
}
"""Operators that take codes for activations, and where they take the scale and the zero point of these."""
_UNSCALED = frozenset({"ConvInteger", "MatMulInteger"})
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "FusedConv", "QLinearConv"})
_LINEAR = _CODES.keys() | _UNSCALED | _CONVOLUTIONS | {
    "DynamicQuantizeMatMul", "FusedGemm", "FusedMatMul", "Gemm", "MatMul", "MatMulNBits",
}  # fmt: skip
_AFFINE = frozenset(
    {
        *("Add", "AveragePool", "BatchNormalization", "Cast", "DequantizeLinear", "Div", "Dropout"),
        *("DynamicQuantizeLinear", "Flatten", "GlobalAveragePool", "Identity", "Mul", "QLinearAdd", "QLinearMul"),
        *("QuantizeLinear", "ReduceMean", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze"),
    }
)
"""Operators that are affine in one input, but for rounding."""
_ZERO_POINTS = {"QGemm": 8, "QLinearAdd": 7, "QLinearMatMul": 7, "QLinearMul": 7, "QuantizeLinear": 2}
"""Where operators that give codes take the zero point of these."""
_IMAGES_AT_ONCE = 512


class FeatureError(RuntimeError):
    """The session has no penultimate features to read; the message says why."""


class Penultimate(NamedTuple):
    """Where the features are: ``value = (tensor - zero_point) * scale``, averaged over positions if it has any.

    ``channels`` is the axis of the features. A float tensor has scale 1 and zero point 0.
    """

    tensor: str
    layer: str
    channels: int
    scale: float = 1.0
    zero_point: float = 0.0


def find_penultimate(session: DeployedSession) -> Penultimate:
    """The activations that the last layer with weights takes, in the graph that the runtime runs.

    Layers with nothing but affine steps between are one layer. Where the last of them takes no more numbers than there
    are classes, or what is made of no more, as an appended identity does, these are logits: the features are what the
    next one before takes that is wider. Convolutions mix places, and end such a line.

    Codes are dequantized, as that layer does: of codes whose scale is made at run time, one per row, the floats that
    they stand for. One image is run to see that the tap changes no logit.

    Raises:
        FeatureError: there is no such layer, there are several, their codes have no scale, no tap reaches them, or they
            are as many as the classes: nothing tells them from logits then.
    """
    graph, contract = onnx.load_from_string(session.graph).graph, session.artifact.contract
    gray = np.full((1, 3, contract.height, contract.width), 0.5, np.float32)
    places: list[Penultimate] = []
    widths: list[int] = []
    for layer in _layers_in_line(graph, _last_layer(graph, contract.output_name)):
        try:
            place = _operand(graph, layer)
            widths.append(_read(session, gray, place)[0].shape[1])
        except FeatureError:
            if not places:
                raise
            break  # what lies further back is out of reach
        places.append(place)
    wide = (at for at in range(len(places)) if min(widths[at:]) > contract.classes)
    at = next(wide, len(places) - 1)
    if widths[at] == contract.classes:
        raise FeatureError(
            f"layer '{places[at].layer}' takes {widths[at]} numbers for {contract.classes} classes: nothing tells "
            "whether they are features or already logits"
        )
    return places[at]


def penultimate_features(
    session: DeployedSession,
    images: ImageSet,
    place: Penultimate,
    *,
    progress: Callable[[int, int], None] = lambda _done, _total: None,
) -> tuple[Features, Logits]:
    """Features and logits of every image: ``(N, D)`` and ``(N, K) float32``, in the order of ``images``.

    They are not finite where the file's are not. ``progress(done, total)`` hears of images.

    Raises:
        FeatureError: the tap changes the logits of an image, or there are no images.
    """
    if not len(images):
        raise FeatureError(f"{images.source}: no images to read features of")
    step = session.profile.batch * max(1, _IMAGES_AT_ONCE // session.profile.batch)
    features, logits = np.empty((0, 0), np.float32), np.empty((0, 0), np.float32)
    progress(0, len(images))
    for start in range(0, len(images), step):
        rows = slice(start, min(start + step, len(images)))
        part, answers = _read(session, to_pixels(images.images[rows]), place)
        if not start:
            features = np.empty((len(images), part.shape[1]), np.float32)
            logits = np.empty((len(images), answers.shape[1]), np.float32)
        features[rows], logits[rows] = part, answers
        progress(rows.stop, len(images))
    return features, logits


def _read(session: DeployedSession, pixels: Pixels, place: Penultimate) -> tuple[Features, Logits]:
    output = session.artifact.contract.output_name
    try:
        found = session.tap(pixels, [place.tensor, output])
    except SessionError as error:
        raise FeatureError(f"the input of layer '{place.layer}' cannot be read: {error}") from error
    return _values(found[place.tensor], place), found[output].astype(np.float32)


def _values(tapped: NDArray[np.generic], place: Penultimate) -> Features:
    values = (tapped.astype(np.float32) - np.float32(place.zero_point)) * np.float32(place.scale)
    if values.ndim == 1:
        raise FeatureError(f"the input of layer '{place.layer}' holds one number per image, which is no feature vector")
    channels = place.channels % values.ndim
    positions = tuple(axis for axis in range(1, values.ndim) if axis != channels)
    averaged: Features = values.mean(axis=positions, dtype=np.float64).astype(np.float32) if positions else values
    return averaged


def _last_layer(graph: onnx.GraphProto, output: str) -> onnx.NodeProto:
    moved = moved_by_inputs(graph)
    layers = list(_first_layers_behind(graph, output, moved))
    if not layers:
        raise FeatureError("no layer with weights makes the logits, so none has penultimate activations")
    if len(layers) > 1:
        named = ", ".join(f"'{node_label(node)}'" for node in layers[:3])
        raise FeatureError(f"{len(layers)} layers make the logits together ({named}): none is the last one")
    return layers[0]


def _first_layers_behind(graph: onnx.GraphProto, output: str, moved: set[str]) -> Iterator[onnx.NodeProto]:
    producers = {name: node for node in graph.node for name in node.output if name}
    pending, seen = [output], set()
    while pending:
        name = pending.pop()
        node = producers.get(name)
        if node is None or name in seen:
            continue
        seen.add(name)
        if any(bodies(node)):
            raise FeatureError(f"the logits come out of a branch, '{node_label(node)}', into which no tap reaches")
        if _is_linear(node, moved):
            yield node
        elif node.op_type != "DynamicQuantizeLinear" or name == node.output[0]:  # its other outputs only scale
            pending.extend(part for part in node.input if part in moved)


def _layers_in_line(graph: onnx.GraphProto, last: onnx.NodeProto) -> list[onnx.NodeProto]:
    """The last layer, and those before it as long as only affine steps lie between."""
    producers = {name: node for node in graph.node for name in node.output if name}
    carrying, line, name = _carrying(graph), [last], last.input[0]
    while (node := producers.get(name)) is not None:
        before = [part for part in node.input if part in carrying]
        if node.op_type in _CONVOLUTIONS or _rectifies(graph, node):
            break
        if _is_linear(node, carrying):
            line.append(node)
        elif node.op_type not in _AFFINE or len(before) != 1 or (node.op_type == "Div" and before[0] != node.input[0]):
            break
        name = before[0]
    return line


def _rectifies(graph: onnx.GraphProto, node: onnx.NodeProto) -> bool:
    """Whether an activation is fused into it, or its codes hold nothing below 0, which is one, too."""
    if any(part.name == "activation" and part.s for part in node.attribute):
        return True
    index = _ZERO_POINTS.get(node.op_type)
    if index is None:
        return False
    name = node.input[index] if index < len(node.input) else ""
    constant = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    if constant is None:
        return True
    values = tensor_array(constant)
    return values.dtype.kind not in "iu" or bool((values == np.iinfo(values.dtype).min).any())


def _carrying(graph: onnx.GraphProto) -> set[str]:
    """Tensors that the image moves otherwise than by the scale that its codes get at run time."""
    constants = {tensor.name for tensor in graph.initializer}
    found = {value.name for value in graph.input} - constants
    for node in graph.node:
        if found.intersection(node.input) or any(bodies(node)):
            found.update(node.output[:1] if node.op_type == "DynamicQuantizeLinear" else node.output)
    return found


def _is_linear(node: onnx.NodeProto, moved: set[str]) -> bool:
    if node.op_type not in _LINEAR:
        return False
    weight = WEIGHTED[node.op_type].weight
    return (node.input[0] in moved) != (node.input[weight] in moved)


def _operand(graph: onnx.GraphProto, layer: onnx.NodeProto) -> Penultimate:
    name, label = layer.input[0], node_label(layer)
    last = any(part.name == "channels_last" and part.i for part in layer.attribute)
    channels = 1 if layer.op_type in _CONVOLUTIONS and not last else -1
    producer = next((node for node in graph.node if name in node.output), None)
    maker = None if producer is None else producer.op_type
    if producer is not None and maker == "DynamicQuantizeLinear":
        return Penultimate(producer.input[0], label, channels)
    if layer.op_type in _CODES:
        scale, zero_point = (_number(graph, layer, index) for index in _CODES[layer.op_type])
        return Penultimate(name, label, channels, scale, zero_point)
    if producer is not None and maker == "QuantizeLinear":
        scale, zero_point = (_number(graph, producer, index) for index in (1, 2))
        return Penultimate(name, label, channels, scale, zero_point)
    if layer.op_type in _UNSCALED:
        raise FeatureError(f"layer '{label}' multiplies codes whose scale the graph does not tell")
    return Penultimate(name, label, channels)


def _number(graph: onnx.GraphProto, node: onnx.NodeProto, index: int) -> float:
    name = node.input[index] if index < len(node.input) else ""
    if not name:
        return 0.0  # only a zero point may be left out
    constant = next((tensor for tensor in graph.initializer if tensor.name == name), None)
    values = np.empty(0) if constant is None else tensor_array(constant)
    if values.size != 1:
        raise FeatureError(
            f"'{safe_text(name)}' is no constant number, so the codes that layer '{node_label(node)}' takes or gives "
            "cannot be read"
        )
    return float(values.reshape(()))
