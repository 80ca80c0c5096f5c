from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.contract import InputContract, write_contract
from qdefense.converters.fingerprint import graph_fingerprint
from qdefense.converters.quantize import quantize
from qdefense.converters.reading import FileRefusedError

SIDE = 8
Model = onnx.ModelProto


def network(
    seed: int = 0, *, width: int = 4, classes: int = 3, activation: str = "Relu", kernel: int = 3, flat: int = -1
) -> Model:
    """Two convolutions with a residual addition, pooling, a reshape to a constant shape and one linear layer."""
    rng = np.random.default_rng(seed)
    tensors: list[onnx.TensorProto] = []
    nodes: list[onnx.NodeProto] = []

    def const(name: str, array: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(array, name))
        return name

    def normal(name: str, *shape: int) -> str:
        return const(name, (rng.normal(size=shape) * 0.4).astype(np.float32))

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes))

    pads = [kernel // 2] * 4
    node("Conv", ["image", normal("w1", width, 3, kernel, kernel), normal("b1", width)], "conv1", pads=pads)
    node(activation, ["conv1"], "first")
    node("Conv", ["first", normal("w2", width, width, 3, 3), normal("b2", width)], "conv2", pads=[1] * 4)
    node("Add", ["conv2", "first"], "sum")
    node("GlobalAveragePool", ["sum"], "pooled")
    node("Reshape", ["pooled", const("shape", np.array([flat, width], np.int64))], "flat")
    node("Gemm", ["flat", normal("w3", classes, width), normal("b3", classes)], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def fingerprint(model: Model) -> str:
    return graph_fingerprint(model.SerializeToString())


def images(seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).uniform(size=(16, 3, SIDE, SIDE)).astype(np.float32)


SCHEMES: dict[str, Callable[[Model], bytes]] = {
    "fp32": lambda model: model.SerializeToString(),
    "int8-static": lambda model: quantize(model.SerializeToString(), "int8-static", calibration=images()),
    "int8-static per tensor": lambda model: quantize(
        model.SerializeToString(), "int8-static", calibration=images(), per_channel=False
    ),
    "int8-dynamic": lambda model: quantize(model.SerializeToString(), "int8-dynamic"),
}
PLAIN = fingerprint(network())


# --- what does not count ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_graph_fingerprint_is_equal_for_two_trainings_under_one_scheme(scheme: str) -> None:
    prints = {graph_fingerprint(SCHEMES[scheme](network(seed))) for seed in range(3)}
    assert len(prints) == 1


def _rename(model: Model) -> None:
    """Every node and every tensor, in an order that turns the alphabet round."""
    names: dict[str, str] = {}

    def renamed(name: str) -> str:
        return names.setdefault(name, f"t{1000 - len(names)}") if name else ""

    graph = model.graph
    for index, node in enumerate(graph.node):
        node.name = f"n{1000 - index}"
        node.input[:] = [renamed(name) for name in node.input]
        node.output[:] = [renamed(name) for name in node.output]
    for value in (*graph.input, *graph.output, *graph.initializer):
        value.name = renamed(value.name)
    graph.input[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def _shuffle_initializers(model: Model) -> None:
    tensors = list(model.graph.initializer)[::-1]
    del model.graph.initializer[:]
    model.graph.initializer.extend(tensors)


def _describe(model: Model) -> None:
    model.producer_name, model.doc_string, model.graph.name, model.graph.doc_string = "another", "a", "b", "c"
    model.graph.node[0].doc_string = "the first"
    model.model_version, model.ir_version = 7, 9
    names = ("a", "b", "c")
    contract = InputContract(input_name="image", output_name="logits", height=SIDE, width=SIDE, class_names=names)
    write_contract(model, contract)
    model.graph.value_info.append(helper.make_tensor_value_info("conv1", TensorProto.FLOAT, ["batch", 4, SIDE, SIDE]))
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "rows"


def _unused(model: Model) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.arange(3), "left over"))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def _declared_constants(model: Model) -> None:
    """As files of IR version 3 did: every initializer is an input, too."""
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))


def _raw_as_fields(model: Model) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "shape")
    values = numpy_helper.to_array(tensor).tolist()
    tensor.ClearField("raw_data")
    tensor.int64_data[:] = values


@pytest.mark.parametrize(
    "change", [_rename, _shuffle_initializers, _describe, _unused, _declared_constants, _raw_as_fields]
)
def test_graph_fingerprint_is_equal_when_only_names_and_descriptions_differ(change: Callable[[Model], None]) -> None:
    model = network()
    change(model)
    assert model.SerializeToString() != network().SerializeToString()
    assert fingerprint(model) == PLAIN


def _two_branches(order: list[int]) -> Model:
    make = helper.make_node
    nodes = [make("Relu", ["image"], ["a"]), make("Sigmoid", ["image"], ["b"]), make("Tanh", ["image"], ["c"])]
    body = [nodes[index] for index in order]
    body += [make("Sum", ["a", "b", "c"], ["sum"]), make("GlobalAveragePool", ["sum"], ["p"])]
    body += [make("Flatten", ["p"], ["logits"])]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 3])
    graph = helper.make_graph(body, "branches", [image], [logits])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@given(st.permutations([0, 1, 2]))
def test_graph_fingerprint_is_equal_whatever_order_the_nodes_are_written_in(order: list[int]) -> None:
    assert fingerprint(_two_branches(order)) == fingerprint(_two_branches([0, 1, 2]))


@given(st.integers(0, 2**32 - 1), st.floats(-1024, 1024, width=32))
def test_graph_fingerprint_is_equal_whatever_the_weights_are(seed: int, scale: float) -> None:
    model = network(seed)
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(scale), tensor.name))
    assert fingerprint(model) == PLAIN


# --- what counts ------------------------------------------------------------------------------------------------------


def _set(model: Model, node: int, **attributes: Any) -> None:
    changed = model.graph.node[node]
    kept = [entry for entry in changed.attribute if entry.name not in attributes]
    del changed.attribute[:]
    changed.attribute.extend([*kept, *(helper.make_attribute(name, value) for name, value in attributes.items())])


def _swap_addends(model: Model) -> None:
    addition = model.graph.node[3]
    addition.input[:] = list(addition.input)[::-1]


def _without_bias(model: Model) -> None:
    del model.graph.node[2].input[2]


def _fixed_batch(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1


def _half_weights(model: Model) -> None:
    """Weights of another type, cast back."""
    tensor = model.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    cast = helper.make_node("Cast", [tensor.name], ["cast"], to=TensorProto.FLOAT)
    model.graph.node[0].input[1] = "cast"
    model.graph.node.insert(0, cast)


def _twice_the_relu(model: Model) -> None:
    """The same function computed in two nodes: as a graph it is another one."""
    again = helper.make_node("Relu", ["conv1"], ["again"])
    model.graph.node.insert(2, again)
    model.graph.node[4].input[1] = "again"


def _opset(model: Model) -> None:
    model.opset_import[0].version = 20


CHANGES: dict[str, Callable[[Model], None]] = {
    "stride": lambda model: _set(model, 0, strides=[2, 2]),
    "transposition": lambda model: _set(model, 6, transB=0),
    "float attribute": lambda model: _set(model, 6, alpha=0.5),
    "addends": _swap_addends,
    "bias": _without_bias,
    "batch": _fixed_batch,
    "weight type": _half_weights,
    "copy": _twice_the_relu,
    "opset": _opset,
}
OTHERS = {
    "width": network(width=5),
    "classes": network(classes=4),
    "kernel": network(kernel=1),
    "operator": network(activation="Sigmoid"),
    "reshape target": network(flat=0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graph_fingerprint_differs_when_the_graph_does(change: str) -> None:
    model = network()
    CHANGES[change](model)
    assert fingerprint(model) != PLAIN


@pytest.mark.parametrize("other", OTHERS)
def test_graph_fingerprint_differs_when_the_architecture_does(other: str) -> None:
    assert fingerprint(OTHERS[other]) != PLAIN


def test_graph_fingerprint_differs_between_schemes() -> None:
    assert len({graph_fingerprint(make(network())) for make in SCHEMES.values()}) == len(SCHEMES)


# --- constants, attributes and control flow ---------------------------------------------------------------------------


def _chain(nodes: list[onnx.NodeProto], tensors: dict[str, NDArray[Any]], classes: int = 192) -> Model:
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", classes])
    constants = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "chain", [image], [logits], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def _gather(indices: NDArray[Any]) -> str:
    flat = helper.make_node("Flatten", ["image"], ["flat"])
    gather = helper.make_node("Gather", ["flat", "indices"], ["logits"], axis=1)
    return fingerprint(_chain([flat, gather], {"indices": indices}))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
@pytest.mark.parametrize(("size", "counts"), [(64, True), (65, False)])
def test_graph_fingerprint_counts_up_to_64_whole_numbers_by_value(kind: Any, size: int, counts: bool) -> None:
    ahead, back = np.arange(size, dtype=kind), np.arange(size, dtype=kind)[::-1].copy()
    assert (_gather(ahead) != _gather(back)) == counts


def _constant(**value: Any) -> str:
    flat = helper.make_node("Flatten", ["image"], ["flat"])
    constant = helper.make_node("Constant", [], ["c"], **value)
    whole = next(iter(value)) in ("value_int", "value_ints")
    used = (
        helper.make_node("Cast", ["c"], ["f"], to=TensorProto.FLOAT) if whole else helper.make_node("Neg", ["c"], ["f"])
    )
    return fingerprint(_chain([flat, constant, used, helper.make_node("Mul", ["flat", "f"], ["logits"])], {}))


@pytest.mark.parametrize(
    ("name", "one", "other", "counts"),
    [
        ("value_int", 1, 2, True),
        ("value_ints", [1, 1], [1, 2], True),
        ("value_float", 1.0, 2.0, False),
        ("value_floats", [1.0] * 2, [2.0] * 2, False),
        ("value_floats", [1.0] * 2, [1.0] * 3, True),
        ("value", numpy_helper.from_array(np.float32([1])), numpy_helper.from_array(np.float32([2])), False),
        ("value", numpy_helper.from_array(np.float32([1])), numpy_helper.from_array(np.float32([1, 1])), True),
    ],
)
def test_graph_fingerprint_reads_constant_nodes_as_initializers(name: str, one: Any, other: Any, counts: bool) -> None:
    assert (_constant(**{name: one}) != _constant(**{name: other})) == counts


def _sparse(values: list[float], columns: int) -> str:
    tensor = helper.make_sparse_tensor(
        helper.make_tensor("s", TensorProto.FLOAT, [2], values),
        helper.make_tensor("s_indices", TensorProto.INT64, [2], [0, 1]),
        [columns],
    )
    flat = helper.make_node("Flatten", ["image"], ["flat"])
    model = _chain([flat, helper.make_node("Mul", ["flat", "s"], ["logits"])], {})
    model.graph.sparse_initializer.append(tensor)
    attribute = _chain(
        [
            flat,
            helper.make_node("Constant", [], ["s"], sparse_value=tensor),
            helper.make_node("Mul", ["flat", "s"], ["logits"]),
        ],
        {},
    )
    return fingerprint(model) + fingerprint(attribute)


def test_graph_fingerprint_reads_sparse_constants_by_shape() -> None:
    assert _sparse([1.0, 2.0], 192) == _sparse([3.0, 4.0], 192)
    plain, wide = _sparse([1.0, 2.0], 192), _sparse([1.0, 2.0], 193)
    assert plain[:64] != wide[:64]
    assert plain[64:] != wide[64:]


def _branches(positive: str, negative: str, weights: float = 1.0) -> str:
    def branch(operator: str, name: str) -> onnx.GraphProto:
        nodes = [
            helper.make_node(operator, ["flat"], [f"{name}_a"]),
            helper.make_node("Mul", [f"{name}_a", f"{name}_w"], [f"{name}_out"]),
        ]
        weight = numpy_helper.from_array(np.full(192, weights, np.float32), f"{name}_w")
        out = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, ["N", 192])
        return helper.make_graph(nodes, name, [], [out], [weight])

    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("ReduceMax", ["flat"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["condition"], to=TensorProto.BOOL),
        helper.make_node(
            "If",
            ["condition"],
            ["logits"],
            then_branch=branch(positive, "then"),
            else_branch=branch(negative, "otherwise"),
        ),
    ]
    return fingerprint(_chain(nodes, {}))


def test_graph_fingerprint_looks_into_control_flow() -> None:
    plain = _branches("Relu", "Neg")
    assert plain == _branches("Relu", "Neg", weights=5.0)
    assert plain != _branches("Relu", "Abs")
    assert plain != _branches("Neg", "Relu")


def test_graph_fingerprint_reads_texts_and_types_of_attributes() -> None:
    def resized(mode: str) -> str:
        scales = {"scales": np.ones(4, np.float32)}
        nodes = [
            helper.make_node("Resize", ["image", "", "scales"], ["same"], mode=mode),
            helper.make_node("Flatten", ["same"], ["logits"]),
        ]
        return fingerprint(_chain(nodes, scales))

    def optional(kind: int) -> str:
        made = helper.make_node("Optional", [], ["nothing"], type=helper.make_tensor_type_proto(kind, [1]))
        return fingerprint(_chain([made, helper.make_node("Flatten", ["image"], ["logits"])], {}))

    assert resized("nearest") != resized("linear")
    assert optional(TensorProto.FLOAT) != optional(TensorProto.INT64)


def test_graph_fingerprint_survives_an_attribute_of_a_function_nobody_calls() -> None:
    node = helper.make_node("LeakyRelu", ["image"], ["leaky"])
    node.attribute.add(name="alpha", ref_attr_name="slope", type=onnx.AttributeProto.FLOAT)
    model = _chain([node, helper.make_node("Flatten", ["leaky"], ["logits"])], {})
    assert len(fingerprint(model)) == 64


def test_graph_fingerprint_refuses_what_is_no_model() -> None:
    with pytest.raises(FileRefusedError, match="the file is empty"):
        graph_fingerprint(b"")
