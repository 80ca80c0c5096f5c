"""The prediction of what becomes an integer kernel; its oracle is ONNX Runtime's own graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdefense.converters.inspection import inspect_model

from .inspected_graphs import ort_quantize
from .quantized_graphs import Quantized, facts, predicted, run_by_runtime, start

TYPES = [("uint8", "int8"), ("int8", "int8"), ("uint8", "uint8"), ("int8", "uint8")]
KINDS = ["Conv", "Gemm", "MatMul"]


def check(model: bytes, *expected: bool) -> None:
    assert run_by_runtime(model) == list(expected), "the runtime does something else"
    assert predicted(model) == list(expected), "the prediction is wrong"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "weight"), TYPES)
@pytest.mark.parametrize("per_channel", [False, True])
def test_fuses_quantized_chain(kind: str, activation: str, weight: str, per_channel: bool) -> None:
    net = start(kind)
    axis = (0 if kind == "Conv" else 1) if per_channel else None
    for name in ("first", "second"):
        source = "image_d" if name == "second" else net.passed("image", "image_q", activation)
        net.passed(net.layer(kind, source, name, weight, axis=axis), f"{name}_d", activation)
        net.nodes[-1].output[0] = "image_d" if name == "first" else "out"
    check(net.model("out"), True, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "weight"), TYPES)
def test_fuses_residual_network_only_when_codes_are_unsigned(kind: str, activation: str, weight: str) -> None:
    net = start(kind)
    x = net.passed("image", "x", activation)
    first = net.passed(net.layer(kind, x, "first", weight), "first_d", activation)
    second = net.passed(net.layer(kind, first, "second", weight), "second_d", activation)
    added = net.passed(net.node("Add", [first, second], "sum"), "sum_d", activation)
    out = net.passed(net.layer(kind, added, "third", weight), "third_d", activation)
    unsigned = activation == "uint8"
    check(net.model(out), unsigned, unsigned, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "weight"), TYPES)
def test_fuses_without_quantizer_behind_it(kind: str, activation: str, weight: str) -> None:
    net = start(kind)
    out = net.layer(kind, net.passed("image", "x", activation), "layer", weight)
    check(net.model(out), kind != "Conv")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("activation", "weight"), TYPES)
def test_fuses_without_quantizer_behind_it_when_codes_are_shared(kind: str, activation: str, weight: str) -> None:
    net = start(kind)
    x = net.passed("image", "x", activation)
    outs = [net.layer(kind, x, name, weight) for name in ("left", "right")]
    expected = {"Conv": False, "Gemm": activation in ("uint8", weight), "MatMul": activation == "uint8"}[kind]
    check(net.model(*outs), expected, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_fuses_other_output_type_only_when_it_becomes_unsigned(kind: str, activation: str) -> None:
    other = "int8" if activation == "uint8" else "uint8"
    net = start(kind)
    once = net.passed(net.layer(kind, net.passed("image", "x", activation), "layer", "int8"), "layer_d", other)
    check(net.model(once), True)
    twice = net.node("Relu", [once], "read_again")
    check(net.model(once, twice), other == "uint8")


DEPTHWISE = {"depthwise": (4, (4, 1, 3, 3)), "grouped": (2, (4, 2, 3, 3))}


@pytest.mark.parametrize("name", DEPTHWISE)
@pytest.mark.parametrize(("activation", "weight"), TYPES)
def test_fuses_grouped_convolution(name: str, activation: str, weight: str) -> None:
    group, shape = DEPTHWISE[name]
    net = start("Conv")
    x = net.passed("image", "x", activation)
    y = net.node("Conv", [x, net.weights("w", shape, weight, axis=0)], "y", group=group, pads=[1] * 4)
    check(net.model(net.passed(y, "out", activation)), True)


def two_quantizers(net: Quantized, y: str) -> list[str]:
    return [net.passed(y, "one", "uint8"), net.passed(y, "two", "uint8", zero=3)]


def equal_quantizers(net: Quantized, y: str) -> list[str]:
    net.passed(y, "one", "uint8")
    net.node("QuantizeLinear", [y, "one_codes_scale", "one_codes_zero"], "two_codes")
    return ["one", net.node("DequantizeLinear", ["two_codes", "one_codes_scale", "one_codes_zero"], "two")]


def quantizer_and_reader(net: Quantized, y: str) -> list[str]:
    return [net.passed(y, "one", "uint8"), net.node("Relu", [y], "two")]


def quantizer_and_output(net: Quantized, y: str) -> list[str]:
    return [net.passed(y, "one", "uint8"), y]


def dropped_relu(net: Quantized, y: str) -> list[str]:
    return [net.passed(net.node("Relu", [y], "cut"), "one", "uint8", zero=0)]


def kept_relu(net: Quantized, y: str) -> list[str]:
    return [net.passed(net.node("Relu", [y], "cut"), "one", "uint8", zero=100)]


def float_relu(net: Quantized, y: str) -> list[str]:
    return [net.node("Relu", [y], "cut")]


def transposing(net: Quantized, y: str) -> list[str]:
    return [net.passed(net.node("Transpose", [y], "turned"), "one", "uint8")]


def reshaping(net: Quantized, y: str) -> list[str]:
    last = net.const("target", [0, -1], np.int64)
    return [net.passed(net.node("Reshape", [y, last], "reshaped"), "one", "uint8")]


def stopping(net: Quantized, y: str) -> list[str]:
    return [net.passed(net.node("Neg", [y], "negative"), "one", "uint8")]


BEHIND: dict[str, tuple[Callable[[Quantized, str], list[str]], dict[str, bool]]] = {
    "two quantizers": (two_quantizers, dict.fromkeys(KINDS, False)),
    "equal quantizers": (equal_quantizers, dict.fromkeys(KINDS, True)),
    "quantizer and reader": (quantizer_and_reader, dict.fromkeys(KINDS, False)),
    "quantizer and output": (quantizer_and_output, dict.fromkeys(KINDS, False)),
    "dropped relu": (dropped_relu, dict.fromkeys(KINDS, True)),
    "kept relu": (kept_relu, dict.fromkeys(KINDS, False)),
    "float relu": (float_relu, {"Conv": False, "Gemm": True, "MatMul": True}),
    "reshape": (reshaping, dict.fromkeys(KINDS, True)),
    "transpose": (transposing, {"Conv": True, "Gemm": False, "MatMul": True}),
    "stopping operator": (stopping, {"Conv": False, "Gemm": True, "MatMul": True}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", BEHIND)
def test_fuses_by_what_stands_behind(name: str, kind: str) -> None:
    build, expected = BEHIND[name]
    net = start(kind)
    y = net.layer(kind, net.passed("image", "x", "uint8"), "layer", "int8")
    check(net.model(*build(net, y)), expected[kind])


BEFORE = {
    "Transpose": ((8, 8), {"perm": [0, 2, 1]}, None, True),
    "MaxPool": ((8, 8), {"kernel_shape": [1]}, None, True),
    "Reshape": ((8,), {}, [-1, 8], True),
    "Squeeze": ((1, 8), {}, [1], True),
    "Unsqueeze": ((8,), {}, [1], True),
    "Identity": ((8,), {}, None, True),
    "Dropout": ((8,), {}, None, True),
    "Flatten": ((8,), {}, None, False),
    "Neg": ((8,), {}, None, False),
    "Relu": ((8,), {}, None, False),
}


@pytest.mark.parametrize("kind", BEFORE)
def test_fuses_by_what_stands_before(kind: str) -> None:
    shape, attributes, constant, expected = BEFORE[kind]
    net = Quantized(*shape)
    inputs = [net.passed("image", "x", "uint8")]
    inputs += [] if constant is None else [net.const("constant", constant, np.int64)]
    y = net.layer("MatMul", net.node(kind, inputs, "moved", **attributes), "layer", "uint8")
    check(net.model(net.passed(y, "out", "uint8")), expected)


@pytest.mark.parametrize("bias", [None, "codes", "floats", "computed"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("quantized", [True, False])
def test_fuses_gemm_by_its_bias(bias: str | None, factor: float, quantized: bool) -> None:
    net = start("Gemm")
    inputs = [net.passed("image", "x", "uint8"), net.weights("w", (8, 8), "int8")]
    if bias == "codes":
        net.const("b_codes", np.arange(8), np.int32)
        parts = [net.const("b_scale", 0.0005), net.const("b_zero", 0, np.int32)]
        inputs.append(net.node("DequantizeLinear", ["b_codes", *parts], "b"))
    elif bias is not None:
        inputs.append(net.const("b", np.ones(8)) if bias == "floats" else net.node("ReduceSum", ["image"], "b"))
    y = net.node("Gemm", inputs, "y", alpha=factor)
    expected = bias is None or (factor == 1 and (bias == "codes" or (bias == "floats" and quantized)))
    check(net.model(net.passed(y, "out", "uint8") if quantized else y), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("quantized", [True, False])
def test_fuses_float_weights_that_the_runtime_quantizes_itself(kind: str, quantized: bool) -> None:
    net = start(kind)
    weights = net.const("w", net.rng.normal(size=(4, 4, 1, 1) if kind == "Conv" else (8, 8)))
    y = net.node(kind, [net.passed("image", "x", "uint8"), weights], "y")
    check(net.model(net.passed(y, "out", "uint8") if quantized else y), quantized and kind != "MatMul")


@pytest.mark.parametrize("axis", [0, 1])
def test_fuses_matmul_only_when_scales_are_those_of_columns(axis: int) -> None:
    net = start("MatMul")
    y = net.layer("MatMul", net.passed("image", "x", "uint8"), "layer", "int8", axis=axis)
    check(net.model(net.passed(y, "out", "uint8")), axis == 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight", ["int4", "uint4"])
@pytest.mark.parametrize("block", [0, 16])
def test_fuses_no_four_bit_weights_when_activations_have_eight(kind: str, weight: str, block: int) -> None:
    net = Quantized(16, 3, 3) if kind == "Conv" else Quantized(32)
    axis = {"Conv": 1, "Gemm": 0, "MatMul": 0}[kind] if block else {"Conv": 0, "Gemm": 1, "MatMul": 1}[kind]
    y = net.layer(kind, net.passed("image", "x", "uint8"), "layer", weight, axis=axis, block=block)
    model = net.model(net.passed(y, "out", "uint8"))
    check(model, False)
    assert facts(model).float_layers == ("layer_node",)


@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_fuses_transposed_convolution_never(activation: str) -> None:
    net = start("Conv")
    x = net.passed("image", "x", activation)
    y = net.node("ConvTranspose", [x, net.weights("w", (4, 4, 1, 1), "int8")], "y")
    check(net.model(net.passed(y, "out", activation)), False)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("activation", ["uint8", "int8"])
def test_fuses_product_of_two_activations(activation: str, shared: bool) -> None:
    net = Quantized(6, 6)
    left = net.passed("image", "left", activation)
    right = left if shared else net.passed("image", "right", activation)
    model = net.model(net.passed(net.node("MatMul", [left, right], "y"), "out", activation))
    check(model, activation == "uint8" or not shared)
    # Signed codes become unsigned on both sides, and products of those never saturate.
    assert inspect_model(model).layers[0].can_saturate is facts(model).layers[0].can_saturate is False


RESIDUAL = [False, False, True, True, True]
"""The codes that conv1 answers with are read by conv2 and by the residual connection."""


@pytest.mark.parametrize(
    ("activation", "weight", "expected"),
    [("QUInt8", "QInt8", [True] * 5), ("QUInt8", "QUInt8", [True] * 5), ("QInt8", "QInt8", RESIDUAL)],
)
@pytest.mark.parametrize("form", ["QDQ", "QOperator"])
def test_fuses_as_the_runtime_does_when_its_own_quantizer_wrote_the_file(
    form: str, activation: str, weight: str, expected: list[bool], tmp_path: Path
) -> None:
    check(ort_quantize(tmp_path, form, activation, weight), *(expected if form == "QDQ" else [True] * 5))
