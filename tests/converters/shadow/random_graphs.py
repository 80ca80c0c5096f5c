"""Random small networks of image operators, as hypothesis draws them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import NodeProto, TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from .shadow_graphs import Array, graph_model

CLASSES = 5
OPSET = 21
Draw = Callable[[st.SearchStrategy[Any]], Any]
Shape = tuple[int, ...]


@dataclass
class Network:
    """A graph that grows: each new node reads tensors that are there and adds one."""

    draw: Draw
    rng: np.random.Generator
    shapes: dict[str, Shape]
    nodes: list[NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def constant(self, value: Array) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def weights(self, *shape: int) -> str:
        spread = 1.0 / max(1.0, float(np.prod(shape[1:]))) ** 0.5
        return self.constant(self.rng.normal(0, spread, shape).astype(np.float32))

    def add(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Append a node where it is possible, and give the name of its output; the first input's where it is not."""
        name = f"t{len(self.nodes)}"
        node = helper.make_node(op_type, inputs, [name], name=f"n{len(self.nodes)}", **attributes)
        shape = self._inferred(node)
        if shape is None or min(shape) < 1 or np.prod(shape) > 20_000:
            return inputs[0]
        self.nodes.append(node)
        self.shapes[name] = shape
        return name

    def _inferred(self, node: NodeProto) -> Shape | None:
        graph = helper.make_graph(
            [node],
            "one",
            [
                helper.make_tensor_value_info(name, TensorProto.FLOAT, self.shapes[name])
                for name in dict.fromkeys(node.input)
                if name in self.shapes
            ],
            [helper.make_tensor_value_info(node.output[0], TensorProto.FLOAT, None)],
            [onnx.numpy_helper.from_array(self.constants[n], n) for n in node.input if n in self.constants],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)
        try:
            found = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph.output[0]
        except onnx.shape_inference.InferenceError:
            return None
        return tuple(axis.dim_value for axis in found.type.tensor_type.shape.dim)


def _window(net: Network, *, dilated: bool = True) -> dict[str, Any]:
    kernel = [net.draw(st.integers(1, 3)) for _ in range(2)]
    found: dict[str, Any] = {"kernel_shape": kernel, "strides": [net.draw(st.integers(1, 2)) for _ in range(2)]}
    if dilated and net.draw(st.booleans()):
        found["dilations"] = [net.draw(st.integers(1, 2)) for _ in range(2)]
    padding = net.draw(st.sampled_from(["none", "pads", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if padding == "pads":
        found["pads"] = [net.draw(st.integers(0, size - 1)) for size in (*kernel, *kernel)]
    elif padding != "none" and "dilations" not in found:
        found["auto_pad"] = padding
    return found


def _fits(net: Network, x: str, window: dict[str, Any]) -> bool:
    """Whether the window lies in the image: what one that fits nowhere gives, not all agree on."""
    spans = [(k - 1) * d + 1 for k, d in zip(window["kernel_shape"], window.get("dilations", (1, 1)), strict=True)]
    return all(span <= size for span, size in zip(spans, net.shapes[x][2:], strict=True))


def conv(net: Network, x: str) -> str:
    channels = net.shapes[x][1]
    groups = net.draw(st.sampled_from([size for size in range(1, channels + 1) if channels % size == 0]))
    outputs = groups * net.draw(st.integers(1, 3))
    window = _window(net)
    if not _fits(net, x, window):
        return x
    inputs = [x, net.weights(outputs, channels // groups, *window["kernel_shape"])]
    inputs += [net.weights(outputs)] if net.draw(st.booleans()) else []
    return net.add("Conv", inputs, group=groups, **window)


def conv_transpose(net: Network, x: str) -> str:
    channels = net.shapes[x][1]
    window = _window(net)
    weight = net.weights(channels, net.draw(st.integers(1, 3)), *window["kernel_shape"])
    return net.add("ConvTranspose", [x, weight], **window)


def pool(net: Network, x: str) -> str:
    op_type = net.draw(st.sampled_from(["MaxPool", "AveragePool", "LpPool"]))
    window = _window(net)
    if not _fits(net, x, window):
        return x
    more = {"count_include_pad": net.draw(st.integers(0, 1))} if op_type == "AveragePool" else {}
    if "auto_pad" not in window and op_type != "LpPool":
        more["ceil_mode"] = net.draw(st.integers(0, 1))
    return net.add(op_type, [x], **window, **more)


def normalization(net: Network, x: str) -> str:
    op_type = net.draw(st.sampled_from(["BatchNormalization", "InstanceNormalization", "LayerNormalization", "LRN"]))
    channels = net.shapes[x][1]
    scale, bias = (net.constant(net.rng.normal(1, 0.3, channels).astype(np.float32)) for _ in range(2))
    if op_type == "BatchNormalization":
        variance = net.constant(net.rng.uniform(0.5, 2, channels).astype(np.float32))
        return net.add(op_type, [x, scale, bias, net.weights(channels), variance], epsilon=1e-3)
    if op_type == "InstanceNormalization":
        return net.add(op_type, [x, scale, bias], epsilon=1e-2)
    if op_type == "LRN":
        return net.add(op_type, [x], size=3, alpha=0.1)
    width = net.shapes[x][-1]
    return net.add(op_type, [x, net.weights(width)], axis=-1, epsilon=1e-2)


ACTIVATIONS = (
    *("Relu", "LeakyRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "Tanh", "HardSwish", "Mish", "Gelu"),
    *("Softplus", "Softsign", "Erf", "ThresholdedRelu", "Abs", "Neg", "Exp", "Softmax"),
)


def activation(net: Network, x: str) -> str:
    op_type = net.draw(st.sampled_from((*ACTIVATIONS, "PRelu", "Clip")))
    if op_type == "PRelu":
        return net.add(op_type, [x, net.weights(net.shapes[x][1], 1, 1)])
    if op_type == "Clip":
        return net.add(op_type, [x, net.constant(np.float32(-0.5)), net.constant(np.float32(0.7))])
    if op_type == "Gelu":
        return net.add(op_type, [x], approximate=net.draw(st.sampled_from(["none", "tanh"])))
    if op_type == "Exp":
        return net.add(op_type, [net.add("Neg", [net.add("Abs", [x])])])
    return net.add(op_type, [x])


def join(net: Network, x: str) -> str:
    """Two tensors, or one and a constant for each channel, in one."""
    fitting = [name for name, shape in net.shapes.items() if shape == net.shapes[x]]
    op_type = net.draw(st.sampled_from(["Add", "Sub", "Mul", "Concat", "Max", "Min", "Mean"]))
    other = net.draw(st.sampled_from(fitting))
    if op_type == "Concat":
        return net.add(op_type, [x, other], axis=1)
    if net.draw(st.booleans()):
        other = net.weights(net.shapes[x][1], 1, 1)
    return net.add(op_type, [x, other])


def resize(net: Network, x: str) -> str:
    scales = np.array([1, 1, *net.draw(st.sampled_from([(2, 2), (1.5, 2), (0.5, 0.6), (3, 1)]))], dtype=np.float32)
    mode = net.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    how = net.draw(st.sampled_from(["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"]))
    rounding = {"nearest_mode": net.draw(st.sampled_from(["floor", "ceil", "round_prefer_floor"]))}
    inputs, more = [x, "", net.constant(scales)], rounding if mode == "nearest" else {}
    return net.add("Resize", inputs, mode=mode, coordinate_transformation_mode=how, **more)


def pad(net: Network, x: str) -> str:
    pads = np.array([0, 0, *net.draw(st.tuples(*[st.integers(0, 2)] * 2))] * 2, dtype=np.int64)
    mode = net.draw(st.sampled_from(["constant", "reflect", "edge"]))
    return net.add("Pad", [x, net.constant(pads)], mode=mode)


def move(net: Network, x: str) -> str:
    kind = net.draw(st.sampled_from(["Slice", "Transpose", "SpaceToDepth", "Flip", "Split"]))
    if kind in ("Slice", "Flip"):
        start, end, step = (1, 100, 1) if kind == "Slice" else (-1, -100, -1)
        given = [net.constant(np.array([value], dtype=np.int64)) for value in (start, end, 3, step)]
        return net.add("Slice", [x, *given])
    if kind == "Transpose":
        return net.add(kind, [x], perm=[0, 1, 3, 2])
    if kind == "SpaceToDepth" and all(size % 2 == 0 for size in net.shapes[x][2:]):
        return net.add(kind, [x], blocksize=2)
    return net.add("Gather", [x, net.constant(np.array([0, -1], dtype=np.int64))], axis=1)


FLOAT = (conv, conv, conv_transpose, pool, normalization, activation, activation, join, join, resize, pad, move)


def conv_relu(net: Network, x: str) -> str:
    return net.add("Relu", [conv(net, x)])


def sum_or_concat(net: Network, x: str) -> str:
    fitting = [name for name, shape in net.shapes.items() if shape == net.shapes[x]]
    other = net.draw(st.sampled_from(fitting))
    return net.add("Add", [x, other]) if net.draw(st.booleans()) else net.add("Concat", [x, other], axis=1)


def tabulated(net: Network, x: str) -> str:
    return net.add(net.draw(st.sampled_from(["LeakyRelu", "Sigmoid"])), [x])


def max_pool(net: Network, x: str) -> str:
    return net.add("MaxPool", [x], kernel_shape=[2, 2], strides=[net.draw(st.integers(1, 2))] * 2)


INTEGER = (conv_relu, conv_relu, conv, sum_or_concat, sum_or_concat, tabulated, max_pool)


class _Images(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, images: Array) -> None:
        self._batches = iter([{"x": images}])

    def get_next(self) -> dict[str, Array] | None:
        return next(self._batches, None)


@st.composite
def quantized_networks(draw: Draw, folder: Path) -> tuple[bytes, Array]:
    """A network of operators that have integer kernels, quantized by ONNX Runtime, and images for it."""
    model, images = draw(networks(INTEGER, largest=4))
    unsigned, signed = QuantType.QUInt8, QuantType.QInt8
    activations, weights = draw(st.sampled_from([(unsigned, signed), (unsigned, unsigned), (signed, signed)]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_static(
            onnx.load_from_string(model), folder / "quantized.onnx", _Images(images),
            quant_format=draw(st.sampled_from([QuantFormat.QDQ, QuantFormat.QOperator])),
            activation_type=activations, weight_type=weights,
            per_channel=draw(st.booleans()), reduce_range=draw(st.booleans()),
        )  # fmt: skip
    return (folder / "quantized.onnx").read_bytes(), images


def head(net: Network, x: str) -> NodeProto:
    """Global pooling or none, and a linear layer to the classes."""
    if net.draw(st.booleans()):
        x = net.add(net.draw(st.sampled_from(["GlobalAveragePool", "GlobalMaxPool"])), [x])
    flat = net.add("Flatten", [x], axis=1)
    weight = net.weights(CLASSES, int(np.prod(net.shapes[x][1:])))
    return helper.make_node("Gemm", [flat, weight, net.weights(CLASSES)], ["y"], name="head", transB=1)


@st.composite
def networks(draw: Draw, operators: Sequence[Callable[[Network, str], str]], largest: int = 6) -> tuple[bytes, Array]:
    """A network with logits, and images for it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    shape = (2, draw(st.integers(1, 4)), draw(st.integers(4, 8)), draw(st.integers(4, 8)))
    net = Network(draw, rng, {"x": shape})
    for _ in range(draw(st.integers(1, largest))):
        draw(st.sampled_from(operators))(net, draw(st.sampled_from(list(net.shapes)[-3:])))
    images = rng.uniform(0, 1, shape).astype(np.float32)
    last = head(net, list(net.shapes)[-1])
    return graph_model([*net.nodes, last], images, net.constants, opset=OPSET), images
