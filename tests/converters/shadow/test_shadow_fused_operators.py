from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper

from qdefense.converters.shadow import UnsupportedOperatorError, build_shadow

from .shadow_graphs import MICROSOFT, Array, graph_model, session_output, shadow_output

CONVOLUTIONS: dict[str, list[float]] = {
    "": [], "Relu": [], "Sigmoid": [], "Tanh": [], "HardSwish": [],
    "LeakyRelu": [0.3], "Clip": [-0.5, 1.5], "HardSigmoid": [0.3, 0.4],
}  # fmt: skip
PRODUCTS: dict[str, dict[str, float]] = {
    "Relu": {}, "Sigmoid": {}, "Tanh": {}, "Softplus": {}, "Softsign": {},
    "LeakyRelu": {"alpha": 0.3}, "Elu": {"alpha": 0.7}, "Celu": {"alpha": 0.7}, "ThresholdedRelu": {"alpha": 0.4},
    "HardSigmoid": {"alpha": 0.3, "beta": 0.4}, "Selu": {"alpha": 1.6, "gamma": 1.1},
    "ScaledTanh": {"alpha": 0.6, "beta": 1.2}, "ParametricSoftplus": {"alpha": 0.6, "beta": 1.2},
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def fused(operator: str, inputs: int | list[str], **attributes: Any) -> NodeProto:
    names = ["x", *"abcd"[: inputs - 1]] if isinstance(inputs, int) else inputs
    domain = "" if operator == "SimplifiedLayerNormalization" else MICROSOFT
    return helper.make_node(operator, names, ["y"], domain=domain, **attributes)


def assert_close(node: NodeProto, x: Array, constants: dict[str, Array]) -> None:
    model = graph_model([node], x, constants)
    expected = session_output(model, x, level="ORT_DISABLE_ALL")
    np.testing.assert_allclose(shadow_output(model, x), expected, rtol=2e-5, atol=2e-5)
    inputs = torch.from_numpy(x).requires_grad_()
    (gradient,) = torch.autograd.grad((build_shadow(model, source="shipped")(inputs) * 1.7).sum(), inputs)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("activation", CONVOLUTIONS)
@pytest.mark.parametrize("added", [False, True])
def test_fused_convolution_equals_runtime(activation: str, added: bool) -> None:
    settings = {"activation": activation, "activation_params": CONVOLUTIONS[activation]}
    node = fused(
        "FusedConv", 4 if added else 3, pads=[1] * 4, **{name: value for name, value in settings.items() if value}
    )
    constants = {"a": normal(5, 3, 3, 3, seed=1), "b": normal(5, seed=2)}
    if added:
        constants["c"] = normal(2, 5, 6, 6, seed=3)
    assert_close(node, normal(2, 3, 6, 6), constants)


@pytest.mark.parametrize("activation", PRODUCTS)
def test_fused_gemm_equals_runtime(activation: str) -> None:
    numbers = {f"activation_{name}": number for name, number in PRODUCTS[activation].items()}
    node = fused("FusedGemm", 3, activation=activation, transB=1, alpha=0.7, beta=1.5, **numbers)
    assert_close(node, normal(4, 8), {"a": normal(5, 8, seed=1), "b": normal(5, seed=2)})


# shapes of (2, 3) matrices of 4 x 5 and 5 x 6; `transBatch` puts the rows before the axes of the batch
MATRICES: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plain": ((2, 3, 4, 5), (2, 3, 5, 6), {"alpha": 0.25}),
    "transposed": ((2, 3, 5, 4), (2, 3, 6, 5), {"transA": 1, "transB": 1}),
    "left rows first": ((4, 2, 3, 5), (2, 3, 5, 6), {"transBatchA": 1}),
    "right rows first": ((2, 3, 4, 5), (5, 2, 3, 6), {"transBatchB": 1, "alpha": 3.0}),
    "rows first and transposed": ((5, 2, 3, 4), (6, 2, 3, 5), dict.fromkeys(
        ("transA", "transB", "transBatchA", "transBatchB"), 1)),
}  # fmt: skip


@pytest.mark.parametrize("form", MATRICES)
def test_fused_matmul_equals_runtime(form: str) -> None:
    left, right, attributes = MATRICES[form]
    assert_close(fused("FusedMatMul", 2, **attributes), normal(*left), {"a": normal(*right, seed=1)})


UNARY: dict[str, tuple[NodeProto, int]] = {
    "gelu": (fused("Gelu", 1), 0),
    "bias gelu": (fused("BiasGelu", 2), 1),
    "fast gelu": (fused("FastGelu", 1), 0),
    "fast gelu of a sum": (fused("FastGelu", 2), 1),
    "quick gelu": (fused("QuickGelu", 1), 0),
    "silu": (fused("QuickGelu", 1, alpha=1.0), 0),
    "root mean square": (fused("SimplifiedLayerNormalization", 2, axis=-1, epsilon=1e-3), 1),
}


@pytest.mark.parametrize("name", UNARY)
def test_operator_of_one_tensor_equals_runtime(name: str) -> None:
    node, vectors = UNARY[name]
    assert_close(node, 3 * normal(2, 4, 8), {"a": normal(8, seed=1)} if vectors else {})


@pytest.mark.parametrize("skip", [(2, 4, 8), (1, 4, 8)])
@pytest.mark.parametrize(("beta", "bias"), [(True, True), (True, False), (False, True), (False, False)])
def test_skip_layer_normalization_equals_runtime(skip: tuple[int, ...], beta: bool, bias: bool) -> None:
    names = ["x", "a", "b", "c" if beta else "", "d" if bias else ""]
    constants = {name: normal(8, seed=at) for at, name in enumerate("bcd", 2) if name in names}
    assert_close(
        fused("SkipLayerNormalization", names, epsilon=1e-4), normal(2, 4, 8), {"a": normal(*skip, seed=1), **constants}
    )


@pytest.mark.parametrize("inputs", [3, 4])
def test_skip_simplified_layer_normalization_equals_runtime(inputs: int) -> None:
    constants = {"a": normal(2, 4, 8, seed=1)} | {name: normal(8, seed=2) for name in "bc"[: inputs - 2]}
    assert_close(fused("SkipSimplifiedLayerNormalization", inputs), normal(2, 4, 8), constants)


@pytest.mark.parametrize("operator", ["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"])
def test_sum_that_was_normalised_is_an_output(operator: str) -> None:
    node = helper.make_node(operator, ["x", "a", "b"], ["n", "", "", "s"], domain=MICROSOFT)
    x = normal(2, 4, 8)
    model = graph_model([node, helper.make_node("Mul", ["n", "s"], ["y"])], x, {"a": x[::-1], "b": normal(8)})
    np.testing.assert_allclose(shadow_output(model, x), session_output(model, x), rtol=2e-5, atol=2e-5)


def test_normalisations_of_the_runtime_are_known_before_onnx_had_them() -> None:
    x, constants = normal(2, 4, 8), {"a": normal(8, seed=1)}
    for operator in ("SimplifiedLayerNormalization", "LayerNormalization"):
        model = graph_model([helper.make_node(operator, ["x", "a"], ["y"], axis=-1)], x, constants, opset=13)
        np.testing.assert_allclose(shadow_output(model, x), session_output(model, x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (fused("FusedConv", 2, activation="Elu"), "activation 'Elu' is not one of"),
        (fused("FusedConv", 2, activation="Clip", activation_params=[0.0]), "its activation takes .'min', 'max'."),
        (fused("FusedGemm", 2, activation="Clip"), "activation 'Clip' is not one of"),
        (fused("FusedGemm", 2, activation="Elu"), "attribute 'activation_alpha' is missing"),
        (
            helper.make_node("SkipLayerNormalization", ["x", "a", "a"], ["y", "m"], domain=MICROSOFT),
            "its mean and deviation are read",
        ),
    ],
)
def test_uncovered_use_is_refused(node: NodeProto, reason: str) -> None:
    model = graph_model([node], normal(1, 2, 4, 4), {"a": normal(2, 2, 1, 1)})
    with pytest.raises(UnsupportedOperatorError, match=reason):
        build_shadow(model, source="shipped")
