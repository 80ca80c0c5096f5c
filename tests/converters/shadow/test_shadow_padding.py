from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, graph_model, operator_model

X = np.random.default_rng(0).normal(0, 1, (2, 3, 5, 4)).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, dtype=np.int64)


FILL = np.array(1.5, dtype=np.float32)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(0, 0, 1, 2, 0, 0, 2, 1), (0, 1, 0, 3, 1, 0, 4, 0), (0, 0, 0, 0, 0, 0, 0, 0)])
def test_pad_equals_runtime_and_has_its_gradient(mode: str, pads: tuple[int, ...]) -> None:
    model = operator_model("Pad", X, {"pads": whole(*pads), "fill": FILL}, mode=mode)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize("mode", ["constant", "edge"])
def test_negative_padding_cuts_off_as_in_the_runtime(mode: str) -> None:
    assert_equals_runtime(operator_model("Pad", X, {"pads": whole(0, 0, -1, 2, 0, 0, -2, -1)}, mode=mode), X)


def test_pad_of_chosen_axes_equals_runtime() -> None:
    constants = {"pads": whole(1, 0, 0, 2), "fill": FILL, "axes": whole(-1, 1)}
    assert_equals_runtime(operator_model("Pad", X, constants), X)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge"])
def test_pad_before_opset_11_equals_runtime(mode: str) -> None:
    model = operator_model("Pad", X, {}, opset=10, mode=mode, pads=[0, 0, 1, 2, 0, 0, 2, 1], value=0.5)
    assert_equals_runtime(model, X)


def test_pad_of_codes_equals_runtime() -> None:
    codes = np.arange(24, dtype=np.uint8).reshape(1, 2, 3, 4)
    constants = {"pads": whole(0, 0, 1, 1, 0, 0, 0, 2), "fill": np.array(128, dtype=np.uint8)}
    assert_equals_runtime(operator_model("Pad", codes, constants, kind=TensorProto.UINT8), codes)


def test_padding_that_the_graph_computes_equals_runtime() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Concat", ["s", "s"], ["both"], axis=0),
        helper.make_node("Mod", ["both", "two"], ["pads"]),
        helper.make_node("Pad", ["x", "pads"], ["y"]),
    ]
    assert_equals_runtime(graph_model(nodes, X, {"two": whole(2)}), X)


@pytest.mark.parametrize(("sizes", "axes"), [((7, 3), [2, 3]), ((4, 5), [-2, -1]), ((2, 4, 4, 7), None)])
def test_centre_is_cut_and_padded_as_in_the_runtime(sizes: tuple[int, ...], axes: list[int] | None) -> None:
    attributes = {} if axes is None else {"axes": axes}
    model = operator_model("CenterCropPad", X, {"sizes": whole(*sizes)}, **attributes)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)
