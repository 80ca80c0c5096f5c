from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from .shadow_graphs import (
    Array,
    assert_equals_runtime,
    assert_gradient_is_right,
    graph_model,
    operator_model,
    shadow_output,
)

RNG = np.random.default_rng(0)
X = RNG.normal(0, 2, (2, 3, 4)).astype(np.float32)
OTHER = RNG.normal(0, 2, (3, 1)).astype(np.float32)
SMOOTH = ("Abs", "Cos", "Cosh", "Erf", "Exp", "Neg", "Reciprocal", "Sin", "Sinh", "Tan", "Tanh", "Asinh", "Atan")
ON_UNIT = ("Acos", "Asin", "Atanh")
POSITIVE = ("Log", "Sqrt", "Acosh")
STEPS = ("Ceil", "Floor", "Round", "Sign")


@pytest.mark.parametrize("op_type", [*SMOOTH, *ON_UNIT, *POSITIVE])
def test_function_equals_runtime_and_has_its_gradient(op_type: str) -> None:
    x = np.tanh(X) * np.float32(0.9) if op_type in ON_UNIT else np.abs(X) + 1 if op_type in POSITIVE else X
    model = operator_model(op_type, x, {}, opset=22)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


@pytest.mark.parametrize("op_type", STEPS)
def test_step_function_equals_runtime(op_type: str) -> None:
    x = np.array([-2.5, -1.5, -1.2, -0.5, -0.0, 0.5, 0.7, 1.5, 2.5, 3.5], dtype=np.float32)
    assert_equals_runtime(operator_model(op_type, x, {}), x)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Max", "Min", "Sum", "Mean"])
def test_pairwise_operator_equals_runtime_and_has_its_gradient(op_type: str) -> None:
    model = operator_model(op_type, X, {"other": OTHER})
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


def test_operators_of_any_number_of_inputs_equal_runtime() -> None:
    for op_type in ("Max", "Min", "Sum", "Mean"):
        assert_equals_runtime(operator_model(op_type, X, {"a": OTHER, "b": X[:1], "c": OTHER * 2}), X)
        assert_equals_runtime(operator_model(op_type, X, {}), X)


@pytest.mark.parametrize("exponent", [2.0, 3.0, 0.5, -1.5])
def test_power_equals_runtime_and_has_its_gradient(exponent: float) -> None:
    x = np.abs(X) + np.float32(0.1)
    for value in (np.array(exponent, dtype=np.float32), np.full((4,), exponent, dtype=np.float32)):
        model = operator_model("Pow", x, {"exponent": value})
        assert_equals_runtime(model, x)
        assert_gradient_is_right(model, x)


def test_power_of_a_negative_number_has_its_gradient() -> None:
    model = operator_model("Pow", X, {"exponent": np.array(2, dtype=np.int64)})
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize("op_type", ["Add", "Sub", "Mul", "Div", "Mod", "Pow", "Max", "Min"])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_integers_compute_as_in_the_runtime(op_type: str, kind: Any) -> None:
    whole, other = TensorProto.INT32 if kind is np.int32 else TensorProto.INT64, np.array([3, 2, 4, 5], dtype=kind)
    nodes = [helper.make_node("Cast", ["x"], ["i"], to=whole), helper.make_node(op_type, ["i", "other"], ["y"])]
    assert_equals_runtime(graph_model(nodes, X * 4, {"other": other}, output_type=whole), X * 4)


@pytest.mark.parametrize("fmod", [0, 1])
def test_remainder_of_integers_and_floats_equals_runtime(fmod: int) -> None:
    codes = np.arange(-10, 10, dtype=np.int8)
    model = operator_model("Mod", codes, {"other": np.array(3, dtype=np.int8)}, kind=TensorProto.INT8, fmod=fmod)
    assert_equals_runtime(model, codes)
    if fmod:
        assert_equals_runtime(operator_model("Mod", X, {"other": OTHER}, fmod=fmod), X)


@pytest.mark.parametrize(
    ("op_type", "other", "expected"),
    [("Add", 200, [200, 44, 199]), ("Sub", 3, [253, 97, 252]), ("Mul", 7, [0, 188, 249]), ("Div", 3, [0, 33, 85])],
)
def test_codes_wrap_around(op_type: str, other: int, expected: list[int]) -> None:
    # ONNX Runtime has no kernel for this; numpy and the node tests of the onnx package say so
    codes = np.array([0, 100, 255], dtype=np.uint8)
    model = operator_model(op_type, codes, {"other": np.array(other, dtype=np.uint8)}, kind=TensorProto.UINT8)
    np.testing.assert_array_equal(shadow_output(model, codes), expected)


def clip_constants(low: float | None, high: float | None) -> dict[str, Array | None]:
    bounds = {"low": low, "high": high}
    return {name: None if bound is None else np.array(bound, dtype=np.float32) for name, bound in bounds.items()}


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.0), (None, 1.0), (-0.5, None), (None, None), (1.0, -1.0)])
def test_clip_equals_runtime(low: float | None, high: float | None) -> None:
    assert_equals_runtime(operator_model("Clip", X, clip_constants(low, high)), X)


def test_clip_between_computed_bounds_equals_runtime() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["high"], keepdims=0),
        helper.make_node("Clip", ["x", "low", "high"], ["y"]),
    ]
    model = graph_model(nodes, X, {"low": np.array(-1, dtype=np.float32)})
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


def test_clip_of_codes_equals_runtime() -> None:
    codes = np.arange(-128, 127, dtype=np.int8)
    bounds = {"low": np.array(-3, dtype=np.int8), "high": np.array(9, dtype=np.int8)}
    assert_equals_runtime(operator_model("Clip", codes, bounds, kind=TensorProto.INT8), codes)
