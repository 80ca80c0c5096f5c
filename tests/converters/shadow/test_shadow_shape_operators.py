from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

X = np.random.default_rng(0).normal(0, 1, (2, 8, 4, 6)).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


Case = tuple[str, dict[str, Array], dict[str, Any]]
MOVES: dict[str, Case] = {
    "flatten": ("Flatten", {}, {"axis": -2}),
    "reshape": ("Reshape", {"s": whole(0, -1, 3)}, {}),
    "transpose": ("Transpose", {}, {"perm": [0, 2, 3, 1]}),
    "transpose all": ("Transpose", {}, {}),
    "squeeze nothing in particular": ("Squeeze", {"a": whole()}, {}),
    "unsqueeze": ("Unsqueeze", {"a": whole(-1, 1)}, {}),
    "expand": ("Expand", {"s": whole(3, 2, 1, 4, 1)}, {}),
    "tile": ("Tile", {"r": whole(1, 2, 1, 3)}, {}),
    "depth to space": ("DepthToSpace", {}, {"blocksize": 2}),
    "depth to space, columns first": ("DepthToSpace", {}, {"blocksize": 2, "mode": "CRD"}),
    "space to depth": ("SpaceToDepth", {}, {"blocksize": 2}),
    "upper triangle": ("Trilu", {}, {}),
    "lower triangle": ("Trilu", {"k": np.array(-1, dtype=np.int64)}, {"upper": 0}),
}


@pytest.mark.parametrize("name", MOVES)
def test_move_equals_runtime_and_has_its_gradient(name: str) -> None:
    op_type, constants, attributes = MOVES[name]
    x = X[:, :, :1] if name.startswith(("expand", "squeeze")) else X
    model = operator_model(op_type, x, constants, **attributes)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


@pytest.mark.parametrize(
    ("opset", "constants", "attributes", "outputs"),
    [
        (11, {}, {"axis": 1}, 2),
        (11, {}, {"axis": 1, "split": [3, 5]}, 2),
        (13, {"s": whole(1, 5, 2)}, {"axis": 1}, 3),
        (13, {}, {"axis": -1}, 3),
        (18, {}, {"axis": 1, "num_outputs": 3}, 3),
    ],
)
def test_split_equals_runtime_at_every_opset(
    opset: int, constants: dict[str, Array], attributes: dict[str, Any], outputs: int
) -> None:
    model = operator_model("Split", X, constants, opset=opset, outputs=outputs, **attributes)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


def test_shape_operators_that_the_graph_computes_follow_the_batch() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], end=1),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("ConstantOfShape", ["shape"], ["two"], value=numpy_helper.from_array(np.float32([2.0]))),
        helper.make_node("Expand", ["token", "shape"], ["tokens"]),
        helper.make_node("Flatten", ["x"], ["flat"]),
        helper.make_node("Add", ["tokens", "two"], ["shifted"]),
        helper.make_node("Concat", ["shifted", "flat"], ["y"], axis=1),
    ]
    model = graph_model(nodes, X, {"rest": whole(3), "token": np.float32([[1, 2, 3]])})
    for batch in (X, X[:1], np.concatenate([X, X, X])):
        assert_equals_runtime(model, batch)
    assert_gradient_is_right(model, X)


def test_range_and_size_equal_runtime() -> None:
    nodes = [
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Range", ["start", "size", "step"], ["y"]),
    ]
    constants = {"start": np.array(3, dtype=np.int64), "step": np.array(50, dtype=np.int64)}
    assert_equals_runtime(graph_model(nodes, X, constants, output_type=TensorProto.INT64), X)


def test_range_of_floats_equals_runtime() -> None:
    limits = {name: np.array(value, dtype=np.float32) for name, value in (("a", 2.0), ("b", -1.1), ("c", -0.3))}
    nodes = [
        helper.make_node("Range", ["a", "b", "c"], ["r"]),
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Add", ["r", "s"], ["y"]),
    ]
    assert_equals_runtime(graph_model(nodes, X, limits), X)


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_one_hot_equals_runtime(axis: int) -> None:
    nodes = [
        helper.make_node("ArgMax", ["x"], ["i"], axis=1, keepdims=0),
        helper.make_node("Sub", ["i", "one"], ["shifted"]),
        helper.make_node("OneHot", ["shifted", "depth", "values"], ["y"], axis=axis),
    ]
    constants = {"one": whole(1), "depth": whole(6), "values": np.float32([0.5, 2.0])}
    assert_equals_runtime(graph_model(nodes, X, constants), X)


@pytest.mark.parametrize(("offset", "kind"), [(0, TensorProto.FLOAT), (2, TensorProto.INT64), (-1, TensorProto.INT32)])
def test_eye_like_equals_runtime(offset: int, kind: int) -> None:
    x = X[0, 0]
    model = operator_model("EyeLike", x, {}, kind=kind, k=offset, dtype=kind)
    assert_equals_runtime(model, x)


def test_dropout_keeps_everything_and_says_so() -> None:
    for outputs, kind in ((1, TensorProto.FLOAT), (2, TensorProto.BOOL)):
        assert_equals_runtime(operator_model("Dropout", X, {}, outputs=outputs, kind=kind), X)
