from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from qdefense.converters.shadow import ShadowError, build_shadow
from qdefense.converters.shadow.integer_products import IntegerProduct
from qdefense.converters.shadow.registry import Mode
from qdefense.converters.shadow.rounding import round_product

from .shadow_graphs import graph_model, scalars

GEOMETRIES: dict[str, dict[str, Any]] = {
    "padded": {"pads": [1, 1, 1, 1]},
    "lopsided": {"pads": [0, 1, 2, 0]},
    "strided with a rest": {"pads": [1, 1, 1, 1], "strides": [3, 2]},
    "dilated": {"dilations": [2, 1]},
    "grouped": {"group": 2, "pads": [1, 1, 1, 1]},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_gradient_of_requantized_convolution_equals_that_of_its_parts(name: str) -> None:
    rng, attributes = np.random.default_rng(0), GEOMETRIES[name]
    groups = attributes.get("group", 1)
    weight = rng.integers(-60, 60, (6, 4 // groups, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.01, 0.03, 6).astype(np.float32)
    constants = scalars(xs=(0.03, np.float32), xz=(3, np.uint8), ys=(0.07, np.float32), yz=(90, np.uint8))
    constants |= {"w": weight, "ws": scale, "wz": np.zeros(6, dtype=np.int8)}
    x = rng.integers(0, 256, (3, 4, 9, 8)).astype(np.uint8)
    node = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"], ["y"], **attributes)
    shadow = build_shadow(graph_model([node], x, constants, output_type=TensorProto.UINT8), source="shipped")

    codes = torch.from_numpy(x).float().requires_grad_()
    top, left, bottom, right = attributes.get("pads", [0, 0, 0, 0])
    padded = torch.nn.functional.pad(codes - 3, (left, right, top, bottom))
    sums = torch.nn.functional.conv2d(
        padded, torch.from_numpy(weight).float(), None, attributes.get("strides", 1), 0,
        attributes.get("dilations", 1), groups,
    )  # fmt: skip
    factor = torch.from_numpy(np.float32(0.03) * scale / np.float32(0.07)).reshape(1, -1, 1, 1)
    parts = round_product(sums, factor, torch.tensor(90.0), (0, 255))
    upstream = torch.randn(parts.shape, generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(parts, codes, upstream)
    whole = shadow(codes)
    (found,) = torch.autograd.grad(whole, codes, upstream)
    assert torch.equal(whole, parts)
    assert 0.05 < ((parts == 0) | (parts == 255)).float().mean() < 0.95
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_product_without_a_right_operand_is_refused() -> None:
    product = IntegerProduct(raw=None, zero_point=None, bias=None, saturates=False)
    with pytest.raises(ValueError, match="the right operand is neither constant nor given"):
        product.sums(torch.zeros(1, 2), None, None, Mode())


def test_product_of_two_activations_is_exact_when_asked_for() -> None:
    product = IntegerProduct(raw=None, zero_point=None, bias=None, saturates=False)
    codes, right = torch.full((1, 3000), 255.0), torch.full((3000, 1), 255.0)
    right[::2] -= 1
    exact = int(codes.long() @ right.long())
    assert int(product.sums(codes, None, right, Mode(exact=True))) == exact > 2**24


@pytest.mark.parametrize("operator", ["QLinearConv", "MatMulInteger"])
def test_sums_that_could_wrap_around_are_refused(operator: str) -> None:
    """ONNX Runtime's fused kernel answers 0 where the exact sum is the largest code: a step that no gradient sees."""
    constants = scalars(xs=(1 / 255, np.float32), xz=(0, np.uint8), ys=(84215.0, np.float32), yz=(0, np.uint8))
    bias = np.array([2**31 - 1 - 500_000], dtype=np.int32)
    constants |= {
        "w": np.full((1, 3, 4, 4), 64, np.int8),
        "ws": np.array([0.01], np.float32),
        "wz": np.zeros(1, np.int8),
    }
    node, x = helper.make_node("QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"]), (1, 3, 4, 4)
    kind = TensorProto.UINT8
    if operator == "MatMulInteger":
        constants, x, kind = {"w": np.full((67_000, 1), 127, np.int8)}, (1, 67_000), TensorProto.INT32
        node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])

    def build(**more: np.ndarray) -> None:
        model = graph_model([node], np.zeros(x, np.uint8), constants | more, output_type=kind)
        build_shadow(model, source="shipped")

    with pytest.raises(ShadowError, match="its sums can leave 32 bits, where they wrap around, which is not covered"):
        build(b=bias) if operator == "QLinearConv" else build()
    if operator == "QLinearConv":
        build(b=bias - 500_000)
