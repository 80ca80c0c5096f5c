from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.contract import ContractError, StatedContract
from qdefense.converters.reading import FileRefusedError
from qdefense.session import DeployedSession, profile_for


def test_read_equals_from_bytes_and_needs_the_file_no_more_when_it_is_gone(
    tmp_path: Path, small_files: dict[str, bytes]
) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(small_files["first"])
    artifact = Artifact.read(path)
    path.unlink()
    assert artifact == Artifact.from_bytes(small_files["first"])
    assert artifact.sha256 == hashlib.sha256(small_files["first"]).hexdigest()
    assert (artifact.size_bytes, artifact.external_files) == (len(small_files["first"]), ())
    session = DeployedSession(artifact, profile_for(artifact))
    assert session.logits(np.zeros((1, 3, 16, 16), dtype=np.float32)).shape == (1, 12)
    assert (artifact.contract.height, artifact.contract.classes, artifact.contract.source) == (16, 12, "metadata")


def test_read_raises_oserror_when_there_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"absent\.onnx"):
        Artifact.read(tmp_path / "absent.onnx")


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x0a"])
def test_from_bytes_refuses_what_is_no_model(data: bytes) -> None:
    with pytest.raises(FileRefusedError, match=r"export (the model|it) again"):
        Artifact.from_bytes(data)


def test_from_bytes_asks_which_output_when_there_are_two_and_only_the_file_says_it(
    small_files: dict[str, bytes],
) -> None:
    model = onnx.load_from_string(small_files["first"])
    extra = model.graph.output.add()
    extra.CopyFrom(model.graph.output[0])
    extra.name = model.graph.node[0].output[0]
    assert b'"output_name":"logits"' in small_files["first"], "a file has no say in which of its outputs is judged"
    with pytest.raises(ContractError, match=r"^expected one output, found 'logits' \[None, 12\], .*with --output$"):
        Artifact.from_bytes(model.SerializeToString())
    chosen = Artifact.from_bytes(model.SerializeToString(), StatedContract(output_name="logits"))
    assert (chosen.contract.output_name, chosen.contract.source) == ("logits", "options")


def test_from_bytes_raises_contract_error_when_an_input_cannot_hold_its_value(small_files: dict[str, bytes]) -> None:
    """Before anything runs: once the file is described, a stop leaves it unmeasured."""
    model = onnx.load_from_string(small_files["first"])
    model.graph.input.append(helper.make_tensor_value_info("training", TensorProto.BOOL, []))
    stated = StatedContract(fixed_inputs={"training": 1})
    artifact = Artifact.from_bytes(model.SerializeToString(), stated)
    assert {name: (value.dtype, value.item()) for name, value in artifact.fixed_inputs.items()} == {
        "training": (np.dtype(bool), True)
    }
    with pytest.raises(ContractError, match=r"^input 'training' holds bool, which can't hold 0\.5; give it another"):
        Artifact.from_bytes(model.SerializeToString(), StatedContract(fixed_inputs={"training": 0.5}))


def test_fixed_inputs_are_none_when_the_contract_has_none(small_files: dict[str, bytes]) -> None:
    assert Artifact.from_bytes(small_files["first"]).fixed_inputs == {}


@pytest.mark.parametrize(
    ("name", "integer", "coupled"),
    [("first", False, False), ("first.int8-static", True, False), ("first.int8-dynamic", True, True)],
)
def test_only_dynamic_int8_is_batch_coupled(
    small_files: dict[str, bytes], name: str, *, integer: bool, coupled: bool
) -> None:
    artifact = Artifact.from_bytes(small_files[name])
    assert (artifact.integer, artifact.batch_coupled) == (integer, coupled)
    nodes = onnx.load_from_string(small_files[name]).graph.node
    assert artifact.batch_coupled_layers == tuple(n.name for n in nodes if n.op_type == "DynamicQuantizeLinear")


def test_batch_coupled_layers_names_a_quantizer_when_it_hides_in_a_branch() -> None:
    artifact = Artifact.from_bytes(_quantizer_in_a_branch("hidden\x1b[2J"))
    assert artifact.batch_coupled_layers == (r"hidden\x1b[2J",)
    assert profile_for(artifact).batch == 1


def _quantizer_in_a_branch(name: str) -> bytes:
    def branch(label: str, nodes: list[onnx.NodeProto]) -> onnx.GraphProto:
        return helper.make_graph(nodes, label, [], [helper.make_tensor_value_info(label, TensorProto.FLOAT, None)])

    quantized = [
        helper.make_node("DynamicQuantizeLinear", ["flat"], ["codes", "scale", "zero"], name=name),
        helper.make_node("DequantizeLinear", ["codes", "scale", "zero"], ["then"]),
    ]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("ReduceMax", ["image"], ["peak"], keepdims=0),
        helper.make_node("Greater", ["peak", "half"], ["bright"]),
        helper.make_node(
            "If",
            ["bright"],
            ["logits"],
            then_branch=branch("then", quantized),
            else_branch=branch("else", [helper.make_node("Identity", ["flat"], ["else"])]),
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "branches",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 1])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(np.array(0.5, dtype=np.float32), "half")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())
