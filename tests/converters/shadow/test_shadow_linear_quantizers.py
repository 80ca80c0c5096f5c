from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import NodeProto, TensorProto, helper

from qdefense.converters.shadow import UnsupportedOperatorError, build_shadow

from .code_graphs import assert_same_codes, codes, dynamic_inputs
from .shadow_graphs import graph_model, scalars, session_output, shadow_output

QUANTIZERS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "per tensor": ((), {}),
    "per channel": ((4,), {"axis": 1}),
    "last axis": ((6,), {"axis": -1}),
    "blocked": ((5, 2, 6), {"axis": 1, "block_size": 2}),
    "blocked first axis, short last block": ((3, 4, 6), {"axis": 0, "block_size": 2}),
}
NARROW = {ml_dtypes.int4: (-8, 7), ml_dtypes.uint4: (0, 15)}


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_quantize_linear_equals_runtime_when_values_lie_on_ties(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng, limits = np.random.default_rng(5), np.iinfo(kind)
    scale = 2.0 ** rng.integers(-3, 0, shape)
    zero = rng.integers(max(limits.min, -20), 20, shape).astype(kind)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = (rng.integers(-400, 400, (5, 4, 6)) / 8).astype(np.float32)
    constants = {"s": np.asarray(scale, dtype=np.float32), "z": zero}
    kind_of_output = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    assert_same_codes(graph_model([node], x, constants, output_type=kind_of_output), x, operator="")


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_dequantize_linear_equals_runtime_when_codes_are_random(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng = np.random.default_rng(6)
    constants = {"s": rng.uniform(0.01, 0.1, shape).astype(np.float32), "z": rng.integers(0, 20, shape).astype(kind)}
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = codes(kind, 5, 4, 6)
    assert_same_codes(graph_model([node], x, constants), x, operator="")


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", NARROW)
@pytest.mark.parametrize("scale_kind", [np.float32, np.float16])
def test_four_bit_codes_equal_runtime_there_and_back(grain: str, kind: type, scale_kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng, (low, high) = np.random.default_rng(7), NARROW[kind]
    zero = rng.integers(max(low, -4), 5, shape).astype(np.int8).astype(kind)
    constants = {"s": rng.uniform(0.2, 0.5, shape).astype(scale_kind), "z": zero}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    x = rng.normal(0, 3, (5, 4, 6)).astype(scale_kind)
    output = helper.np_dtype_to_tensor_dtype(np.dtype(scale_kind))
    model = graph_model(nodes, x, constants, output_type=output)
    expected = session_output(model, x, level="ORT_DISABLE_ALL")
    assert len(np.unique(expected)) > high - low
    np.testing.assert_array_equal(shadow_output(model, x), expected.astype(np.float32))


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_float16_scale_gives_float16_values(kind: type) -> None:
    rng = np.random.default_rng(8)
    constants = {"s": rng.uniform(0.001, 0.01, 4).astype(np.float16), "z": rng.integers(0, 20, 4).astype(kind)}
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"])
    x = codes(kind, 5, 4, 6)
    assert_same_codes(graph_model([node], x, constants, output_type=TensorProto.FLOAT16), x, operator="")


@pytest.mark.parametrize("grain", QUANTIZERS)
def test_int32_codes_of_a_bias_equal_runtime(grain: str) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng = np.random.default_rng(9)
    constants = {"s": rng.uniform(1e-6, 1e-5, shape).astype(np.float32), "w": codes(np.int32, 5, 4, 6)}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["d"], **attributes),
        helper.make_node("Add", ["x", "d"], ["y"]),
    ]
    x = rng.normal(0, 1, (5, 4, 6)).astype(np.float32)
    assert_same_codes(graph_model(nodes, x, constants), x, operator="")


# how deep weights are blocked: the layer, its weights, the axis of the inputs
LAYERS: dict[str, tuple[str, tuple[int, ...], int, dict[str, int]]] = {
    "convolution": ("Conv", (5, 24, 3, 3), 1, {}),
    "grouped convolution": ("Conv", (4, 12, 1, 1), 1, {"group": 2}),
    "matrix product": ("MatMul", (24, 5), 0, {}),
    "gemm": ("Gemm", (5, 24), 1, {"transB": 1}),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("block", [0, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
def test_layer_with_four_bit_weights_equals_runtime(layer: str, block: int, symmetric: bool) -> None:
    operator, shape, axis, attributes = LAYERS[layer]
    rng, kind = np.random.default_rng(10), ml_dtypes.int4 if symmetric else ml_dtypes.uint4
    low, high = NARROW[kind]
    output_axis = 1 - axis
    blocks = tuple(-(-size // block) if at == axis else size for at, size in enumerate(shape)) if block else ()
    scale_shape = blocks or (shape[output_axis],)
    weight = rng.integers(low, high + 1, shape).astype(np.int8).astype(kind)
    constants = {"w": weight, "s": rng.uniform(0.01, 0.05, scale_shape).astype(np.float32)}
    if not symmetric:
        constants["z"] = rng.integers(0, 16, scale_shape).astype(np.int8).astype(kind)
    grain = {"axis": axis, "block_size": block} if block else {"axis": output_axis}
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", *(["z"] if "z" in constants else [])], ["d"], **grain),
        helper.make_node(operator, ["x", "d"], ["y"], **attributes),
    ]
    x = rng.normal(0, 1, (3, 24, 5, 5) if operator == "Conv" else (3, 24)).astype(np.float32)
    model = graph_model(nodes, x, constants)
    expected = session_output(model, x, level="ORT_DISABLE_ALL")
    assert np.abs(shadow_output(model, x) - expected).max() <= 1e-5 * np.abs(expected).max()


def test_gradient_of_rounding_is_one_inside_the_range_and_zero_outside() -> None:
    constants = scalars(s=(0.5, np.float32), z=(10, np.uint8))
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    x = torch.tensor([[-9.0, -5.0, -4.9, 0.1, 122.5, 123.0]]).requires_grad_()
    shadow = build_shadow(graph_model(nodes, x.detach().numpy(), constants), source="shipped")
    (gradient,) = torch.autograd.grad(shadow(x).sum(), x)
    assert gradient.tolist() == [[0, 1, 1, 1, 1, 0]]


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (
            helper.make_node("QuantizeLinear", ["x", "s"], ["y"], precision=TensorProto.FLOAT16),
            "'precision' is not float32",
        ),
        (
            helper.make_node("DequantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.BFLOAT16),
            "its result has element type BFLOAT16, covered are FLOAT and FLOAT16",
        ),
    ],
)
def test_other_precisions_are_refused(node: NodeProto, reason: str) -> None:
    x = np.zeros((2, 3), dtype=np.float32 if node.op_type == "QuantizeLinear" else np.uint8)
    with pytest.raises(UnsupportedOperatorError, match=reason):
        build_shadow(graph_model([node], x, scalars(s=(1.5, np.float32)), opset=23), source="shipped")


def test_quantize_linear_takes_type_from_attribute_when_zero_point_is_left_out() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.INT8)
    x = np.linspace(-300, 300, 1000, dtype=np.float32)[:, None]
    model = graph_model([node], x, scalars(s=(1.5, np.float32)), output_type=TensorProto.INT8)
    assert_same_codes(model, x, operator="")


@pytest.mark.parametrize(
    ("output", "kind"), [("q", TensorProto.UINT8), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)]
)
def test_dynamic_quantize_linear_equals_runtime_at_batch_one(output: str, kind: int) -> None:
    x = dynamic_inputs()
    model = graph_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], x, {}, output, kind)
    expected = np.stack(
        [session_output(model, x[at : at + 1]).reshape(x.shape[1:] if output == "q" else ()) for at in range(12)]
    )
    np.testing.assert_array_equal(shadow_output(model, x), expected.astype(np.float32))
