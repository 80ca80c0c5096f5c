from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qdefense.converters.shadow import UnsupportedOperatorError, runtime_saturation

from .code_graphs import SIGNS, TYPES, assert_same_codes, codes, dynamic_inputs
from .shadow_graphs import MICROSOFT, graph_model, scalars, session_output, shadow_output

CONVOLUTIONS: dict[str, tuple[dict[str, Any], int]] = {
    "plain": ({}, 1),
    "padded": ({"pads": [1, 1, 1, 1]}, 1),
    "lopsided": ({"pads": [0, 1, 2, 0]}, 1),
    "strided": ({"strides": [2, 2], "pads": [1, 1, 1, 1]}, 1),
    "dilated": ({"dilations": [2, 2], "pads": [2, 2, 2, 2]}, 1),
    "grouped": ({"group": 2, "pads": [1, 1, 1, 1]}, 2),
    "depthwise": ({"group": 4, "pads": [1, 1, 1, 1]}, 4),
    "same upper": ({"auto_pad": "SAME_UPPER", "strides": [2, 2]}, 1),
    "same lower": ({"auto_pad": "SAME_LOWER", "strides": [2, 2]}, 1),
}


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
@pytest.mark.parametrize(("per_channel", "with_bias"), [(False, False), (True, True)])
def test_qlinear_conv_equals_runtime_when_codes_are_random(
    geometry: str, kind: type, weight_kind: type, per_channel: bool, with_bias: bool
) -> None:
    attributes, groups = CONVOLUTIONS[geometry]
    rng, limits = np.random.default_rng(1), np.iinfo(weight_kind)
    middle = (limits.min + limits.max + 1) // 2
    weight = rng.integers(middle - 60, middle + 60, (4, 4 // groups, 3, 3)).astype(weight_kind)
    constants = scalars(
        xs=(0.03, np.float32), xz=(3, kind), wz=(middle, weight_kind), ys=(0.35, np.float32), yz=(5, kind)
    )
    constants |= {"w": weight, "ws": np.array(0.02, dtype=np.float32)}
    if per_channel:
        constants["ws"] = rng.uniform(0.01, 0.03, 4).astype(np.float32)
        constants["wz"] = np.full(4, middle, dtype=weight_kind)
    if with_bias:
        constants["b"] = rng.integers(-5000, 5000, 4).astype(np.int32)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", *(["b"] if with_bias else [])]
    node = helper.make_node("QLinearConv", names, ["y"], **attributes)
    x = codes(kind, 3, 4, 9, 9)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="QLinearConv")


@pytest.mark.parametrize("geometry", CONVOLUTIONS)
@pytest.mark.parametrize("weight_kind", [np.uint8, np.int8])
def test_conv_integer_equals_runtime_when_codes_are_random(geometry: str, weight_kind: type) -> None:
    attributes, groups = CONVOLUTIONS[geometry]
    constants = scalars(xz=(7, np.uint8), wz=(2, weight_kind)) | {"w": codes(weight_kind, 4, 4 // groups, 3, 3, seed=1)}
    node = helper.make_node("ConvInteger", ["x", "w", "xz", "wz"], ["y"], **attributes)
    x = codes(np.uint8, 3, 4, 9, 9)
    assert_same_codes(graph_model([node], x, constants, output_type=TensorProto.INT32), x, operator="ConvInteger")


@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
@pytest.mark.parametrize("zero_points", ["none", "scalar", "per column"])
def test_matmul_integer_equals_runtime_when_codes_are_random(kind: type, weight_kind: type, zero_points: str) -> None:
    constants = {"w": codes(weight_kind, 64, 6, seed=1)}
    names = ["x", "w"]
    if zero_points != "none":
        constants |= {"xz": np.array(9, dtype=kind), "wz": np.array(4, dtype=weight_kind)}
        names += ["xz", "wz"]
    if zero_points == "per column":
        constants["wz"] = codes(weight_kind, 6, seed=2)
    node = helper.make_node("MatMulInteger", names, ["y"])
    x = codes(kind, 5, 64)
    assert_same_codes(graph_model([node], x, constants, output_type=TensorProto.INT32), x, operator="MatMulInteger")


@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
@pytest.mark.parametrize("per_column", [False, True])
def test_qlinear_matmul_equals_runtime_when_codes_are_random(kind: type, weight_kind: type, per_column: bool) -> None:
    rng = np.random.default_rng(3)
    constants = scalars(
        xs=(0.03, np.float32),
        xz=(3, kind),
        ws=(0.02, np.float32),
        wz=(1, weight_kind),
        ys=(2.9, np.float32),
        yz=(99, kind),
    )
    constants["w"] = codes(weight_kind, 64, 6, seed=1)
    constants["ys"] *= 4 if weight_kind is np.uint8 else 1
    if per_column:
        constants["ws"] = rng.uniform(0.01, 0.03, 6).astype(np.float32)
        constants["wz"] = codes(weight_kind, 6, seed=2)
    node = helper.make_node("QLinearMatMul", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"])
    x = codes(kind, 40, 64)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="QLinearMatMul")


@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
@pytest.mark.parametrize(("transposed", "with_bias", "to_codes"), [(0, False, True), (1, True, True), (1, True, False)])
def test_qgemm_equals_runtime_when_codes_are_random(
    kind: type, weight_kind: type, transposed: int, with_bias: bool, to_codes: bool
) -> None:
    rng = np.random.default_rng(4)
    constants = scalars(xs=(0.03, np.float32), xz=(3, kind), ys=(1.7, np.float32), yz=(11, kind))
    constants["w"] = codes(weight_kind, *((6, 64) if transposed else (64, 6)), seed=1)
    constants["ws"] = rng.uniform(0.01, 0.03, 6).astype(np.float32)
    constants["wz"] = np.zeros(6, dtype=weight_kind)
    constants["b"] = rng.integers(-5000, 5000, 6).astype(np.int32)
    names = ["x", "xs", "xz", "w", "ws", "wz", "b" if with_bias else "", *(["ys", "yz"] if to_codes else [])]
    node = helper.make_node("QGemm", names, ["y"], domain=MICROSOFT, transB=transposed, alpha=0.75)
    x = codes(kind, 40, 64)
    kind_of_output = TYPES[kind] if to_codes else TensorProto.FLOAT
    assert_same_codes(graph_model([node], x, constants, output_type=kind_of_output), x, operator="QGemm")


@pytest.mark.parametrize("weight_kind", [np.uint8, np.int8])
@pytest.mark.parametrize("scale_shape", [(), (1,), (5,)])
def test_dynamic_product_equals_runtime_at_batch_one(weight_kind: type, scale_shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(8)
    constants = {
        "w": codes(weight_kind, 18, 5, seed=1), "wz": np.array(3, dtype=weight_kind),
        "ws": rng.uniform(0.01, 0.02, scale_shape).astype(np.float32), "shape": np.array([1], dtype=np.int64),
        "axes": np.array([0], dtype=np.int64), "b": rng.normal(0, 1, 5).astype(np.float32),
    }  # fmt: skip
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z", "wz"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["s", "shape"], ["s1"]),
        helper.make_node("Squeeze", ["s1", "axes"], ["s2"]),
        helper.make_node("Mul", ["s2", "ws"], ["m"]),
        helper.make_node("Mul", ["f", "m"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    x = dynamic_inputs().reshape(12, 6, 18)
    model = graph_model(nodes, x, constants)
    expected = session_output(model, x, level="ORT_DISABLE_ALL", batch=1)
    found = shadow_output(model, x, saturate="MatMulInteger" in runtime_saturation())
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("weight_kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("operator", "with_bias"), list(product(["DynamicQuantizeMatMul", "MatMulIntegerToFloat"], [False, True]))
)
def test_fused_dynamic_product_equals_runtime_at_batch_one(operator: str, weight_kind: type, with_bias: bool) -> None:
    rng = np.random.default_rng(9)
    constants = {
        "w": codes(weight_kind, 108, 5, seed=1), "wz": np.array(3, dtype=weight_kind),
        "ws": np.array(0.013, dtype=np.float32), "b": rng.normal(0, 1, 5).astype(np.float32),
    }  # fmt: skip
    bias = ["b"] if with_bias else []
    nodes = [helper.make_node(operator, ["x", "w", "ws", "wz", *bias], ["y"], domain=MICROSOFT)]
    if operator == "MatMulIntegerToFloat":
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node(operator, ["q", "w", "s", "ws", "z", "wz", *bias], ["y"], domain=MICROSOFT),
        ]
    x = dynamic_inputs().reshape(12, 108)
    model = graph_model(nodes, x, constants)
    found = shadow_output(model, x, saturate="MatMulInteger" in runtime_saturation())
    np.testing.assert_allclose(found, session_output(model, x, batch=1), rtol=2e-7, atol=1e-6)


def test_wide_reduction_is_exact_only_when_asked_for() -> None:
    constants = {"w": np.full((2048, 3), 255, dtype=np.uint8)}
    constants["w"][::7, 1] -= 2
    x = codes(np.uint8, 16, 2048)
    x[:, ::2] |= 129
    model = graph_model(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], x, constants, output_type=TensorProto.INT32
    )
    expected = session_output(model, x).astype(np.float64)
    assert expected.max() > 2**24
    np.testing.assert_array_equal(shadow_output(model, x), expected)
    assert not np.array_equal(shadow_output(model, x, exact=False), expected)


# images, weights, settings of convolutions that do not slide over two axes, or whose channels come last
OTHER_CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "one axis": ((2, 6, 12), (4, 6, 3), {"pads": [1, 1]}),
    "one axis, grouped": ((2, 6, 12), (4, 3, 3), {"group": 2, "dilations": [2]}),
    "three axes": ((1, 4, 5, 6, 5), (8, 4, 2, 3, 3), {"pads": [0, 1, 1, 1, 1, 0]}),
    "three axes, depthwise": ((1, 4, 5, 6, 5), (4, 1, 2, 2, 2), {"group": 4}),
    "channels last": ((2, 7, 7, 6), (8, 6, 3, 3), {"channels_last": 1, "pads": [1, 1, 1, 1]}),
}


@pytest.mark.parametrize("name", OTHER_CONVOLUTIONS)
@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
def test_convolution_of_another_form_equals_runtime(name: str, kind: type, weight_kind: type) -> None:
    shape, kernel, attributes = OTHER_CONVOLUTIONS[name]
    middle = 128 if weight_kind is np.uint8 else 0
    constants = scalars(
        xs=(0.03, np.float32), xz=(3, kind), ws=(0.01, np.float32), wz=(middle, weight_kind),
        ys=(0.03 * float(np.prod(kernel[1:])) ** 0.5, np.float32), yz=(99, kind),
    )  # fmt: skip
    constants |= {"w": codes(weight_kind, *kernel, seed=1)}
    domain = MICROSOFT if "channels_last" in attributes else ""
    node = helper.make_node(
        "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], domain=domain, **attributes
    )
    x = codes(kind, *shape)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="QLinearConv")


@pytest.mark.parametrize(("kind", "weight_kind"), SIGNS)
@pytest.mark.parametrize("right", [(16, 5), (1, 16, 5), (2, 3, 16, 5)])
def test_batched_product_equals_runtime(kind: type, weight_kind: type, right: tuple[int, ...]) -> None:
    constants = scalars(xz=(3, kind), wz=(1, weight_kind)) | {"w": codes(weight_kind, *right, seed=1)}
    x = codes(kind, 2, 3, 4, 16)
    node = helper.make_node("MatMulInteger", ["x", "w", "xz", "wz"], ["y"])
    assert_same_codes(graph_model([node], x, constants, output_type=TensorProto.INT32), x, operator="MatMulInteger")


@pytest.mark.parametrize("shape", [(7,), (1, 7), (9, 7), (9, 1), (1,)])
@pytest.mark.parametrize("to_codes", [False, True])
def test_qgemm_equals_runtime_for_each_shape_of_c(shape: tuple[int, ...], to_codes: bool) -> None:
    constants = scalars(
        xs=(0.03, np.float32), xz=(3, np.uint8), ws=(0.01, np.float32), wz=(0, np.int8), ys=(0.5, np.float32),
        yz=(99, np.uint8),
    )  # fmt: skip
    constants |= {"w": codes(np.int8, 33, 7, seed=1), "c": codes(np.int32, *shape, seed=2) // 2**18}
    names = ["x", "xs", "xz", "w", "ws", "wz", "c", *(["ys", "yz"] if to_codes else [])]
    node = helper.make_node("QGemm", names, ["y"], domain=MICROSOFT, transA=1, alpha=0.37)
    x = codes(np.uint8, 33, 9)
    kind_of_output = TensorProto.UINT8 if to_codes else TensorProto.FLOAT
    assert_same_codes(graph_model([node], x, constants, output_type=kind_of_output), x, operator="QGemm")


def test_vector_as_right_operand_is_refused() -> None:
    x = codes(np.uint8, 4, 16)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    model = graph_model([node], x, {"w": codes(np.int8, 16)}, output_type=TensorProto.INT32)
    with pytest.raises(UnsupportedOperatorError, match="its right operand is a vector, which is not covered"):
        shadow_output(model, x)
