from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.inspection import inspect_model, runtime_operators
from qdefense.converters.runtime_graph import optimized_model

from .inspected_graphs import (
    BIASES,
    CONV3,
    DYNAMIC,
    FC,
    FP32,
    FULL_RANGE,
    HONEST,
    MACS,
    NORMALISATION,
    STATIC,
    WEIGHTS,
    Net,
    layer_names,
    ort_quantize,
    with_rank,
)
from .quantized_graphs import Quantized


@pytest.mark.parametrize("kind", HONEST)
def test_inspect_model_gives_hand_computed_layers(kind: str) -> None:
    found = inspect_model(HONEST[kind])
    assert layer_names(found) == list(MACS)
    assert [layer.macs for layer in found.layers] == list(MACS.values())
    assert [layer.weights for layer in found.layers] == list(WEIGHTS.values())
    assert found.parameters == sum(WEIGHTS.values()) + BIASES + NORMALISATION


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


def test_inspect_model_counts_float_convolution_when_its_output_is_not_quantized() -> None:
    model = onnx.load_from_string(STATIC)
    unquantize(model, "conv3_out")
    found = inspect_model(model.SerializeToString())
    assert [layer.integer for layer in found.layers] == [True, True, False, True, True]
    assert found.integer_mac_share == pytest.approx(1 - CONV3 / sum(MACS.values()))
    assert found.integer_weight_share == pytest.approx(1 - 144 / 708)
    # What a layer stores and what the runtime makes of it are two facts.
    assert (found.scheme, found.layers[2].scheme, found.layers[2].weight_type) == ("int8-static",) * 2 + ("int8",)
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


def four_bit(net: Net, block: int) -> None:
    net.tensors.append(helper.make_tensor("codes", TensorProto.INT4, [8, 4], [1] * 32))
    net.const("scale", np.ones((2, 4) if block else 4, np.float32))
    net.node("DequantizeLinear", ["codes", "scale"], "w", axis=0 if block else 1, block_size=block)


@pytest.mark.parametrize(("block", "granularity"), [(0, "per-channel"), (4, "per-block")])
def test_inspect_model_calls_the_scheme_int4_when_weights_alone_are(block: int, granularity: str) -> None:
    net = small("MatMul", ["image", "w"], (8,), lambda n: four_bit(n, block))
    found = inspect_model(net.model(shape=(8,)))
    assert (found.scheme, found.granularity, found.weight_types) == ("int4", granularity, ("int4",))
    assert (found.layers[0].weights, found.layers[0].macs, found.integer_mac_share) == (32, 32, 0.0)


FORMS: dict[str, tuple[str | None, str | None, int | None, int, str, str | None]] = {
    "u8s8 per tensor": ("uint8", "int8", None, 0, "int8-static", "per-tensor"),
    "s8s8 per channel": ("int8", "int8", 0, 0, "int8-static", "per-channel"),
    "u8u8 per channel": ("uint8", "uint8", 0, 0, "int8-static", "per-channel"),
    "int4 per tensor": (None, "int4", None, 0, "int4", "per-tensor"),
    "int4 per channel": (None, "int4", 0, 0, "int4", "per-channel"),
    "int4 in blocks": (None, "int4", 1, 16, "int4", "per-block"),
    "uint4 in blocks": (None, "uint4", 1, 8, "int4", "per-block"),
    "int4 with u8": ("uint8", "int4", 0, 0, "int4-a8", "per-channel"),
    "uint4 with s8 in blocks": ("int8", "uint4", 1, 16, "int4-a8", "per-block"),
    "int8 weights alone": (None, "int8", 0, 0, "other", "per-channel"),
    "floats": (None, None, None, 0, "fp32", None),
    "u8 with float weights": ("uint8", None, None, 0, "other", None),
}


@pytest.mark.parametrize("kind", ["Conv", "Gemm", "MatMul"])
@pytest.mark.parametrize("name", FORMS)
def test_inspect_model_recovers_scheme_and_granularity(name: str, kind: str) -> None:
    activation, weight, place, block, scheme, granularity = FORMS[name]
    net = Quantized(16, 3, 3) if kind == "Conv" else Quantized(16)
    shape = (16, 16, 1, 1) if kind == "Conv" else (16, 16)
    axis = place if place is None or kind == "Conv" else 1 - place
    source = "image" if activation is None else net.passed("image", "x", activation)
    # Weights that were rounded to four bits and are stored as floats are floats.
    made = (
        net.const("w", np.full(shape, 0.07))
        if weight is None
        else net.weights("w", shape, weight, axis=axis, block=block)
    )
    y = net.node(kind, [source, made], "y")
    found = inspect_model(net.model(y if activation is None else net.passed(y, "out", activation)))
    (layer,) = found.layers
    assert (found.scheme, found.granularity, layer.granularity) == (scheme, granularity, granularity)
    assert (layer.scheme, layer.block_size) == (scheme, block or None)
    assert (layer.weight_type, layer.activation_type) == (weight or "float32", activation or "float32")
    assert (layer.weights, layer.macs) == (256, 256 * (9 if kind == "Conv" else 1))


@pytest.mark.parametrize("second", ["int4", None])
def test_inspect_model_calls_the_scheme_mixed_when_layers_differ(second: str | None) -> None:
    net = Quantized(16)
    first = net.passed(net.layer("MatMul", net.passed("image", "x", "uint8"), "first", "int8"), "first_d", "uint8")
    weights = net.const("w", np.ones((16, 4))) if second is None else net.weights("w", (16, 4), second, axis=0, block=8)
    found = inspect_model(net.model(net.node("MatMul", [first, weights], "y")))
    assert (found.scheme, found.granularity) == ("mixed", "per-tensor" if second is None else "per-block")
    # 16 x 16 of the 16 x 20 products are integer.
    assert (found.integer_mac_share, found.integer_weight_share) == (0.8, 0.8)


def test_inspect_model_calls_the_scheme_other_when_activations_have_sixteen_bits() -> None:
    net = Quantized(16)
    net.const("scale", 0.01)
    net.const("zero", 0, np.uint16)
    codes = net.node("QuantizeLinear", ["image", "scale", "zero"], "codes")
    source = net.node("DequantizeLinear", [codes, "scale", "zero"], "x")
    (layer,) = inspect_model(net.model(net.layer("MatMul", source, "y", "int8"))).layers
    assert (layer.scheme, layer.activation_type, layer.integer) == ("other", "uint16", False)


def test_inspect_model_calls_the_scheme_int4_when_weights_are_packed() -> None:
    net = Net()
    net.const("packed", np.zeros((3, 1, 16), np.uint8))
    net.const("scale", np.ones(3, np.float32))
    sizes = {"K": 32, "N": 3, "bits": 4, "block_size": 32}
    net.node("MatMulNBits", ["image", "packed", "scale"], "logits", domain="com.microsoft", **sizes)
    found = inspect_model(net.model(shape=(32,)))
    assert (found.scheme, found.granularity, found.weight_types) == ("int4", "per-block", ("uint4",))
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
