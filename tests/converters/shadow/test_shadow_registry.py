from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from onnx import TensorProto, helper

from qdefense.converters.shadow import ShadowError, UnsupportedOperatorError, build_shadow, operator, registered
from qdefense.converters.shadow.registry import Kernel, Node

from .shadow_graphs import Array, graph_model

IMAGES = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)


def node_error(
    op_type: str, *, domain: str = "", constants: dict[str, Array] | None = None, **attributes: object
) -> str:
    names = ["x", *(constants or {})]
    node = helper.make_node(op_type, names, ["y"], name="the node", domain=domain, **attributes)
    with pytest.raises(UnsupportedOperatorError) as caught:
        build_shadow(graph_model([node], IMAGES, constants or {}), source="shipped")
    return str(caught.value)


def test_registered_lists_every_operator_once_with_domain_and_version() -> None:
    table = registered()
    assert {("", "Conv", 1), ("com.microsoft", "QLinearAdd", 1), ("", "Softmax", 1), ("", "Softmax", 13)} <= set(table)
    assert all(key == (found.domain, found.op_type, found.since) for key, found in table.items())


def test_operator_raises_when_registered_twice() -> None:
    def build(node: Node) -> Kernel:
        raise NotImplementedError(node.name)

    with pytest.raises(ValueError, match=r"operator \('', 'Conv', 1\) is registered twice; remove one"):
        operator("Conv")(build)


def test_unknown_operator_is_named_with_node_domain_and_version() -> None:
    message = node_error("Fancy\n\x1b[2J", domain="evil'\ndomain")
    assert message.splitlines() == [message]
    assert "node 'the node': operator 'Fancy\\n\\x1b[2J' of domain \"evil'\\ndomain\", no stated opset:" in message
    assert "no function is registered for it; register it with qdefense.converters.shadow.operator" in message


def test_operator_older_than_its_function_is_unknown() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"])
    model = graph_model([node], IMAGES, {"s": np.array(1, dtype=np.float32)}, opset=9)
    with pytest.raises(
        UnsupportedOperatorError, match=r"'QuantizeLinear' of domain 'ai.onnx', opset 9: ONNX has it from"
    ):
        build_shadow(model, source="shipped")


def test_attribute_that_no_function_reads_is_refused() -> None:
    assert "attributes ['sharpness'] are not covered" in node_error("Relu", sharpness=3)


@pytest.mark.parametrize(
    ("op_type", "attributes", "reason"),
    [
        ("MaxPool", {}, "attribute 'kernel_shape' is missing"),
        ("MaxPool", {"kernel_shape": [2, 2], "auto_pad": "SAME"}, "attribute 'auto_pad' is 'SAME', expected one of"),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [1, 1]}, "'pads' (1, 1) don't fit kernel (2, 2)"),
        ("MaxPool", {"kernel_shape": [2, 2], "pads": [-1, 0, 0, 0]}, "'pads' (-1, 0, 0, 0) don't fit kernel (2, 2)"),
        ("MaxPool", {"kernel_shape": [1, 1, 1, 1]}, "it pools over 4 axes, at most 3 are covered"),
        ("ReduceMean", {"axes": [1], "keepdims": 1, "fast": 1}, "attributes ['fast'] are not covered"),
        ("QuantizeLinear", {"precision": TensorProto.FLOAT16}, "attribute 'precision' is not float32"),
        ("Cast", {"to": TensorProto.STRING}, "its result has element type 8, covered are [1, 2, 3, 4, 5, 6, 7, 9, 10,"),
        ("Cast", {"to": TensorProto.COMPLEX64}, "its result has element type 14, covered are [1, 2, 3, 4, 5, 6, 7,"),
        ("Pad", {"pads": [0] * 8, "mode": "mirror"}, "attribute 'mode' is 'mirror', expected one of ('constant',"),
        ("Gelu", {"approximate": "erf"}, "attribute 'approximate' is 'erf', expected 'none' or 'tanh'"),
        ("LRN", {}, "attribute 'size' is None, expected at least 1"),
        ("LpNormalization", {"p": 3}, "attribute 'p' is 3, expected 1 or 2"),
        ("DepthToSpace", {"blocksize": 2, "mode": "RCD"}, "attribute 'mode' is 'RCD', expected 'DCR' or 'CRD'"),
        ("SpaceToDepth", {"blocksize": 2, "mode": "RCD"}, "attribute 'mode' is 'RCD', expected 'DCR' or 'CRD'"),
        ("Resize", {"mode": "area"}, "attribute 'mode' is 'area', expected one of ('nearest', 'linear', 'cubic')"),
        ("Resize", {"coordinate_transformation_mode": "half"}, "expected one of ('half_pixel',"),
        ("Resize", {"nearest_mode": "up"}, "attribute 'nearest_mode' is 'up', expected one of ('round_prefer_floor',"),
        ("Resize", {"keep_aspect_ratio_policy": "crop"}, "'keep_aspect_ratio_policy' is 'crop', expected one of"),
    ],
)
def test_attribute_out_of_reach_is_named(op_type: str, attributes: dict[str, object], reason: str) -> None:
    assert reason in node_error(op_type, **attributes)


def test_batch_statistics_are_refused() -> None:
    constants = {name: np.ones(3, dtype=np.float32) for name in ("scale", "bias", "mean", "variance")}
    message = node_error("BatchNormalization", constants=constants, training_mode=1)
    assert "attribute 'training_mode' is 1, only 0 is covered" in message


def test_dropout_in_training_is_refused() -> None:
    constants = {"ratio": np.array(0.5, dtype=np.float32), "training": np.array(True)}
    assert "it is in training mode" in node_error("Dropout", constants=constants)


def test_output_that_the_shadow_does_not_compute_cannot_be_read() -> None:
    nodes = [
        helper.make_node("MaxPool", ["x"], ["d", "indices"], kernel_shape=[2, 2]),
        helper.make_node("Identity", ["indices"], ["y"], name="reader"),
    ]
    with pytest.raises(ShadowError, match="node 'reader' reads 'indices', which nothing before it computes"):
        build_shadow(graph_model(nodes, IMAGES, {}, output_type=TensorProto.INT64), source="shipped")


@pytest.mark.parametrize(
    ("op_type", "constants", "attributes", "reason"),
    [
        ("BatchNormalization", 4, {"spatial": 0}, "attribute 'spatial' is 0, only 1 is covered"),
        ("GroupNormalization", 2, {}, "attribute 'num_groups' is None, expected at least 1"),
        ("ConvTranspose", 1, {"output_shape": [3]}, "'output_padding' (0, 0) or 'output_shape' (3,) don't fit kernel"),
        ("ScatterND", 2, {"reduction": "mean"}, "attribute 'reduction' is 'mean', expected one of ['none', 'add',"),
        ("Conv", 1, {"kernel_shape": [1, 1, 1, 1]}, "it slides over 4 axes, at most 3 are covered"),
    ],
)
def test_use_out_of_reach_is_named(op_type: str, constants: int, attributes: dict[str, object], reason: str) -> None:
    rank = 4 if attributes.get("output_shape") else 6 if op_type == "Conv" else 1
    values = {f"c{index}": np.ones((3,) + (1,) * (rank - 1), dtype=np.float32) for index in range(constants)}
    assert reason in node_error(op_type, constants=values, **attributes)


def test_old_batch_normalization_in_training_is_refused() -> None:
    constants = {name: np.ones(3, dtype=np.float32) for name in ("scale", "bias", "mean", "variance")}
    node = helper.make_node("BatchNormalization", ["x", *constants], ["y"])
    with pytest.raises(UnsupportedOperatorError, match="attribute 'is_test' is 0, only 1 is covered"):
        build_shadow(graph_model([node], IMAGES, constants, opset=6), source="shipped")


def test_unknown_activation_is_named() -> None:
    constants = {"w": np.ones((1, 3, 1, 1), dtype=np.float32)}
    message = node_error("FusedConv", domain="com.microsoft", constants=constants, activation="Swish\n")
    known = ["Clip", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"]
    assert f"activation 'Swish\\n' is not one of {known}" in message


def test_weight_that_the_graph_computes_is_named() -> None:
    nodes = [helper.make_node("Relu", ["x"], ["w"]), helper.make_node("Conv", ["x", "w"], ["y"], name="c")]
    with pytest.raises(UnsupportedOperatorError, match=r"node 'c': .*input 1 \('w'\) is not a constant"):
        build_shadow(graph_model(nodes, IMAGES, {}), source="shipped")


@pytest.mark.parametrize("op_type", ["ReduceSum", "Pow"])
def test_arithmetic_that_codes_do_not_have_is_refused(op_type: str) -> None:
    codes = np.zeros((2, 3), dtype=np.uint8)
    node = helper.make_node(op_type, ["x", "one"], ["y"])
    model = graph_model([node], codes, {"one": np.array([1], dtype=np.int64)}, output_type=TensorProto.UINT8)
    with pytest.raises(UnsupportedOperatorError, match=f"operator '{op_type}' .* integer"):
        build_shadow(model, source="shipped")


def test_quantizer_of_unknown_type_is_refused() -> None:
    message = node_error("QuantizeLinear", constants={"s": np.array(1, dtype=np.float32)}, output_dtype=17)
    assert "its codes have element type 17" in message


def test_operator_without_rows_refuses_a_scale_of_each_image() -> None:
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("Relu", ["s"], ["r"], name="r"),
        helper.make_node("Mul", ["x", "r"], ["y"]),
    ]
    with pytest.raises(UnsupportedOperatorError, match=r"node 'r': .* dynamic quantization computes per image"):
        build_shadow(graph_model(nodes, IMAGES, {}), source="shipped")


def test_importing_converters_does_not_import_torch() -> None:
    code = "import sys, qdefense.converters; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0
