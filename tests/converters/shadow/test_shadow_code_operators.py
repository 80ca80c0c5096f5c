from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from qdefense.converters.shadow import registered

from .code_graphs import TYPES, assert_same_codes, codes
from .shadow_graphs import MICROSOFT, graph_model, scalars, session_output, shadow_output


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("left", "right", "out"), [(0.5, 0.25, 1.0), (0.0371, 0.0123, 0.0411), (0.1, 0.3, 0.2), (2e-3, 0.7, 0.9)]
)
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("zeros", [(0, 0, 0), (3, 77, 51)])
def test_elementwise_equals_runtime_when_all_pairs_of_codes_meet(
    operator: str, kind: type, left: float, right: float, out: float, zeros: tuple[int, int, int]
) -> None:
    limits = np.iinfo(kind)
    every = np.arange(limits.min, limits.max + 1).astype(kind)
    out = left * right * 200 if operator == "QLinearMul" else out
    constants = scalars(
        xs=(left, np.float32), xz=(zeros[0], kind), bs=(right, np.float32), bz=(zeros[1], kind),
        ys=(out, np.float32), yz=(zeros[2], kind),
    )  # fmt: skip
    constants["b"] = np.tile(every, (256, 1))
    node = helper.make_node(operator, ["x", "xs", "xz", "b", "bs", "bz", "ys", "yz"], ["y"], domain=MICROSOFT)
    x = np.repeat(every[:, None], 256, 1)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator=operator)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    ("size", "x_scale", "y_scale"), [(8, 0.5, 0.25), (7, 0.031, 0.017), (4, 0.25, 0.25), (1, 1.0, 3.0)]
)
def test_qlinear_global_average_pool_equals_runtime_when_codes_are_random(
    kind: type, size: int, x_scale: float, y_scale: float
) -> None:
    constants = scalars(xs=(x_scale, np.float32), xz=(5, kind), ys=(y_scale, np.float32), yz=(9, kind))
    node = helper.make_node(
        "QLinearGlobalAveragePool", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, channels_last=0
    )
    x = codes(kind, 32, 64, size, size)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(
    "attributes",
    [
        {"kernel_shape": [2, 2], "strides": [2, 2]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1]},
        {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1},
    ],
)
def test_qlinear_average_pool_equals_runtime_when_codes_are_random(kind: type, attributes: dict[str, Any]) -> None:
    constants = scalars(xs=(0.031, np.float32), xz=(5, kind), ys=(0.017, np.float32), yz=(9, kind))
    node = helper.make_node("QLinearAveragePool", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, **attributes)
    x = codes(kind, 8, 16, 8, 8)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(("operator", "attributes"), [("QLinearLeakyRelu", {"alpha": 0.1}), ("QLinearSigmoid", {})])
def test_tabulated_operator_equals_runtime_on_every_code(operator: str, attributes: dict[str, Any], kind: type) -> None:
    limits = np.iinfo(kind)
    constants = scalars(xs=(0.031, np.float32), xz=(5, kind), ys=(0.017, np.float32), yz=(9, kind))
    node = helper.make_node(operator, ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, **attributes)
    x = np.arange(limits.min, limits.max + 1).astype(kind)[:, None]
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize(("axis", "opset"), [(-1, 13), (1, 13), (1, 12)])
@pytest.mark.parametrize("y_scale", [1 / 256, 1 / 255])
def test_qlinear_softmax_equals_runtime_when_codes_are_random(
    kind: type, axis: int, opset: int, y_scale: float
) -> None:
    limits = np.iinfo(kind)
    constants = scalars(xs=(0.05, np.float32), xz=(5, kind), ys=(y_scale, np.float32), yz=(limits.min, kind))
    node = helper.make_node(
        "QLinearSoftmax", ["x", "xs", "xz", "ys", "yz"], ["y"], domain=MICROSOFT, axis=axis, opset=opset
    )
    x = codes(kind, 64, 10, 3)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_qlinear_concat_equals_runtime_when_scales_differ(kind: type) -> None:
    constants = scalars(
        ys=(0.02, np.float32), yz=(9, kind), xs=(0.031, np.float32), xz=(5, kind), bs=(0.02, np.float32), bz=(9, kind)
    ) | {"b": codes(kind, 4, 3, 5, 5, seed=1)}
    node = helper.make_node(
        "QLinearConcat", ["ys", "yz", "x", "xs", "xz", "b", "bs", "bz"], ["y"], domain=MICROSOFT, axis=1
    )
    x = codes(kind, 4, 2, 5, 5)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("shape", [(), (5,), (1, 6, 1, 1), (2, 3, 6, 4, 5)])
@pytest.mark.parametrize("exact", [True, False])
def test_elementwise_equals_runtime_when_shapes_broadcast(
    operator: str, kind: type, shape: tuple[int, ...], exact: bool
) -> None:
    constants = scalars(
        xs=(0.0371, np.float32), xz=(3, kind), bs=(0.0123, np.float32), bz=(77, kind), ys=(0.041, np.float32),
        yz=(51, kind),
    ) | {"b": codes(kind, *shape, seed=1)}  # fmt: skip
    node = helper.make_node(operator, ["x", "xs", "xz", "b", "bs", "bz", "ys", "yz"], ["y"], domain=MICROSOFT)
    x = codes(kind, 3, 6, 4, 5)
    model = graph_model([node], x, constants, output_type=TYPES[kind])
    difference = np.abs(shadow_output(model, x, exact=exact) - session_output(model, x).astype(np.float64))
    assert difference.max() <= (0 if exact else 1)


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
def test_qlinear_where_equals_runtime_when_scales_differ(kind: type) -> None:
    constants = scalars(
        xs=(0.031, np.float32), xz=(5, kind), bs=(0.02, np.float32), bz=(9, kind), ys=(0.027, np.float32), yz=(40, kind)
    ) | {"b": codes(kind, 6, 4, 5, seed=1), "c": codes(kind, 6, 1, 5, seed=2) > 20}
    node = helper.make_node(
        "QLinearWhere", ["c", "x", "xs", "xz", "b", "bs", "bz", "ys", "yz"], ["y"], domain=MICROSOFT
    )
    x = codes(kind, 3, 6, 4, 5)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


CHANNELS_LAST: dict[str, dict[str, Any]] = {
    "QLinearGlobalAveragePool": {"channels_last": 1},
    "QLinearAveragePool": {"channels_last": 1, "kernel_shape": [3, 2], "pads": [1, 0, 1, 1], "strides": [2, 1]},
    "NhwcMaxPool": {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]},
}


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("operator", CHANNELS_LAST)
def test_pooling_with_channels_last_equals_runtime(operator: str, kind: type) -> None:
    constants = scalars(xs=(0.031, np.float32), xz=(5, kind), ys=(0.017, np.float32), yz=(9, kind))
    names = ["x"] if operator == "NhwcMaxPool" else ["x", "xs", "xz", "ys", "yz"]
    node = helper.make_node(operator, names, ["y"], domain=MICROSOFT, **CHANNELS_LAST[operator])
    x = codes(kind, 3, 9, 8, 6)
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[kind]), x, operator="")


# what ONNX Runtime 1.32 wrote into its EXTENDED graphs of mobile, SE, transformer, ConvNeXt and dense blocks, exported
# and quantized as QDQ and QOperator (u8s8, s8s8, u8u8, a16w8, a8w4, a16w4), dynamically (u8, s8) and by MatMulNBits
EMITTED = {
    "": {
        *("Add", "AveragePool", "BatchNormalization", "Cast", "Clip", "Concat", "Conv", "ConvInteger", "ConvTranspose"),
        *("DequantizeLinear", "DynamicQuantizeLinear", "Elu", "Gelu", "Gemm", "Greater", "HardSigmoid"),
        *("LayerNormalization", "LeakyRelu", "MatMul", "MaxPool", "Mul", "QLinearConv", "QLinearMatMul"),
        *("QuantizeLinear", "ReduceMean", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Softmax", "Split"),
        *("Squeeze", "Tanh", "Transpose", "Where"),
    },
    MICROSOFT: {
        *("BiasGelu", "DynamicQuantizeMatMul", "FusedConv", "FusedMatMul", "MatMulNBits", "QGemm", "QLinearAdd"),
        *("QLinearAveragePool", "QLinearConcat", "QLinearLeakyRelu", "QLinearMul", "QLinearSigmoid"),
        *("QLinearSoftmax", "QLinearWhere", "QuickGelu", "SkipLayerNormalization"),
    },
}


@pytest.mark.parametrize("domain", EMITTED)
def test_each_operator_that_the_optimizer_wrote_is_registered(domain: str) -> None:
    assert {name for each, name, _ in registered() if each == domain} >= EMITTED[domain]


@pytest.mark.parametrize("operator", ["QLinearLeakyRelu", "QLinearSigmoid"])
def test_codes_without_a_zero_point_have_the_type_of_the_input(operator: str) -> None:
    node = helper.make_node(operator, ["x", "xs", "", "ys", ""], ["y"], domain=MICROSOFT)
    x = codes(np.int8, 4, 8)
    constants = scalars(xs=(0.031, np.float32), ys=(0.004, np.float32))
    assert_same_codes(graph_model([node], x, constants, output_type=TYPES[np.int8]), x, operator="")
