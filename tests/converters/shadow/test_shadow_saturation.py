from __future__ import annotations

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from qdefense.converters.shadow import (
    build_shadow,
    runtime_saturation,
    saturating_matmul,
    saturation_risk,
)

from .shadow_graphs import Array, graph_model, run_shadow, scalars, session_output


def pairwise_clipped(codes: Array, weights: Array) -> Array:
    """The definition, entry by entry: clip each sum of two neighbouring products to int16, then add."""
    result = np.zeros((codes.shape[0], weights.shape[1]), dtype=np.int64)
    for row, column in np.ndindex(*result.shape):
        products = [int(a) * int(w) for a, w in zip(codes[row], weights[:, column], strict=True)]
        products += [0] * (len(products) % 2)
        result[row, column] = sum(
            min(max(first + second, -32768), 32767) for first, second in zip(products[::2], products[1::2], strict=True)
        )
    return result


def random_operands(rows: int, depth: int, columns: int, spread: float) -> tuple[Array, Array]:
    rng = np.random.default_rng(depth)
    weights = np.clip(rng.normal(0, spread, (depth, columns)).round(), -128, 127).astype(np.int8)
    return rng.integers(0, 256, (rows, depth)).astype(np.uint8), weights


def as_floats(array: Array) -> torch.Tensor:
    return torch.from_numpy(array.astype(np.float32))


@pytest.mark.parametrize("depth", [1, 2, 7, 64, 65])
@pytest.mark.parametrize("spread", [30.0, 90.0, 1000.0])
def test_saturating_matmul_equals_definition_when_operands_are_random(depth: int, spread: float) -> None:
    codes, weights = random_operands(5, depth, 6, spread)
    found = saturating_matmul(as_floats(codes), as_floats(weights))
    np.testing.assert_array_equal(found.numpy(), pairwise_clipped(codes, weights))


def test_saturating_matmul_differs_from_product_when_pairs_overflow() -> None:
    codes, weights = random_operands(5, 64, 6, 1000.0)
    found = saturating_matmul(as_floats(codes), as_floats(weights)).numpy()
    assert (found != codes.astype(np.int64) @ weights.astype(np.int64)).mean() > 0.5


@pytest.mark.parametrize("depth", [32, 33])
def test_matmul_integer_equals_emulation_or_product_as_the_runtime_was_measured(depth: int) -> None:
    codes, weights = random_operands(9, depth, 6, 1000.0)
    node = helper.make_node("MatMulInteger", ["x", "w"], ["y"])
    found = session_output(graph_model([node], codes, {"w": weights}, output_type=TensorProto.INT32), codes)
    exact = codes.astype(np.int64) @ weights.astype(np.int64)
    expected = pairwise_clipped(codes, weights) if "MatMulInteger" in runtime_saturation() else exact
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("weights", "pairs"),
    [
        ([[64], [64]], 0),
        ([[64], [65]], 1),
        ([[-64], [-64]], 0),
        ([[-64], [-65]], 1),
        ([[127], [-128]], 0),
        ([[1], [127], [127], [1]], 0),
        ([[-128]], 0),
        ([[127, 127, 0], [127, 0, 0], [127, 127, -128], [127, 127, -1]], 4),
    ],
)
def test_saturation_risk_counts_pairs_that_can_overflow(weights: list[list[int]], pairs: int) -> None:
    assert saturation_risk(np.array(weights, dtype=np.int8)) == pairs


def test_saturation_risk_is_zero_when_range_is_reduced() -> None:
    weights = np.random.default_rng(0).integers(-64, 65, (576, 64)).astype(np.int8)
    assert saturation_risk(weights) == 0


def convolution(groups: int, channels: int = 6) -> tuple[bytes, Array, Array]:
    rng = np.random.default_rng(groups)
    weights = rng.integers(-128, 128, (12, channels // groups, 3, 3)).astype(np.int8)
    constants = scalars(
        xs=(0.02, np.float32),
        xz=(9, np.uint8),
        ws=(0.01, np.float32),
        wz=(0, np.int8),
        ys=(0.4, np.float32),
        yz=(120, np.uint8),
    ) | {"w": weights}
    node = helper.make_node(
        "QLinearConv",
        ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"],
        ["y"],
        pads=[1, 0, 1, 2],
        strides=[2, 1],
        group=groups,
    )
    x = rng.integers(0, 256, (3, channels, 7, 6)).astype(np.uint8)
    return graph_model([node], x, constants, output_type=TensorProto.UINT8), x, weights


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_saturating_convolution_equals_definition_in_kernel_order(groups: int) -> None:
    model, x, weights = convolution(groups)
    padded = np.pad(x, ((0, 0), (0, 0), (1, 1), (0, 2)), constant_values=9)
    depth = 6 // groups
    sums = np.zeros((3, 12, 4, 6))
    for out, row, column in np.ndindex(12, 4, 6):
        group = out // (12 // groups)
        patch = padded[:, group * depth : (group + 1) * depth, 2 * row : 2 * row + 3, column : column + 3]
        kernel = weights[out].transpose(1, 2, 0).reshape(-1, 1)
        clipped = pairwise_clipped(patch.transpose(0, 2, 3, 1).reshape(3, -1), kernel)[:, 0]
        sums[:, out, row, column] = clipped - 9 * kernel.sum(dtype=np.int64)
    factor = np.float32(0.02) * np.float32(0.01) / np.float32(0.4)
    expected = np.clip(np.rint(sums.astype(np.float32) * factor) + 120, 0, 255)
    shadow = build_shadow(model, source="shipped")
    np.testing.assert_array_equal(run_shadow(shadow, x, saturate=True), expected)
    assert (run_shadow(shadow, x) != expected).any()


def test_gradient_is_the_same_with_and_without_saturation() -> None:
    model, x, _ = convolution(1)
    shadow = build_shadow(model, source="shipped")
    gradients = []
    for saturate in (False, True):
        codes = torch.from_numpy(x).float().requires_grad_()
        (gradient,) = torch.autograd.grad(shadow(codes, saturate=saturate).clamp(60, 180).sum(), codes)
        gradients.append(gradient)
    assert all(torch.isfinite(gradient).all() and gradient.abs().sum() > 0 for gradient in gradients)


def test_batched_right_operand_saturates_matrix_by_matrix() -> None:
    rng = np.random.default_rng(3)
    weights = rng.integers(-128, 128, (2, 16, 4)).astype(np.int8)
    x = rng.integers(0, 256, (2, 5, 16)).astype(np.uint8)
    model = graph_model(
        [helper.make_node("MatMulInteger", ["x", "w"], ["y"])], x, {"w": weights}, output_type=TensorProto.INT32
    )
    found = run_shadow(build_shadow(model, source="shipped"), x, saturate=True)
    np.testing.assert_array_equal(found, [pairwise_clipped(a, b) for a, b in zip(x, weights, strict=True)])
