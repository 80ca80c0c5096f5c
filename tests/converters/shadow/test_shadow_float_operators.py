from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.shadow import ShadowError, build_shadow, registered

from .shadow_graphs import MICROSOFT, Array, graph_model, session_output, shadow_output

# modules of the operator test suite inside the onnx package that hold cases of registered operators
SUITE = (
    *("add", "averagepool", "batch_normalization", "clip", "concat", "conv", "convinteger", "dequantizelinear", "div"),
    *("dropout", "flatten", "gather", "gemm", "globalaveragepool", "identity", "leakyrelu", "logsoftmax", "matmul"),
    *("matmulinteger", "maxpool", "mul", "qlinearconv", "qlinearmatmul", "quantizelinear", "reducemean", "relu"),
    *("reshape", "shape", "sigmoid", "slice", "softmax", "squeeze", "sub", "transpose", "unsqueeze"),
)


def suite_cases() -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SUITE:
            importlib.import_module(f"onnx.backend.test.case.node.{name}")
        cases = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    known = {op_type for domain, op_type, _ in registered() if domain == ""}
    return {case.name: case for case in cases if {node.op_type for node in case.model.graph.node} <= known}


CASES = suite_cases()


def as_array(value: Any) -> Array:
    return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else np.asarray(value)


def one_input(case: Any) -> tuple[bytes, Array, Array]:
    """The case's model with every input but the first turned into an initializer, its input and its answer."""
    inputs, outputs = case.data_sets[0]
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for value, array in list(zip(model.graph.input, inputs, strict=True))[1:]:
        tensor = array if isinstance(array, onnx.TensorProto) else numpy_helper.from_array(np.asarray(array))
        model.graph.initializer.add().CopyFrom(tensor)
        model.graph.initializer[-1].name = value.name
    return model.SerializeToString(), as_array(inputs[0]), as_array(outputs[0])


def agrees(case: Any) -> bool:
    """Whether the shadow gives the case's answer; False where it refuses the case.

    Raises:
        AssertionError: it gives another one.
    """
    model, x, expected = one_input(case)
    try:
        shadow = build_shadow(model, source="shipped")
    except ShadowError:
        return False
    with torch.no_grad():
        found = shadow(torch.from_numpy(np.array(x, dtype=np.float32)), exact=True).numpy()
    np.testing.assert_allclose(found, expected.astype(np.float64), rtol=case.rtol, atol=1e-6)
    return True


def test_suite_of_the_onnx_package_finds_no_difference() -> None:
    agreed = [name for name, case in CASES.items() if agrees(case)]
    assert len(agreed) >= 170, f"only {len(agreed)} of {len(CASES)} cases were covered"
    assert {"test_basic_conv_with_padding", "test_qlinearconv", "test_reshape_allowzero_reordered"} <= set(agreed)


def images(*shape: int) -> Array:
    return np.random.default_rng(0).normal(0, 1, shape or (3, 4, 9, 9)).astype(np.float32)


WEIGHT = np.random.default_rng(1).normal(0, 0.3, (6, 4, 3, 3)).astype(np.float32)
BIAS = np.random.default_rng(2).normal(0, 1, 6).astype(np.float32)
MATRIX = np.random.default_rng(3).normal(0, 0.3, (8, 5)).astype(np.float32)
ADDED = np.random.default_rng(4).normal(0, 1, (3, 6, 9, 9)).astype(np.float32)


@pytest.mark.parametrize(
    ("activation", "numbers"),
    [
        ("Relu", []),
        ("Sigmoid", []),
        ("Tanh", []),
        ("LeakyRelu", [0.2]),
        ("Clip", [-0.5, 0.5]),
        ("HardSigmoid", [0.3, 0.4]),
    ],
)
@pytest.mark.parametrize("added", [False, True])
def test_fused_conv_equals_runtime_for_each_activation(activation: str, numbers: list[float], added: bool) -> None:
    constants = {"w": WEIGHT, "b": BIAS} | ({"z": ADDED} if added else {})
    attributes = {"activation": activation, "pads": [1, 1, 1, 1]} | ({"activation_params": numbers} if numbers else {})
    node = helper.make_node("FusedConv", ["x", *constants], ["y"], domain=MICROSOFT, **attributes)
    model = graph_model([node], images(), constants)
    np.testing.assert_allclose(shadow_output(model, images()), session_output(model, images()), rtol=1e-5, atol=1e-5)


Case = tuple[onnx.NodeProto, dict[str, Array], tuple[int, ...]]


def case(op_type: str, shape: tuple[int, ...], *constants: Array, domain: str = "", **attributes: Any) -> Case:
    named = {f"c{index}": value for index, value in enumerate(constants)}
    return helper.make_node(op_type, ["x", *named], ["y"], domain=domain, **attributes), named, shape


PLANE = (2, 3, 8, 8)
OPERATORS: dict[str, Case] = {
    "fused gemm": case("FusedGemm", (3, 8), MATRIX, BIAS[:5], domain=MICROSOFT, activation="Relu"),
    "fused gemm, leaky": case(
        "FusedGemm", (3, 8), MATRIX, BIAS[:5], domain=MICROSOFT, activation="LeakyRelu", activation_alpha=0.2
    ),
    "scaled gemm": case("Gemm", (3, 8), MATRIX.T, BIAS[:5], transB=1, alpha=0.5, beta=2.0),
    "gemm without c": case("Gemm", (3, 8), MATRIX, alpha=0.5),
    "fused matmul": case("FusedMatMul", (3, 2, 8), MATRIX.T, domain=MICROSOFT, transB=1, alpha=0.25),
    "average by ceil": case("AveragePool", PLANE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "average with padding": case("AveragePool", PLANE, kernel_shape=[3, 2], pads=[1, 0, 0, 1], count_include_pad=1),
    "average of a line": case("AveragePool", (2, 3, 8), kernel_shape=[3], pads=[1, 1]),
    "maximum by ceil": case("MaxPool", PLANE, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1),
    "maximum, wide padding": case("MaxPool", PLANE, kernel_shape=[3, 3], pads=[2, 2, 2, 2]),
    "maximum, dilated": case("MaxPool", PLANE, kernel_shape=[2, 2], dilations=[3, 2]),
    "mean, kept": case("ReduceMean", PLANE, np.array([2, 3])),
    "mean, dropped": case("ReduceMean", PLANE, np.array([-1]), keepdims=0),
    "mean of all": case("ReduceMean", (2, 3), keepdims=1),
    "mean of none": case("ReduceMean", (2, 3), noop_with_empty_axes=1),
    "clip": case("Clip", (2, 3), np.array(-0.2, dtype=np.float32), np.array(0.3, dtype=np.float32)),
    "quotient": case("Div", (2, 3, 4), BIAS[:3].reshape(1, 3, 1)),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_equals_runtime(name: str) -> None:
    node, constants, shape = OPERATORS[name]
    model, x = graph_model([node], images(*shape), constants), images(*shape)
    expected = session_output(model, x)
    found = shadow_output(model, x)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def old_models() -> Iterator[tuple[str, bytes, Array]]:
    """Operators whose meaning changed between opset versions, in their old form."""
    x = images(2, 3, 4)
    softmax = helper.make_node("Softmax", ["x"], ["y"])
    log_softmax = helper.make_node("LogSoftmax", ["x"], ["y"], axis=2)
    yield "Softmax", graph_model([softmax], x, {}, opset=11), x
    yield "LogSoftmax", graph_model([log_softmax], x, {}, opset=11), x
    mean = helper.make_node("ReduceMean", ["x"], ["y"], axes=[1, 2], keepdims=0)
    yield "ReduceMean", graph_model([mean], x, {}, opset=17), x
    clip = helper.make_node("Clip", ["x"], ["y"], min=-0.1, max=0.1)
    yield "Clip", graph_model([clip], x, {}, opset=10), x
    yield (
        "Slice",
        graph_model([helper.make_node("Slice", ["x"], ["y"], starts=[1], ends=[3], axes=[2])], x, {}, opset=9),
        x,
    )
    nodes = [
        helper.make_node("Unsqueeze", ["x"], ["u"], axes=[0, 4]),
        helper.make_node("Squeeze", ["u"], ["y"], axes=[0]),
    ]
    yield "Squeeze", graph_model(nodes, x, {}, opset=11), x


@pytest.mark.parametrize(
    ("name", "model", "x"), list(old_models()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_old_form_equals_runtime(name: str, model: bytes, x: Array) -> None:
    np.testing.assert_allclose(shadow_output(model, x), session_output(model, x), rtol=1e-5, atol=1e-6)


def test_shape_computed_by_the_graph_follows_the_batch() -> None:
    constants = {
        "first": np.array(0, dtype=np.int64),
        "axes": np.array([0], dtype=np.int64),
        "rest": np.array([-1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "first"], ["n"], axis=0),
        helper.make_node("Unsqueeze", ["n", "axes"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    model = graph_model(nodes, images(2, 3, 4, 4), constants)
    for batch in (1, 2, 5):
        x = images(batch, 3, 4, 4)
        np.testing.assert_array_equal(shadow_output(model, x), x.reshape(batch, -1))


def test_outputs_of_training_are_forgotten_when_nobody_reads_them() -> None:
    nodes = [
        helper.make_node("Dropout", ["x"], ["d", "mask"]),
        helper.make_node("MaxPool", ["d"], ["y", "indices"], kernel_shape=[2, 2]),
    ]
    model, x = graph_model(nodes, images(2, 3, 4, 4), {}), images(2, 3, 4, 4)
    np.testing.assert_array_equal(shadow_output(model, x), session_output(model, x))


def test_constant_nodes_are_folded() -> None:
    value = numpy_helper.from_array(np.array([2.0], dtype=np.float32))
    nodes = [
        helper.make_node("Constant", [], ["two"], value=value),
        helper.make_node("Constant", [], ["three"], value_float=3.0),
        helper.make_node("Mul", ["two", "three"], ["six"]),
        helper.make_node("Mul", ["x", "six"], ["y"]),
    ]
    model = graph_model(nodes, images(2, 3), {})
    assert build_shadow(model, source="shipped").operators == ("Mul",)
    np.testing.assert_array_equal(shadow_output(model, images(2, 3)), images(2, 3) * 6)


def test_constant_node_of_strings_is_refused() -> None:
    node = helper.make_node("Constant", [], ["y"], name="c", value_string="text")
    with pytest.raises(ShadowError, match=r"node 'c': .*attribute 'value_string' is not covered"):
        build_shadow(graph_model([node], images(2, 3), {}, output_type=TensorProto.STRING), source="shipped")
