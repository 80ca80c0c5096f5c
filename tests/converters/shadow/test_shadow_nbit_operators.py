from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper

from qdefense.converters.shadow import UnsupportedOperatorError, build_shadow

from .shadow_graphs import MICROSOFT, Array, graph_model, session_output, shadow_output

# (K, block size): whole blocks, a short last block, one block
SHAPES = [(64, 16), (40, 16), (96, 64), (128, 128), (20, 32)]


def packed(codes: Array, bits: int) -> Array:
    """Codes of (N, ...) rows in bytes, the low bits first, each row padded to whole bytes."""
    per_byte = 8 // bits
    rows = codes.reshape(len(codes), -1)
    rows = np.pad(rows, ((0, 0), (0, -rows.shape[1] % per_byte))).reshape(len(codes), -1, per_byte)
    return np.asarray((rows << (np.arange(per_byte) * bits)).sum(-1), dtype=np.uint8)


def product(
    depth: int, block: int, *, bits: int = 4, zero_points: str = "none", flat: bool = False, bias: bool = False,
    **attributes: int,
) -> tuple[bytes, Array]:  # fmt: skip
    rng, rows, blocks = np.random.default_rng(depth + bits), 6, -(-depth // block)
    codes = rng.integers(0, 2**bits, (rows, blocks * block))
    scale = rng.uniform(0.01, 0.1, (rows, blocks)).astype(np.float32)
    constants: dict[str, Any] = {
        "w": packed(codes, bits).reshape(rows, blocks, -1),
        "s": scale.ravel() if flat else scale,
    }
    if zero_points == "packed":
        given = packed(rng.integers(0, 2**bits, (rows, blocks)), bits)
        constants["z"] = given.ravel() if flat else given
    elif zero_points == "float":
        constants["z"] = rng.uniform(0, 15, (rows, blocks)).astype(np.float32)
    if bias:
        constants["b"] = rng.normal(0, 1, rows).astype(np.float32)
    names = ["x", "w", "s", "z" if "z" in constants else "", "", "b" if bias else ""]
    x = rng.normal(0, 1, (3, 5, depth)).astype(np.float32)
    x[0, 1, :block] = 0
    settings = {"K": depth, "N": rows, "block_size": block, "bits": bits, **attributes}
    node = helper.make_node("MatMulNBits", names, ["y"], domain=MICROSOFT, **settings)
    return graph_model([node], x, constants), x


def relative_error(found: Array, expected: Array) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


# ONNX Runtime refuses float zero points of 8 bit weights
FORMS = [(2, "none"), (2, "packed"), (2, "float"), (4, "none"), (4, "packed"), (4, "float"), (8, "none"), (8, "packed")]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("bits", "zero_points"), FORMS)
def test_product_equals_runtime_at_float_accuracy(shape: tuple[int, int], bits: int, zero_points: str) -> None:
    level = 0 if bits == 4 else 1
    model, x = product(*shape, bits=bits, zero_points=zero_points, accuracy_level=level, bias=True)
    assert relative_error(shadow_output(model, x), session_output(model, x)) < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("zero_points", "flat"), [("none", False), ("none", True), ("packed", True)])
def test_product_equals_runtime_when_it_quantizes_activations(
    shape: tuple[int, int], bits: int, zero_points: str, flat: bool
) -> None:
    model, x = product(*shape, bits=bits, zero_points=zero_points, flat=flat, accuracy_level=4)
    expected = session_output(model, x)
    assert relative_error(shadow_output(model, x), expected) < 1e-6
    plain, _ = product(*shape, bits=bits, zero_points=zero_points, flat=flat, accuracy_level=1)
    assert relative_error(shadow_output(plain, x), expected) > 1e-4


def test_float_zero_points_leave_activations_alone_at_every_level() -> None:
    model, x = product(64, 16, zero_points="float", accuracy_level=4)
    assert relative_error(shadow_output(model, x), session_output(model, x)) < 1e-6


def test_gradient_goes_straight_through_the_quantized_activations() -> None:
    gradients = []
    for level in (1, 4):
        model, x = product(40, 16, accuracy_level=level)
        inputs = torch.from_numpy(x).requires_grad_()
        gradients += torch.autograd.grad(build_shadow(model, source="shipped")(inputs).sum(), inputs)
    assert gradients[0].abs().sum() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bits": 2, "accuracy_level": 4}, "session.qdq_matmulnbits_accuracy_level to 1"),
        ({"weight_prepacked": 1}, "attribute 'weight_prepacked' is 1, only 0 is covered"),
        ({"K": 0}, "'N' 6, 'K' 0 or 'block_size' 16 is not positive"),
        ({"K": 80}, "192 bytes are not 6 rows of 80 codes of 4 bits"),
    ],
)
def test_uncovered_product_is_refused(settings: dict[str, int], reason: str) -> None:
    model, _ = product(64, 16, **settings)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        build_shadow(model, source="shipped")


def test_bits_that_do_not_fill_bytes_are_refused() -> None:
    node = helper.make_node("MatMulNBits", ["x", "w", "s"], ["y"], domain=MICROSOFT, K=8, N=1, block_size=8, bits=3)
    constants = {"w": np.zeros((1, 1, 3), dtype=np.uint8), "s": np.ones((1, 1), dtype=np.float32)}
    model = graph_model([node], np.zeros((1, 8), dtype=np.float32), constants)
    with pytest.raises(UnsupportedOperatorError, match="attribute 'bits' is 3, covered are 2, 4 and 8"):
        build_shadow(model, source="shipped")


def test_reordered_weights_are_refused() -> None:
    node = helper.make_node("MatMulNBits", ["x", "w", "s", "", "g"], ["y"], domain=MICROSOFT, K=16, N=1, block_size=16)
    constants = {
        "w": np.zeros((1, 1, 8), dtype=np.uint8), "s": np.ones((1, 1), dtype=np.float32),
        "g": np.zeros(16, dtype=np.int32),
    }  # fmt: skip
    model = graph_model([node], np.zeros((1, 16), dtype=np.float32), constants)
    with pytest.raises(UnsupportedOperatorError, match="input 'g_idx' reorders the weights"):
        build_shadow(model, source="shipped")


@pytest.mark.parametrize(
    ("level", "zero_points", "quantization"), [(1, "none", "float"), (4, "none", "dynamic"), (4, "float", "float")]
)
def test_shadow_says_whether_activations_are_rounded(level: int, zero_points: str, quantization: str) -> None:
    model, _ = product(40, 16, accuracy_level=level, zero_points=zero_points)
    assert build_shadow(model, source="shipped").quantization == quantization
