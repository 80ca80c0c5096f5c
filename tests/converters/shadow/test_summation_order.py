"""An exact pass gives the runtime's bits where the order of its float sums is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.shadow import build_shadow, convolutions, summation_order
from qdefense.converters.shadow.summation_order import adds_in_chains, channel_block

Floats = NDArray[np.float32]
CONVOLUTIONS = {
    "few channels, one by one": {"weight": (16, 3, 3, 3), "pads": [1, 1, 1, 1]},
    "one block": {"weight": (16, 16, 3, 3), "pads": [1, 1, 1, 1]},
    "several blocks": {"weight": (32, 64, 3, 3), "pads": [1, 1, 1, 1]},
    "an incomplete block": {"weight": (32, 24, 3, 3), "pads": [1, 1, 1, 1]},
    "outputs that fill no block": {"weight": (20, 32, 3, 3), "pads": [1, 1, 1, 1]},
    "pointwise": {"weight": (32, 64, 1, 1)},
    "pointwise, past 128 channels": {"weight": (16, 160, 1, 1), "strides": [2, 2]},
    "pointwise with padding": {"weight": (16, 64, 1, 1), "pads": [1, 1, 1, 1]},
    "depthwise": {"weight": (32, 1, 3, 3), "group": 32, "pads": [1, 1, 1, 1]},
    "grouped": {"weight": (64, 32, 3, 3), "group": 2, "pads": [1, 1, 1, 1]},
    "dilated, uneven padding": {"weight": (32, 32, 3, 3), "dilations": [2, 2], "pads": [2, 1, 2, 3]},
    "same upper": {"weight": (32, 32, 3, 3), "strides": [2, 2], "auto_pad": "SAME_UPPER"},
}


def draw(seed: int, *shape: int) -> Floats:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def model(operator: str, x: Floats, constants: list[Any], *, codes: bool = False, **attributes: Any) -> bytes:
    """One operator; its first constant is computed by a DequantizeLinear where it comes in codes."""
    names = [f"constant{index}" for index in range(len(constants))]
    nodes = [helper.make_node(operator, ["x", *names], ["y"], name="only", **attributes)]
    if codes:
        nodes.insert(0, helper.make_node("DequantizeLinear", ["codes", "scale"], [names[0]], name="weights"))
        constants = [
            (constants[0] * 30).round().clip(-128, 127).astype(np.int8),
            np.array(1 / 30, np.float32),
            *constants[1:],
        ]
        names = ["codes", "scale", *names[1:]]
    graph = helper.make_graph(
        nodes,
        "one-operator",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *x.shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for value, name in zip(constants, names, strict=True)],
    )
    opset = helper.make_opsetid("", 17)
    answer: bytes = helper.make_model(graph, opset_imports=[opset], ir_version=10).SerializeToString()
    return answer


def gelu(x: Floats) -> bytes:
    graph = helper.make_graph(
        [helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft")],
        "gelu",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N"])],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    answer: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return answer


def both(file: bytes, x: Floats) -> tuple[Floats, Floats]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    shadow = build_shadow(file, source="optimized")
    with torch.no_grad():
        return session.run(None, {"x": x})[0], shadow(torch.from_numpy(x), exact=True).numpy()


@pytest.mark.parametrize("codes", [False, True], ids=["stored", "dequantized"])
@pytest.mark.parametrize("size", [12, 8])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolution(case: str, size: int, codes: bool) -> None:
    attributes = dict(CONVOLUTIONS[case])
    weight = draw(1, *attributes.pop("weight"))
    x = draw(0, 3, weight.shape[1] * attributes.get("group", 1), size, size)
    expected, found = both(model("Conv", x, [weight, draw(2, len(weight))], codes=codes, **attributes), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    if channel_block() == 16:  # the order was found with AVX-512; elsewhere it is followed where the probes find it
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("codes", [False, True], ids=["stored", "dequantized"])
def test_random_shapes_have_the_runtimes_bits_wherever_an_order_is_claimed(
    codes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    claimed: list[bool] = []

    def observe(*given: Any, **named: Any) -> torch.Tensor | None:
        found = summation_order.convolve_in_order(*given, **named)
        claimed.append(found is not None)
        return found

    monkeypatch.setattr(convolutions, "convolve_in_order", observe)
    differing = [shape for shape in random_shapes(seed=0, count=120) if not same_bits(shape, codes, claimed)]
    assert len(claimed) == 120
    assert differing == []
    if channel_block() == 16:
        assert sum(claimed) > 30


def random_shapes(seed: int, count: int) -> list[dict[str, int]]:
    """Batches of one image, single outputs, single positions and small groups among them."""
    random = np.random.default_rng(seed)
    ranges = {
        "images": [1, 2, 3],
        "groups": [1, 1, 2, 16],
        "channels": [1, 3, 8, 16, 24, 64],
        "outputs": [1, 2, 8, 16, 24],
        "kernel": [1, 1, 2, 3],
        "size": [3, 4, 8, 12],
        "pad": [0, 1],
        "stride": [1, 2],
    }
    return [{name: int(random.choice(values)) for name, values in ranges.items()} for _ in range(count)]


def same_bits(shape: dict[str, int], codes: bool, claimed: list[bool]) -> bool:
    """Whether shadow and runtime agree, or no order was claimed."""
    groups, kernel = shape["groups"], shape["kernel"]
    weight = draw(1, shape["outputs"] * groups, shape["channels"], kernel, kernel)
    x = draw(0, shape["images"], shape["channels"] * groups, shape["size"], shape["size"])
    attributes = {"group": groups, "pads": [shape["pad"]] * 4, "strides": [shape["stride"]] * 2}
    expected, found = both(model("Conv", x, [weight, draw(2, len(weight))], codes=codes, **attributes), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    return channel_block() != 16 or not claimed[-1] or bool(np.array_equal(found, expected))


def test_convolution_without_bias_and_gradient() -> None:
    weight, x = draw(1, 32, 32, 3, 3), draw(0, 2, 32, 8, 8)
    file = model("Conv", x, [weight])
    expected, found = both(file, x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    pixels = torch.from_numpy(x).requires_grad_()
    build_shadow(file, source="optimized")(pixels, exact=True).sum().backward()
    assert pixels.grad is not None
    assert torch.isfinite(pixels.grad).all()
    assert pixels.grad.abs().sum() > 0


@pytest.mark.parametrize("weight", [(32, 18, 3, 3), (16, 8, 3, 3)], ids=["channels not aligned", "small groups"])
def test_convolution_of_unknown_order_is_torch_s(weight: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    groups = 2 if weight[1] == 8 else 1
    x = draw(0, 2, weight[1] * groups, 8, 8)
    expected, found = both(model("Conv", x, [draw(1, *weight)], group=groups), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(summation_order, "channel_block", lambda: None)  # as on another CPU
    np.testing.assert_array_equal(both(model("Conv", x, [draw(1, *weight)], group=groups), x)[1], found)


def test_probes_say_where_the_order_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    assert channel_block() in (8, 16, None)
    monkeypatch.setattr(summation_order, "_convolved", lambda *_: torch.zeros(2, 32, 6, 6))
    assert channel_block.__wrapped__() is None
    assert not adds_in_chains.__wrapped__()


def test_batch_normalization() -> None:
    x, variance = draw(0, 3, 24, 7, 7), np.abs(draw(4, 24)) + np.float32(0.1)
    constants = [draw(1, 24), draw(2, 24), draw(3, 24), variance]
    expected, found = both(model("BatchNormalization", x, constants, epsilon=1e-3), x)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("length", [16, 48, 384])
def test_layer_normalization(length: int) -> None:
    x = draw(0, 3, 9, length) + np.float32(0.5)
    expected, found = both(model("LayerNormalization", x, [draw(1, length), draw(2, length)], epsilon=1e-6), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    if channel_block() == 16:
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 16)], ids=["not of eight", "over two axes"])
def test_layer_normalization_of_unknown_order_is_torch_s(shape: tuple[int, ...]) -> None:
    x = draw(0, *shape)
    axis = -1 if shape[-1] == 7 else 1
    parameters = [draw(1, *shape[axis:]), draw(2, *shape[axis:])]
    expected, found = both(model("LayerNormalization", x, parameters, axis=axis), x)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gelu_to_the_bit_and_its_gradient() -> None:
    x = np.concatenate([draw(0, 20_000) * 2, np.array([0, -0.0, 0.92, -4, 9, -30, 1e4], np.float32)])
    file = gelu(x)
    expected, found = both(file, x)
    np.testing.assert_array_equal(found, expected)
    pixels = torch.from_numpy(x).requires_grad_()
    shadow = build_shadow(file, source="optimized")
    (exact,) = torch.autograd.grad(shadow(pixels, exact=True).sum(), pixels)
    (usual,) = torch.autograd.grad(shadow(pixels).sum(), pixels)
    torch.testing.assert_close(exact, usual, rtol=1e-4, atol=1e-5)


def test_gradient_path_is_left_alone() -> None:
    weight, x = draw(1, 32, 32, 3, 3), draw(0, 2, 32, 8, 8)
    shadow = build_shadow(model("Conv", x, [weight, draw(2, 32)]), source="optimized")
    plain = torch.conv2d(torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(draw(2, 32)))
    torch.testing.assert_close(shadow(torch.from_numpy(x)), plain, rtol=1e-5, atol=1e-5)
