from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.exact_products import UnsupportedArithmeticError, exact_model

from .mixed_graphs import PRODUCTS, ROWS, K, N, codes, model, product, run, single


def _rewritten(data: bytes) -> bytes:
    exact = exact_model(data)
    assert exact.rewritten == ("product",)
    assert exact_model(exact.data).rewritten == ()
    return exact.data


@pytest.mark.parametrize("name", PRODUCTS)
def test_exact_model_gives_the_same_bits_where_nothing_can_saturate(name: str) -> None:
    data, x = product(name, bits=7)  # 2 * 255 * 64 fits in int16
    np.testing.assert_array_equal(run(_rewritten(data), x), run(data, x))


@pytest.mark.parametrize("name", PRODUCTS)
def test_exact_model_multiplies_no_u8_by_s8_codes(name: str) -> None:
    graph = onnx.load_from_string(_rewritten(product(name)[0])).graph
    held = {tensor.name: tensor.data_type for tensor in graph.initializer}
    assert TensorProto.INT8 not in held.values()
    assert [held[held_name] for held_name in graph.node[0].input if held_name.startswith("w/")] == [TensorProto.UINT8]


def _matmul(data: bytes, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    w, zero = codes((K, N), "int8", seed=1).astype(np.int64), 7
    return run(_rewritten(data), x), (x.astype(np.int64) - zero) @ w


def test_exact_model_equals_the_int64_product_over_the_whole_range() -> None:
    found, expected = _matmul(*product("MatMulInteger"))
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected).max() > 2**15


def test_exact_model_equals_the_int64_convolution_over_the_whole_range() -> None:
    data, x = product("ConvInteger")
    kernel = codes((N, 4, 3, 3), "int8", seed=3).astype(np.int64)
    padded = np.pad(x.astype(np.int64) - 7, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    np.testing.assert_array_equal(run(_rewritten(data), x), np.einsum("nchwij,kcij->nkhw", windows, kernel))


@pytest.mark.parametrize("op_type", ["QGemm", "MatMulIntegerToFloat"])
def test_exact_model_equals_the_scaled_int64_product_over_the_whole_range(op_type: str) -> None:
    found, sums = _matmul(*product(op_type))
    scales = np.float32(0.01) * np.linspace(0.01, 0.02, N, dtype=np.float32)
    np.testing.assert_allclose(found, sums * scales, rtol=1e-6)


@pytest.mark.parametrize(("left", "right"), [("uint8", "uint8"), ("int8", "int8")])
def test_exact_model_keeps_the_bytes_of_other_pairs(left: str, right: str) -> None:
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(left))
    data = model([single("MatMulInteger", ["x", "w"])], {"w": codes((K, N), right)}, given=kind)
    assert exact_model(data) == type(exact_model(data))(data, ())


def test_exact_model_keeps_weights_that_something_else_reads() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["floats"]),
        helper.make_node("ReduceSum", ["floats"], ["total"], keepdims=0),
        helper.make_node("MatMulInteger", ["x", "w", "", "zero"], ["sums"], name="product"),
        helper.make_node("Cast", ["sums"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["cast", "total"], ["y"]),
    ]
    constants = {"w": codes((K, N), "int8", bits=7), "scale": np.float32(0.5), "zero": np.int8(0)}
    constants = {name: np.asarray(value) for name, value in constants.items()}
    data, x = model(nodes, constants, output=TensorProto.FLOAT), codes((ROWS, K), "uint8")
    found = _rewritten(data)
    names = {tensor.name for tensor in onnx.load_from_string(found).graph.initializer}
    assert names == {"w", "w/u8", "scale", "zero", "zero/u8"}
    np.testing.assert_array_equal(run(found, x), run(data, x))


def test_exact_model_moves_right_operands_that_the_graph_computes() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["floats", "scale", "zero"], ["w"]),
        helper.make_node("Identity", ["zero"], ["same zero"]),
        helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "a scale", "a zero"]),
        helper.make_node("MatMulInteger", ["a", "w", "a zero", "same zero"], ["y"], name="product"),
    ]
    floats = np.random.default_rng(0).normal(0, 30, (K, N)).astype(np.float32)
    constants = {"floats": floats, "scale": np.asarray(np.float32(1)), "zero": np.asarray(np.int8(3))}
    data = model(nodes, constants, given=TensorProto.FLOAT)
    x = np.linspace(-1, 1, ROWS * K, dtype=np.float32).reshape(ROWS, K)
    weights = np.clip(np.rint(floats) + 3, -128, 127).astype(np.int64) - 3
    scale = np.float32(2) / np.float32(255)
    zero = np.rint(np.float32(1) / scale)
    left = np.clip(np.rint(x / scale) + zero, 0, 255).astype(np.int64) - int(zero)
    np.testing.assert_array_equal(run(_rewritten(data), x), left @ weights)


def _in_a_branch(*, zero_point: bool) -> bytes:
    inputs = ["left", "w", "zero"] if zero_point else ["left", "w"]
    inner = [
        helper.make_node("Identity", ["x"], ["left"]),
        helper.make_node("MatMulInteger", inputs, ["sums"], name="product"),
    ]
    value = helper.make_tensor_value_info("sums", TensorProto.INT32, None)
    body = helper.make_graph(inner, "body", [], [value])
    other = [helper.make_node("MatMulInteger", ["x", "w"], ["others"], name="other")]
    value = helper.make_tensor_value_info("others", TensorProto.INT32, None)
    branch = helper.make_graph(other, "other", [], [value])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=branch)
    constants = {"w": codes((K, N), "int8"), "yes": np.asarray(True), "zero": np.asarray(np.uint8(0))}
    return model([node], constants)


def test_exact_model_rewrites_branches_too() -> None:
    data, x = _in_a_branch(zero_point=True), codes((ROWS, K), "uint8")
    exact = exact_model(data)
    assert sorted(exact.rewritten) == ["other", "product"]
    expected = x.astype(np.int64) @ codes((K, N), "int8").astype(np.int64)
    np.testing.assert_array_equal(run(exact.data, x), expected)


def test_exact_model_refuses_operands_of_unknown_types() -> None:
    message = (
        r"^node 'product': operator 'MatMulInteger' of domain 'ai.onnx' multiplies codes of unknown types; judge the "
        "file in as-run arithmetic, on the CPU that it is for$"
    )
    with pytest.raises(UnsupportedArithmeticError, match=message):
        exact_model(_in_a_branch(zero_point=False))


def test_exact_model_refuses_an_operator_without_an_exact_form() -> None:
    data = model([single("DynamicQuantizeLSTM", ["x"], domain="com.microsoft")], {})
    message = r"^node 'product': operator 'DynamicQuantizeLSTM' of domain 'com.microsoft' has no exact form here; judge"
    with pytest.raises(UnsupportedArithmeticError, match=message):
        exact_model(data)


def test_exact_model_takes_no_name_twice() -> None:
    constants = {"w": codes((K, N), "int8"), "w/u8": np.zeros(N, np.int32)}
    nodes = [single("MatMulInteger", ["x", "w"]), helper.make_node("Add", ["y", "w/u8"], ["z"])]
    exact = exact_model(model(nodes, constants))
    onnxruntime.InferenceSession(exact.data, providers=["CPUExecutionProvider"])
    names = [tensor.name for tensor in onnx.load_from_string(exact.data).graph.initializer]
    assert names == ["w/u8", "w/u8_", "zero_point/u8"]


def test_exact_model_takes_products_that_share_a_zero_point() -> None:
    """Where ONNX Runtime's own option ends with "Attempt to replace the existing tensor"."""
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "", "zero"], ["first"], name="one"),
        helper.make_node("MatMulInteger", ["x", "v", "", "zero"], ["second"], name="two"),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    w, v, x = codes((K, N), "int8"), codes((K, N), "int8", seed=9), codes((ROWS, K), "uint8")
    exact = exact_model(model(nodes, {"w": w, "v": v, "zero": np.asarray(np.int8(5))}))
    assert exact.rewritten == ("one", "two")
    names = [tensor.name for tensor in onnx.load_from_string(exact.data).graph.initializer]
    assert sorted(names) == ["v/u8", "w/u8", "zero/u8"]
    expected = x.astype(np.int64) @ (w.astype(np.int64) + v - 10)
    np.testing.assert_array_equal(run(exact.data, x), expected)


def test_exact_model_keeps_a_zero_point_of_the_name_of_its_own_apart() -> None:
    nodes = [
        helper.make_node("MatMulInteger", ["x", "w", "", "zero_point"], ["first"], name="one"),
        helper.make_node("MatMulInteger", ["x", "w"], ["second"], name="two"),
        helper.make_node("Add", ["first", "second"], ["y"]),
    ]
    w, x = codes((K, N), "int8"), codes((ROWS, K), "uint8")
    exact = exact_model(model(nodes, {"w": w, "zero_point": np.asarray(np.int8(3))}))
    expected = x.astype(np.int64) @ (2 * w.astype(np.int64) - 3)
    np.testing.assert_array_equal(run(exact.data, x), expected)


@pytest.mark.parametrize("taken", [True, False])
def test_exact_model_keeps_constants_of_one_name_in_two_branches_apart(taken: bool) -> None:
    weights = {"then": codes((K, N), "int8"), "else": codes((K, N), "int8", seed=1)}
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node("MatMulInteger", ["x", "w"], [name], name=name)],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.INT32, None)],
            [numpy_helper.from_array(w, "w")],
        )
        for name, w in weights.items()
    }
    node = helper.make_node("If", ["taken"], ["y"], **branches)
    exact, x = exact_model(model([node], {"taken": np.asarray(taken)})), codes((ROWS, K), "uint8")
    expected = x.astype(np.int64) @ weights["then" if taken else "else"].astype(np.int64)
    np.testing.assert_array_equal(run(exact.data, x), expected)


def test_exact_model_asks_for_no_weights_whose_initializers_are_inputs_too() -> None:
    data, x = product("MatMulInteger", bits=7)
    proto = onnx.load_from_string(data)
    for tensor in proto.graph.initializer:
        proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    np.testing.assert_array_equal(run(_rewritten(proto.SerializeToString()), x), run(data, x))
