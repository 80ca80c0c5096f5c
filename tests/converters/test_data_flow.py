from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as runtime_state

from qdefense.converters.gradient_blindness import BLIND_INPUTS, BLIND_OUTPUTS
from qdefense.converters.inspection import Inspection, inspect_model
from qdefense.converters.quantize import quantize
from qdefense.converters.runtime_graph import RUNTIME_ERRORS

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


OVER_THE_BATCH = ("if", "loop", "shape", "scale")
"""These take the largest distance of all images in the batch."""


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
    expected = ["ReduceMax"] * (name in OVER_THE_BATCH) + ATTACKS[name][1]
    assert [node.operator for node in found.gradient_blind_nodes] == expected
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


@pytest.mark.parametrize(("first", "blind"), [(0, ["If"]), (1, [])])
def test_inspect_model_calls_a_branch_blind_when_the_batch_size_decides(first: int, blind: list[str]) -> None:
    net = residual_net()
    size = net.node("Squeeze", [net.node("Shape", ["logits"], "shape", start=first, end=first + 1)], "size")
    odd = net.node("Equal", [size, net.const("none", np.array(0, np.int64))], "odd")
    taken = branch("then", helper.make_node("Neg", ["logits"], ["then_out"]))
    other = branch("else", helper.make_node("Identity", ["logits"], ["else_out"]))
    net.node("If", [odd], "out", then_branch=taken, else_branch=other)
    net.output = "out"
    found = inspect_model(net.model())
    assert ([node.operator for node in found.gradient_blind_nodes], found.bypass_depth) == (blind, 3)
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


def on_sums(kind: str, constant: Any) -> Callable[[Net, str], None]:
    """Arithmetic on what an integer kernel answers, before it becomes float: where it leaves 32 bits, it wraps."""

    def build(net: Net, source: str) -> None:
        net.node("DynamicQuantizeLinear", [source], "q", "scale", "zero")
        net.node("MatMulInteger", ["q", net.const("codes", np.ones((6, 6), np.int8)), "zero"], "sums")
        changed = net.node(kind, ["sums", net.const("constant", constant)], "changed")
        net.node("Cast", [changed], "probed", to=TensorProto.FLOAT)

    return build


def both_dynamic(net: Net, source: str) -> None:
    """Two activations multiplied in whole numbers, as attention is; the product of their scales undoes both."""
    net.node("DynamicQuantizeLinear", [source], "q", "scale", "zero")
    turned = net.node("Transpose", [source], "turned", perm=[1, 0])
    net.node("DynamicQuantizeLinear", [turned], "q2", "scale2", "zero2")
    net.node("MatMulInteger", ["q", "q2", "zero", "zero2"], "sums")
    scales = net.node("Mul", ["scale", "scale2"], "scales")
    product = net.node("Mul", [net.node("Cast", ["sums"], "floats", to=TensorProto.FLOAT), scales], "product")
    net.node("MatMul", [product, source], "probed")


def test_scales_of_two_activations_that_undo_their_codes_are_no_channel() -> None:
    operators = {node.operator for node in probe(both_dynamic).gradient_blind_nodes}
    assert "DynamicQuantizeLinear" not in operators


def test_a_huge_axis_costs_nothing() -> None:
    """Ranges of axes were sets of all of them: 83 MiB for this one."""
    found = probe(apply("Softmax", axis=-(2**40)))
    assert found.operators["Softmax"] == 1


def nonzero(net: Net, source: str) -> None:
    places = net.node("Cast", [net.node("NonZero", [source], "places")], "numbers", to=TensorProto.FLOAT)
    count = net.node("ReduceSum", [places], "count", keepdims=0)
    net.node("Mul", [source, count], "probed")


def sampled(mode: str) -> Callable[[Net, str], None]:
    """The features say where they are looked at themselves, as a picture."""

    def build(net: Net, source: str) -> None:
        picture = net.node("Reshape", [source, integers(net, "rows", -1, 1, 2, 3)], "picture")
        places = net.node("Reshape", [source, integers(net, "grid", -1, 1, 3, 2)], "places")
        seen = net.node("GridSample", [picture, places], "seen", mode=mode)
        half = net.node("Reshape", [seen, integers(net, "back", -1, 3)], "half")
        net.node("Concat", [half, half], "probed", axis=1)

    return build


def dropout_mask(net: Net, source: str) -> None:
    net.node("Dropout", [source], "kept", "mask")
    net.node("Cast", ["mask"], "probed", to=TensorProto.FLOAT)


def chosen_by_constant(net: Net, source: str) -> None:
    net.const("mask", np.array([[True, False] * 3]))
    net.node("Where", ["mask", source, net.node("Neg", [source], "negative")], "probed")


def branched_by_constant(net: Net, source: str) -> None:
    net.const("always", np.array(True))
    bodies = []
    for name, kind in (("then", "Neg"), ("else", "Abs")):
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [None, 6])
        bodies.append(helper.make_graph([helper.make_node(kind, [source], [f"{name}_out"])], name, [], [out]))
    net.node("If", ["always"], "probed", then_branch=bodies[0], else_branch=bodies[1])


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
    "Cast": on_integer("Identity", to=TensorProto.INT32),
    "Neg": on_integer("Neg", to=TensorProto.INT32),
    "Div": on_integer("Div", np.array(1000, np.int32), to=TensorProto.INT32),
    "ReduceMean": on_integer("ReduceMean", np.array([1], np.int64), to=TensorProto.INT32),
    "Add": on_sums("Add", np.array(2**31 - 2001, np.int32)),
    "Mul": on_sums("Mul", np.array(1_000_000, np.int32)),
    "CastLike": cast_like(np.int32),
    "TopK": top(1),
    "Gather": lookup,
    "OneHot": on_integer("OneHot", np.array(6), np.array([0, 1], np.float32), to=TensorProto.INT64),
    "NonZero": nonzero,
    "GridSample": sampled("nearest"),
    "Dropout": dropout_mask,
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
    "If": branched_by_constant,
    "GridSample": sampled("linear"),
    "Dropout": apply("Dropout"),
    "Scaler": regressor("Scaler", offset=[0.0], scale=[1.0]),
}


@pytest.mark.parametrize("kind", SMOOTH)
def test_inspect_model_reports_nothing_when_operator_has_a_gradient(kind: str) -> None:
    assert probe(SMOOTH[kind]).gradient_blind_nodes == ()


@pytest.mark.parametrize(("kind", "to"), [(kind, to) for kind in ("Add", "Div", "Mul", "Sub") for to in (True, False)])
def test_inspect_model_reports_arithmetic_on_bytes(kind: str, to: bool) -> None:
    """A file that takes uint8 images may look at them without any cast: 100 // 101 is 0 and 101 // 101 is 1."""
    net = Net()
    source = net.node("Cast", ["image"], "floats", to=TensorProto.FLOAT) if to else "image"
    answer = net.node(kind, [source, net.const("k", np.array(101, np.float32 if to else np.uint8))], "answer")
    net.node("MatMul", [net.node("Cast", [answer], "again", to=TensorProto.FLOAT), net.normal("w", 6, 3)], "logits")
    proto = onnx.load_from_string(net.model(shape=(6,)))
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    found = inspect_model(proto.SerializeToString()).gradient_blind_nodes
    assert [node.operator for node in found] == ([] if to else [kind])


FLOAT_TYPES = {f"tensor({name})" for name in ("float", "float16", "double", "bfloat16")}
NO_NUMBERS_OF_THE_IMAGE = {
    *("Shape", "Size", "RemovePadding"),  # followed as sizes
    *("Optional", "OptionalHasElement", "SequenceConstruct", "SequenceInsert", "SequenceMap", "SplitToSequence"),
    *("BiasDropout", "BitmaskBiasDropout", "BitmaskDropout", "DynamicSparseAttention", "EmbedLayerNormalization"),
}
"""Operators with an answer that is no float, which a shadow can still follow, or that carries nothing of the pixels."""


def test_inspect_model_reports_a_resize_whose_scale_is_read_off_the_pixels() -> None:
    def build(net: Net, source: str) -> None:
        highest = net.node("ReduceMax", [source], "highest")
        scales = net.node("Reshape", [highest, integers(net, "one", 1)], "scale")
        both = net.node("Concat", [net.const("same", np.ones(1, np.float32)), scales], "scales", axis=0)
        net.node("Resize", [source, "", both], "probed")

    assert ("Resize", "reads or writes at a place that depends on the image") in {
        (node.operator, node.reason) for node in probe(build).gradient_blind_nodes
    }


def turning_floats_into_something_else() -> Iterator[str]:
    for schema in runtime_state.get_all_operator_schema():
        types = {entry.type_param_str: set(entry.allowed_type_strs) for entry in schema.type_constraints}
        given, made = (
            [types.get(entry.typeStr, {entry.typeStr}) & FLOAT_TYPES for entry in side]
            for side in (schema.inputs, schema.outputs)
        )
        if schema.domain in ("", "com.microsoft") and not schema.name.endswith("_TRT") and any(given) and not all(made):
            yield schema.name


def test_every_operator_that_turns_floats_into_something_else_is_known() -> None:
    """From the runtime's own list, so that a new version's operators are noticed."""
    known = {*BLIND_INPUTS, *BLIND_OUTPUTS, *NO_NUMBERS_OF_THE_IMAGE}
    unknown = {*turning_floats_into_something_else()} - known
    # Quantizers: the shadow passes their gradient straight through.
    assert {name for name in unknown if "Quantize" not in name and not name.startswith("Q")} == set()


def unary_operators() -> list[str]:
    """Operators of ONNX that need one float tensor and nothing else."""
    names = []
    for schema in onnx.defs.get_all_schemas():
        types = {entry.type_param_str: set(entry.allowed_type_strs) for entry in schema.type_constraints}
        given = [types.get(entry.type_str, {entry.type_str}) for entry in schema.inputs[: max(1, schema.min_input)]]
        needed = [entry for entry in schema.attributes.values() if entry.required]
        if schema.domain == "" and not needed and len(given) == 1 and "tensor(float)" in given[0]:
            names.append(schema.name)
    return sorted(names)


def runs_flat(kind: str) -> bool | None:
    """Whether the operator answers the same when its input moves a little, by the runtime; None if it can't say."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4, 4])
    node = helper.make_node(kind, ["x"], ["y"])
    graph = helper.make_graph([node], "one", [x], [onnx.ValueInfoProto(name="y")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    at = np.random.default_rng(0).uniform(0.1, 0.9, (2, 3, 4, 4)).astype(np.float32)
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        here, there = (session.run(None, {"x": at + np.float32(step)})[0] for step in (0, 1e-5))
    except RUNTIME_ERRORS:
        return None
    floats = isinstance(here, np.ndarray) and here.dtype == np.float32
    return floats and np.array_equal(here, there)


def test_every_operator_that_the_runtime_runs_as_a_step_function_is_reported() -> None:
    found = {kind: runs_flat(kind) for kind in unary_operators()}
    assert sum(flat is not None for flat in found.values()) > 40, "the runtime could say of enough operators"
    flat = {kind for kind, answer in found.items() if answer}
    assert {"Ceil", "Floor", "Round", "Sign"} <= flat
    # These ignore what they are given.
    assert flat - {"EyeLike", "RandomNormalLike", "RandomUniformLike"} <= set(BLIND_INPUTS)


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


COUNTS, MIXES = "computes with the size of the batch or image", "mixes the images of one batch"


def integers(net: Net, name: str, *values: int) -> str:
    return net.const(name, np.array(values, np.int64))


def rows(net: Net, source: str) -> str:
    """How many images the batch has, as a shape of one dimension."""
    return net.node("Gather", [net.node("Shape", [source], "shape"), integers(net, "first", 0)], "rows")


def times(net: Net, source: str, factor: str) -> None:
    number = net.node("Cast", [factor], "number", to=TensorProto.FLOAT)
    net.node("Mul", [source, number], "probed")


def times_size(net: Net, source: str) -> None:
    times(net, source, net.node("Size", [source], "count"))


def times_table(net: Net, source: str) -> None:
    """The table says the same for most batches."""
    table = integers(net, "table", 1, 2, *[1] * 62)
    times(net, source, net.node("Gather", [table, rows(net, source)], "found"))


def times_cancelled(net: Net, source: str) -> None:
    """A batch of another size leaves something else over."""
    times(net, source, net.node("Sub", [rows(net, source), integers(net, "huge", 720720 << 10)], "left"))


def times_sum_of_ones(net: Net, source: str) -> None:
    ones = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    column = net.node("ConstantOfShape", [rows(net, source)], "column", value=ones)
    times(net, source, net.node("ReduceSum", [column], "sum"))


def times_position(net: Net, source: str) -> None:
    count = net.node("Squeeze", [rows(net, source)], "count")
    net.const("zero", np.array(0, np.int64))
    net.const("step", np.array(1, np.int64))
    places = net.node("Range", ["zero", count, "step"], "places")
    times(net, source, net.node("Unsqueeze", [places, integers(net, "last", 1)], "column"))


def sliced_at_rows(net: Net, source: str) -> None:
    """Which features are read depends on the size of the batch."""
    twice = net.node("Concat", [source, source], "twice", axis=1)
    end = net.node("Add", [rows(net, source), integers(net, "six", 6)], "end")
    net.node("Slice", [twice, "rows", end, integers(net, "axis", 1)], "probed")


def counting_product(net: Net, source: str) -> None:
    """Row vector of ones times the features: their sum over the batch."""
    net.node("Gemm", [net.const("ones", np.ones((1, 1), np.float32)), source], "scaled")
    net.node("Add", [source, "scaled"], "probed")


def whole_mean(net: Net, source: str) -> None:
    net.node("Sub", [source, net.node("ReduceMean", [source], "mean")], "probed")


def mean_over(axis: int) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        net.node("Sub", [source, net.node("ReduceMean", [source, integers(net, "axis", axis)], "mean")], "probed")

    return build


def mean_of_turned(net: Net, source: str) -> None:
    turned = net.node("Transpose", [source], "turned", perm=[1, 0])
    mean = net.node("ReduceMean", [turned, integers(net, "last", 1)], "mean")
    net.node("Add", [source, net.node("Transpose", [mean], "flat", perm=[1, 0])], "probed")


def diagonal(net: Net, source: str) -> None:
    net.node("Mul", [source, net.node("EyeLike", [source], "eye")], "probed")


def training_norm(net: Net, source: str) -> None:
    parts = [net.const(name, np.ones(6, np.float32)) for name in ("scale", "bias", "mean", "variance")]
    net.node("BatchNormalization", [source, *parts], "probed", "m", "v", training_mode=1)


def einsum(equation: str) -> Callable[[Net, str], None]:
    def build(net: Net, source: str) -> None:
        summed = net.node("Einsum", [source], "summed", equation=equation)
        net.node("Add", [source, summed], "probed")

    return build


BATCH_BOUND = {
    "size": (times_size, "Mul", COUNTS),
    "table": (times_table, "Mul", COUNTS),
    "cancelled": (times_cancelled, "Mul", COUNTS),
    "sum of ones": (times_sum_of_ones, "Mul", COUNTS),
    "position": (times_position, "Mul", COUNTS),
    "slice": (sliced_at_rows, "Slice", COUNTS),
    "eye": (diagonal, "EyeLike", MIXES),
    "product": (counting_product, "Gemm", MIXES),
    "mean": (whole_mean, "ReduceMean", MIXES),
    "mean over rows": (mean_over(0), "ReduceMean", MIXES),
    "mean of transposed": (mean_of_turned, "ReduceMean", MIXES),
    "first image": (apply("Gather", np.array([0]), axis=0), "Gather", MIXES),
    "softmax over rows": (apply("Softmax", axis=0), "Softmax", MIXES),
    "running sum": (apply("CumSum", np.array(0)), "CumSum", MIXES),
    "norm": (training_norm, "BatchNormalization", MIXES),
    "einsum": (einsum("nc->c"), "Einsum", MIXES),
}


@pytest.mark.parametrize("name", BATCH_BOUND)
def test_inspect_model_reports_node_when_the_batch_decides(name: str) -> None:
    build, operator, reason = BATCH_BOUND[name]
    assert [(node.operator, node.reason) for node in probe(build).gradient_blind_nodes] == [(operator, reason)]


def scaled_by_width(net: Net, source: str) -> None:
    """The square root of the number of features, as attention has it."""
    width = net.node("Gather", [net.node("Shape", [source], "shape"), integers(net, "second", 1)], "width")
    square = net.node("Mul", [width, width], "square")
    times(net, source, square)


def expanded_token(net: Net, source: str) -> None:
    target = net.node("Concat", [rows(net, source), integers(net, "rest", 2)], "target", axis=0)
    token = net.node("Expand", [net.normal("token", 1, 2), target], "tokens")
    both = net.node("Concat", [source, token], "both", axis=1)
    starts, ends = integers(net, "starts", 0, 1), integers(net, "ends", 2**63 - 1, 7)
    net.node("Slice", [both, starts, ends, integers(net, "axes", 0, 1)], "probed")


def viewed(net: Net, source: str) -> None:
    target = net.node("Concat", [rows(net, source), integers(net, "rest", 2, 3)], "target", axis=0)
    pairs = net.node("Reshape", [source, target], "pairs")
    mean = net.node("ReduceMean", [pairs, integers(net, "axis", 1)], "mean")
    net.node("Concat", [mean, mean], "probed", axis=1)


BATCH_FREE = {
    "width": scaled_by_width,
    "token": expanded_token,
    "view": viewed,
    "mean over features": mean_over(1),
    "mean over last": mean_over(-1),
    "einsum": einsum("nc->nc"),
}


@pytest.mark.parametrize("name", BATCH_FREE)
def test_inspect_model_reports_nothing_when_the_batch_only_gives_a_shape(name: str) -> None:
    assert probe(BATCH_FREE[name]).gradient_blind_nodes == ()
