from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks" / "operators"))

from node_cases import NodeCase, Outcome, exceptions, judge, known_operators, load_cases, older_versions

from qdefense.converters.shadow import registry

MICROSOFT = "com.microsoft"
REQUIRED: dict[str, tuple[str, ...]] = {
    "": (
        *("Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"),
        *("MaxPool", "AveragePool", "LpPool", "GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"),
        *("BatchNormalization", "InstanceNormalization", "GroupNormalization", "LayerNormalization", "LRN"),
        *("Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "ThresholdedRelu", "Sigmoid", "HardSigmoid", "Tanh"),
        *("HardSwish", "Swish", "Mish", "Gelu", "Softplus", "Softsign", "Clip", "Erf", "Softmax", "LogSoftmax"),
        *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Abs", "Neg", "Reciprocal", "Min", "Max", "Mean"),
        *("Sum", "Floor", "Ceil", "Round", "Sign", "Mod"),
        *("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "And", "Or", "Xor", "Not", "Where"),
        *(
            "ReduceMean",
            "ReduceSum",
            "ReduceMax",
            "ReduceMin",
            "ReduceProd",
            "ReduceL1",
            "ReduceL2",
            "ArgMax",
            "ArgMin",
        ),
        *("Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Concat", "Split", "Slice", "Gather", "Shape"),
        *("Expand", "Tile", "Pad", "Resize", "DepthToSpace", "SpaceToDepth", "Identity", "Dropout", "Cast", "Size"),
        *("ConstantOfShape", "Range", "GatherElements", "Constant", "If"),
        *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"),
        *("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    ),
    MICROSOFT: (
        *("QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearGlobalAveragePool", "QLinearAveragePool"),
        *("QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "QGemm"),
        *("FusedConv", "FusedMatMul", "FusedGemm", "BiasGelu", "SkipLayerNormalization", "MatMulNBits"),
        *("DynamicQuantizeMatMul", "MatMulIntegerToFloat"),
    ),
}
"""Issue 4: what image classifiers need. "All poolings", "elementwise" and "shape ops" are spelt out."""

Results = dict[str, tuple[NodeCase, Outcome]]


@pytest.fixture(scope="module")
def results() -> Results:
    return {case.name: (case, judge(case)) for case in load_cases().values()}


def test_every_case_of_a_registered_operator_agrees_or_is_listed(results: Results) -> None:
    listed = exceptions()
    wrong = {
        name: f"{outcome.verdict}, {outcome.reason}"
        for name, (_, outcome) in results.items()
        if outcome.verdict in ("differs", "refused") and name not in listed
    }
    assert wrong == {}


def test_no_listed_exception_is_stale(results: Results) -> None:
    gone = [name for name in exceptions() if name not in results]
    idle = {name: results[name][1].verdict for name in exceptions() if name in results}
    assert gone == []
    assert {name: verdict for name, verdict in idle.items() if verdict not in ("differs", "refused")} == {}


def test_at_least_95_percent_of_the_cases_of_registered_operators_agree(results: Results) -> None:
    counts = Counter(outcome.verdict for _, outcome in results.values())
    registered = counts.total() - counts["unregistered"]
    assert registered >= 250
    assert counts["agrees"] >= 0.95 * registered, counts


@pytest.mark.parametrize("domain", REQUIRED)
def test_every_operator_of_image_classifiers_is_registered(domain: str) -> None:
    assert [name for name in REQUIRED[domain] if (domain, name) not in known_operators()] == []


@pytest.fixture(scope="module")
def relu() -> NodeCase:
    return load_cases("Relu")["test_relu"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda y: y + np.float32(1), "'y' differs in 60 of 60 values: at (0, 0, 0) it is 1.764052, expected 2.764052"),
        (lambda y: y[:1], "'y' has shape (3, 4, 5), expected (1, 4, 5)"),
        (lambda y: y.astype(np.float64), "'y' is said to be FLOAT, expected DOUBLE"),
        (lambda y: y.astype(str), "'y' holds text"),
    ],
)
def test_wrong_answer_is_found(relu: NodeCase, change: Any, reason: str) -> None:
    outcome = judge(replace(relu, outputs=[change(relu.outputs[0])]))
    assert outcome.verdict == ("refused" if "text" in reason else "differs")
    assert outcome.reason == f"live: {reason}"


def test_operator_without_a_function_is_unregistered(relu: NodeCase) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(relu.model)
    model.graph.node[0].domain = "elsewhere"
    outcome = judge(replace(relu, model=model, operators=frozenset({("elsewhere", "Relu")})))
    assert (outcome.verdict, outcome.reason) == ("unregistered", "Relu")


def test_input_that_must_be_constant_is_excused_where_another_variant_agrees() -> None:
    outcome = judge(load_cases("QLinearConv")["test_qlinearconv"])
    assert outcome == Outcome("agrees", variants=("weights", "folded"))


def test_earlier_versions_of_registered_operators_mean_what_the_runtime_makes_of_them(results: Results) -> None:
    agreeing = [case for case, outcome in results.values() if outcome.verdict == "agrees"]
    found = {older.name: judge(older) for case in agreeing for older in older_versions(case)}
    assert len(found) >= 600
    assert {name: outcome.reason for name, outcome in found.items() if outcome.verdict == "differs"} == {}


def test_earlier_version_with_another_meaning_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case = load_cases("Softmax")["test_softmax_default_axis"]
    (old,) = [older for older in older_versions(case) if older.name.endswith(" at 11")]
    assert judge(old).verdict == "agrees"
    table = registry._TABLE
    monkeypatch.setitem(table, ("", "Softmax", 1), table["", "Softmax", 13])
    assert judge(old).verdict == "differs"


def test_operator_that_onnx_changed_since_it_was_looked_at_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "VERIFIED", {"": 19, "com.microsoft": 1})
    outcome = judge(load_cases("Conv")["test_basic_conv_with_padding"])
    assert outcome.verdict == "refused"
    assert "opset 22: ONNX changed it in version 22, and its function was held against versions up to 19" in (
        outcome.reason
    )
