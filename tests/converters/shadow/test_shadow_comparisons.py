from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from .shadow_graphs import assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

X = np.round(np.random.default_rng(0).normal(0, 2, (4, 3, 5))).astype(np.float32)
BOUND = np.array([[-1], [0], [2]], dtype=np.float32)
SPECIAL = np.array([np.nan, np.inf, -np.inf, 0, 1, -1], dtype=np.float32)


@pytest.mark.parametrize("op_type", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparison_equals_runtime(op_type: str) -> None:
    assert_equals_runtime(operator_model(op_type, X, {"bound": BOUND}, kind=TensorProto.BOOL), X)


@pytest.mark.parametrize("op_type", ["And", "Or", "Xor"])
def test_logic_equals_runtime(op_type: str) -> None:
    nodes = [
        helper.make_node("Greater", ["x", "bound"], ["a"]),
        helper.make_node("Less", ["x", "two"], ["b"]),
        helper.make_node("Not", ["b"], ["c"]),
        helper.make_node(op_type, ["a", "c"], ["y"]),
    ]
    constants = {"bound": BOUND, "two": np.array(2, dtype=np.float32)}
    assert_equals_runtime(graph_model(nodes, X, constants, output_type=TensorProto.BOOL), X)


@pytest.mark.parametrize(
    ("op_type", "attributes"),
    [
        ("IsNaN", {}),
        ("IsInf", {}),
        ("IsInf", {"detect_negative": 0}),
        ("IsInf", {"detect_positive": 0}),
        ("IsInf", {"detect_negative": 0, "detect_positive": 0}),
    ],
)
def test_special_values_are_found_as_in_the_runtime(op_type: str, attributes: dict[str, int]) -> None:
    assert_equals_runtime(operator_model(op_type, SPECIAL, {}, kind=TensorProto.BOOL, **attributes), SPECIAL)


def test_where_equals_runtime_and_has_its_gradient() -> None:
    nodes = [
        helper.make_node("Greater", ["x", "bound"], ["chosen"]),
        helper.make_node("Mul", ["x", "x"], ["square"]),
        helper.make_node("Where", ["chosen", "square", "bound"], ["y"]),
    ]
    model = graph_model(nodes, X + np.float32(0.25), {"bound": BOUND})
    assert_equals_runtime(model, X + np.float32(0.25))
    assert_gradient_is_right(model, X + np.float32(0.25))
