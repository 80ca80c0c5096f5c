from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from qdefense.converters.shadow import build_shadow

from .shadow_graphs import Array, assert_equals_runtime, graph_model, operator_model

FLOATS = np.float32([-300.7, -1.5, -0.5, 0.0, 0.5, 1.5, 255.9, 256, 300.2, 70000])
INTEGERS = ("UINT8", "INT8", "UINT16", "INT16", "INT32", "INT64", "BOOL")


def kind_of(name: str) -> int:
    return int(TensorProto.DataType.Value(name))


@pytest.mark.parametrize("target", INTEGERS)
def test_cast_of_floats_equals_runtime(target: str) -> None:
    assert_equals_runtime(operator_model("Cast", FLOATS, {}, kind=kind_of(target), to=kind_of(target)), FLOATS)


@pytest.mark.parametrize("target", ["UINT8", "INT8", "UINT16", "INT16"])
def test_cast_of_what_no_integer_holds_equals_runtime(target: str) -> None:
    # what a C compiler makes of it is its own affair; this is the runtime's
    x = np.float32([3e9, -3e9, 1e20, np.nan, np.inf, -np.inf])
    assert_equals_runtime(operator_model("Cast", x, {}, kind=kind_of(target), to=kind_of(target)), x)


@pytest.mark.parametrize("middle", INTEGERS)
@pytest.mark.parametrize("target", [*INTEGERS, "FLOAT"])
def test_cast_of_integers_equals_runtime(middle: str, target: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=kind_of(middle)),
        helper.make_node("Cast", ["i"], ["y"], to=kind_of(target)),
    ]
    assert_equals_runtime(graph_model(nodes, FLOATS, {}, output_type=kind_of(target)), FLOATS)


@pytest.mark.parametrize("middle", ["FLOAT16", "DOUBLE", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E5M2"])
def test_cast_through_another_float_rounds_as_the_runtime_does(middle: str) -> None:
    x = np.random.default_rng(0).normal(0, 50, 200).astype(np.float32)
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=kind_of(middle)),
        helper.make_node("Cast", ["n"], ["y"], to=kind_of("FLOAT")),
    ]
    assert_equals_runtime(graph_model(nodes, x, {}), x, rtol=0)


def gradient(model: bytes, x: Array) -> torch.Tensor:
    at = torch.from_numpy(x).requires_grad_()
    (found,) = torch.autograd.grad(build_shadow(model, source="shipped")(at).sum(), at)
    return found


@pytest.mark.parametrize("narrow", ["FLOAT16", "BFLOAT16", "FLOAT8E4M3FN"])
def test_gradient_passes_what_only_rounds(narrow: str) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["n"], to=kind_of(narrow)),
        helper.make_node("Cast", ["n"], ["y"], to=kind_of("FLOAT")),
    ]
    x = FLOATS[:8]
    torch.testing.assert_close(gradient(graph_model(nodes, x, {}), x), torch.ones(8), rtol=0, atol=0)


def test_cast_like_takes_the_type_of_the_other_input() -> None:
    constants = {"like": np.array(0, dtype=np.int8)}
    assert_equals_runtime(operator_model("CastLike", FLOATS, constants, kind=TensorProto.INT8), FLOATS)
