from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qdefense.converters.shadow import runtime_saturation

from .shadow_graphs import MICROSOFT, Array, graph_model, scalars, session_output, shadow_output

TYPES = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8, np.int32: TensorProto.INT32}
SIGNS = [(np.uint8, np.int8), (np.uint8, np.uint8), (np.int8, np.int8)]


def codes(kind: type, *shape: int, seed: int = 0) -> Array:
    limits = np.iinfo(kind)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape).astype(kind)


def assert_same_codes(model: bytes, x: Array, *, operator: str, batch: int = 0) -> None:
    expected = session_output(model, x, batch=batch)
    found = shadow_output(model, x, saturate=operator in runtime_saturation())
    assert expected.min() < expected.max(), "a constant output would prove nothing"
    np.testing.assert_array_equal(found, expected.astype(np.float64))


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


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("left", "right", "out"), [(0.5, 0.25, 1.0), (0.0371, 0.0123, 0.0411), (0.1, 0.3, 0.2), (2e-3, 0.7, 0.9)]
)
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("zeros", [(0, 0, 0), (3, 77, 51)])
def test_elementwise_equals_runtime_when_all_pairs_of_codes_meet(
    operator: str, kind: type, left: float, right: float, out: float, zeros: tuple[int, int, int]
) -> None:
    limits = np.iinfo(kind)
    every = np.arange(limits.min, limits.max + 1).astype(kind)
    out = left * right * 200 if operator == "QLinearMul" else out
    constants = scalars(
        xs=(left, np.float32), xz=(zeros[0], kind), bs=(right, np.float32), bz=(zeros[1], kind),
        ys=(out, np.float32), yz=(zeros[2], kind),
    )  # fmt: skip
    constants["b"] = np.tile(every, (256, 1))
    node = helper.make_node(operator, ["x", "xs", "xz", "b", "bs", "bz", "ys", "yz"], ["y"], domain=MICROSOFT)
    x = np.repeat(every[:, None], 256, 1)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator=operator)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("size", "x_scale", "y_scale"), [(8, 0.5, 0.25), (7, 0.031, 0.017), (4, 0.25, 0.25), (1, 1.0, 3.0)]
)
def test_qlinear_global_average_pool_equals_runtime_when_codes_are_random(
    kind: type, size: int, x_scale: float, y_scale: float
) -> None:
    constants = scalars(xs=(x_scale, np.float32), xz=(5, kind), ys=(y_scale, np.float32), yz=(9, kind))
    node = helper.make_node(
        "QLinearGlobalAveragePool", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, channels_last=0
    )
    x = codes(kind, 32, 64, size, size)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ],
)
def test_qlinear_average_pool_equals_runtime_when_codes_are_random(kind: type, attributes: dict[str, Any]) -> None:
    constants = scalars(xs=(0.031, np.float32), xz=(5, kind), ys=(0.017, np.float32), yz=(9, kind))
    node = helper.make_node("QLinearAveragePool", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, **attributes)
    x = codes(kind, 8, 16, 8, 8)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(("operator", "attributes"), [("QLinearLeakyRelu", {"alpha": 0.1}), ("QLinearSigmoid", {})])
def test_tabulated_operator_equals_runtime_on_every_code(operator: str, attributes: dict[str, Any], kind: type) -> None:
    limits = np.iinfo(kind)
    constants = scalars(xs=(0.031, np.float32), xz=(5, kind), ys=(0.017, np.float32), yz=(9, kind))
    node = helper.make_node(operator, ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, **attributes)
    x = np.arange(limits.min, limits.max + 1).astype(kind)[:, None]
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(("axis", "opset"), [(-1, 13), (1, 13), (1, 12)])
@pytest.mark.parametrize("y_scale", [1 / 256, 1 / 255])
def test_qlinear_softmax_equals_runtime_when_codes_are_random(
    kind: type, axis: int, opset: int, y_scale: float
) -> None:
    limits = np.iinfo(kind)
    constants = scalars(xs=(0.05, np.float32), xz=(5, kind), ys=(y_scale, np.float32), yz=(limits.min, kind))
    node = helper.make_node(
        "QLinearSoftmax", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, axis=axis, opset=opset
    )
    x = codes(kind, 64, 10, 3)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_qlinear_concat_equals_runtime_when_scales_differ(kind: type) -> None:
    constants = scalars(
        ys=(0.02, np.float32), yz=(9, kind), xs=(0.031, np.float32), xz=(5, kind), bs=(0.02, np.float32), bz=(9, kind)
    ) | {"b": codes(kind, 4, 3, 5, 5, seed=1)}
    node = helper.make_node(
        "QLinearConcat", ["ys", "yz", "x", "xs", "xz", "b", "bs", "bz"], ["y"], domain=MICROSOFT, axis=1
    )
    x = codes(kind, 4, 2, 5, 5)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


QUANTIZERS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "per tensor": ((), {}),
    "per channel": ((4,), {"axis": 1}),
    "last axis": ((6,), {"axis": -1}),
    "blocked": ((5, 2, 6), {"axis": 1, "block_size": 2}),
}


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_quantize_linear_equals_runtime_when_values_lie_on_ties(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng, limits = np.random.default_rng(5), np.iinfo(kind)
    scale = 2.0 ** rng.integers(-3, 0, shape)
    zero = rng.integers(max(limits.min, -20), 20, shape).astype(kind)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = (rng.integers(-400, 400, (5, 4, 6)) / 8).astype(np.float32)
    constants = {"s": np.asarray(scale, dtype=np.float32), "z": zero}
    kind_of_output = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    assert_same_codes(graph_model([node], x, constants, output_type=kind_of_output), x, operator="")


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_dequantize_linear_equals_runtime_when_codes_are_random(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng = np.random.default_rng(6)
    constants = {"s": rng.uniform(0.01, 0.1, shape).astype(np.float32), "z": rng.integers(0, 20, shape).astype(kind)}
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = codes(kind, 5, 4, 6)
    assert_same_codes(graph_model([node], x, constants), x, operator="")


def test_quantize_linear_takes_type_from_attribute_when_zero_point_is_left_out() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.INT8)
    x = np.linspace(-300, 300, 1000, dtype=np.float32)[:, None]
    model = graph_model([node], x, scalars(s=(1.5, np.float32)), output_type=TensorProto.INT8)
    assert_same_codes(model, x, operator="")


def dynamic_inputs() -> Array:
    rng = np.random.default_rng(7)
    x = rng.normal(0, 1, (12, 3, 6, 6)) * rng.uniform(0.1, 9, (12, 1, 1, 1))
    x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("output", "kind"), [("q", TensorProto.UINT8), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)]
)
def test_dynamic_quantize_linear_equals_runtime_at_batch_one(output: str, kind: int) -> None:
    x = dynamic_inputs()
    model = graph_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], x, {}, output, kind)
    expected = np.stack(
        [session_output(model, x[at : at + 1]).reshape(x.shape[1:] if output == "q" else ()) for at in range(12)]
    )
    np.testing.assert_array_equal(shadow_output(model, x), expected.astype(np.float32))


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
