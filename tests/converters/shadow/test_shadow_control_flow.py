"""What is resolved while the graph is read: constant conditions, `Constant` nodes, functions of the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdefense.converters.shadow import ShadowError, UnsupportedOperatorError, build_shadow

from .shadow_graphs import Array, graph_model, session_output, shadow_output

X = np.random.default_rng(0).normal(0, 1, (2, 3, 4, 4)).astype(np.float32)


def branch(name: str, nodes: Sequence[NodeProto], output: str, **initializers: Array) -> onnx.GraphProto:
    kept = [numpy_helper.from_array(value, key) for key, value in initializers.items()]
    value = helper.make_tensor_value_info(output, TensorProto.FLOAT, None)
    return helper.make_graph(list(nodes), name, [], [value], kept)


def choice(condition: str, then: onnx.GraphProto, otherwise: onnx.GraphProto, output: str = "y") -> NodeProto:
    return helper.make_node(
        "If", [condition], [output], name=f"choice of {output}", then_branch=then, else_branch=otherwise
    )


def scaled(output: str, factor: float) -> onnx.GraphProto:
    """A branch that reads x from around it and an initializer of its own, under the names that other branches use."""
    node = helper.make_node("Mul", ["x", "factor"], ["inner"])
    return branch("b", [node, helper.make_node("Relu", ["inner"], [output])], output, factor=np.float32([factor]))


@pytest.mark.parametrize("condition", [True, False])
def test_branch_that_a_constant_chooses_is_inlined(condition: bool) -> None:
    model = graph_model([choice("c", scaled("a", 2), scaled("b", -3))], X, {"c": np.array(condition)})
    np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))
    shadow = build_shadow(model, source="shipped")
    assert shadow.operators == ("Mul", "Relu", "Identity")
    assert shadow.tensor_names == ("y/inner", f"y/{'a' if condition else 'b'}", "y")
    assert shadow.parameters_by_initializer == {}


def test_nested_branches_see_the_names_around_them() -> None:
    inner = choice("c", scaled("d", 5), scaled("e", 7), "inner_y")
    outer = branch(
        "outer", [helper.make_node("Neg", ["x"], ["x2"]), inner, helper.make_node("Add", ["inner_y", "x2"], ["o"])], "o"
    )
    other = branch("other", [helper.make_node("Abs", ["x"], ["p"])], "p")
    for condition in (True, False):
        nodes = [choice("c", outer, other, "first"), choice("c", scaled("a", 2), scaled("b", 4), "second")]
        model = graph_model(
            [*nodes, helper.make_node("Add", ["first", "second"], ["y"])], X, {"c": np.array(condition)}
        )
        np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))


def test_condition_that_shapes_decide_is_folded() -> None:
    nodes = [
        helper.make_node("Shape", ["w"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Equal", ["n", "three"], ["c"]),
        choice("c", scaled("a", 2), scaled("b", 4)),
    ]
    constants = {"w": np.ones((3, 2), np.float32), "zero": np.array(0), "three": np.array(3)}
    model = graph_model(nodes, X, constants)
    np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))


def test_condition_that_the_image_decides_is_refused() -> None:
    nodes = [
        helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        choice("c", scaled("a", 2), scaled("b", 4)),
    ]
    expected = "node 'choice of y': operator 'If' of domain 'ai.onnx', opset 21: its condition 'c' is not a constant"
    with pytest.raises(UnsupportedOperatorError, match=expected):
        build_shadow(graph_model(nodes, X, {"zero": np.float32(0)}), source="shipped")


def test_condition_of_several_values_is_refused() -> None:
    model = graph_model([choice("c", scaled("a", 2), scaled("b", 4))], X, {"c": np.array([True, False])})
    with pytest.raises(UnsupportedOperatorError, match=r"its condition has the shape \(2,\), expected one value"):
        build_shadow(model, source="shipped")


def test_branch_that_is_missing_is_refused() -> None:
    node = helper.make_node("If", ["c"], ["y"], name="choice", else_branch=scaled("a", 1))
    with pytest.raises(UnsupportedOperatorError, match="the branch that is taken is missing or has another number"):
        build_shadow(graph_model([node], X, {"c": np.array(True)}), source="shipped")


@pytest.mark.parametrize(
    ("op_type", "reason"),
    [
        ("Loop", "it repeats a graph while the file runs, which the shadow can't"),
        ("Scan", "it repeats a graph along an axis, which the shadow can't"),
        ("SequenceMap", "it repeats a graph for each tensor of a sequence, which the shadow can't"),
    ],
)
def test_repeated_graph_is_refused(op_type: str, reason: str) -> None:
    node = helper.make_node(op_type, ["x"], ["y"], name="again", body=scaled("a", 1))
    with pytest.raises(UnsupportedOperatorError, match=f"node 'again': operator '{op_type}' of .*: {reason}"):
        build_shadow(graph_model([node], X, {}), source="shipped")


@pytest.mark.parametrize(
    ("attributes", "value"),
    [
        ({"value": numpy_helper.from_array(np.float32([2, 3, 4, 5]))}, np.float32([2, 3, 4, 5])),
        ({"value_float": 2.5}, np.float32(2.5)),
        ({"value_floats": [1.0, 2.0, 3.0, 4.0]}, np.float32([1, 2, 3, 4])),
    ],
)
def test_constant_of_floats_is_folded(attributes: dict[str, Any], value: Array) -> None:
    nodes = [helper.make_node("Constant", [], ["k"], **attributes), helper.make_node("Mul", ["x", "k"], ["y"])]
    np.testing.assert_array_equal(shadow_output(graph_model(nodes, X, {}), X), X * value)


@pytest.mark.parametrize("attributes", [{"value_ints": [2, -1]}, {"value": numpy_helper.from_array(np.array([2, -1]))}])
def test_constant_of_integers_is_folded(attributes: dict[str, Any]) -> None:
    nodes = [helper.make_node("Constant", [], ["k"], **attributes), helper.make_node("Reshape", ["x", "k"], ["y"])]
    np.testing.assert_array_equal(shadow_output(graph_model(nodes, X, {}), X), X.reshape(2, -1))


def test_constant_of_one_integer_is_folded() -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], value_int=2),
        helper.make_node("Gather", ["x", "k"], ["y"], axis=1),
    ]
    np.testing.assert_array_equal(shadow_output(graph_model(nodes, X, {}), X), X[:, 2])


SPARSE = helper.make_sparse_tensor(
    numpy_helper.from_array(np.float32([1]), "v"), numpy_helper.from_array(np.array([0]), "i"), [4]
)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"sparse_value": SPARSE}, "attribute 'sparse_value' is not covered"),
        ({"value_string": "text"}, "attribute 'value_string' is not covered"),
        ({"value_strings": ["text"]}, "attribute 'value_strings' is not covered"),
        ({}, r"it has the attributes \[\], expected exactly one"),
        (
            {"value_int": 1, "value_float": 1.0},
            r"it has the attributes \['value_float', 'value_int'\], expected exactly",
        ),
    ],
)
def test_other_constants_are_refused(attributes: dict[str, Any], reason: str) -> None:
    nodes = [
        helper.make_node("Constant", [], ["k"], name="k", **attributes),
        helper.make_node("Mul", ["x", "k"], ["y"]),
    ]
    with pytest.raises(UnsupportedOperatorError, match=f"node 'k': operator 'Constant' of .*: {reason}"):
        build_shadow(graph_model(nodes, X, {}), source="shipped")


def calling(*functions: onnx.FunctionProto, opset: int = 21) -> bytes:
    model = onnx.load_from_string(graph_model([helper.make_node("F", ["x"], ["y"], domain="own")], X, {}, opset=opset))
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return bytes(model.SerializeToString())


def function(name: str, nodes: Sequence[NodeProto], opset: int = 21) -> onnx.FunctionProto:
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("own", 1)]
    return helper.make_function("own", name, ["a"], ["b"], list(nodes), imports)


def test_functions_of_the_model_are_inlined() -> None:
    outer = [helper.make_node("G", ["a"], ["m"], domain="own"), helper.make_node("Relu", ["m"], ["b"])]
    model = calling(function("F", outer), function("G", [helper.make_node("Neg", ["a"], ["b"])]))
    assert build_shadow(model, source="shipped").operators == ("Neg", "Relu")
    np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))


def test_function_of_another_opset_keeps_its_meaning() -> None:
    model = calling(function("F", [helper.make_node("Softmax", ["a"], ["b"])], opset=11))
    old = graph_model([helper.make_node("Softmax", ["x"], ["y"])], X, {}, opset=11)
    np.testing.assert_allclose(shadow_output(model, X), session_output(old, X), rtol=1e-6)


def test_function_that_calls_itself_is_refused() -> None:
    model = calling(function("F", [helper.make_node("F", ["a"], ["b"], domain="own")]))
    with pytest.raises(ShadowError, match="function 'F' of domain 'own' calls itself, which ONNX forbids"):
        build_shadow(model, source="shipped")


def test_functions_that_would_fill_any_memory_are_refused() -> None:
    functions = []
    for level in range(6):
        called, domain = ("Relu", "") if level == 5 else ("FGHIJK"[level + 1], "own")
        names = ["a", *(f"t{index}" for index in range(9)), "b"]
        nodes = [helper.make_node(called, [names[at]], [names[at + 1]], domain=domain) for at in range(10)]
        functions.append(function("FGHIJK"[level], nodes))
    with pytest.raises(
        ShadowError, match="functions make a graph of 1000000 nodes, more than 100000; export a smaller"
    ):
        build_shadow(calling(*functions), source="shipped")


def test_tensor_that_is_computed_twice_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"], name="a"), helper.make_node("Neg", ["x"], ["y"], name="b")]
    with pytest.raises(ShadowError, match="node 'b' computes 'y', which is there already; export the model again"):
        build_shadow(graph_model(nodes, X, {}), source="shipped")


def test_node_whose_inputs_do_not_fit_is_named_when_it_is_built_and_when_it_runs() -> None:
    alone = graph_model([helper.make_node("Add", ["x"], ["y"], name="sum")], X, {})
    label = "node 'sum': operator 'Add' of domain 'ai.onnx', opset 21"
    with pytest.raises(UnsupportedOperatorError, match=f"{label}: its inputs or attributes don't fit it"):
        build_shadow(alone, source="shipped")
    wide = graph_model([helper.make_node("Add", ["x", "k"], ["y"], name="sum")], X, {"k": np.ones(7, np.float32)})
    with pytest.raises(ShadowError, match=f"{label}: it can't be computed .*; check the shape of the images"):
        shadow_output(wide, X)


@pytest.mark.parametrize(("outputs", "value"), [([], 1.0), (["k"], "one")])
def test_malformed_constant_node_is_named(outputs: list[str], value: float | str) -> None:
    node = helper.make_node("Constant", [], outputs, name="k", value_float=value)
    with pytest.raises(
        UnsupportedOperatorError, match=r"node 'k': operator 'Constant' of .*: its inputs or attributes"
    ):
        build_shadow(graph_model([node, helper.make_node("Relu", ["x"], ["y"])], X, {}), source="shipped")


def test_tensor_of_a_branch_takes_no_name_from_outside() -> None:
    nodes = [
        choice("c", scaled("a", 2), scaled("b", -3), "block"),
        helper.make_node("Add", ["block", "block/factor"], ["y"]),
    ]
    model = graph_model(nodes, X, {"c": np.array(True), "block/factor": np.float32([7])})
    np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))
    nodes = [
        *nodes[:1],
        helper.make_node("Neg", ["x"], ["block/inner"]),
        helper.make_node("Add", ["block", "block/inner"], ["y"]),
    ]
    model = graph_model(nodes, X, {"c": np.array(True)})
    np.testing.assert_array_equal(shadow_output(model, X), session_output(model, X))
