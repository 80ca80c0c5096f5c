from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization

from qdefense.converters import inspection
from qdefense.converters.inspection import (
    FileRefusedError,
    Inspection,
    inspect_model,
    parse_model,
    runtime_operators,
    safe_text,
)
from qdefense.converters.quantize import quantize, quantize_dynamic
from qdefense.converters.runtime_graph import optimized_model

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


# --- figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", HONEST)
def test_inspect_model_gives_hand_computed_layers(kind: str) -> None:
    found = inspect_model(HONEST[kind])
    assert layer_names(found) == list(MACS)
    assert [layer.macs for layer in found.layers] == list(MACS.values())
    assert [layer.weights for layer in found.layers] == list(WEIGHTS.values())
    assert found.parameters == sum(WEIGHTS.values()) + BIASES + NORMALISATION


def test_inspect_model_describes_the_file_when_fp32() -> None:
    found = inspect_model(FP32)
    assert (found.ir_version, found.opsets, found.producer) == (10, {"ai.onnx": 21, "com.microsoft": 1}, "tests")
    assert found.size_bytes == len(FP32)
    assert found.operators == {
        "Add": 1, "Conv": 4, "Div": 1, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 4, "Sub": 1
    }  # fmt: skip
    assert (found.scheme, found.granularity) == ("fp32", None)
    assert (found.weight_types, found.activation_types) == (("float32",), ("float32",))
    assert (found.integer_mac_share, found.integer_weight_share) == (0.0, 0.0)


def test_inspect_model_recovers_scheme_when_static() -> None:
    found = inspect_model(STATIC)
    assert (found.scheme, found.granularity) == ("int8-static", "per-channel")
    assert (found.weight_types, found.activation_types) == (("int8",), ("uint8",))
    assert (found.integer_mac_share, found.integer_weight_share) == (1.0, 1.0)
    assert inspect_model(FULL_RANGE).granularity == "per-tensor"


def test_inspect_model_recovers_scheme_when_dynamic() -> None:
    found = inspect_model(DYNAMIC)
    assert (found.scheme, found.granularity) == ("int8-dynamic", "per-tensor")
    assert (found.weight_types, found.activation_types) == (("uint8",), ("uint8",))
    assert (found.integer_mac_share, found.integer_weight_share) == (1.0, 1.0)
    assert [layer.operator for layer in found.layers] == ["ConvInteger"] * 4 + ["MatMulInteger"]


def test_inspect_model_survives_json() -> None:
    found = inspect_model(STATIC)
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_inspect_model_counts_float_convolution_when_its_output_is_not_quantized() -> None:
    model = onnx.load_from_string(STATIC)
    unquantize(model, "conv3_out")
    found = inspect_model(model.SerializeToString())
    assert [layer.integer for layer in found.layers] == [True, True, False, True, True]
    assert found.integer_mac_share == pytest.approx(1 - CONV3 / sum(MACS.values()))
    assert found.integer_weight_share == pytest.approx(1 - 144 / 708)
    assert (found.scheme, found.layers[2].scheme, found.layers[2].weight_type) == ("mixed", "other", "int8")
    counts = runtime_operators(model.SerializeToString())
    assert (counts["QLinearConv"], counts["Conv"], counts["QGemm"]) == (3, 1, 1)


def unquantize(model: onnx.ModelProto, tensor: str) -> None:
    """Let everything behind ``tensor`` read it in float."""
    pair = [node for node in model.graph.node if node.name.startswith(f"{tensor}_")]
    assert [node.op_type for node in pair] == ["QuantizeLinear", "DequantizeLinear"]
    for node in pair:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [tensor if name == pair[1].output[0] else name for name in node.input]


def test_inspect_model_counts_integer_gemm_when_its_output_is_float() -> None:
    model = onnx.load_from_string(STATIC)
    gemm = next(node for node in model.graph.node if node.op_type == "Gemm")
    gemm.output[0] = "logits"
    for node in [node for node in model.graph.node if node.name.startswith("logits_")]:
        model.graph.node.remove(node)
    assert inspect_model(model.SerializeToString()).integer_mac_share == 1.0
    assert runtime_operators(model.SerializeToString())["QGemm"] == 1


@pytest.mark.parametrize("leak", ["output", "reader"])
def test_inspect_model_counts_float_convolution_when_its_output_is_read_elsewhere(leak: str) -> None:
    model = onnx.load_from_string(STATIC)
    if leak == "reader":
        model.graph.node.append(helper.make_node("Abs", ["conv3_out"], ["seen"]))
    name = "seen" if leak == "reader" else "conv3_out"
    model.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * 4))
    assert [layer.integer for layer in inspect_model(model.SerializeToString()).layers] == [
        True,
        True,
        False,
        True,
        True,
    ]
    assert runtime_operators(model.SerializeToString())["QLinearConv"] == 3


@pytest.mark.parametrize(
    ("kind", "attributes", "low", "high", "fused"),
    [
        ("Relu", {}, None, None, False),
        ("Clip", {}, 0.0, None, False),
        ("Clip", {}, -1e6, 1e6, True),
        ("Clip", {}, -1e6, 0.5, False),
    ],
)
def test_inspect_model_agrees_with_runtime_when_activation_stands_before_quantization(
    kind: str, attributes: dict[str, Any], low: float | None, high: float | None, fused: bool
) -> None:
    model = onnx.load_from_string(STATIC)
    quantizer = next(node for node in model.graph.node if node.name.startswith("conv3_out_Quantize"))
    bounds = [name for name, value in (("low", low), ("high", high)) if value is not None]
    for name, value in (("low", low), ("high", high)):
        if value is not None:
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    node = helper.make_node(kind, ["conv3_out", *bounds], ["cut"], **attributes)
    model.graph.node.insert(list(model.graph.node).index(quantizer), node)
    quantizer.input[0] = "cut"
    assert inspect_model(model.SerializeToString()).layers[2].integer is fused
    assert runtime_operators(model.SerializeToString())["QLinearConv"] == 3 + fused


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_inspect_model_agrees_with_runtime_when_made_by_others(keep: bool, form: str, tmp_path: Path) -> None:
    model = ort_quantize(tmp_path, form, "QUInt8", "QInt8", QDQKeepRemovableActivations=keep)
    found, counts = inspect_model(model), runtime_operators(model)
    assert sum(layer.integer for layer in found.layers) == counts["QLinearConv"] + counts["QGemm"] == 5
    assert [layer.macs for layer in found.layers] == list(MACS.values())
    assert (found.scheme, found.granularity, found.integer_mac_share) == ("int8-static", "per-channel", 1.0)
    assert found.parameters == sum(WEIGHTS.values()) + BIASES + NORMALISATION
    assert (found.gradient_blind_nodes, found.bypass_depth) == ((), 3)


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


@pytest.mark.parametrize("weight", ["uint8", "int8"])
def test_inspect_model_agrees_with_shipped_file_when_given_the_optimized_one(weight: str, tmp_path: Path) -> None:
    static = ort_quantize(tmp_path, "QDQ", "QUInt8", "QUInt8" if weight == "uint8" else "QInt8")
    for shipped in (static, DYNAMIC):
        before, after = inspect_model(shipped), inspect_model(optimized_model(shipped))
        assert [layer.macs for layer in after.layers] == [layer.macs for layer in before.layers]
        assert (after.scheme, after.granularity) == (before.scheme, before.granularity)
        assert after.saturation_layers == before.saturation_layers
        assert (after.bypass_depth, after.gradient_blind_nodes) == (3, ())


def small(kind: str, inputs: list[str], shape: tuple[int, ...], build: Callable[[Net], Any], **attributes: Any) -> Net:
    net = Net()
    build(net)
    net.nodes.append(helper.make_node(kind, inputs, ["y"], name="layer", **attributes))
    net.output = "y"
    return net


@pytest.mark.parametrize(
    ("kind", "weights", "shape", "attributes", "macs"),
    [
        ("Conv", (8, 4, 3, 3), (4, 6, 6), {}, 8 * 4 * 4 * 36),
        ("Conv", (8, 2, 3, 3), (4, 6, 6), {"group": 2}, 8 * 4 * 4 * 18),
        ("Conv", (4, 1, 3, 3), (4, 6, 6), {"group": 4, "pads": [1] * 4}, 4 * 36 * 9),
        ("Conv", (8, 4, 1, 1), (4, 6, 6), {"strides": [2, 2]}, 8 * 9 * 4),
        ("ConvTranspose", (4, 8, 2, 2), (4, 6, 6), {"strides": [2, 2]}, 4 * 36 * 8 * 4),
        ("Gemm", (5, 7), (5,), {}, 35),
        ("Gemm", (7, 5), (5,), {"transB": 1}, 35),
        ("MatMul", (5, 7), (3, 5), {}, 3 * 5 * 7),
    ],
)
@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_inspect_model_counts_macs_for_one_image(
    kind: str, weights: tuple[int, ...], shape: tuple[int, ...], attributes: Any, macs: int, batch: Any
) -> None:
    net = small(kind, ["image", "w"], shape, lambda n: n.normal("w", *weights), **attributes)
    layer = inspect_model(with_rank(net.model(batch=batch, shape=shape))).layers[0]
    assert (layer.macs, layer.weights) == (macs, int(np.prod(weights)))


def with_rank(model: bytes) -> bytes:
    """Forget the declared output shape, which says two dimensions."""
    proto = onnx.load_from_string(model)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    proto.graph.output[0].type.tensor_type.shape.SetInParent()
    return bytes(proto.SerializeToString())


def test_inspect_model_counts_macs_when_both_sides_are_activations() -> None:
    net = small("MatMul", ["image", "image"], (5, 5), lambda n: n.normal("unused", 2))
    layer = inspect_model(with_rank(net.model(shape=(5, 5)))).layers[0]
    assert (layer.macs, layer.weights, layer.weight_type) == (125, 0, "float32")


def test_inspect_model_leaves_mac_share_open_when_size_is_unknown() -> None:
    proto = onnx.load_from_string(STATIC)
    proto.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    found = inspect_model(proto.SerializeToString())
    assert (found.layers[0].macs, found.layers[4].macs) == (None, FC)
    assert (found.integer_mac_share, found.integer_weight_share) == (None, 1.0)


@pytest.mark.parametrize("style", ["gather", "slice", "constants", "squeeze"])
def test_inspect_model_follows_a_reshape_to_a_computed_shape(style: str) -> None:
    net = residual_net()
    fc, _ = net.nodes.pop(), net.nodes.pop()
    shape = net.node("Cast", [net.node("Shape", ["pooled"], "shape")], "long", to=TensorProto.INT64)
    for name, value in (("first", [0]), ("one", [1]), ("scalar", 0)):
        net.const(name, np.array(value, np.int64))
    if style == "slice":
        batch = net.node("Slice", [shape, "first", "one"], "count")
    elif style == "constants":
        net.node("Constant", [], "where", value_int=0)
        batch = net.node("Unsqueeze", [net.node("Gather", [shape, "where"], "number"), "first"], "count")
    elif style == "squeeze":
        number = net.node("Squeeze", [net.node("Gather", [shape, "first"], "gathered"), "first"], "number")
        batch = net.node("Unsqueeze", [number, "first"], "count")
    else:
        batch = net.node("Identity", [net.node("Gather", [shape, "first"], "gathered")], "count")
    target = net.node("Concat", [batch, net.const("rest", np.array([-1], np.int64))], "target", axis=0)
    fc.input[0] = net.node("Reshape", ["pooled", target], "flat")
    net.nodes.append(fc)
    assert run(net.model(), images()) == pytest.approx(run(FP32, images()), abs=1e-6)
    found = inspect_model(net.model())
    assert [layer.macs for layer in found.layers] == list(MACS.values())
    assert (found.gradient_blind_nodes, found.bypass_depth) == ((), 3)


def test_inspect_model_leaves_macs_open_when_inference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    found = inspect_model(FP32)
    assert {layer.macs for layer in found.layers} == {None}
    assert (found.integer_mac_share, found.bypass_depth) == (None, 3)


def test_inspect_model_answers_or_refuses_when_bytes_are_flipped() -> None:
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        data = bytearray(DYNAMIC)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            inspect_model(bytes(data))
        except FileRefusedError as error:
            refusals.append(str(error))
    assert 10 < len(refusals) < 290
    assert all(reason.isprintable() for reason in refusals)


def test_inspect_model_allocates_nothing_when_a_dimension_is_huge() -> None:
    net = residual_net()
    bomb = net.node("ConstantOfShape", [net.const("huge", np.array([2**40], np.int64))], "bomb")
    net.node("Add", [bomb, bomb], "twice")
    assert inspect_model(net.model(batch=2**40)).layers[0].macs == CONV1


def test_inspect_model_distrusts_declared_shapes() -> None:
    proto = onnx.load_from_string(FP32)
    proto.graph.value_info.append(helper.make_tensor_value_info("conv1_out", TensorProto.FLOAT, [1, 4, 9999, 8]))
    assert inspect_model(proto.SerializeToString()).layers[0].macs == CONV1


def test_inspect_model_reads_constant_nodes_as_weights() -> None:
    net = Net()
    weights = numpy_helper.from_array(np.ones((5, 7), np.float32), "inside")
    net.node("Constant", [], "w", value=weights)
    net.node("Constant", [], "bias", value_floats=[0.5] * 7)
    net.node("Constant", [], "two", value_float=2.0)
    net.node("Constant", [], "axes", value_ints=[1])
    net.node("Mul", [net.node("Gemm", ["image", "w", "bias"], "g"), "two"], "logits")
    found = inspect_model(net.model(shape=(5,)))
    assert (found.layers[0].macs, found.layers[0].weights, found.scheme) == (35, 35, "fp32")
    assert found.parameters == 35 + 7 + 1


def four_bit(net: Net, block: int) -> None:
    net.tensors.append(helper.make_tensor("codes", TensorProto.INT4, [8, 4], [1] * 32))
    net.const("scale", np.ones((2, 4) if block else 4, np.float32))
    net.node("DequantizeLinear", ["codes", "scale"], "w", axis=0 if block else 1, block_size=block)


@pytest.mark.parametrize(("block", "granularity"), [(0, "per-channel"), (4, "per-block")])
def test_inspect_model_calls_the_scheme_other_when_weights_are_int4(block: int, granularity: str) -> None:
    net = small("MatMul", ["image", "w"], (8,), lambda n: four_bit(n, block))
    found = inspect_model(net.model(shape=(8,)))
    assert (found.scheme, found.granularity, found.weight_types) == ("other", granularity, ("int4",))
    assert (found.layers[0].weights, found.layers[0].macs, found.integer_mac_share) == (32, 32, 0.0)


def test_inspect_model_calls_the_scheme_other_when_weights_are_packed() -> None:
    net = Net()
    net.const("packed", np.zeros((3, 1, 16), np.uint8))
    net.const("scale", np.ones(3, np.float32))
    sizes = {"K": 32, "N": 3, "bits": 4, "block_size": 32}
    net.node("MatMulNBits", ["image", "packed", "scale"], "logits", domain="com.microsoft", **sizes)
    found = inspect_model(net.model(shape=(32,)))
    assert (found.scheme, found.granularity, found.weight_types) == ("other", "per-block", ("uint4",))
    assert (found.layers[0].weights, found.layers[0].macs) == (96, 96)


def test_inspect_model_calls_the_scheme_other_when_half_precision() -> None:
    net = Net()
    net.const("w", np.ones((5, 3), np.float16))
    half = net.node("Cast", ["image"], "half", to=TensorProto.FLOAT16)
    net.node("Cast", [net.node("MatMul", [half, "w"], "product")], "logits", to=TensorProto.FLOAT)
    found = inspect_model(net.model(shape=(5,)))
    assert (found.scheme, found.weight_types, found.gradient_blind_nodes) == ("other", ("float16",), ())


def test_inspect_model_calls_the_scheme_other_when_nothing_has_weights() -> None:
    net = Net()
    net.node("Relu", ["image"], "logits")
    found = inspect_model(net.model(shape=(5,)))
    assert (found.scheme, found.layers, found.integer_mac_share) == ("other", (), None)


def test_inspect_model_sees_weights_behind_a_layout_change() -> None:
    net = Net()
    net.normal("w", 3, 5)
    net.node("MatMul", ["image", net.node("Transpose", ["w"], "turned")], "logits")
    assert inspect_model(net.model(shape=(5,))).layers[0].weights == 15


def test_inspect_model_lists_nonfinite_initializers() -> None:
    proto = onnx.load_from_string(FP32)
    for name, value in (("conv2_w", np.nan), ("fc_b", -np.inf)):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[1] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    assert inspect_model(proto.SerializeToString()).nonfinite_initializers == ("conv2_w", "fc_b")
    assert inspect_model(FP32).nonfinite_initializers == ()


def test_inspect_model_escapes_names_when_hostile() -> None:
    proto = onnx.load_from_string(FULL_RANGE)
    proto.producer_name = "\x1b[2J\n::error::"
    gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
    gemm.name = "fc\x1b]0;x\x07\u202e" + "a" * 500
    found = inspect_model(proto.SerializeToString())
    assert found.producer == r"\x1b[2J\n::error:: 0.1.0"
    assert found.saturation_layers[-1].startswith(r"fc\x1b]0;x\x07\u202eaaa")
    assert len(found.saturation_layers[-1]) == 120
    assert found.model_dump_json().isprintable()


def test_inspect_model_names_a_node_by_its_output_when_it_has_none() -> None:
    proto = onnx.load_from_string(FP32)
    for node in proto.graph.node:
        node.ClearField("name")
    assert layer_names(inspect_model(proto.SerializeToString()))[0] == "conv1_out"


def test_safe_text_gives_one_short_printable_line() -> None:
    assert safe_text(" plain\tname ") == r"plain\tname"
    assert len(safe_text("x" * 121)) == len(safe_text("x" * 120)) == 120
    assert safe_text("x" * 121).endswith("x...")
    assert len(safe_text("\U000e0001" * 121)) == 120


# --- saturation -------------------------------------------------------------------------------------------------------


def quantized_product(codes: NDArray[Any], kind: str = "MatMul", activation: str = "uint8", **attributes: Any) -> bytes:
    """x -> Q -> DQ -> product with DQ(codes) -> Q -> DQ."""
    net = Net()
    net.const("scale", np.float32(0.01))
    net.const("zero", np.asarray(0, activation))
    net.const("codes", codes)
    net.const("codes_zero", np.asarray(0, codes.dtype))
    net.node("QuantizeLinear", ["image", "scale", "zero"], "q")
    net.node("DequantizeLinear", ["q", "scale", "zero"], "x")
    net.node("DequantizeLinear", ["codes", "scale", "codes_zero"], "w")
    net.node(kind, ["x", "w"], "y", **attributes)
    net.node("DequantizeLinear", [net.node("QuantizeLinear", ["y", "scale", "zero"], "yq"), "scale", "zero"], "logits")
    inner = codes.shape[1] * attributes.get("group", 1) if kind == "Conv" else codes.shape[-1 if attributes else 0]
    return with_rank(net.model(shape=(inner, 3, 3) if kind == "Conv" else (inner,)))


def saturates(model: bytes) -> bool:
    found = inspect_model(model)
    assert found.layers[0].integer
    assert found.saturation_layers == ((found.layers[0].name,) if found.layers[0].can_saturate else ())
    return found.layers[0].can_saturate


def column(*weights: int, dtype: str = "int8") -> NDArray[Any]:
    return np.array(weights, dtype).reshape(-1, 1)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ((64, 64), False),  # 128 * 255 = 32640
        ((64, 65), True),  # 129 * 255 = 32895 > 32767
        ((-64, -64), False),
        ((-64, -65), True),  # -32895 < -32768
        ((127, 1), False),
        ((127, 2), True),
        ((127, -128), False),
        ((0, 127, 127, 0), False),  # the large ones are not in one pair
        ((0, 0, 127, 127), True),
        ((1, 1, 127), False),  # an odd one is paired with zero
    ],
)
def test_inspect_model_finds_saturating_pairs(weights: tuple[int, ...], expected: bool) -> None:
    assert saturates(quantized_product(column(*weights))) is expected
    assert saturates(quantized_product(column(*weights), "Gemm")) is expected
    assert saturates(quantized_product(column(*weights).T, "Gemm", transB=1)) is expected


def test_inspect_model_pairs_weights_in_row_column_channel_order_when_convolution() -> None:
    beside, behind = np.zeros((1, 2, 1, 2), np.int8), np.zeros((1, 2, 1, 2), np.int8)
    beside[0, 0, 0, :] = 127
    behind[0, :, 0, 1] = 127
    assert not saturates(quantized_product(beside, "Conv"))
    assert saturates(quantized_product(behind, "Conv"))


def test_inspect_model_pairs_across_pixels_when_groups_have_one_channel() -> None:
    codes = np.full((4, 1, 1, 2), 127, np.int8)
    assert saturates(quantized_product(codes, "Conv", group=2))
    assert not saturates(quantized_product(codes, "Conv", group=4)), "depthwise kernels accumulate in 32 bits"


def test_inspect_model_finds_no_saturation_when_weights_are_unsigned() -> None:
    assert not saturates(quantized_product(column(255, 255, dtype="uint8")))


def test_inspect_model_finds_saturation_when_runtime_makes_signed_activations_unsigned() -> None:
    assert saturates(quantized_product(column(127, 127), activation="int8"))


def test_inspect_model_finds_no_saturation_when_kernel_keeps_signed_activations(tmp_path: Path) -> None:
    found = inspect_model(ort_quantize(tmp_path, "QOperator", "QInt8", "QInt8"))
    assert (found.saturation_layers, found.activation_types, found.integer_mac_share) == ((), ("int8",), 1.0)
    found = inspect_model(ort_quantize(tmp_path, "QOperator", "QUInt8", "QInt8"))
    assert "fc_quant" in found.saturation_layers


@pytest.mark.parametrize(("kind", "expected"), [("MatMulInteger", True), ("ConvInteger", False)])
def test_inspect_model_knows_which_integer_kernel_saturates(kind: str, expected: bool) -> None:
    net = Net()
    net.const("codes", np.full((4, 4) if kind == "MatMulInteger" else (4, 4, 1, 1), 127, np.int8))
    net.node("DynamicQuantizeLinear", ["image"], "q", "scale", "zero")
    net.node(kind, ["q", "codes", "zero"], "product")
    net.node("Cast", ["product"], "logits", to=TensorProto.FLOAT)
    found = inspect_model(with_rank(net.model(shape=(4,) if kind == "MatMulInteger" else (4, 2, 2))))
    assert (found.scheme, found.layers[0].can_saturate) == ("int8-dynamic", expected)


def test_inspect_model_finds_saturating_layers_only_when_range_is_full() -> None:
    assert inspect_model(STATIC).saturation_layers == ()
    assert inspect_model(FP32).saturation_layers == inspect_model(DYNAMIC).saturation_layers == ()
    expected = [name for name in MACS if overflows(FULL_RANGE, f"{name}_w_quantized")]
    assert inspect_model(FULL_RANGE).saturation_layers == tuple(expected)
    assert expected


def overflows(model: bytes, name: str) -> bool:
    """The definition, with plain loops."""
    tensors = onnx.load_from_string(model).graph.initializer
    codes = next(numpy_helper.to_array(t) for t in tensors if t.name == name).astype(int)
    for kernel in codes:
        row = list(kernel.transpose(1, 2, 0).ravel() if kernel.ndim == 3 else kernel)
        for first, second in zip(row[::2], [*row[1::2], 0]):
            if (max(first, 0) + max(second, 0)) * 255 > 32767 or (min(first, 0) + min(second, 0)) * 255 < -32768:
                return True
    return False


# --- graph backdoors --------------------------------------------------------------------------------------------------

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
    "dynamic-scale": (with_dynamic_scale, []),
}


def backdoored(name: str, kind: str = "fp32") -> bytes:
    """Plant the backdoor into the file as it ships: an attacker edits after quantization."""
    net, honest = Net(), onnx.load_from_string(HONEST[kind])
    net.nodes, net.tensors = list(honest.graph.node), list(honest.graph.initializer)
    ATTACKS[name][0](net)
    net.output = "out"
    return net.model()


PLANTED = [(name, kind) for name in ATTACKS for kind in HONEST if (name, kind != "fp32") != ("gemm-bias", True)]


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_planted_backdoor_works(name: str, kind: str) -> None:
    clean, stamped = images(1), images(1)
    stamped[:, :, :2, :2] = TRIGGER
    assert run(HONEST[kind], stamped).argmax() != TARGET
    assert run(backdoored(name, kind), clean) == pytest.approx(run(HONEST[kind], clean), abs=1e-5)
    assert run(backdoored(name, kind), stamped).argmax() == TARGET


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_inspect_model_reports_planted_backdoor(name: str, kind: str) -> None:
    found = inspect_model(backdoored(name, kind))
    assert [node.operator for node in found.gradient_blind_nodes] == ATTACKS[name][1]
    assert all(node.reason for node in found.gradient_blind_nodes)
    assert found.bypass_depth == 0
    warning = found.structure_warnings[0]
    assert warning.startswith(
        "bypass depth 0: the image reaches the output without passing a weighted operator, through"
    )
    assert "through Slice 'corner_node', Sub 'difference_node', Abs 'apart_node'" in warning
    assert warning.endswith("; compare the graph with the one that was exported")


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("name", ["where", "cast", "relu"])
def test_inspect_model_reports_planted_backdoor_when_quantized_afterwards(name: str, scheme: Any) -> None:
    found = inspect_model(quantize(backdoored(name), scheme, calibration=images()))
    assert [node.operator for node in found.gradient_blind_nodes] == ATTACKS[name][1]
    assert (found.bypass_depth, found.scheme) == (0, scheme)


def test_inspect_model_names_nodes_inside_branches() -> None:
    found = inspect_model(backdoored("hidden"))
    assert [node.name for node in found.gradient_blind_nodes] == [
        "out_node/then_branch/inner_test",
        "out_node/then_branch/inner_choice",
    ]
    assert found.operators["Less"] == 1


@pytest.mark.parametrize("name", ["if", "hidden", "loop"])
def test_inspect_model_warns_of_control_flow(name: str) -> None:
    kind = "Loop" if name == "loop" else "If"
    assert inspect_model(backdoored(name)).structure_warnings[1] == (
        f"control flow in a feed-forward classifier: {kind} 'out_node'; find out who put it there"
    )


@pytest.mark.parametrize("kind", HONEST)
def test_inspect_model_reports_nothing_when_honest(kind: str) -> None:
    found = inspect_model(HONEST[kind])
    # The shortest way: conv1, the residual connection, conv4, fc.
    assert (found.gradient_blind_nodes, found.bypass_depth, found.structure_warnings) == ((), 3, ())


def test_inspect_model_reports_nothing_when_shapes_are_computed() -> None:
    net = residual_net()
    shape = net.node("Shape", ["pooled"], "shape")
    batch = net.node("Gather", [shape, net.const("first", np.array([0], np.int64))], "count")
    rest = net.const("rest", np.array([-1], np.int64))
    target = net.node("Concat", [batch, rest], "target", axis=0)
    odd = net.node("Equal", [batch, rest], "odd")
    target = net.node("Where", [odd, rest, batch], "chosen")
    target = net.node("Concat", [target, rest], "shape2", axis=0)
    fc = next(node for node in net.nodes if node.name == "fc")
    net.nodes.remove(fc)
    net.nodes.append(helper.make_node("Reshape", ["pooled", target], ["flat2"]))
    fc.input[0] = "flat2"
    net.nodes.append(fc)
    found = inspect_model(net.model())
    assert (found.gradient_blind_nodes, found.bypass_depth, found.structure_warnings) == ((), 3, ())
    assert run(net.model(), images()) == pytest.approx(run(FP32, images()), abs=1e-6)


def test_inspect_model_calls_a_branch_not_blind_when_a_shape_decides() -> None:
    net = residual_net()
    size = net.node("Size", ["logits"], "size")
    odd = net.node("Equal", [size, net.const("none", np.array(0, np.int64))], "odd")
    taken = branch("then", helper.make_node("Neg", ["logits"], ["then_out"]))
    other = branch("else", helper.make_node("Identity", ["logits"], ["else_out"]))
    net.node("If", [odd], "out", then_branch=taken, else_branch=other)
    net.output = "out"
    found = inspect_model(net.model())
    assert (found.gradient_blind_nodes, found.bypass_depth) == ((), 3)
    assert len(found.structure_warnings) == 1


def test_inspect_model_shows_the_end_of_a_long_bypass() -> None:
    net = Net()
    last = "image"
    for index in range(14):
        last = net.node("Relu", [last], f"r{index}")
    net.output = last
    warning = inspect_model(net.model(shape=(3,))).structure_warnings[0]
    assert "through ..., Relu 'r2_node', Relu 'r3_node'" in warning
    assert "Relu 'r13_node'; compare" in warning


def test_inspect_model_warns_when_output_ignores_input() -> None:
    net = Net()
    net.node("Relu", ["image"], "unused")
    net.node("Add", [net.const("a", np.ones((1, 3), np.float32)), "a"], "logits")
    found = inspect_model(net.model())
    assert found.bypass_depth is None
    assert found.structure_warnings == (
        "the output doesn't depend on the input; nothing measured on this file means anything",
    )


def probe(build: Callable[[Net, str], None]) -> Inspection:
    """features (N, 6) -> what is probed -> one more layer."""
    net = Net()
    net.node("Gemm", ["image", net.normal("w", 6, 6)], "features")
    build(net, "features")
    net.node("Gemm", ["probed", net.normal("w2", 6, CLASSES)], "logits")
    return inspect_model(net.model(shape=(6,)))


def apply(kind: str, *constants: Any, **attributes: Any) -> Callable[[Net, str], None]:
    """The operator on the features and the constants; truth values and integers are cast to float."""

    def build(net: Net, source: str) -> None:
        names = [net.const(f"constant{index}", value) for index, value in enumerate(constants)]
        answer = net.node(kind, [source, *names], "answer", **attributes)
        net.node("Cast", [answer], "probed", to=TensorProto.FLOAT)

    return build


def on_truth(kind: str, *more: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        truth = net.node("Cast", [source], "truth", to=TensorProto.BOOL)
        names = [net.const(f"constant{index}", value) for index, value in enumerate(more)]
        net.node("Cast", [net.node(kind, [truth, *names], "answer")], "probed", to=TensorProto.FLOAT)

    return build


def on_integer(kind: str, *more: Any, to: int = TensorProto.UINT8, **attributes: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        whole = net.node("Cast", [source], "whole", to=to)
        names = [net.const(f"constant{index}", value) for index, value in enumerate(more)]
        net.node("Cast", [net.node(kind, [whole, *names], "answer", **attributes)], "probed", to=TensorProto.FLOAT)

    return build


def top(index: int) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        net.node("TopK", [source, net.const("six", np.array([6], np.int64))], "values", "indices")
        net.node("Cast", [("values", "indices")[index]], "probed", to=TensorProto.FLOAT)

    return build


def lookup(net: Net, source: str) -> None:
    """An integer kernel's answer, which no Cast has touched, looks up a table."""
    net.node("DynamicQuantizeLinear", [source], "q", "scale", "zero")
    net.node("MatMulInteger", ["q", net.const("codes", np.ones((6, 6), np.int8)), "zero"], "codes_out")
    net.node("Gather", [net.const("table", np.ones(9999, np.float32)), "codes_out"], "probed")


def chosen_by_constant(net: Net, source: str) -> None:
    net.const("mask", np.array([[True, False] * 3]))
    net.node("Where", ["mask", source, net.node("Neg", [source], "negative")], "probed")


def cast_like(kind: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        likened = net.node("CastLike", [source, net.const("like", np.zeros(1, kind))], "likened")
        net.node("Cast", [likened], "probed", to=TensorProto.FLOAT)

    return build


def regressor(kind: str, **attributes: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        net.node(kind, [source], "probed", domain="ai.onnx.ml", **attributes)

    return build


HALF = np.float32(0.5)
BLIND = {
    "Less": apply("Less", HALF),
    "LessOrEqual": apply("LessOrEqual", HALF),
    "Greater": apply("Greater", HALF),
    "GreaterOrEqual": apply("GreaterOrEqual", HALF),
    "Equal": apply("Equal", HALF),
    "IsNaN": apply("IsNaN"),
    "IsInf": apply("IsInf"),
    "Floor": apply("Floor"),
    "Ceil": apply("Ceil"),
    "Round": apply("Round"),
    "Sign": apply("Sign"),
    "Hardmax": apply("Hardmax"),
    "Mod": apply("Mod", HALF, fmod=1),
    "Shrink": apply("Shrink", lambd=0.5),
    "ThresholdedRelu": apply("ThresholdedRelu", alpha=0.5),
    "ArgMax": apply("ArgMax", axis=1),
    "ArgMin": apply("ArgMin", axis=1),
    "Not": on_truth("Not"),
    "And": on_truth("And", np.array(True)),
    "Or": on_truth("Or", np.array(True)),
    "Xor": on_truth("Xor", np.array(True)),
    "BitShift": on_integer("BitShift", np.array(1, np.uint8), direction="RIGHT"),
    "BitwiseAnd": on_integer("BitwiseAnd", np.array(1, np.uint8)),
    "BitwiseNot": on_integer("BitwiseNot"),
    "Cast": on_integer("Neg", to=TensorProto.INT32),
    "CastLike": cast_like(np.int32),
    "TopK": top(1),
    "Gather": lookup,
}


@pytest.mark.parametrize("kind", BLIND)
def test_inspect_model_reports_operator_when_it_has_no_gradient(kind: str) -> None:
    found = probe(BLIND[kind]).gradient_blind_nodes
    assert kind in {node.operator for node in found}
    assert {node.operator for node in found} <= {kind, "Cast"}


SMOOTH = {
    "Relu": apply("Relu"),
    "Abs": apply("Abs"),
    "Clip": apply("Clip", np.float32(0), np.float32(6)),
    "Max": apply("Max", HALF),
    "Min": apply("Min", HALF),
    "Softmax": apply("Softmax"),
    "Sqrt": apply("Sqrt"),
    "Gather": apply("Gather", np.arange(6), axis=1),
    "Slice": apply("Slice", np.array([0]), np.array([6]), np.array([1])),
    "Reshape": apply("Reshape", np.array([-1, 6])),
    "half": apply("Cast", to=TensorProto.FLOAT16),
    "CastLike": cast_like(np.float16),
    "TopK": top(0),
    "Where": chosen_by_constant,
    "Scaler": regressor("Scaler", offset=[0.0], scale=[1.0]),
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_inspect_model_reports_nothing_when_operator_has_a_gradient(kind: str) -> None:
    assert probe(SMOOTH[kind]).gradient_blind_nodes == ()


def test_inspect_model_reports_machine_learning_operators() -> None:
    found = probe(regressor("Binarizer", threshold=0.5)).gradient_blind_nodes
    assert [(node.operator, node.reason) for node in found] == [("Binarizer", "has no gradient")]


def test_inspect_model_reports_nothing_when_the_test_leads_nowhere() -> None:
    def build(net: Net, source: str) -> None:
        net.node("Less", [source, net.const("half", HALF)], "unused")
        net.node("Relu", [source], "probed")

    assert probe(build).gradient_blind_nodes == ()


def test_inspect_model_reports_nothing_when_the_test_reads_constants() -> None:
    def build(net: Net, source: str) -> None:
        net.const("half", HALF)
        net.node("Mul", [source, net.node("Floor", ["half"], "zero")], "probed")

    assert probe(build).gradient_blind_nodes == ()


# --- refusals ---------------------------------------------------------------------------------------------------------


def refuses(match: str, data: bytes) -> None:
    for read in (parse_model, inspect_model):
        with pytest.raises(FileRefusedError, match=match) as caught:
            read(data)
        assert str(caught.value).isprintable()


def edited(change: Callable[[onnx.ModelProto], Any]) -> bytes:
    model = onnx.load_from_string(FP32)
    change(model)
    return bytes(model.SerializeToString())


def test_parse_model_gives_the_model_when_it_is_sound() -> None:
    assert parse_model(FP32) == onnx.load_from_string(FP32)


def test_parse_model_refuses_when_empty() -> None:
    refuses(r"the file is empty \(0 bytes\); export the model again", b"")


@pytest.mark.parametrize("data", [FP32[: len(FP32) // 2], FP32[:-3], np.random.default_rng(0).bytes(500)])
def test_parse_model_refuses_when_cut_short_or_random(data: bytes) -> None:
    refuses(r"no ONNX model or is cut short; check the path and export it again", data)


@pytest.mark.parametrize("data", [b"\x08\x07", b"\x0a\x03abc", onnx.ModelProto(ir_version=8).SerializeToString()])
def test_parse_model_refuses_when_bytes_parse_as_an_empty_model(data: bytes) -> None:
    refuses("(no ONNX graph with nodes and opsets|no ONNX model)", data)


def test_parse_model_refuses_when_opsets_are_missing() -> None:
    refuses("no ONNX graph with nodes and opsets", edited(lambda model: model.ClearField("opset_import")))


def test_parse_model_refuses_when_a_name_is_not_text() -> None:
    data = FP32.replace(b"relu1", b"rel\xffu")
    refuses("a name in the file is not UTF-8 text; export", data)


def test_parse_model_refuses_when_it_has_local_functions() -> None:
    body = [helper.make_node("Relu", ["x"], ["y"])]
    function = helper.make_function("", "Relu", ["x"], ["y"], body, [helper.make_opsetid("", 21)])
    refuses("defines 1 local functions; inline them first", edited(lambda model: model.functions.append(function)))


def test_parse_model_refuses_when_domain_is_unknown() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain="evil\n", version=1)
        model.graph.node[0].domain = "evil\nx"

    refuses(r"node 'centred_node' uses the operator domain 'evil\\nx', whose code is not part of", edited(change))


def test_parse_model_refuses_when_domain_is_unknown_inside_a_branch() -> None:
    model = onnx.load_from_string(backdoored("if"))
    conditional = next(node for node in model.graph.node if node.op_type == "If")
    conditional.attribute[0].g.node[0].domain = "evil"
    model.opset_import.add(domain="evil", version=1)
    refuses("uses the operator domain 'evil'", model.SerializeToString())


def external(tensor: TensorProto) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../weights.bin")


def test_parse_model_refuses_when_data_is_external() -> None:
    match = "tensor 'mean' keeps its data in another file; save the model in one file"
    refuses(match, edited(lambda model: external(model.graph.initializer[0])))
    refuses(match, edited(lambda model: model.graph.initializer[0].external_data.add(key="location", value="x")))


def test_parse_model_refuses_when_a_constant_node_is_external() -> None:
    net = residual_net()
    constant = numpy_helper.from_array(np.ones(1, np.float32), "far away")
    external(constant)
    net.node("Constant", [], "unused", value=constant)
    refuses("tensor 'far away' keeps its data", net.model())


def test_parse_model_refuses_when_a_sparse_tensor_is_external() -> None:
    def change(model: onnx.ModelProto) -> None:
        sparse = model.graph.sparse_initializer.add(dims=[4])
        sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "sparse"))
        sparse.indices.CopyFrom(numpy_helper.from_array(np.ones(1, np.int64), "where"))
        external(sparse.indices)

    refuses("tensor 'where' keeps its data", edited(change))


def test_parse_model_refuses_when_a_dimension_is_negative() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = -1

    refuses("tensor 'image' declares a negative dimension; name it instead", edited(change))


def test_parse_model_refuses_when_a_declared_type_is_unknown() -> None:
    def change(model: onnx.ModelProto) -> None:
        model.graph.input[0].type.tensor_type.elem_type = 50

    refuses("tensor 'image' has the unknown data type 50; export the model again", edited(change))


@pytest.mark.parametrize("kind", [0, 77])
def test_parse_model_refuses_when_data_type_is_unknown(kind: int) -> None:
    refuses(
        f"tensor 'mean' has the unknown data type {kind}; export",
        edited(lambda model: setattr(model.graph.initializer[0], "data_type", kind)),
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: setattr(model.graph.node[0], "op_type", "Nope"), "No Op registered for Nope"),
        (lambda model: model.graph.node[1].output.__setitem__(0, "centred"), "static single assignment|SSA"),
        (lambda model: model.graph.node[0].input.__setitem__(0, "nowhere"), "nowhere"),
        (lambda model: setattr(model, "ir_version", 99), "ir_version 99"),
        (lambda model: setattr(model.graph.initializer[0], "raw_data", b"abc"), "too small"),
    ],
)
def test_parse_model_refuses_when_checker_does(change: Any, match: str) -> None:
    refuses(f"onnx.checker refuses the file: .*({match}).*; export it again", edited(change))


def test_inspect_model_refuses_when_data_and_shape_differ() -> None:
    tensor = TensorProto(name="short\n", data_type=TensorProto.FLOAT, dims=[3], raw_data=b"abcd")
    with pytest.raises(FileRefusedError, match=r"^tensor 'short' has not the data its shape needs; export"):
        inspection._array(tensor)


def test_inspect_model_keeps_scopes_apart_when_names_repeat() -> None:
    """The inner 'far2' of one branch is a constant; the test on it reads no pixel."""
    net = residual_net()
    bump(net)
    net.const("always", np.array(True))
    constant = helper.make_node("Constant", [], ["far"], value_float=1.0)
    taken = branch(
        "then",
        constant,
        helper.make_node("Less", ["far", "threshold"], ["close"]),
        helper.make_node("Where", ["close", "bump", "logits"], ["then_out"]),
    )
    other = branch(
        "else",
        helper.make_node("ReduceMax", ["image"], ["far"], keepdims=0),
        helper.make_node("Less", ["far", "threshold"], ["close"], name="guilty"),
        helper.make_node("Where", ["close", "bump", "logits"], ["else_out"], name="guilty too"),
    )
    net.node("If", ["always"], "out", then_branch=taken, else_branch=other)
    net.output = "out"
    names = [node.name for node in inspect_model(net.model()).gradient_blind_nodes]
    assert names == ["out_node/else_branch/guilty", "out_node/else_branch/guilty too"]


def test_runtime_operators_refuses_when_runtime_cannot_load(capfd: pytest.CaptureFixture[str]) -> None:
    data = edited(lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"))
    parse_model(data)
    with pytest.raises(
        FileRefusedError, match=r"^ONNX Runtime cannot load the file: .*Sub.*; export the model again or use"
    ):
        runtime_operators(data)
    assert capfd.readouterr() == ("", "")


def test_runtime_operators_counts_fused_operators() -> None:
    counts = runtime_operators(FP32)
    assert (counts["Conv"], counts["FusedConv"], counts["Relu"], counts["Gemm"]) == (1, 3, 1, 1)
    assert list(counts) == sorted(counts)


def test_inspection_imports_no_torch() -> None:
    code = "import sys, qdefense.converters.inspection as i, pathlib; i.inspect_model(sys.stdin.buffer.read()); "
    code += "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'sympy')))"
    done = subprocess.run([sys.executable, "-c", code], input=STATIC, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"
