from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdefense.converters.shadow import ShadowError, UnsupportedOperatorError, build_shadow

from .shadow_graphs import MICROSOFT, Array, graph_model

IMAGES = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
CODES = np.ones((6, 3, 3, 3), dtype=np.int8)


def floats(*values: float) -> Array:
    return np.array(values if len(values) > 1 else values[0], dtype=np.float32)


def activation_model(scale: Array, zero_point: Array, **attributes: Any) -> bytes:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    return graph_model(nodes, IMAGES, {"s": scale, "z": zero_point})


def weight_model(scale: Array, zero_point: Array, **attributes: Any) -> bytes:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["f"], name="dequantize", **attributes),
        helper.make_node("Conv", ["x", "f"], ["y"]),
    ]
    return graph_model(nodes, IMAGES, {"w": CODES, "s": scale, "z": zero_point})


def refuses(model: bytes, label: str, reason: str) -> None:
    with pytest.raises(ShadowError) as caught:
        build_shadow(model, source="shipped")
    assert str(caught.value) == f"{label}: {reason}; quantize or export the model again"


ZERO = np.array(0, dtype=np.uint8)
POSITIVE = "expected finite numbers above 0"


@pytest.mark.parametrize(
    ("scale", "zero_point", "attributes", "reason"),
    [
        (floats(0), ZERO, {}, f"scale 's' holds 0.0, {POSITIVE}"),
        (floats(-0.5), ZERO, {}, f"scale 's' holds -0.5, {POSITIVE}"),
        (floats(np.nan), ZERO, {}, f"scale 's' holds nan, {POSITIVE}"),
        (floats(np.inf), ZERO, {}, f"scale 's' holds inf, {POSITIVE}"),
        (np.array(1), ZERO, {}, "scale 's' has no float values"),
        (floats(1, 1), ZERO.repeat(2), {}, "scale 's' has 2 values, expected 1 or 3, one for each channel"),
        (floats(1, 1, 1), ZERO.repeat(2), {}, "zero point 'z' has 2 values and its scale 3"),
        (floats(1, 1, 1), ZERO.repeat(3), {"axis": 7}, "attribute 'axis' is 7, and its input has 4 axes"),
        (floats(1, 1, 1), ZERO.repeat(3), {"axis": -5}, "attribute 'axis' is -5, and its input has 4 axes"),
        (np.ones((1, 3), np.float32), np.zeros((1, 3), np.uint8), {}, "scale 's' has 2 axes, expected none or one"),
    ],
)
def test_corrupt_parameter_of_an_activation_is_named(
    scale: Array, zero_point: Array, attributes: dict[str, Any], reason: str
) -> None:
    label = "node 'quantize': operator 'QuantizeLinear' of domain 'ai.onnx', opset 21"
    refuses(activation_model(scale, zero_point, **attributes), label, reason)


EACH_CHANNEL = "expected 1 or 6, one for each channel"
SIX, ZEROS = np.ones(6, dtype=np.float32), np.zeros(6, dtype=np.int8)


@pytest.mark.parametrize(
    ("scale", "zero_point", "attributes", "reason"),
    [
        (SIX * np.nan, ZEROS, {"axis": 0}, f"scale 's' holds nan, {POSITIVE}"),
        (SIX[:5], ZEROS[:5], {"axis": 0}, "scale 's' has 5 values, expected 1 or 6, one for each channel"),
        (SIX, ZEROS.astype(np.uint8), {"axis": 0}, "zero point 'z' has element type UINT8, its codes have INT8"),
        (SIX, ZEROS, {"axis": 4}, "attribute 'axis' is 4, and its input has 4 axes"),
        (
            np.ones((6, 2, 3, 3), np.float32),
            np.zeros((6, 2, 3, 3), np.int8),
            {"axis": 1, "block_size": 3},
            "scale 's' has shape (6, 2, 3, 3), expected (6, 1, 3, 3) for blocks of 3 along axis 1 of (6, 3, 3, 3)",
        ),
        (SIX, ZEROS, {"axis": 0, "block_size": -2}, "attribute 'block_size' is -2, expected a positive number"),
    ],
)
def test_corrupt_parameter_of_a_weight_is_named(
    scale: Array, zero_point: Array, attributes: dict[str, Any], reason: str
) -> None:
    label = "node 'dequantize': operator 'DequantizeLinear' of domain 'ai.onnx', opset 21"
    refuses(weight_model(scale, zero_point, **attributes), label, reason)


def test_scales_of_weight_blocks_may_be_negative_or_zero_as_the_block_quantizer_writes_them() -> None:
    scale = np.full((6, 2, 3, 3), -0.1, dtype=np.float32)
    scale[0] = 0
    build_shadow(weight_model(scale, np.zeros_like(scale, dtype=np.int8), axis=1, block_size=2), source="shipped")
    scale[0] = np.nan
    label = "node 'dequantize': operator 'DequantizeLinear' of domain 'ai.onnx', opset 21"
    model = weight_model(scale, np.zeros_like(scale, dtype=np.int8), axis=1, block_size=2)
    refuses(model, label, f"scale 's' holds nan, {POSITIVE}")


def test_stated_output_type_that_the_zero_point_contradicts_is_named() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], name="q", output_dtype=3)
    label = "node 'q': operator 'QuantizeLinear' of domain 'ai.onnx', opset 21"
    reason = "zero point 'z' has element type UINT8, attribute 'output_dtype' is INT8"
    refuses(graph_model([node], IMAGES, {"s": floats(1), "z": ZERO}, output_type=2), label, reason)


@pytest.mark.parametrize(
    ("op_type", "domain", "inputs", "bad", "reason"),
    [
        (
            "QLinearConv",
            "",
            "xszwtuvq",
            {"t": SIX[:5]},
            "scale 't' has 5 values, expected 1 or 6, one for each channel",
        ),
        ("QLinearConv", "", "xszwtuvq", {"s": SIX[:2]}, "scale 's' has 2 values, expected one for the whole tensor"),
        ("QLinearConv", "", "xszwtuvq", {"v": floats(0)}, f"scale 'v' holds 0.0, {POSITIVE}"),
        ("QLinearAdd", MICROSOFT, "xszxszvq", {"v": floats(np.inf)}, f"scale 'v' holds inf, {POSITIVE}"),
        ("QLinearConcat", MICROSOFT, "vqxsz", {"s": floats(-1)}, f"scale 's' holds -1.0, {POSITIVE}"),
        ("QLinearSigmoid", MICROSOFT, "xszvq", {"s": floats(np.nan)}, f"scale 's' holds nan, {POSITIVE}"),
    ],
)
def test_corrupt_parameter_of_an_operator_on_codes_is_named(
    op_type: str, domain: str, inputs: str, bad: dict[str, Array], reason: str
) -> None:
    good = {"s": floats(1), "z": ZERO, "w": CODES, "t": SIX, "u": ZEROS, "v": floats(1), "q": ZERO}
    constants = {name: value for name, value in (good | bad).items() if name in inputs}
    if bad.get("t") is not None:
        constants["u"] = ZEROS[:5]
    if bad.get("s") is not None and bad["s"].size > 1:
        constants["z"] = ZERO.repeat(bad["s"].size)
    node = helper.make_node(op_type, list(inputs), ["y"], name="n", domain=domain)
    model = graph_model([node], (IMAGES * 255).astype(np.uint8), constants, output_type=2)
    version = 1 if domain else 21
    refuses(model, f"node 'n': operator '{op_type}' of domain '{domain or 'ai.onnx'}', opset {version}", reason)


def test_axis_that_is_no_number_is_named() -> None:
    with pytest.raises(UnsupportedOperatorError, match=r"operator 'DequantizeLinear' of .*: its inputs or attributes"):
        build_shadow(weight_model(SIX, ZEROS, axis="channels"), source="shipped")
