from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdefense.converters import runtime_facts as under_test
from qdefense.converters.inspection import inspect_model
from qdefense.converters.precision import Layer
from qdefense.converters.reading import FileRefusedError
from qdefense.converters.runtime_facts import RuntimeFacts, runtime_operators

from .inspected_graphs import (
    CONV1,
    CONV2,
    DYNAMIC,
    FP32,
    FULL_RANGE,
    MACS,
    STATIC,
    WEIGHTS,
    Net,
    backdoored,
    edited,
    ort_quantize,
)
from .quantized_graphs import Quantized, facts, start


def test_runtime_facts_name_what_runs_for_each_layer() -> None:
    assert [layer.operator for layer in facts(FP32).layers] == ["FusedConv", "FusedConv", "Conv", "FusedConv", "Gemm"]
    assert [layer.operator for layer in facts(STATIC).layers] == ["QLinearConv"] * 4 + ["QGemm"]
    assert [layer.operator for layer in facts(DYNAMIC).layers] == ["ConvInteger"] * 4 + ["DynamicQuantizeMatMul"]


@pytest.mark.parametrize("model", [FP32, STATIC, DYNAMIC], ids=["fp32", "static", "dynamic"])
def test_runtime_facts_give_names_and_shares_of_the_shipped_layers(model: bytes) -> None:
    found, shipped = facts(model), inspect_model(model)
    assert [layer.name for layer in found.layers] == [layer.name for layer in shipped.layers]
    expected = 0.0 if model is FP32 else 1.0
    assert (found.integer_mac_share, found.integer_weight_share, found.float_layers) == (expected, expected, ())
    assert RuntimeFacts.model_validate_json(found.model_dump_json()) == found


def test_runtime_facts_give_hand_computed_shares_when_the_runtime_leaves_layers_in_float(tmp_path: Path) -> None:
    model = ort_quantize(tmp_path, "QDQ", "QInt8", "QInt8")
    found, shipped = facts(model), inspect_model(model)
    assert found.float_layers == ("conv1", "conv2")
    assert found.integer_mac_share == pytest.approx(1 - (CONV1 + CONV2) / sum(MACS.values()))
    assert found.integer_weight_share == pytest.approx(
        1 - (WEIGHTS["conv1"] + WEIGHTS["conv2"]) / sum(WEIGHTS.values())
    )
    # The prediction, which runs nothing, says the same.
    assert shipped.integer_mac_share == found.integer_mac_share
    assert shipped.scheme == "int8-static"


def test_runtime_facts_say_what_each_level_changes() -> None:
    found = facts(FP32)
    assert [effect.level for effect in found.levels] == ["basic", "extended", "all"]
    basic, extended, _ = found.levels
    assert (basic.nodes, basic.removed, basic.added) == (14, {}, {})
    assert (extended.nodes, extended.removed, extended.added) == (11, {"Conv": 3, "Relu": 3}, {"FusedConv": 3})
    assert found.operators == runtime_operators(FP32)


@pytest.mark.parametrize("model", [STATIC, DYNAMIC, FULL_RANGE], ids=["static", "dynamic", "full range"])
def test_highest_level_changes_no_integer_kernel(model: bytes) -> None:
    """What runs is read off EXTENDED, because ALL adds only layouts to it."""
    effect = facts(model).levels[-1]
    assert effect.removed == {}
    assert set(effect.added) <= {"Transpose"}


def same_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = "layer#3#"


def no_names(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        node.name = ""


@pytest.mark.parametrize("change", [same_names, no_names])
def test_runtime_facts_tell_layers_apart_when_names_do_not(change: Any) -> None:
    operators = [layer.operator for layer in facts(edited(change)).layers]
    assert operators == ["FusedConv", "FusedConv", "Conv", "FusedConv", "Gemm"]


def test_runtime_facts_find_layers_inside_branches() -> None:
    """The detector of this file is behind its `If`, whose condition is constant: the runtime inlines the branch."""
    found = facts(backdoored("hidden"))
    assert "If" not in found.operators
    assert len(found.layers) == 5
    assert all(layer.operator is not None for layer in found.layers)


def test_runtime_facts_leave_out_a_layer_that_is_merged_with_its_equal() -> None:
    net = Net()
    net.normal("w", 5, 5)
    halves = [net.node("MatMul", ["image", "w"], name) for name in ("left", "right")]
    net.node("Add", halves, "logits")
    found = facts(net.model(shape=(5,)))
    assert sorted(layer.operator or "" for layer in found.layers) == ["", "MatMul"]
    assert (found.integer_mac_share, found.integer_weight_share) == (0.0, 0.0)


def test_runtime_facts_leave_shares_open_when_a_layer_went_into_an_operator_of_no_layer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The untagged file stands for what the runtime made of the tagged one.
    monkeypatch.setattr(under_test, "dumped_model", lambda *_: FP32)
    found = facts(FP32)
    assert {layer.operator for layer in found.layers} == {None}
    assert (found.integer_mac_share, found.integer_weight_share) == (None, None)


@pytest.mark.parametrize("measured", [frozenset[str](), frozenset({"QLinearConv"})])
def test_runtime_facts_say_which_layers_saturate_on_this_cpu(
    measured: frozenset[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "runtime_saturation", lambda: measured)
    found, shipped = facts(FULL_RANGE), inspect_model(FULL_RANGE)
    risky = [layer.name for layer in found.layers if layer.can_saturate]
    assert tuple(risky) == shipped.saturation_layers
    assert "fc" in risky
    assert found.saturation_layers == (tuple(name for name in risky if name != "fc") if measured else ())
    assert facts(STATIC).saturation_layers == ()


@pytest.mark.parametrize("weight", ["int8", "uint8"])
def test_runtime_facts_take_a_fused_product_for_the_kernel_it_runs(
    weight: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(under_test, "runtime_saturation", lambda: frozenset({"MatMulInteger"}))
    net = start("MatMul")
    out = net.layer("MatMul", net.passed("image", "x", "uint8"), "layer", weight)
    (layer,) = facts(net.model(out)).layers
    assert (layer.operator, layer.saturates) == ("MatMulIntegerToFloat", weight == "int8")


def packed(level: int) -> bytes:
    net = Net()
    net.const("packed", np.zeros((3, 1, 16), np.uint8))
    net.const("scale", np.ones(3, np.float32))
    sizes = {"K": 32, "N": 3, "bits": 4, "block_size": 32, "accuracy_level": level}
    net.node("MatMulNBits", ["image", "packed", "scale"], "logits", domain="com.microsoft", **sizes)
    return net.model(shape=(32,))


@pytest.mark.parametrize(("level", "integer"), [(0, False), (1, False), (4, True)])
def test_runtime_facts_give_the_accuracy_level_of_packed_weights(level: int, integer: bool) -> None:
    (layer,) = facts(packed(level)).layers
    assert (layer.operator, layer.accuracy_level, layer.integer) == ("MatMulNBits", level, integer)
    assert inspect_model(packed(level)).layers[0].integer is integer


@pytest.mark.parametrize("kind", ["Conv", "MatMul"])
def test_runtime_facts_show_what_becomes_of_int4_weights(kind: str) -> None:
    net = Quantized(16, 3, 3) if kind == "Conv" else Quantized(32)
    out = net.layer(kind, "image", "layer", "int4", axis=0 if kind == "Conv" else 1)
    (layer,) = facts(net.model(out)).layers
    assert layer.operator == {"Conv": "Conv", "MatMul": "MatMulNBits"}[kind]
    assert layer.integer is (layer.accuracy_level == 4)


def test_runtime_facts_refuse_when_runtime_cannot_load(capfd: pytest.CaptureFixture[str]) -> None:
    data = edited(lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"))
    with pytest.raises(
        FileRefusedError, match=r"^ONNX Runtime cannot load the file: .*Sub.*; export the model again or"
    ):
        facts(data)
    assert capfd.readouterr() == ("", "")


def test_runtime_facts_show_text_of_the_file_as_text() -> None:
    found = facts(edited(lambda model: setattr(model.graph.node[2], "name", "conv\x1b[2J\n")))
    assert found.layers[0].name == r"conv\x1b[2J"
    assert found.model_dump_json().isprintable()


def test_layers_of_older_reports_have_no_granularity() -> None:
    layer = inspect_model(STATIC).layers[0].model_dump()
    del layer["granularity"], layer["block_size"]
    assert Layer.model_validate(layer).granularity is None


def test_runtime_facts_count_bodies_of_control_flow() -> None:
    net = Net()
    taken = helper.make_graph(
        [helper.make_node("Neg", ["image"], ["then_out"])],
        "then",
        [],
        [helper.make_tensor_value_info("then_out", TensorProto.FLOAT, [None, 5])],
    )
    other = helper.make_graph(
        [helper.make_node("Abs", ["image"], ["else_out"])],
        "else",
        [],
        [helper.make_tensor_value_info("else_out", TensorProto.FLOAT, [None, 5])],
    )
    positive = net.node(
        "Greater", [net.node("ReduceMax", ["image"], "top", keepdims=0), net.const("zero", np.float32(0))], "p"
    )
    net.node("If", [positive], "logits", then_branch=taken, else_branch=other)
    found = facts(net.model(shape=(5,)))
    assert found.operators == {"Abs": 1, "Greater": 1, "If": 1, "Neg": 1, "ReduceMax": 1}
    assert (found.layers, found.integer_mac_share) == ((), None)
