from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

X = np.random.default_rng(0).uniform(0.3, 2, (2, 3, 4)).astype(np.float32)
REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")


def axes(*values: int) -> dict[str, Array]:
    return {"axes": np.array(values, dtype=np.int64)}


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduction_equals_runtime_and_has_its_gradient(kind: str) -> None:
    for constants, attributes in (({}, {}), (axes(1), {"keepdims": 0}), (axes(-1, 0), {})):
        model = operator_model(f"Reduce{kind}", X, constants, **attributes)
        assert_equals_runtime(model, X)
        assert_gradient_is_right(model, X)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduction_along_axes_that_are_an_attribute_equals_runtime(kind: str) -> None:
    opset = 12 if kind == "Sum" else 17
    assert_equals_runtime(operator_model(f"Reduce{kind}", X, {}, opset=opset, axes=[0, -1], keepdims=0), X)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_reduction_along_no_axis_that_is_no_operation_equals_runtime(kind: str) -> None:
    assert_equals_runtime(operator_model(f"Reduce{kind}", X, {}, noop_with_empty_axes=1), X)


@pytest.mark.parametrize("kind", ["Max", "Mean", "Min", "Prod", "Sum"])
def test_reduction_of_integers_equals_runtime(kind: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT32),
        helper.make_node(f"Reduce{kind}", ["i", "axes"], ["y"]),
    ]
    x = np.random.default_rng(1).integers(-9, 9, (3, 5)).astype(np.float32)
    assert_equals_runtime(graph_model(nodes, x, axes(1), output_type=TensorProto.INT32), x)


def test_gradient_of_a_norm_is_zero_at_zero() -> None:
    x = np.concatenate([np.zeros((1, 4), dtype=np.float32), np.ones((1, 4), dtype=np.float32)])
    model = operator_model("ReduceL2", x, axes(1))
    assert_equals_runtime(model, x)


TIES = np.array([[1, 3, 3, 2], [5, 5, 0, 0], [7, 7, 7, 7]], dtype=np.float32)


@pytest.mark.parametrize("op_type", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize(
    "attributes", [{}, {"axis": 1}, {"axis": -1, "keepdims": 0}, {"axis": 1, "select_last_index": 1}]
)
def test_position_of_the_extreme_equals_runtime(op_type: str, attributes: dict[str, Any]) -> None:
    assert_equals_runtime(operator_model(op_type, TIES, {}, kind=TensorProto.INT64, **attributes), TIES)


@pytest.mark.parametrize("largest", [0, 1])
@pytest.mark.parametrize("axis", [0, -1])
def test_top_k_equals_runtime(largest: int, axis: int) -> None:
    constants = {"k": np.array([2], dtype=np.int64)}
    for x in (TIES, X):
        attributes = {"axis": axis, "largest": largest}
        model = operator_model("TopK", x, constants, outputs=2, kind=TensorProto.INT64, **attributes)
        assert_equals_runtime(model, x)
    nodes = [helper.make_node("TopK", ["x", "k"], ["y", "i"], axis=axis, largest=largest)]
    assert_equals_runtime(graph_model(nodes, X, constants), X)
    assert_gradient_is_right(graph_model(nodes, X, constants), X)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
def test_running_sum_equals_runtime_and_has_its_gradient(exclusive: int, reverse: int) -> None:
    constants = {"axis": np.array(1, dtype=np.int64)}
    model = operator_model("CumSum", X, constants, exclusive=exclusive, reverse=reverse)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)
