"""The gradients of quantized operators against those of the float operators that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from onnx import NodeProto, helper
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow import build_shadow

from .shadow_graphs import MICROSOFT, Array, graph_model, scalars

SCALE, ZERO = 0.02, 128
WEIGHT, MATRIX, OTHER = (
    np.random.default_rng(seed).integers(-60, 61, shape).astype(np.int8)
    for seed, shape in enumerate([(6, 4, 3, 3), (64, 5), (3, 4, 4, 4)])
)


def weights(codes: Array) -> Tensor:
    return torch.from_numpy(codes.astype(np.float32)) * 0.01


def quantized(operator: str, names: str, **attributes: Any) -> NodeProto:
    domain = "" if operator in ("QLinearConv", "QLinearMatMul") else MICROSOFT
    return helper.make_node(operator, names.split(), ["r"], domain=domain, **attributes)


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


OTHER_FLOATS = weights(OTHER)
# a quantized operator on the codes q of images (3, 4, 4, 4), and the float function that it stands for
CASES: dict[str, tuple[NodeProto, Callable[[Tensor], Tensor]]] = {
    "convolution": (
        quantized("QLinearConv", "q s z w ws wz ys z", pads=[1] * 4),
        lambda x: functional.conv2d(x, weights(WEIGHT), padding=1),
    ),
    "product": (
        quantized("QLinearMatMul", "q s z v ws wz ys z"),
        lambda x: x @ weights(MATRIX[:4]),
    ),
    "sum": (quantized("QLinearAdd", "q s z o ws wz ys z"), lambda x: x + OTHER_FLOATS),
    "elementwise product": (quantized("QLinearMul", "q s z o ws wz ps z"), lambda x: x * OTHER_FLOATS),
    "join": (
        quantized("QLinearConcat", "ys z q s z o ws wz", axis=1),
        lambda x: torch.cat([x, OTHER_FLOATS], 1),
    ),
    "choice": (
        quantized("QLinearWhere", "c q s z o ws wz ys z"),
        lambda x: torch.where(OTHER_FLOATS > 0, x, OTHER_FLOATS),
    ),
    "average": (
        quantized("QLinearAveragePool", "q s z ps z", kernel_shape=[2, 2]),
        lambda x: functional.avg_pool2d(x, 2, 1),
    ),
    "global average": (
        quantized("QLinearGlobalAveragePool", "q s z ps z"),
        lambda x: x.mean((2, 3), keepdim=True),
    ),
    "sigmoid": (quantized("QLinearSigmoid", "q s z ps z"), torch.sigmoid),
    "leaky relu": (quantized("QLinearLeakyRelu", "q s z s z", alpha=0.2), lambda x: functional.leaky_relu(x, 0.2)),
    "softmax": (quantized("QLinearSoftmax", "q s z ps nz", axis=-1, opset=13), lambda x: torch.softmax(x, -1)),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("exact", [False, True])
def test_gradient_is_close_to_that_of_the_float_operator(name: str, exact: bool) -> None:
    node, function = CASES[name]
    x = np.random.default_rng(7).uniform(-1.2, 1.2, (3, 4, 4, 4)).astype(np.float32)
    constants = scalars(
        s=(SCALE, np.float32), z=(ZERO, np.uint8), ws=(0.01, np.float32), wz=(0, np.int8), nz=(0, np.uint8),
        ys=(0.05, np.float32), ps=(0.01, np.float32),
    )  # fmt: skip
    constants |= {"w": WEIGHT, "v": MATRIX[:4], "o": OTHER, "c": OTHER > 0}
    if name in ("sum", "elementwise product", "join", "choice"):
        # these operators take codes of one type
        constants |= {"o": (OTHER.astype(np.int16) + ZERO).astype(np.uint8), "wz": constants["z"]}
    result = "ps" if "ps" in node.input[3:] else "s" if name == "leaky relu" else "ys"
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        node,
        helper.make_node("DequantizeLinear", ["r", result, "nz" if name == "softmax" else "z"], ["y"]),
    ]
    inputs = torch.from_numpy(x).requires_grad_()
    found = build_shadow(graph_model(nodes, x, constants), source="shipped")(inputs, exact=exact)
    expected = function(inputs)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(y, inputs, upstream)[0] for y in (found, expected)]
    assert torch.isfinite(gradients[0]).all()
    assert torch.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) > 0.995
