from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.quantize import QuantizationError, quantize
from qdefense.converters.reading import tensor_array

from .quantized_nets import LEVELS, WIDE, constants, images, logits, relative_error, wide_net

GRANULARITIES = [None, 16, 32]
LAYERS = {
    # the axis of output channels, that of reduction
    "stem_w": (0, 1),
    "plain_w": (0, 1),
    "depthwise_w": (0, 1),
    "grouped_w": (0, 1),
    "gemm_w": (0, 1),
    "plain_gemm_w": (1, 0),
    "matmul_w": (1, 0),
}
BLOCKED = {16: {"plain_w", "gemm_w", "plain_gemm_w", "matmul_w"}, 32: {"gemm_w", "plain_gemm_w"}}


def on_the_grid(weight: NDArray[np.float32], channel: int, reduction: int, size: int | None, symmetric: bool) -> Any:
    """The oracle: float weights rounded to the grid, one group of weights at a time."""
    result = np.empty_like(weight)
    size = size if size is not None and weight.shape[reduction] >= size else None
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in np.ndindex(weight.shape):
        key = (place[channel],)
        if size is not None:
            key = tuple(index // size if axis == reduction else index for axis, index in enumerate(place))
        groups.setdefault(key, []).append(place)
    for places in groups.values():
        rows = tuple(np.array(axis) for axis in zip(*places))
        values = weight[rows].astype(np.float64)
        if symmetric:
            scale, zero, low, high = np.abs(values).max() / 7, 0, -7, 7
        else:
            scale = (max(values.max(), 0) - min(values.min(), 0)) / 15
            zero, low, high = round(-min(values.min(), 0) / np.float32(scale)), 0, 15
        scale = np.float32(scale)
        codes = np.clip(np.rint(values / scale) + zero, low, high)
        result[rows] = (codes - zero).astype(np.float32) * scale
    return result


def fake_quantized(size: int | None, symmetric: bool) -> bytes:
    model = wide_net()
    for tensor in model.graph.initializer:
        if tensor.name in LAYERS:
            rounded = on_the_grid(tensor_array(tensor), *LAYERS[tensor.name], size, symmetric)
            tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    return bytes(model.SerializeToString())


@pytest.fixture(scope="module", params=[(size, symmetric) for size in GRANULARITIES for symmetric in (True, False)])
def packed(request: pytest.FixtureRequest) -> tuple[int | None, bool, bytes]:
    size, symmetric = request.param
    return size, symmetric, quantize(WIDE, "int4", block_size=size, symmetric=symmetric)


def test_packed_answers_as_the_float_weights_on_its_grid_do(packed: tuple[int | None, bool, bytes]) -> None:
    size, symmetric, made = packed
    x = images(64, seed=2)
    expected = logits(fake_quantized(size, symmetric), x, "disable")
    for level in LEVELS:
        assert np.abs(logits(made, x, level) - expected).max() <= 1e-5 * np.abs(expected).max(), level
    assert relative_error(WIDE, made) < 0.5


def test_every_product_has_packed_weights_and_the_blocks_its_axis_allows(
    packed: tuple[int | None, bool, bytes],
) -> None:
    size, symmetric, made = packed
    graph = onnx.load_from_string(made).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    read = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    assert set(read) == {f"{name}_int4" for name in LAYERS}
    assert not set(LAYERS) & set(kinds)
    for name, (channel, reduction) in LAYERS.items():
        node = read[f"{name}_int4"]
        attributes = {attribute.name: attribute.i for attribute in node.attribute}
        blocked = size is not None and name in BLOCKED[size]
        expected = {"axis": reduction, "block_size": size} if blocked else {"axis": channel}
        assert attributes == expected, name
        kind = TensorProto.INT4 if symmetric else TensorProto.UINT4
        assert [kinds[each] for each in node.input] == [kind, TensorProto.FLOAT, kind][: 2 if symmetric else 3]


def test_scales_are_above_zero_and_zero_points_within_four_bits(packed: tuple[int | None, bool, bytes]) -> None:
    _, symmetric, made = packed
    arrays = constants(made)
    for name in LAYERS:
        assert (arrays[f"{name}_int4_scale"] > 0).all()
        assert (arrays[f"{name}_int4"].min() < 0) == symmetric
        if not symmetric:
            assert arrays[f"{name}_int4_zero_point"].max() <= 15
            assert arrays[f"{name}_int4_zero_point"].shape == arrays[f"{name}_int4_scale"].shape


def test_packed_file_is_an_eighth_of_the_weights(packed: tuple[int | None, bool, bytes]) -> None:
    graph = onnx.load_from_string(packed[2]).graph
    codes = [tensor for tensor in graph.initializer if tensor.name.endswith("_int4")]
    count = sum(int(np.prod(tensor.dims)) for tensor in codes)
    assert count == sum(array.size for name, array in constants(WIDE).items() if name in LAYERS)
    assert sum(len(tensor.raw_data) for tensor in codes) == sum((int(np.prod(t.dims)) + 1) // 2 for t in codes)


@pytest.mark.parametrize("size", GRANULARITIES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4_a8_has_the_weights_of_int4_and_quantized_activations(size: Any, symmetric: bool) -> None:
    made = quantize(WIDE, "int4-a8", calibration=images(), block_size=size, symmetric=symmetric)
    plain = constants(quantize(WIDE, "int4", block_size=size, symmetric=symmetric))
    arrays = constants(made)
    for name in LAYERS:
        for ending in ("int4", "int4_scale", *(() if symmetric else ("int4_zero_point",))):
            assert np.array_equal(arrays[f"{name}_{ending}"], plain[f"{name}_{ending}"])
    kinds = {tensor.data_type for tensor in onnx.load_from_string(made).graph.initializer}
    weights = TensorProto.INT4 if symmetric else TensorProto.UINT4
    assert kinds == {TensorProto.FLOAT, TensorProto.UINT8, weights}
    assert_products_read_quantizers(made)
    x = images(64, seed=1)
    expected = logits(quantize(WIDE, "int4", block_size=size, symmetric=symmetric), x)
    for level in LEVELS:
        away = logits(made, x, level) - expected
        assert 0 < np.sqrt(np.mean(away**2)) < 0.06 * expected.std(), level


def assert_products_read_quantizers(model: bytes) -> None:
    graph = onnx.load_from_string(model).graph
    makers = {output: node for node in graph.node for output in node.output}
    products = [node for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert len(products) == len(LAYERS)
    for node in products:
        reader = makers[node.input[0]]
        assert reader.op_type == "DequantizeLinear"
        assert makers[reader.input[0]].op_type == "QuantizeLinear"


def test_shared_weight_is_packed_once_for_each_use_and_kept_in_float_for_others() -> None:
    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    weight = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    nodes = [
        helper.make_node("MatMul", ["image", "w"], ["first"]),
        helper.make_node("MatMul", ["first", "w"], ["second"]),
        helper.make_node("Gemm", ["second", "w"], ["third"], transB=1),
        helper.make_node("Add", ["third", "w"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes, "shared", [value("image", 8, 8)], [value("logits", 8, 8)], [numpy_helper.from_array(weight, "w")]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    made = onnx.load_from_string(quantize(model.SerializeToString(), "int4"))
    codes = [tensor.name for tensor in made.graph.initializer if tensor.data_type == TensorProto.INT4]
    assert sorted(codes) == ["w_int4", "w_int4_1"]
    assert "w" in {tensor.name for tensor in made.graph.initializer}
    weights = {node.output[0]: node.input[1] for node in made.graph.node if node.op_type != "DequantizeLinear"}
    assert weights == {
        "first": "w_int4_dequantized",
        "second": "w_int4_dequantized",
        "third": "w_int4_1_dequantized",
        "logits": "w",
    }


def test_constants_among_the_inputs_are_packed_as_others_are() -> None:
    """Files of old list them there."""
    model = wide_net()
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, tensor.dims))
    made = quantize(model.SerializeToString(), "int4")
    assert {value.name for value in onnx.load_from_string(made).graph.input} - {"image"} <= set(constants(made))
    assert {f"{name}_int4" for name in LAYERS} <= set(constants(made))
    assert np.array_equal(logits(made, images()), logits(quantize(WIDE, "int4"), images()))


def product_of(*inputs: str, constant: NDArray[np.float32]) -> bytes:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, [4, 4])
    answer = helper.make_tensor_value_info("logits", TensorProto.FLOAT, None)
    answer.type.tensor_type.shape.SetInParent()
    graph = helper.make_graph(
        [helper.make_node("MatMul", inputs, ["product"]), helper.make_node("Identity", ["product"], ["logits"])],
        "product",
        [image],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [4, 4])],
        [numpy_helper.from_array(constant, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


SQUARE = np.eye(4, dtype=np.float32)


@pytest.mark.parametrize("inputs", [("image", "image"), ("w", "image")])
def test_quantize_refuses_when_no_weight_is_the_second_operand(inputs: tuple[str, str]) -> None:
    with pytest.raises(QuantizationError, match="no Conv, Gemm or MatMul has a constant float32 weight; there is"):
        quantize(product_of(*inputs, constant=SQUARE), "int4")


def test_quantize_refuses_when_no_axis_is_as_long_as_a_block() -> None:
    with pytest.raises(QuantizationError, match="no weight has 16 or more values along its reduction axis, so that"):
        quantize(product_of("image", "w", constant=SQUARE), "int4", block_size=16)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantize_refuses_when_a_weight_is_not_finite(value: float) -> None:
    broken = SQUARE.copy()
    broken[1, 2] = value
    with pytest.raises(QuantizationError, match="weight 'w' has NaN or infinite values; train or export"):
        quantize(product_of("image", "w", constant=broken), "int4")
