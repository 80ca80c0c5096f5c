from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

RNG = np.random.default_rng(0)
X = RNG.normal(0, 1, (4, 3, 5)).astype(np.float32)


def whole(values: Any) -> Array:
    return np.array(values, dtype=np.int64)


UPDATES = RNG.normal(0, 1, (2, 3, 5)).astype(np.float32)
Case = tuple[str, dict[str, Array], dict[str, Any]]
CASES: dict[str, Case] = {
    "gather one": ("Gather", {"i": whole(-2)}, {"axis": 1}),
    "gather many": ("Gather", {"i": whole([[0, -1], [2, 2]])}, {"axis": 2}),
    "gather elements": ("GatherElements", {"i": whole(RNG.integers(-5, 5, (4, 3, 2)))}, {"axis": 2}),
    "gather points": ("GatherND", {"i": whole([[0, 1, -1], [3, 2, 0]])}, {}),
    "gather rows": ("GatherND", {"i": whole([[[0, 1]], [[3, 2]]])}, {}),
    "gather in each row": ("GatherND", {"i": whole([[[1]], [[0]], [[2]], [[2]]])}, {"batch_dims": 1}),
    "gather in each cell": ("GatherND", {"i": whole(RNG.integers(0, 5, (4, 3, 2, 1)))}, {"batch_dims": 2}),
    "scatter elements": ("ScatterElements", {"i": whole([[[0]], [[-1]]]), "u": UPDATES[:, :1, :1]}, {"axis": 2}),
    "scatter points": ("ScatterND", {"i": whole([[0, 1, 2], [3, -1, 0]]), "u": UPDATES[0, 0, :2]}, {}),
    "scatter rows": ("ScatterND", {"i": whole([[1], [3]]), "u": UPDATES}, {}),
    "compress": ("Compress", {"c": np.array([True, False, True])}, {"axis": 1}),
    "compress all": ("Compress", {"c": np.array([True, False, True, True])}, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_indexing_equals_runtime_and_has_its_gradient(name: str) -> None:
    op_type, constants, attributes = CASES[name]
    model = operator_model(op_type, X, constants, **attributes)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize("reduction", ["add", "mul", "max", "min"])
def test_scattering_that_combines_equals_runtime_and_has_its_gradient(reduction: str) -> None:
    rows = {"i": whole([[1], [1]]), "u": UPDATES}
    elements = {"i": whole(RNG.integers(0, 4, (2, 3, 5))), "u": UPDATES}
    for op_type, constants in (("ScatterND", rows), ("ScatterElements", elements)):
        model = operator_model(op_type, X, constants, reduction=reduction)
        assert_equals_runtime(model, X)
        assert_gradient_is_right(model, X)


def test_scatter_before_opset_11_equals_runtime() -> None:
    constants = {"i": whole([[[0]], [[1]]]), "u": UPDATES[:, :1, :1]}
    assert_equals_runtime(operator_model("Scatter", X, constants, opset=9, axis=2), X)


SLICES: dict[str, dict[str, Array | None]] = {
    "first axes": {"starts": whole([1, 0]), "ends": whole([4, -1])},
    "chosen axes": {"starts": whole([-3, 1]), "ends": whole([2**62, 3]), "axes": whole([2, -2])},
    "steps": {"starts": whole([0]), "ends": whole([5]), "axes": whole([2]), "steps": whole([2])},
    "backwards": {"starts": whole([-1]), "ends": whole([-(2**62)]), "axes": whole([2]), "steps": whole([-2])},
    "axes left out": {"starts": whole([3, 0, 4]), "ends": whole([0, 3, 0]), "axes": None, "steps": whole([-1, 1, -3])},
    "nothing": {"starts": whole([3]), "ends": whole([2]), "axes": whole([0])},
}


@pytest.mark.parametrize("name", SLICES)
def test_slice_equals_runtime(name: str) -> None:
    assert_equals_runtime(operator_model("Slice", X, SLICES[name]), X)


def test_slice_whose_end_the_graph_computes_equals_runtime() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "two"], ["size"]),
        helper.make_node("Sub", ["size", "one"], ["end"]),
        helper.make_node("Slice", ["x", "one", "end", "two"], ["y"]),
    ]
    model = graph_model(nodes, X, {"one": whole([1]), "two": whole([2])})
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)
