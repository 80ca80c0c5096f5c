from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qdefense.converters.operator_versions import first_problem, load_refusal, quoted, version_problem
from qdefense.converters.runtime_graph import RuntimeGraphError, optimized_model


def model_of(node: onnx.NodeProto, opset: int = 21, **domains: int) -> onnx.ModelProto:
    names = [name for name in node.input if name != "x"]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["a", "b", "c", "d"])],
        [onnx.numpy_helper.from_array(np.ones(4, dtype=np.float32), name) for name in names],
    )
    opsets = [helper.make_opsetid("", opset)]
    opsets += [helper.make_opsetid(name.replace("_", "."), version) for name, version in domains.items()]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize(
    ("op_type", "domain", "version", "problem"),
    [
        ("Relu", "", 21, ""),
        ("Relu", "", 99, "knows versions up to "),
        ("Relu", "", 0, "the file states no version of this domain"),
        ("Gelu", "", 19, "ONNX has it from version 20 on"),
        ("Upsample", "", 11, "ONNX withdrew it in version 10"),
        ("Fancy", "", 21, "ONNX has no such operator"),
        ("QGemm", "com.microsoft", 1, ""),
        ("QGemm", "com.microsoft", 2, "this domain has version 1 only"),
        ("Fancy", "com.microsoft", 1, "ONNX Runtime has no such operator"),
        ("Fancy", "evil", 1, "ONNX Runtime has no operators of this domain, its own are ['ai.onnx.ml'"),
    ],
)
def test_version_problem_says_what_no_runtime_knows(op_type: str, domain: str, version: int, problem: str) -> None:
    found = version_problem(op_type, domain, version)
    assert problem in found
    assert bool(found) == bool(problem)


@pytest.mark.parametrize(
    ("node", "domains", "expected"),
    [
        (helper.make_node("Fancy", ["x"], ["y"], name="f"), {}, "'Fancy' of domain 'ai.onnx', opset 21: ONNX has no"),
        (
            helper.make_node("Fancy", ["x"], ["y"], name="f", domain="evil"),
            {"evil": 3},
            "'Fancy' of domain 'evil', opset 3: ONNX Runtime has no operators of this domain",
        ),
        (
            helper.make_node("Fancy", ["x"], ["y"], name="f", domain="evil"),
            {},
            "'Fancy' of domain 'evil', no stated opset: ONNX Runtime has no operators of this domain",
        ),
        (
            helper.make_node("BiasGelu", ["x", "b"], ["y"], name="f", domain="com.microsoft"),
            {"com_microsoft": 2},
            "'BiasGelu' of domain 'com.microsoft', opset 2: this domain has version 1 only",
        ),
    ],
)
def test_file_that_the_runtime_refuses_has_its_node_named(
    node: onnx.NodeProto, domains: dict[str, int], expected: str
) -> None:
    with pytest.raises(RuntimeGraphError) as caught:
        optimized_model(model_of(node, **domains).SerializeToString())
    message = str(caught.value)
    assert message.startswith("ONNX Runtime cannot load the file: ")
    assert f"(node 'f': operator {expected}" in message
    assert message.splitlines() == [message]


def test_node_that_only_the_runtime_finds_fault_with_is_named_in_full() -> None:
    node = helper.make_node("DequantizeLinear", ["x", "s"], ["y"], name="d")
    with pytest.raises(
        RuntimeGraphError, match=r"\(node 'd': operator 'DequantizeLinear' of domain 'ai.onnx', opset 21\)"
    ):
        optimized_model(model_of(node).SerializeToString())


def test_bytes_that_are_no_model_have_no_node_at_fault() -> None:
    assert load_refusal(b"\xff", "no") == "ONNX Runtime cannot load the file: no"


def test_call_of_a_local_function_is_no_problem() -> None:
    model = model_of(helper.make_node("F", ["x"], ["y"], domain="local"), local=1)
    assert "no operators of this domain" in first_problem(model)
    body = [helper.make_node("Relu", ["a"], ["b"])]
    model.functions.append(helper.make_function("local", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))
    assert first_problem(model) == ""


def test_quoted_text_is_one_short_printable_line() -> None:
    assert quoted("a\n\x1b\u202e") == "'a\\n\\x1b\\u202e'"
    assert len(quoted("n" * 10_000)) == 122
