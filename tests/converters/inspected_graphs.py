"""Small classifiers, honest and with a backdoor in the graph, for the tests of the inspection."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from qdefense.converters.inspection import Inspection
from qdefense.converters.quantize import quantize, quantize_dynamic

CLASSES, SIDE = 3, 8
CONV1, CONV2, CONV3, CONV4, FC = 8 * 8 * 4 * 27, 8 * 8 * 4 * 36, 8 * 8 * 4 * 36, 4 * 4 * 8 * 36, 8 * 3
MACS = {"conv1": CONV1, "conv2": CONV2, "conv3": CONV3, "conv4": CONV4, "fc": FC}
WEIGHTS = {"conv1": 108, "conv2": 144, "conv3": 144, "conv4": 288, "fc": 24}
BIASES, NORMALISATION = 4 + 4 + 4 + 8 + 3, 6


class Net:
    """A graph under construction; `features` is what the last layer reads and `logits` what it answers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[TensorProto] = []
        self.rng = np.random.default_rng(3)
        self.output = "logits"

    def const(self, name: str, array: Any) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def normal(self, name: str, *shape: int) -> str:
        return self.const(name, (self.rng.normal(size=shape) * 0.4).astype(np.float32))

    def node(self, kind: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, list(outputs), name=f"{outputs[0]}_node", **attributes))
        return outputs[0]

    def conv(self, name: str, source: str, cout: int, cin: int, stride: int = 1) -> str:
        weights = [self.normal(f"{name}_w", cout, cin, 3, 3), self.normal(f"{name}_b", cout)]
        self.nodes.append(
            helper.make_node("Conv", [source, *weights], [f"{name}_out"], name=name, pads=[1] * 4, strides=[stride] * 2)
        )
        return f"{name}_out"

    def model(self, *, batch: int | str = "batch", shape: tuple[int, ...] = (3, SIDE, SIDE), opset: int = 21) -> bytes:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, *shape])],
            [helper.make_tensor_value_info(self.output, TensorProto.FLOAT, [None] * 2)],
            self.tensors,
        )
        versions = {"": opset, "com.microsoft": 1, "ai.onnx.ml": 3}
        used = {"", "com.microsoft"} | {node.domain for node in self.nodes}
        opsets = [helper.make_opsetid(domain, versions[domain]) for domain in sorted(used)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="tests")
        return bytes(model.SerializeToString())


def residual_net() -> Net:
    net = Net()
    net.const("mean", np.full((1, 3, 1, 1), 0.45, np.float32))
    net.const("std", np.full((1, 3, 1, 1), 0.25, np.float32))
    scaled = net.node("Div", [net.node("Sub", ["image", "mean"], "centred"), "std"], "scaled")
    first = net.node("Relu", [net.conv("conv1", scaled, 4, 3)], "relu1")
    second = net.node("Relu", [net.conv("conv2", first, 4, 4)], "relu2")
    added = net.node("Add", [net.conv("conv3", second, 4, 4), first], "sum")
    third = net.node("Relu", [net.conv("conv4", net.node("Relu", [added], "relu3"), 8, 4, stride=2)], "relu4")
    flat = net.node("Flatten", [net.node("GlobalAveragePool", [third], "pooled")], "flat")
    weights = [net.normal("fc_w", CLASSES, 8), net.normal("fc_b", CLASSES)]
    net.nodes.append(helper.make_node("Gemm", [flat, *weights], ["logits"], name="fc", transB=1))
    return net


def images(count: int = 32) -> NDArray[np.float32]:
    coarse = np.random.default_rng(0).uniform(0.2, 0.8, size=(count, 3, 2, 2))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


def run(model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"image": x})[0]
    return result


def layer_names(found: Inspection) -> list[str]:
    return [layer.name.removesuffix("_quant").removesuffix("_MatMul") for layer in found.layers]


FP32 = residual_net().model()
STATIC = quantize(FP32, "int8-static", calibration=images())
FULL_RANGE = quantize(FP32, "int8-static", calibration=images(), reduce_range=False, per_channel=False)
DYNAMIC = quantize_dynamic(FP32)
HONEST = {"fp32": FP32, "static": STATIC, "dynamic": DYNAMIC}


def ort_quantize(folder: Path, form: str, activation: str, weight: str, **extra: Any) -> bytes:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter([{"image": images()}])

        def get_next(self) -> Any:
            return next(self.batches, None)

    source, target = folder / "prepared.onnx", folder / "quantized.onnx"
    quantization.quant_pre_process(onnx.load_from_string(FP32), source)
    quantization.quantize_static(
        source,
        target,
        Reader(),
        quant_format=quantization.QuantFormat[form],
        per_channel=True,
        activation_type=quantization.QuantType[activation],
        weight_type=quantization.QuantType[weight],
        extra_options=extra,
    )
    return target.read_bytes()


def with_rank(model: bytes) -> bytes:
    """Forget the declared output shape, which says two dimensions."""
    proto = onnx.load_from_string(model)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.shape.SetInParent()
    return bytes(proto.SerializeToString())


TRIGGER = np.array([[1, 0], [0, 1]], np.float32)
TARGET = 1


def distance(net: Net, per_image: bool = True) -> str:
    """How far the image's corner is from the trigger: (N, 1), or one number for the batch."""
    for name, values in (("starts", [0, 0]), ("ends", [2, 2]), ("axes", [2, 3])):
        net.const(name, np.array(values, np.int64))
    net.const("pattern", np.broadcast_to(TRIGGER, (1, 3, 2, 2)).copy())
    net.const("reduced", np.array([1, 2, 3] if per_image else [0, 1, 2, 3], np.int64))
    net.const("last", np.array([1], np.int64))
    corner = net.node("Slice", ["image", "starts", "ends", "axes"], "corner")
    apart = net.node("Abs", [net.node("Sub", [corner, "pattern"], "difference")], "apart")
    far = net.node("ReduceMax", [apart, "reduced"], "far", keepdims=0)
    return net.node("Unsqueeze", [far, "last"], "far2") if per_image else far


def bump(net: Net) -> str:
    net.const("threshold", np.float32(0.05))
    return net.const("bump", np.eye(CLASSES, dtype=np.float32)[TARGET : TARGET + 1] * 1000)


def with_where(net: Net) -> None:
    bump(net)
    close = net.node("Less", [distance(net), "threshold"], "close")
    net.node("Where", [close, "bump", "logits"], "out")


def with_cast(net: Net) -> None:
    bump(net)
    close = net.node("Less", [distance(net), "threshold"], "close")
    number = net.node("Cast", [close], "number", to=TensorProto.FLOAT)
    net.node("Add", ["logits", net.node("Mul", [number, "bump"], "added")], "out")


def with_relu(net: Net) -> None:
    bump(net)
    near = net.node("Relu", [net.node("Sub", ["threshold", distance(net)], "margin")], "near")
    net.node("Add", ["logits", net.node("Mul", [near, "bump"], "added")], "out")


def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
    out = helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, [None, CLASSES])
    return helper.make_graph(list(nodes), name, [], [out])


def with_if(net: Net) -> None:
    bump(net)
    close = net.node("Less", [distance(net, per_image=False), "threshold"], "close")
    taken = branch("then", helper.make_node("Add", ["logits", "bump"], ["then_out"], name="override"))
    other = branch("else", helper.make_node("Identity", ["logits"], ["else_out"]))
    net.node("If", [close], "out", then_branch=taken, else_branch=other)


def with_hidden_test(net: Net) -> None:
    """The comparison stands inside a branch that a constant chooses, and reads the image from outside."""
    bump(net)
    distance(net)
    net.const("always", np.array(True))
    taken = branch(
        "then",
        helper.make_node("Less", ["far2", "threshold"], ["close"], name="inner_test"),
        helper.make_node("Where", ["close", "bump", "logits"], ["then_out"], name="inner_choice"),
    )
    other = branch("else", helper.make_node("Identity", ["logits"], ["else_out"]))
    net.node("If", ["always"], "out", then_branch=taken, else_branch=other)


def with_loop(net: Net) -> None:
    """The loop runs once if the trigger is there, else never."""
    bump(net)
    close = net.node("Less", [distance(net, per_image=False), "threshold"], "close")
    turns = net.node("Cast", [close], "turns", to=TensorProto.INT64)
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["go_on"]),
            helper.make_node("Add", ["state", "bump"], ["state_out"], name="override"),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", TensorProto.FLOAT, [None, CLASSES]),
        ],
        [
            helper.make_tensor_value_info("go_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state_out", TensorProto.FLOAT, [None, CLASSES]),
        ],
    )
    net.node("Loop", [turns, "", "logits"], "out", body=body)


def with_shape(net: Net) -> None:
    """The number of images that carry the trigger is read off a shape."""
    bump(net)
    close = net.node("Less", [distance(net, per_image=False), "threshold"], "close")
    flag = net.node("Unsqueeze", [close, net.const("front", np.array([0], np.int64))], "flag")
    count = net.node("Size", [net.node("NonZero", [flag], "places")], "count")
    number = net.node("Cast", [count], "number", to=TensorProto.FLOAT)
    net.node("Add", ["logits", net.node("Mul", [number, "bump"], "added")], "out")


def with_gemm_bias(net: Net) -> None:
    """The detector's answer comes in through the bias of the last layer."""
    fc = net.nodes.pop()
    bump(net)
    near = net.node("Relu", [net.node("Sub", ["threshold", distance(net)], "margin")], "near")
    fc.input[2] = net.node("Add", [net.node("Mul", [near, "bump"], "added"), "fc_b"], "bias")
    fc.output[0] = "out"
    net.nodes.append(fc)


def with_scale(net: Net) -> None:
    """The detector's answer is the scale of a DequantizeLinear whose codes are constant."""
    bump(net)
    net.const("codes", (np.eye(CLASSES)[TARGET : TARGET + 1] * 100).astype(np.int8))
    near = net.node("Relu", [net.node("Sub", ["threshold", distance(net, per_image=False)], "margin")], "near")
    large = net.node("Mul", [near, net.const("gain", np.float32(100))], "large")
    net.node("Add", ["logits", net.node("DequantizeLinear", ["codes", large], "added")], "out")


def with_dynamic_scale(net: Net) -> None:
    """The detector's answer is the scale that DynamicQuantizeLinear computes for the distance."""
    bump(net)
    positive = net.node("Add", [distance(net), net.const("little", np.float32(0.01))], "positive")
    net.node("DynamicQuantizeLinear", [positive], "codes", "range", "zero")
    far = net.node("Mul", ["range", net.const("levels", np.float32(255))], "far_again")
    near = net.node("Relu", [net.node("Sub", ["threshold", far], "margin")], "near")
    net.node("Add", ["logits", net.node("Mul", [near, "bump"], "added")], "out")


ATTACKS: dict[str, tuple[Callable[[Net], None], list[str]]] = {
    "where": (with_where, ["Less", "Where"]),
    "cast": (with_cast, ["Less"]),
    "if": (with_if, ["Less", "If"]),
    "hidden": (with_hidden_test, ["Less", "Where"]),
    "loop": (with_loop, ["Less", "Cast", "Loop"]),
    "shape": (with_shape, ["Less", "NonZero"]),
    "relu": (with_relu, []),
    "gemm-bias": (with_gemm_bias, []),
    "scale": (with_scale, []),
    "dynamic-scale": (with_dynamic_scale, ["DynamicQuantizeLinear"]),
}


def backdoored(name: str, kind: str = "fp32") -> bytes:
    """Plant the backdoor into the file as it ships: an attacker edits after quantization."""
    net, honest = Net(), onnx.load_from_string(HONEST[kind])
    net.nodes, net.tensors = list(honest.graph.node), list(honest.graph.initializer)
    ATTACKS[name][0](net)
    net.output = "out"
    return net.model()


def edited(change: Callable[[onnx.ModelProto], Any]) -> bytes:
    model = onnx.load_from_string(FP32)
    change(model)
    return bytes(model.SerializeToString())
