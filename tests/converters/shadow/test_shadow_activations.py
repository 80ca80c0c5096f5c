from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from qdefense.converters.shadow import build_shadow

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, operator_model

X = np.random.default_rng(0).normal(0, 2, (2, 3, 4, 5)).astype(np.float32)
SLOPES = np.array([0.1, -0.3, 0.5], dtype=np.float32).reshape(3, 1, 1)
ACTIVATIONS: dict[str, tuple[str, dict[str, Array], dict[str, Any]]] = {
    "relu": ("Relu", {}, {}),
    "leaky relu": ("LeakyRelu", {}, {"alpha": 0.2}),
    "prelu": ("PRelu", {"slope": SLOPES}, {}),
    "elu": ("Elu", {}, {"alpha": 0.7}),
    "selu": ("Selu", {}, {}),
    "selu, own constants": ("Selu", {}, {"alpha": 1.5, "gamma": 0.8}),
    "celu": ("Celu", {}, {"alpha": 0.7}),
    "thresholded relu": ("ThresholdedRelu", {}, {"alpha": 0.6}),
    "shrink": ("Shrink", {}, {"lambd": 0.7, "bias": 0.2}),
    "sigmoid": ("Sigmoid", {}, {}),
    "hard sigmoid": ("HardSigmoid", {}, {"alpha": 0.17, "beta": 0.4}),
    "hard swish": ("HardSwish", {}, {}),
    "mish": ("Mish", {}, {}),
    "softplus": ("Softplus", {}, {}),
    "softsign": ("Softsign", {}, {}),
    "tanh": ("Tanh", {}, {}),
    "gelu": ("Gelu", {}, {}),
    "gelu by tanh": ("Gelu", {}, {"approximate": "tanh"}),
    "softmax": ("Softmax", {}, {"axis": 1}),
    "log softmax": ("LogSoftmax", {}, {"axis": -2}),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation_equals_runtime_and_has_its_gradient(name: str) -> None:
    op_type, constants, attributes = ACTIVATIONS[name]
    model = operator_model(op_type, X, constants, opset=22, **attributes)
    assert_equals_runtime(model, X)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize("alpha", [1.0, 1.7])
def test_swish_equals_its_formula(alpha: float) -> None:
    # ONNX Runtime 1.32 reads no model of opset 24
    model = operator_model("Swish", X, {}, opset=24, alpha=alpha)
    with torch.no_grad():
        found = build_shadow(model, source="shipped")(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(found, X / (1 + np.exp(-alpha * X)), rtol=1e-5, atol=1e-6)
    assert_gradient_is_right(model, X)


@pytest.mark.parametrize(("op_type", "axis"), [("Softmax", 1), ("LogSoftmax", 2), ("Hardmax", 1)])
@pytest.mark.parametrize("opset", [12, 13])
def test_softmax_family_before_and_since_opset_13(op_type: str, axis: int, opset: int) -> None:
    assert_equals_runtime(operator_model(op_type, X, {}, opset=opset, axis=axis), X)


def test_hardmax_takes_the_first_of_equal_values() -> None:
    x = np.array([[1, 3, 3, 2], [0, 0, 0, 0]], dtype=np.float32)
    assert_equals_runtime(operator_model("Hardmax", x, {}), x)
