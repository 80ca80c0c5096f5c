from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from qdefense.converters.shadow import build_shadow, runtime_saturation

from .code_graphs import codes, dynamic_inputs
from .shadow_graphs import MICROSOFT, Array, graph_model, session_output, shadow_output

GROUPS = [1, 4, 8, 5, 12, 50]


@cache
def convolution() -> bytes:
    """A dynamically quantized convolution, as `quantize_dynamic` writes it."""
    rng = np.random.default_rng(3)
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("ConvInteger", ["q", "w", "z", "wz"], ["i"], pads=[1, 1, 1, 1]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["m"]),
        helper.make_node("Mul", ["f", "m"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["y"]),
    ]
    constants = {
        "w": codes(np.uint8, 5, 3, 3, 3, seed=2), "wz": np.array(120, dtype=np.uint8),
        "ws": np.array(0.01, dtype=np.float32), "b": rng.normal(0, 1, (1, 5, 1, 1)).astype(np.float32),
    }  # fmt: skip
    return graph_model(nodes, dynamic_inputs(), constants)


@cache
def product(weight_kind: type = np.uint8) -> bytes:
    constants = {
        "w": codes(weight_kind, 6, 5, seed=1), "ws": np.array(0.013, dtype=np.float32),
        "wz": np.array(3, dtype=weight_kind), "b": np.linspace(-1, 1, 5, dtype=np.float32),
    }  # fmt: skip
    node = helper.make_node("DynamicQuantizeMatMul", ["x", "w", "ws", "wz", "b"], ["y"], domain=MICROSOFT)
    return graph_model([node], dynamic_inputs(), constants)


@pytest.mark.parametrize("group", GROUPS)
def test_convolution_equals_runtime_at_the_batch_of_a_group(group: int) -> None:
    x = dynamic_inputs()
    expected = session_output(convolution(), x, level="ORT_DISABLE_ALL", batch=group)
    np.testing.assert_array_equal(shadow_output(convolution(), x, group=group), expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("weight_kind", [np.uint8, np.int8])
def test_product_equals_runtime_at_the_batch_of_a_group(group: int, weight_kind: type) -> None:
    x, model = dynamic_inputs(), product(weight_kind)
    found = shadow_output(model, x, group=group, saturate="MatMulInteger" in runtime_saturation())
    np.testing.assert_allclose(found, session_output(model, x, batch=group), rtol=2e-7, atol=1e-6)


def scales(x: Array, group: int) -> Array:
    model = graph_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], x, {}, "s")
    return shadow_output(model, x, group=group)


def test_last_group_may_be_short() -> None:
    x = dynamic_inputs()[:7]
    model = graph_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], x, {}, "s")
    expected = [session_output(model, x[at : at + 3]) for at in (0, 0, 0, 3, 3, 3, 6)]
    np.testing.assert_array_equal(scales(x, 3), np.stack(expected))


def test_images_of_a_group_share_a_scale_that_one_alone_would_not_have() -> None:
    x = dynamic_inputs()
    together = scales(x, 4).reshape(3, 4)
    np.testing.assert_array_equal(together, together[:, :1].repeat(4, 1))
    assert (together != scales(x, 1).reshape(3, 4)).sum() > 6


def test_gradient_is_finite_and_reaches_every_image_of_a_group() -> None:
    x = torch.from_numpy(dynamic_inputs()).requires_grad_()
    (gradient,) = torch.autograd.grad(build_shadow(convolution(), source="shipped")(x, group=4).sum(), x)
    assert torch.isfinite(gradient).all()
    assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_group_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="group is 0, expected the runtime's batch, at least 1"):
        shadow_output(convolution(), dynamic_inputs(), group=0)
