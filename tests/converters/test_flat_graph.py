from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.inspection import inspect_model

from .inspected_graphs import CONV1, FP32, MACS, Net, backdoored, branch, bump, images, layer_names, residual_net, run


@pytest.mark.parametrize("style", ["gather", "slice", "constants", "squeeze"])
def test_inspect_model_follows_a_reshape_to_a_computed_shape(style: str) -> None:
    net = residual_net()
    fc, _ = net.nodes.pop(), net.nodes.pop()
    shape = net.node("Cast", [net.node("Shape", ["pooled"], "shape")], "long", to=TensorProto.INT64)
    for name, value in (("first", [0]), ("one", [1]), ("scalar", 0)):
        net.const(name, np.array(value, np.int64))
    if style == "slice":
        batch = net.node("Slice", [shape, "first", "one"], "count")
    elif style == "constants":
        net.node("Constant", [], "where", value_int=0)
        batch = net.node("Unsqueeze", [net.node("Gather", [shape, "where"], "number"), "first"], "count")
    elif style == "squeeze":
        number = net.node("Squeeze", [net.node("Gather", [shape, "first"], "gathered"), "first"], "number")
        batch = net.node("Unsqueeze", [number, "first"], "count")
    else:
        batch = net.node("Identity", [net.node("Gather", [shape, "first"], "gathered")], "count")
    target = net.node("Concat", [batch, net.const("rest", np.array([-1], np.int64))], "target", axis=0)
    fc.input[0] = net.node("Reshape", ["pooled", target], "flat")
    net.nodes.append(fc)
    assert run(net.model(), images()) == pytest.approx(run(FP32, images()), abs=1e-6)
    found = inspect_model(net.model())
    assert [layer.macs for layer in found.layers] == list(MACS.values())
    assert (found.gradient_blind_nodes, found.bypass_depth) == ((), 3)


def test_inspect_model_leaves_macs_open_when_inference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    found = inspect_model(FP32)
    assert {layer.macs for layer in found.layers} == {None}
    assert (found.integer_mac_share, found.bypass_depth) == (None, 3)


def test_inspect_model_allocates_nothing_when_a_dimension_is_huge() -> None:
    net = residual_net()
    bomb = net.node("ConstantOfShape", [net.const("huge", np.array([2**40], np.int64))], "bomb")
    net.node("Add", [bomb, bomb], "twice")
    assert inspect_model(net.model(batch=2**40)).layers[0].macs == CONV1


def test_inspect_model_distrusts_declared_shapes() -> None:
    proto = onnx.load_from_string(FP32)
    proto.graph.value_info.append(helper.make_tensor_value_info("conv1_out", TensorProto.FLOAT, [1, 4, 9999, 8]))
    assert inspect_model(proto.SerializeToString()).layers[0].macs == CONV1


def test_inspect_model_reads_constant_nodes_as_weights() -> None:
    net = Net()
    weights = numpy_helper.from_array(np.ones((5, 7), np.float32), "inside")
    net.node("Constant", [], "w", value=weights)
    net.node("Constant", [], "bias", value_floats=[0.5] * 7)
    net.node("Constant", [], "two", value_float=2.0)
    net.node("Constant", [], "axes", value_ints=[1])
    net.node("Mul", [net.node("Gemm", ["image", "w", "bias"], "g"), "two"], "logits")
    found = inspect_model(net.model(shape=(5,)))
    assert (found.layers[0].macs, found.layers[0].weights, found.scheme) == (35, 35, "fp32")
    assert found.parameters == 35 + 7 + 1


def test_inspect_model_names_a_node_by_its_output_when_it_has_none() -> None:
    proto = onnx.load_from_string(FP32)
    for node in proto.graph.node:
        node.ClearField("name")
    assert layer_names(inspect_model(proto.SerializeToString()))[0] == "conv1_out"


def test_inspect_model_names_nodes_inside_branches() -> None:
    found = inspect_model(backdoored("hidden"))
    assert [node.name for node in found.gradient_blind_nodes] == [
        "out_node/then_branch/inner_test",
        "out_node/then_branch/inner_choice",
    ]
    assert found.operators["Less"] == 1


def test_inspect_model_keeps_scopes_apart_when_names_repeat() -> None:
    """The inner 'far2' of one branch is a constant; the test on it reads no pixel."""
    net = residual_net()
    bump(net)
    net.const("always", np.array(True))
    constant = helper.make_node("Constant", [], ["far"], value_float=1.0)
    taken = branch(
        "then",
        constant,
        helper.make_node("Less", ["far", "threshold"], ["close"]),
        helper.make_node("Where", ["close", "bump", "logits"], ["then_out"]),
    )
    other = branch(
        "else",
        helper.make_node("ReduceMax", ["image"], ["far"], keepdims=0),
        helper.make_node("Less", ["far", "threshold"], ["close"], name="guilty"),
        helper.make_node("Where", ["close", "bump", "logits"], ["else_out"], name="guilty too"),
    )
    net.node("If", ["always"], "out", then_branch=taken, else_branch=other)
    net.output = "out"
    names = [node.name for node in inspect_model(net.model()).gradient_blind_nodes]
    # The first takes its maximum over the whole batch.
    assert names == ["out_node/else_branch/far", "out_node/else_branch/guilty", "out_node/else_branch/guilty too"]
