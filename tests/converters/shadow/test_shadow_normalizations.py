from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qdefense.converters.shadow import build_shadow

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, operator_model

RNG = np.random.default_rng(0)
X = RNG.normal(0.5, 2, (3, 6, 5, 4)).astype(np.float32)


def vector(*shape: int) -> Array:
    return RNG.uniform(0.5, 1.5, shape).astype(np.float32)


Case = tuple[str, dict[str, Array], dict[str, Any]]
CASES: dict[str, Case] = {
    "batch": ("BatchNormalization", {name: vector(6) for name in "sbmv"}, {"epsilon": 1e-3}),
    "instance": ("InstanceNormalization", {"s": vector(6), "b": vector(6)}, {"epsilon": 1e-3}),
    "group": ("GroupNormalization", {"s": vector(6), "b": vector(6)}, {"num_groups": 3}),
    "layer": ("LayerNormalization", {"s": vector(4), "b": vector(4)}, {}),
    "layer, without bias": ("LayerNormalization", {"s": vector(4)}, {"epsilon": 1e-2}),
    "layer, three axes": ("LayerNormalization", {"s": vector(6, 5, 4), "b": vector(6, 5, 4)}, {"axis": 1}),
    "layer, broadcast scale": ("LayerNormalization", {"s": vector(4), "b": vector(4)}, {"axis": 2}),
    "2-norm": ("LpNormalization", {}, {"axis": 1}),
    "1-norm": ("LpNormalization", {}, {"axis": 1, "p": 1}),
    "neighbours": ("LRN", {}, {"size": 3, "alpha": 0.1, "beta": 0.6, "bias": 1.5}),
    "mean and variance": ("MeanVarianceNormalization", {}, {}),
    "mean and variance of some axes": ("MeanVarianceNormalization", {}, {"axes": [1, 2, 3]}),
}


@pytest.mark.parametrize("name", CASES)
def test_normalization_equals_runtime_and_has_its_gradient(name: str) -> None:
    op_type, constants, attributes = CASES[name]
    model = operator_model(op_type, X, constants, **attributes)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


def test_group_normalization_of_opset_18_scales_by_group() -> None:
    constants = {"s": vector(3), "b": vector(3)}
    model = operator_model("GroupNormalization", X, constants, opset=18, num_groups=3)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


def test_rms_normalization_equals_its_formula() -> None:
    scale = vector(5, 4)
    model = operator_model("RMSNormalization", X, {"s": scale}, opset=23, axis=-2, epsilon=1e-3)
    with torch.no_grad():
        found = build_shadow(model, source="shipped")(torch.from_numpy(X)).numpy()
    expected = X / np.sqrt((X**2).mean((2, 3), keepdims=True) + 1e-3) * scale
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize("index", [1, 2])
def test_statistics_of_layer_normalization_equal_runtime(index: int) -> None:
    constants = {"s": vector(5, 4), "b": vector(5, 4)}
    assert_equals_runtime(operator_model("LayerNormalization", X, constants, outputs=index + 1, axis=2), X)


@pytest.mark.parametrize("opset", [7, 9, 14, 15])
def test_batch_normalization_of_every_opset_equals_runtime(opset: int) -> None:
    assert_equals_runtime(operator_model("BatchNormalization", X, CASES["batch"][1], opset=opset), X)


def test_batch_normalization_of_opset_6_equals_that_of_opset_9() -> None:
    constants = CASES["batch"][1]
    old = operator_model("BatchNormalization", X, constants, opset=6, is_test=1)
    with torch.no_grad():
        found, expected = (
            build_shadow(model, source="shipped")(torch.from_numpy(X))
            for model in (old, operator_model("BatchNormalization", X, constants, opset=9))
        )
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_norm_of_zeros_is_not_divided_by() -> None:
    x = np.zeros((2, 3), dtype=np.float32)
    assert_equals_runtime(operator_model("LpNormalization", x, {}, axis=1), x)
