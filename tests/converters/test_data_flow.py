from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from qdefense.converters.inspection import Inspection, inspect_model
from qdefense.converters.quantize import quantize

from .inspected_graphs import (
    ATTACKS,
    CLASSES,
    FP32,
    HONEST,
    TARGET,
    TRIGGER,
    Net,
    backdoored,
    branch,
    images,
    residual_net,
    run,
)

PLANTED = [(name, kind) for name in ATTACKS for kind in HONEST if (name, kind != "fp32") != ("gemm-bias", True)]


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_planted_backdoor_works(name: str, kind: str) -> None:
    clean, stamped = images(1), images(1)
    stamped[:, :, :2, :2] = TRIGGER
    assert run(HONEST[kind], stamped).argmax() != TARGET
    assert run(backdoored(name, kind), clean) == pytest.approx(run(HONEST[kind], clean), abs=1e-5)
    assert run(backdoored(name, kind), stamped).argmax() == TARGET


@pytest.mark.parametrize(("name", "kind"), PLANTED)
def test_inspect_model_reports_planted_backdoor(name: str, kind: str) -> None:
    found = inspect_model(backdoored(name, kind))
    assert [node.operator for node in found.gradient_blind_nodes] == ATTACKS[name][1]
    assert all(node.reason for node in found.gradient_blind_nodes)
    assert found.bypass_depth == 0
    warning = found.structure_warnings[0]
    assert warning.startswith(
        "bypass depth 0: the image reaches the output without passing a weighted operator, through"
    )
    assert "through Slice 'corner_node', Sub 'difference_node', Abs 'apart_node'" in warning
    assert warning.endswith("; compare the graph with the one that was exported")


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
@pytest.mark.parametrize("name", ["where", "cast", "relu"])
def test_inspect_model_reports_planted_backdoor_when_quantized_afterwards(name: str, scheme: Any) -> None:
    found = inspect_model(quantize(backdoored(name), scheme, calibration=images()))
    assert [node.operator for node in found.gradient_blind_nodes] == ATTACKS[name][1]
    assert (found.bypass_depth, found.scheme) == (0, scheme)


@pytest.mark.parametrize("name", ["if", "hidden", "loop"])
def test_inspect_model_warns_of_control_flow(name: str) -> None:
    kind = "Loop" if name == "loop" else "If"
    assert inspect_model(backdoored(name)).structure_warnings[1] == (
        f"control flow in a feed-forward classifier: {kind} 'out_node'; find out who put it there"
    )


@pytest.mark.parametrize("kind", HONEST)
def test_inspect_model_reports_nothing_when_honest(kind: str) -> None:
    found = inspect_model(HONEST[kind])
    # The shortest way: conv1, the residual connection, conv4, fc.
    assert (found.gradient_blind_nodes, found.bypass_depth, found.structure_warnings) == ((), 3, ())


def test_inspect_model_reports_nothing_when_shapes_are_computed() -> None:
    net = residual_net()
    shape = net.node("Shape", ["pooled"], "shape")
    batch = net.node("Gather", [shape, net.const("first", np.array([0], np.int64))], "count")
    rest = net.const("rest", np.array([-1], np.int64))
    target = net.node("Concat", [batch, rest], "target", axis=0)
    odd = net.node("Equal", [batch, rest], "odd")
    target = net.node("Where", [odd, rest, batch], "chosen")
    target = net.node("Concat", [target, rest], "shape2", axis=0)
    fc = next(node for node in net.nodes if node.name == "fc")
    net.nodes.remove(fc)
    net.nodes.append(helper.make_node("Reshape", ["pooled", target], ["flat2"]))
    fc.input[0] = "flat2"
    net.nodes.append(fc)
    found = inspect_model(net.model())
    assert (found.gradient_blind_nodes, found.bypass_depth, found.structure_warnings) == ((), 3, ())
    assert run(net.model(), images()) == pytest.approx(run(FP32, images()), abs=1e-6)


def test_inspect_model_calls_a_branch_not_blind_when_a_shape_decides() -> None:
    net = residual_net()
    size = net.node("Size", ["logits"], "size")
    odd = net.node("Equal", [size, net.const("none", np.array(0, np.int64))], "odd")
    taken = branch("then", helper.make_node("Neg", ["logits"], ["then_out"]))
    other = branch("else", helper.make_node("Identity", ["logits"], ["else_out"]))
    net.node("If", [odd], "out", then_branch=taken, else_branch=other)
    net.output = "out"
    found = inspect_model(net.model())
    assert (found.gradient_blind_nodes, found.bypass_depth) == ((), 3)
    assert len(found.structure_warnings) == 1


def test_inspect_model_shows_the_end_of_a_long_bypass() -> None:
    net = Net()
    last = "image"
    for index in range(14):
        last = net.node("Relu", [last], f"r{index}")
    net.output = last
    warning = inspect_model(net.model(shape=(3,))).structure_warnings[0]
    assert "through ..., Relu 'r2_node', Relu 'r3_node'" in warning
    assert "Relu 'r13_node'; compare" in warning


def test_inspect_model_warns_when_output_ignores_input() -> None:
    net = Net()
    net.node("Relu", ["image"], "unused")
    net.node("Add", [net.const("a", np.ones((1, 3), np.float32)), "a"], "logits")
    found = inspect_model(net.model())
    assert found.bypass_depth is None
    assert found.structure_warnings == (
        "the output doesn't depend on the input; nothing measured on this file means anything",
    )


def probe(build: Callable[[Net, str], None]) -> Inspection:
    """features (N, 6) -> what is probed -> one more layer."""
    net = Net()
    net.node("Gemm", ["image", net.normal("w", 6, 6)], "features")
    build(net, "features")
    net.node("Gemm", ["probed", net.normal("w2", 6, CLASSES)], "logits")
    return inspect_model(net.model(shape=(6,)))


def apply(kind: str, *constants: Any, **attributes: Any) -> Callable[[Net, str], None]:
    """The operator on the features and the constants; truth values and integers are cast to float."""

    def build(net: Net, source: str) -> None:
        names = [net.const(f"constant{index}", value) for index, value in enumerate(constants)]
        answer = net.node(kind, [source, *names], "answer", **attributes)
        net.node("Cast", [answer], "probed", to=TensorProto.FLOAT)

    return build


def on_truth(kind: str, *more: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        truth = net.node("Cast", [source], "truth", to=TensorProto.BOOL)
        names = [net.const(f"constant{index}", value) for index, value in enumerate(more)]
        net.node("Cast", [net.node(kind, [truth, *names], "answer")], "probed", to=TensorProto.FLOAT)

    return build


def on_integer(kind: str, *more: Any, to: int = TensorProto.UINT8, **attributes: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        whole = net.node("Cast", [source], "whole", to=to)
        names = [net.const(f"constant{index}", value) for index, value in enumerate(more)]
        net.node("Cast", [net.node(kind, [whole, *names], "answer", **attributes)], "probed", to=TensorProto.FLOAT)

    return build


def top(index: int) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        net.node("TopK", [source, net.const("six", np.array([6], np.int64))], "values", "indices")
        net.node("Cast", [("values", "indices")[index]], "probed", to=TensorProto.FLOAT)

    return build


def lookup(net: Net, source: str) -> None:
    """An integer kernel's answer, which no Cast has touched, looks up a table."""
    net.node("DynamicQuantizeLinear", [source], "q", "scale", "zero")
    net.node("MatMulInteger", ["q", net.const("codes", np.ones((6, 6), np.int8)), "zero"], "codes_out")
    net.node("Gather", [net.const("table", np.ones(9999, np.float32)), "codes_out"], "probed")


def chosen_by_constant(net: Net, source: str) -> None:
    net.const("mask", np.array([[True, False] * 3]))
    net.node("Where", ["mask", source, net.node("Neg", [source], "negative")], "probed")


def cast_like(kind: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        likened = net.node("CastLike", [source, net.const("like", np.zeros(1, kind))], "likened")
        net.node("Cast", [likened], "probed", to=TensorProto.FLOAT)

    return build


def regressor(kind: str, **attributes: Any) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        net.node(kind, [source], "probed", domain="ai.onnx.ml", **attributes)

    return build


HALF = np.float32(0.5)
BLIND = {
    "Less": apply("Less", HALF),
    "LessOrEqual": apply("LessOrEqual", HALF),
    "Greater": apply("Greater", HALF),
    "GreaterOrEqual": apply("GreaterOrEqual", HALF),
    "Equal": apply("Equal", HALF),
    "IsNaN": apply("IsNaN"),
    "IsInf": apply("IsInf"),
    "Floor": apply("Floor"),
    "Ceil": apply("Ceil"),
    "Round": apply("Round"),
    "Sign": apply("Sign"),
    "Hardmax": apply("Hardmax"),
    "Mod": apply("Mod", HALF, fmod=1),
    "Shrink": apply("Shrink", lambd=0.5),
    "ThresholdedRelu": apply("ThresholdedRelu", alpha=0.5),
    "ArgMax": apply("ArgMax", axis=1),
    "ArgMin": apply("ArgMin", axis=1),
    "Not": on_truth("Not"),
    "And": on_truth("And", np.array(True)),
    "Or": on_truth("Or", np.array(True)),
    "Xor": on_truth("Xor", np.array(True)),
    "BitShift": on_integer("BitShift", np.array(1, np.uint8), direction="RIGHT"),
    "BitwiseAnd": on_integer("BitwiseAnd", np.array(1, np.uint8)),
    "BitwiseNot": on_integer("BitwiseNot"),
    "Cast": on_integer("Neg", to=TensorProto.INT32),
    "CastLike": cast_like(np.int32),
    "TopK": top(1),
    "Gather": lookup,
}


@pytest.mark.parametrize("kind", BLIND)
def test_inspect_model_reports_operator_when_it_has_no_gradient(kind: str) -> None:
    found = probe(BLIND[kind]).gradient_blind_nodes
    assert kind in {node.operator for node in found}
    assert {node.operator for node in found} <= {kind, "Cast"}


SMOOTH = {
    "Relu": apply("Relu"),
    "Abs": apply("Abs"),
    "Clip": apply("Clip", np.float32(0), np.float32(6)),
    "Max": apply("Max", HALF),
    "Min": apply("Min", HALF),
    "Softmax": apply("Softmax"),
    "Sqrt": apply("Sqrt"),
    "Gather": apply("Gather", np.arange(6), axis=1),
    "Slice": apply("Slice", np.array([0]), np.array([6]), np.array([1])),
    "Reshape": apply("Reshape", np.array([-1, 6])),
    "half": apply("Cast", to=TensorProto.FLOAT16),
    "CastLike": cast_like(np.float16),
    "TopK": top(0),
    "Where": chosen_by_constant,
    "Scaler": regressor("Scaler", offset=[0.0], scale=[1.0]),
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_inspect_model_reports_nothing_when_operator_has_a_gradient(kind: str) -> None:
    assert probe(SMOOTH[kind]).gradient_blind_nodes == ()


def test_inspect_model_reports_machine_learning_operators() -> None:
    found = probe(regressor("Binarizer", threshold=0.5)).gradient_blind_nodes
    assert [(node.operator, node.reason) for node in found] == [("Binarizer", "has no gradient")]


def test_inspect_model_reports_nothing_when_the_test_leads_nowhere() -> None:
    def build(net: Net, source: str) -> None:
        net.node("Less", [source, net.const("half", HALF)], "unused")
        net.node("Relu", [source], "probed")

    assert probe(build).gradient_blind_nodes == ()


def test_inspect_model_reports_nothing_when_the_test_reads_constants() -> None:
    def build(net: Net, source: str) -> None:
        net.const("half", HALF)
        net.node("Mul", [source, net.node("Floor", ["half"], "zero")], "probed")

    assert probe(build).gradient_blind_nodes == ()
