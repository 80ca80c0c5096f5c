from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.channels import ChannelError, ChannelParameter, last_feature_map
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow

if TYPE_CHECKING:
    from ..conftest import ToyForms  # noqa: TID252 (the fixtures are there)

C, K = 4, 3
Node = onnx.NodeProto
make = helper.make_node


def conv(x: str, y: str, name: str, *, bias: bool = True) -> Node:
    return make("Conv", [x, f"{name}.w", *([f"{name}.b"] if bias else [])], [y], name=name)


def head(x: str, name: str = "fc") -> list[Node]:
    return [
        make("GlobalAveragePool", [x], ["pooled"], name="pool"),
        make("Flatten", ["pooled"], ["flat"], name="flatten"),
        make("Gemm", ["flat", f"{name}.w"], ["y"], name=name),
    ]


CLIPS = {"below": -1, "zero": 0, "above": 0.5, "six": 6}
WEIGHTS = {
    **{f"{name}.w": np.ones((C, 3, 1, 1), np.float32) for name in ("one", "two")},
    "three.w": np.ones((C, C, 1, 1), np.float32),
    **{f"{name}.b": np.ones(C, np.float32) for name in ("one", "two", "three", "norm", "scale", "mean", "var")},
    "row.b": np.ones((1, C, 1, 1), np.float32),
    "number.b": np.ones((1,), np.float32),
    "columns.b": np.ones((C,), np.float32),
    "rows.b": np.ones((1, 1, C, 1), np.float32),
    "every.b": np.ones((C, C, C), np.float32),
    **{f"{name}.c": np.array(value, np.float32) for name, value in CLIPS.items()},
    "fc.w": np.ones((C, K), np.float32),
    "wide.w": np.ones((2 * C, K), np.float32),
}


def model_of(nodes: list[Node], *, inputs: int = 4, side: int = 2) -> bytes:
    """A file of these nodes and of those weights that they read."""
    read = {name for node in nodes for name in node.input}
    tensors = [numpy_helper.from_array(array, name) for name, array in WEIGHTS.items() if name in read]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, side, side][:inputs])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", K])
    graph = helper.make_graph(nodes, "g", [x], [y], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(made.SerializeToString())


def found(nodes: list[Node]) -> tuple[int, tuple[str, ...], list[tuple[str, int]]]:
    result = last_feature_map(model_of(nodes), "y")
    return result.channels, result.tensors, [(entry.initializer, entry.axis) for entry in result.parameters]


def test_a_convolution_is_silenced_by_its_weights_and_its_bias() -> None:
    nodes = [conv("x", "h", "one"), make("Relu", ["h"], ["r"]), *head("r")]
    assert found(nodes) == (C, ("r", "h"), [("one.w", 0), ("one.b", 0)])


def test_a_convolution_without_bias_is_silenced_by_its_weights() -> None:
    assert found([conv("x", "h", "one", bias=False), *head("h")]) == (C, ("h",), [("one.w", 0)])


def test_earlier_convolutions_are_not_touched() -> None:
    nodes = [conv("x", "h", "one"), make("Relu", ["h"], ["r"]), conv("r", "z", "three"), *head("z")]
    assert found(nodes)[2] == [("three.w", 0), ("three.b", 0)]


def test_a_sum_is_silenced_by_all_its_summands() -> None:
    nodes = [conv("x", "a", "one"), conv("x", "b", "two", bias=False), make("Add", ["a", "b"], ["s"]), *head("s")]
    assert found(nodes) == (C, ("s",), [("one.w", 0), ("one.b", 0), ("two.w", 0)])


def test_an_identity_shortcut_leads_on_to_the_convolution_that_it_starts_from() -> None:
    nodes = [
        *(conv("x", "a", "one"), make("Relu", ["a"], ["r"]), conv("r", "b", "three")),
        *(make("Add", ["b", "r"], ["s"]), *head("s")),
    ]
    assert found(nodes)[2] == [("three.w", 0), ("three.b", 0), ("one.w", 0), ("one.b", 0)]


def test_a_constant_summand_is_a_bias() -> None:
    nodes = [conv("x", "a", "one", bias=False), make("Add", ["a", "row.b"], ["s"]), *head("s")]
    assert found(nodes)[2] == [("row.b", 1), ("one.w", 0)]


def test_a_constant_summand_has_its_channels_where_the_sum_has_them() -> None:
    """Its axes are all as long here."""
    nodes = [conv("x", "a", "one", bias=False), make("Add", ["a", "every.b"], ["s"]), *head("s")]
    assert last_feature_map(model_of(nodes, side=C), "y").parameters[0] == ChannelParameter("every.b", 0)


@pytest.mark.parametrize("bounds", [["zero.c", "six.c"], ["below.c"], ["", "six.c"], []])
def test_a_clip_that_keeps_zero_is_passed(bounds: list[str]) -> None:
    nodes = [conv("x", "h", "one"), make("Clip", ["h", *bounds], ["s"]), *head("s")]
    assert found(nodes)[2] == [("one.w", 0), ("one.b", 0)]


def test_a_normalization_is_silenced_by_its_scale_and_shift_alone() -> None:
    norm = make("BatchNormalization", ["h", "scale.b", "norm.b", "mean.b", "var.b"], ["n"], name="norm")
    nodes = [conv("x", "h", "one"), norm, make("Relu", ["n"], ["r"]), *head("r")]
    assert found(nodes) == (C, ("r", "n"), [("scale.b", 0), ("norm.b", 0)])


@pytest.mark.parametrize("order", [("h", "g"), ("g", "h")])
def test_a_gated_map_is_silenced_by_what_is_gated(order: tuple[str, str]) -> None:
    nodes = [conv("x", "h", "one"), make("Sigmoid", ["h"], ["g"]), make("Mul", list(order), ["m"]), *head("m")]
    assert found(nodes) == (C, ("m",), [("one.w", 0), ("one.b", 0)])


def test_a_deep_ladder_of_sums_is_walked_once() -> None:
    nodes, last = [conv("x", "s0", "one")], "s0"
    for index in range(60):
        nodes.append(make("Add", [last, last], [f"s{index + 1}"]))
        last = f"s{index + 1}"
    assert found([*nodes, *head(last)])[2] == [("one.w", 0), ("one.b", 0)]


def test_a_map_that_is_flattened_whole_is_found() -> None:
    nodes = [
        *(conv("x", "h", "one"), make("MaxPool", ["h"], ["p"], kernel_shape=[2, 2])),
        *(make("Flatten", ["p"], ["f"]), make("Gemm", ["f", "fc.w"], ["y"])),
    ]
    assert found(nodes) == (C, ("p", "h"), [("one.w", 0), ("one.b", 0)])


def test_a_transposed_map_is_read_before_it_is_transposed() -> None:
    nodes = [
        *(conv("x", "h", "one"), make("Transpose", ["h"], ["t"], perm=[0, 2, 3, 1])),
        *(make("ReduceMean", ["t", "axes"], ["m"], keepdims=0), make("Gemm", ["m", "fc.w"], ["y"])),
    ]
    nodes.insert(0, make("Constant", [], ["axes"], value_ints=[1, 2]))
    assert found(nodes) == (C, ("h",), [("one.w", 0), ("one.b", 0)])


def test_a_convolution_that_classifies_is_not_the_one_that_is_pruned() -> None:
    nodes = [
        *(conv("x", "h", "one"), make("Relu", ["h"], ["r"]), make("GlobalAveragePool", ["r"], ["p"])),
        *(make("Conv", ["p", "k.w"], ["c"]), make("Flatten", ["c"], ["y"])),
    ]
    proto = onnx.load_from_string(model_of(nodes))
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((K, C, 1, 1), np.float32), "k.w"))
    result = last_feature_map(proto.SerializeToString(), "y")
    assert (result.channels, result.parameters[0]) == (C, ChannelParameter("one.w", 0))
    assert result.tensors == ("r", "h"), "not the average, which has the same mean"


def fork() -> list[Node]:
    both = make("Add", ["y1", "y2"], ["y"], name="join")
    pooled = [make("GlobalAveragePool", ["h"], ["pooled"]), make("Flatten", ["pooled"], ["flat"])]
    return [
        *(conv("x", "h", "one"), *pooled),
        *(make("Gemm", ["flat", "fc.w"], ["y1"]), make("MatMul", ["flat", "fc.w"], ["y2"]), both),
    ]


REFUSED = {
    "two ways lead to the scores": (fork(), r"forks at node 'join' \(Add\) before it reaches a feature map"),
    "the scores come from nowhere": (
        [make("Identity", ["fc.w"], ["y"])],
        r"^no feature map of four axes \(N, C, H, W\) leads to the last layer with weights$",
    ),
    "the map holds the image": (
        [*head("x")],
        r"^the last feature map contains the input 'x' itself$",
    ),
    "channels are joined": (
        [
            *(conv("x", "a", "one"), conv("x", "b", "two")),
            *(make("Concat", ["a", "b"], ["s"], axis=1, name="join"), *head("s", "wide")),
        ],
        r"^node 'join' \(Concat\) lies between the last convolution and the last weights, and may mix channels or",
    ),
    "zeros are answered with halves": (
        [conv("x", "h", "one"), make("Sigmoid", ["h"], ["s"], name="half"), *head("s")],
        r"^node 'half' \(Sigmoid\) lies between",
    ),
    "a number is added": (
        [conv("x", "h", "one"), make("Add", ["h", "number.b"], ["s"], name="plus"), *head("s")],
        r"^node 'plus' \(Add\) takes 'number.b' of shape \(1,\), which has no axis of 4 channels$",
    ),
    "every column of four gets its own": (
        [conv("x", "h", "one"), make("Add", ["h", "columns.b"], ["s"], name="plus"), *head("s")],
        r"^node 'plus' \(Add\) takes 'columns.b' of shape \(4,\), which has no axis of 4 channels$",
    ),
    "every row of four gets its own": (
        [conv("x", "h", "one"), make("Add", ["h", "rows.b"], ["s"], name="plus"), *head("s")],
        r"^node 'plus' \(Add\) takes 'rows.b' of shape \(1, 1, 4, 1\), which has no axis of 4 channels$",
    ),
    "zeros are clipped up": (
        [conv("x", "h", "one"), make("Clip", ["h", "above.c", "six.c"], ["s"], name="clip"), *head("s")],
        r"^node 'clip' \(Clip\) lies between the last convolution and the last weights",
    ),
    "zeros are clipped down": (
        [conv("x", "h", "one"), make("Clip", ["h", "", "below.c"], ["s"], name="clip"), *head("s")],
        r"^node 'clip' \(Clip\) lies between",
    ),
    "the least value is computed": (
        [
            *(conv("x", "h", "one"), make("ReduceMax", ["x"], ["m"], keepdims=0)),
            *(make("Clip", ["h", "m"], ["s"], name="clip"), *head("s")),
        ],
        r"^node 'clip' \(Clip\) lies between",
    ),
    "a bias is shared": (
        [
            *(conv("x", "a", "one"), make("Conv", ["x", "two.w", "one.b"], ["b"], name="two")),
            *(make("Add", ["a", "b"], ["s"]), *head("s")),
        ],
        r"^node 'one' \(Conv\) shares 'one.b' with other nodes, which would lose the channel with it$",
    ),
    "a bias is computed": (
        [make("Relu", ["two.b"], ["b"]), make("Conv", ["x", "one.w", "b"], ["h"], name="one"), *head("h")],
        r"^node 'one' \(Conv\) takes a weight that is no initializer of the file, so it can't be changed$",
    ),
}


@pytest.mark.parametrize(("nodes", "message"), REFUSED.values(), ids=list(REFUSED))
def test_a_graph_is_refused_when(nodes: list[Node], message: str) -> None:
    with pytest.raises(ChannelError, match=message):
        last_feature_map(model_of(nodes, side=C), "y")


def test_a_bias_in_a_constant_node_is_refused() -> None:
    constant = make("Constant", [], ["b"], value=numpy_helper.from_array(np.ones(C, np.float32)))
    with pytest.raises(ChannelError, match="takes a weight that is no initializer"):
        last_feature_map(model_of([constant, make("Conv", ["x", "one.w", "b"], ["h"]), *head("h")]), "y")


def test_an_output_that_is_not_there_is_named() -> None:
    with pytest.raises(ChannelError, match=r"^the file has no output 'z'$"):
        last_feature_map(model_of([conv("x", "h", "one"), *head("h")]), "z")


# --- quantized files: what is named silences the channel, and that one alone ------------------------------------------

FORMS = ("fp32", "qdq", "qoperator", "u8u8", "dynamic", "int4", "uint4 blocks")


@pytest.fixture(scope="module")
def files(toy_forms: ToyForms) -> dict[str, bytes]:
    plain, images = toy_forms.fp32, toy_forms.images.pixels
    return {
        "fp32": plain,
        "qdq": toy_forms.static,
        "qoperator": quantize(plain, "int8-static", calibration=images, format="qoperator"),
        "u8u8": quantize(plain, "int8-static", calibration=images, types="u8u8"),
        "dynamic": toy_forms.dynamic,
        "int4": quantize(plain, "int4"),
        "uint4 blocks": quantize(plain, "int4", block_size=16, symmetric=False),
    }


@pytest.mark.parametrize("form", FORMS)
def test_zeroed_parameters_silence_their_channel_alone(files: dict[str, bytes], toy_forms: ToyForms, form: str) -> None:
    result = last_feature_map(files[form], "logits")
    assert result.channels == 6
    shadow = build_shadow(files[form], source="shipped", trainable=True)
    tensor = next(name for name in result.tensors if name in shadow.tensor_names)
    x = torch.from_numpy(toy_forms.images.pixels)
    with torch.no_grad():
        before = shadow.activations(x, [tensor])[tensor]
        for entry in result.parameters:
            shadow.parameters_by_initializer[entry.initializer].select(entry.axis, 1).zero_()
        after = shadow.activations(x, [tensor])[tensor]
    silent = after[:, 1]
    assert silent.min() == silent.max() == before.min(), "zero, or the code of zero"
    others = [0, 2, 3, 4, 5]
    assert torch.equal(after[:, others], before[:, others])
    assert not torch.equal(before[:, 1], silent)
