from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from qdefense.converters.quantize import BlockSize, Format, Types
from qdefense.converters.shadow import Shadow, build_shadow
from qdefense.converters.writeback import WriteBackError, write_back

from .shadow.quantized_files import Array, model_of, pictures, quantized
from .shadow.shadow_graphs import run_shadow, session_output


def trainable(model: bytes) -> Shadow:
    return build_shadow(model, source="shipped", trainable=True)


def arrays(model: bytes) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}


def with_first_channel_tripled(model: bytes, name: str) -> tuple[bytes, Array]:
    """The file after channel 0 of a weight was tripled and its scales computed anew, and the weight itself."""
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer[name][0] *= 3
    data = write_back(model, shadow, scales="recalibrate").data
    session_output(data, pictures(4))
    return data, shadow.parameters_by_initializer[name].detach().numpy()


@pytest.mark.parametrize("reduced", [False, True])
def test_symmetric_channel_gets_its_largest_weight_over_half_the_range(reduced: bool) -> None:
    model = quantized("int8-static", reduce_range=reduced)
    data, weight = with_first_channel_tripled(model, "one.w_quantized")
    end, before, after = 64 if reduced else 127, arrays(model), arrays(data)
    largest = np.abs(weight).reshape(8, -1).max(1)
    np.testing.assert_allclose(after["one.w_scale"], largest / end, rtol=1e-6)
    np.testing.assert_allclose(after["one.w_scale"][0], 3 * before["one.w_scale"][0], rtol=1e-6)
    np.testing.assert_array_equal(after["one.w_quantized"], before["one.w_quantized"])
    np.testing.assert_array_equal(after["one.w_zero_point"], before["one.w_zero_point"])


def test_what_the_old_range_would_clip_is_kept() -> None:
    model = quantized("int8-static")
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer["one.w_quantized"][2, 1, 1, 1] = 4.0
    kept, anew = write_back(model, shadow), write_back(model, shadow, scales="recalibrate")
    assert sum(entry.clipped for entry in kept.changed) == 1
    assert sum(entry.clipped for entry in anew.changed) == 0
    found = build_shadow(anew.data, source="shipped").parameters_by_initializer["one.w_quantized"]
    assert float(found[2, 1, 1, 1]) == pytest.approx(4.0, rel=1e-6)
    error = (found - shadow.parameters_by_initializer["one.w_quantized"]).abs().detach()
    step = torch.from_numpy(arrays(anew.data)["one.w_scale"]).reshape(-1, 1, 1, 1)
    assert bool((error <= 0.5001 * step).all())


def test_bias_follows_to_the_new_scale() -> None:
    model = quantized("int8-static")
    before = arrays(model)
    data, _ = with_first_channel_tripled(model, "one.w_quantized")
    after = arrays(data)
    x_scale = np.float32(before["one.b_quantized_scale"][0]) / before["one.w_scale"][0]
    np.testing.assert_allclose(after["one.b_quantized_scale"], x_scale * after["one.w_scale"], rtol=1e-6)
    real, kept = (found["one.b_quantized"] * found["one.b_quantized_scale"].astype(float) for found in (before, after))
    assert (np.abs(real - kept) <= 0.5001 * after["one.b_quantized_scale"]).all()
    for name in ("wise.b_quantized", "wise.b_quantized_scale", "fc.b_quantized", "fc.w_quantized", "fc.w_scale"):
        np.testing.assert_array_equal(after[name], before[name])


def test_bias_of_a_quantized_operator_follows_too() -> None:
    model = quantized("int8-static", format="qoperator")
    data, _ = with_first_channel_tripled(model, "one.w_quantized")
    before, after = arrays(model)["one.b_quantized"].astype(float), arrays(data)["one.b_quantized"]
    assert abs(after[0] - before[0] / 3) <= 0.51
    np.testing.assert_allclose(after[1:], before[1:], atol=1)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_the_same_weights_give_the_same_answers(form: Format) -> None:
    """Recalibrated twice: the second file has the first one's scales and codes."""
    model, x = quantized("int8-static", format=form), pictures(64)
    shadow = trainable(model)
    with torch.no_grad():
        for parameter in shadow.parameters():
            parameter.mul_(1.25)
    once = write_back(model, shadow, scales="recalibrate").data
    np.testing.assert_allclose(run_shadow(trainable(once), x), session_output(once, x, level="ORT_DISABLE_ALL"))
    again = trainable(once)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.mul_(1 + 1e-7)
    twice = write_back(once, again, scales="recalibrate").data
    for name, value in arrays(once).items():
        np.testing.assert_allclose(arrays(twice)[name].astype(float), value.astype(float), rtol=1e-6, atol=1)


@pytest.mark.parametrize(("types", "high"), [("u8u8", 255), ("u8s8", 127)])
def test_dynamic_file_gets_scale_and_zero_point(types: Types, high: int) -> None:
    model = quantized("int8-dynamic", types=types, reduce_range=False)
    data, weight = with_first_channel_tripled(model, "one.w_quantized")
    scale, zero = (float(arrays(data)[f"one.w_{name}"]) for name in ("scale", "zero_point"))
    if types == "u8s8":
        assert scale == pytest.approx(np.abs(weight).max() / 127, rel=1e-6)
        assert zero == 0
    else:
        assert scale == pytest.approx((max(weight.max(), 0) - min(weight.min(), 0)) / high, rel=1e-6)
        assert zero == np.round(-min(weight.min(), 0) / scale)
    stored = (arrays(data)["one.w_quantized"].astype(float) - zero) * scale
    assert np.abs(stored - weight).max() <= 0.5001 * scale


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block", [None, 16])
def test_four_bit_groups_get_their_own_scale(block: BlockSize | None, symmetric: bool) -> None:
    model = quantized("int4", block_size=block, symmetric=symmetric)
    data, weight = with_first_channel_tripled(model, "fc.w_int4")
    found, size = arrays(data), block or weight.shape[1]
    for at in range(-(-weight.shape[1] // size)):
        group = weight[0, at * size : (at + 1) * size]
        low, high = min(group.min(), 0), max(group.max(), 0)
        scale = max(-low, high) / 7 if symmetric else (high - low) / 15
        assert found["fc.w_int4_scale"].reshape(5, -1)[0, at] == pytest.approx(scale, rel=1e-6)
        if not symmetric:
            assert int(found["fc.w_int4_zero_point"].reshape(5, -1)[0, at]) == round(-low / scale)


def four_bit_model(change: str) -> bytes:
    """A file whose scales can't take another value, and says so in one of several ways."""
    model = onnx.load_from_string(quantized("int4", symmetric=False))
    graph = model.graph
    (node,) = (node for node in graph.node if node.name == "fc.w_int4_dequantized")
    if change == "shared":
        graph.node.append(helper.make_node("Identity", [node.input[1]], ["unused"], name="reader"))
    elif change == "constant":
        (tensor,) = (tensor for tensor in graph.initializer if tensor.name == node.input[1])
        graph.node.insert(0, helper.make_node("Constant", [], [node.input[1]], name="c", value=tensor))
        graph.initializer.remove(tensor)
    else:
        del node.input[2]
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("shared", r"scale 'fc\.w_int4_scale', which other nodes read too,"),
        ("constant", "scale, which is no initializer,"),
        ("no zero point", "zero point, which the file leaves out or has once for all channels,"),
    ],
)
def test_scale_that_can_t_be_written_is_refused(change: str, reason: str) -> None:
    model = four_bit_model(change)
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.w_int4"][0] -= 1
    with pytest.raises(WriteBackError, match=rf"initializer 'fc\.w_int4' has a {reason} .*; keep the scales \(scales="):
        write_back(model, shadow, scales="recalibrate")
    assert write_back(model, shadow).changed


def test_bias_between_two_scales_is_refused() -> None:
    names = ["x", "x.s", "x.z", "{}.w", "{}.s", "{}.z", "y.s", "y.z", "bias"]
    nodes = [helper.make_node("QuantizeLinear", ["x", "x.s", "x.z"], ["q"], name="in")]
    for part in ("a", "b"):
        inputs = ["q", *(name.format(part) for name in names[1:])]
        nodes.append(helper.make_node("QLinearConv", inputs, [f"{part}.c"], name=part))
    add = ["a.c", "y.s", "y.z", "b.c", "y.s", "y.z", "y.s", "y.z"]
    nodes.append(helper.make_node("QLinearAdd", add, ["sum"], name="add", domain="com.microsoft"))
    pool = ["sum", "y.s", "y.z", "y.s", "y.z"]
    nodes.append(helper.make_node("QLinearGlobalAveragePool", pool, ["pool"], name="pool", domain="com.microsoft"))
    nodes.append(helper.make_node("DequantizeLinear", ["pool", "y.s", "y.z"], ["wide"], name="out"))
    nodes.append(helper.make_node("Flatten", ["wide"], ["y"], name="flat"))
    rng = np.random.default_rng(2)
    values: dict[str, Array] = {"bias": np.arange(5, dtype=np.int32)}
    for name in ("x.s", "y.s", "a.s", "b.s"):
        values[name] = np.array(0.01, np.float32)
    values |= {"x.z": np.array(0, np.uint8), "y.z": np.array(128, np.uint8)}
    for part in ("a", "b"):
        values |= {
            f"{part}.w": rng.integers(-127, 128, (5, 3, 1, 1)).astype(np.int8),
            f"{part}.z": np.array(0, np.int8),
        }
    proto = model_of(nodes, [numpy_helper.from_array(value, name) for name, value in values.items()])
    model = bytes(proto.SerializeToString())
    shadow = trainable(model)
    with torch.no_grad():
        shadow.parameters_by_initializer["a.w"].mul_(2)
    with pytest.raises(WriteBackError, match="initializer 'bias' is read by several nodes, whose scales would differ"):
        write_back(model, shadow, scales="recalibrate")
    with torch.no_grad():
        shadow.parameters_by_initializer["b.w"].mul_(2)
    assert write_back(model, shadow, scales="keep").changed
