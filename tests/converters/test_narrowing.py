from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.contract import ContractError, InputContract
from qdefense.converters.narrowing import fixed_values, narrowed

CONTRACT = InputContract(input_name="x", output_name="y", height=2, width=2, class_names=tuple("abc"))


def contract(**changes: Any) -> InputContract:
    return CONTRACT.model_copy(update=changes)


def model(
    nodes: list[onnx.NodeProto],
    *,
    batch: int | str = "N",
    inputs: tuple[onnx.ValueInfoProto, ...] = (),
    outputs: tuple[str, ...] = ("y",),
    constants: dict[str, np.ndarray] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "narrow",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 2, 2]), *inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def narrow(proto: onnx.ModelProto, said: InputContract) -> onnx.GraphProto:
    graph: onnx.GraphProto = onnx.load_from_string(narrowed(proto.SerializeToString(), said)).graph
    return graph


def declared(name: str, kind: int, shape: list[Any]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


FLATTENED = [helper.make_node("Flatten", ["x"], ["y"])]


# --- fixed inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape", "value", "expected"),
    [
        (TensorProto.FLOAT, [], 0.5, np.array(0.5, np.float32)),
        (TensorProto.FLOAT, [2, "free"], -1.5, np.full((2, 1), -1.5, np.float32)),
        (TensorProto.FLOAT16, ["N", 2], 0.1, np.full((1, 2), 0.1, np.float16)),
        (TensorProto.DOUBLE, [1], 0.1, np.array([0.1])),
        (TensorProto.INT64, [1], 3.0, np.array([3])),
        (TensorProto.INT32, [0], -7.0, np.array([-7], np.int32)),
        (TensorProto.UINT8, [3], 255.0, np.full(3, 255, np.uint8)),
        (TensorProto.BOOL, [], 1.0, np.array(True)),
        (TensorProto.BOOL, [1], 0.0, np.array([False])),
    ],
)
def test_fixed_values_have_the_type_and_shape_of_their_input(
    kind: int, shape: list[Any], value: float, expected: np.ndarray
) -> None:
    found = fixed_values(
        model(FLATTENED, inputs=(declared("flag", kind, shape),)), contract(fixed_inputs={"flag": value})
    )
    assert list(found) == ["flag"]
    assert found["flag"].dtype == expected.dtype
    np.testing.assert_array_equal(found["flag"], expected)


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.UNDEFINED])
def test_fixed_values_raise_when_an_input_holds_no_numbers(kind: int) -> None:
    proto = model(FLATTENED, inputs=(declared("label", kind, [1]),))
    with pytest.raises(ContractError) as caught:
        fixed_values(proto, contract(fixed_inputs={"label": 1.0}))
    assert str(caught.value) == "input 'label' holds no numbers, so --fixed-input can't set it"


def test_fixed_values_raise_when_an_input_is_no_tensor() -> None:
    sequence = helper.make_tensor_sequence_value_info("list", TensorProto.FLOAT, None)
    with pytest.raises(ContractError, match="input 'list' holds no numbers"):
        fixed_values(model(FLATTENED, inputs=(sequence,)), contract(fixed_inputs={"list": 1.0}))


@pytest.mark.parametrize(
    ("kind", "value", "shown"),
    [
        (TensorProto.INT64, 0.5, "int64, which can't hold 0.5"),
        (TensorProto.INT64, 1e300, "int64, which can't hold 1e+300"),
        (TensorProto.BOOL, 0.5, "bool, which can't hold 0.5"),
        (TensorProto.BOOL, 2.0, "bool, which can't hold 2"),
        (TensorProto.UINT8, 256.0, "uint8, which can't hold 256"),
        (TensorProto.UINT8, -1.0, "uint8, which can't hold -1"),
        (TensorProto.FLOAT16, 1e6, "float16, which can't hold 1e+06"),
    ],
)
def test_fixed_values_raise_when_the_type_cannot_hold_the_value(kind: int, value: float, shown: str) -> None:
    """What would be cut off in silence is another model than the one meant."""
    proto = model(FLATTENED, inputs=(declared("flag", kind, [1]),))
    with pytest.raises(ContractError) as caught:
        fixed_values(proto, contract(fixed_inputs={"flag": value}))
    assert str(caught.value) == f"input 'flag' holds {shown}; give it another value with --fixed-input"


# --- the graph --------------------------------------------------------------------------------------------------------


def test_narrowed_gives_the_same_bytes_when_nothing_is_to_do() -> None:
    data = model(FLATTENED).SerializeToString()
    assert narrowed(data, CONTRACT) is data


def test_narrowed_turns_fixed_inputs_into_constants_and_keeps_one_output() -> None:
    nodes = [
        helper.make_node("Flatten", ["x"], ["features"]),
        helper.make_node("Mul", ["features", "factor"], ["y"]),
    ]
    proto = model(nodes, inputs=(declared("factor", TensorProto.FLOAT, [1]),), outputs=("features", "y"))
    graph = narrow(proto, contract(fixed_inputs={"factor": 3.0}))
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["y"]
    (constant,) = graph.initializer
    assert (constant.name, numpy_helper.to_array(constant).tolist()) == ("factor", [3.0])
    assert graph.node == proto.graph.node


RESHAPES = {
    "the batch stands first": ([2, 12], 2, [0, 12]),
    "the rest is left open": ([2, -1], 2, [0, -1]),
    "the first axis is left open": ([-1, 12], 2, [-1, 12]),
    "the first axis is another number": ([1, 24], 2, [1, 24]),
    "it copies already": ([0, 12], 2, [0, 12]),
    "the batch is 1": ([1, 12], 1, [0, 12]),
}


@pytest.mark.parametrize("as_node", [False, True], ids=["initializer", "Constant"])
@pytest.mark.parametrize(("shape", "batch", "freed"), RESHAPES.values(), ids=list(RESHAPES))
def test_narrowed_frees_a_reshape_when(shape: list[int], batch: int, freed: list[int], as_node: bool) -> None:
    target = np.array(shape)
    constant = helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(target))
    nodes = [*([constant] if as_node else []), helper.make_node("Reshape", ["x", "shape"], ["y"], name="flat")]
    proto = model(nodes, batch=batch, constants={} if as_node else {"shape": target})
    graph = narrow(proto, contract(batch=batch))
    constants = {tensor.name: numpy_helper.to_array(tensor).tolist() for tensor in graph.initializer}
    if freed == shape:
        assert graph.node == proto.graph.node
    else:
        assert constants[graph.node[-1].input[1]] == freed
    assert [value.type.tensor_type.shape.dim[0].dim_value for value in (*graph.input, *graph.output)] == [0, 0]


def test_narrowed_frees_two_reshapes_that_share_their_target_each_for_itself() -> None:
    nodes = [helper.make_node("Reshape", [source, "shape"], [target]) for source, target in (("x", "a"), ("a", "y"))]
    graph = narrow(model(nodes, batch=1, constants={"shape": np.array([1, 12])}), contract(batch=1))
    names = [node.input[1] for node in graph.node]
    assert len({*names, "shape"}) == 3


def test_narrowed_leaves_reshapes_alone_that_have_no_batch() -> None:
    """Old exporters reshape a bias to (1, C, 1, 1), and shapes to (1,)."""
    nodes = [
        helper.make_node("Reshape", ["bias", "four"], ["broad"]),
        helper.make_node("Add", ["x", "broad"], ["sum"]),
        helper.make_node("Shape", ["x"], ["lengths"]),
        helper.make_node("Gather", ["lengths", "zero"], ["rows"]),
        helper.make_node("Reshape", ["rows", "one"], ["row"]),
        helper.make_node("Flatten", ["sum"], ["y"]),
    ]
    constants = {
        "bias": np.ones(3, np.float32),
        "four": np.array([1, 3, 1, 1]),
        "zero": np.array(0),
        "one": np.array([1]),
    }
    proto = model(nodes, batch=1, constants=constants)
    assert narrow(proto, contract(batch=1)).node == proto.graph.node


def test_narrowed_leaves_a_reshape_alone_when_zero_means_zero() -> None:
    proto = model([helper.make_node("Reshape", ["x", "shape"], ["y"], allowzero=1)], batch=2)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 12]), "shape"))
    assert narrow(proto, contract(batch=2)).node == proto.graph.node


def test_narrowed_leaves_a_reshape_alone_when_its_target_is_an_attribute_or_computed() -> None:
    nodes = [
        helper.make_node("Reshape", ["x"], ["a"], shape=[2, 12]),
        helper.make_node("Shape", ["a"], ["lengths"]),
        helper.make_node("Reshape", ["a", "lengths"], ["y"]),
    ]
    proto = model(nodes, batch=2)
    assert narrow(proto, contract(batch=2)).node == proto.graph.node


def test_narrowed_forgets_the_shapes_that_the_file_states_in_between() -> None:
    proto = model(FLATTENED, batch=2)
    proto.graph.value_info.append(declared("between", TensorProto.FLOAT, [2, 3]))
    assert not narrow(proto, contract(batch=2)).value_info
