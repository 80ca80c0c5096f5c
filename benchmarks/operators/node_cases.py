"""The node test cases inside the onnx package, run against the shadow: which operator computes what ONNX says.

Each case is one operator (or the body of one that ONNX defines as a function, "_expanded") with inputs and outputs.
It is run in three variants, since a shadow takes some inputs only as constants:
    live      every input is one of the graph;
    weights   every input but the first is an initializer;
    folded    every input is an initializer, so that the graph is computed when the shadow is built.
A case agrees where at least one variant gives the reference outputs, in shape, type and value, and the others do too
or say that an input "is not a constant". Anything else is `differs` or `refused`.
"""

from __future__ import annotations

import importlib
import pkgutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import onnx
import onnx.backend.test.case.node as suite
import onnxruntime
import torch
from node_exceptions import EXCEPTIONS
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qdefense.converters.operator_versions import stated_versions
from qdefense.converters.reading import bodies, plain_domain
from qdefense.converters.runtime_graph import RUNTIME_ERRORS
from qdefense.converters.shadow import ShadowError, registered
from qdefense.converters.shadow.constants import constant_of, type_name
from qdefense.converters.shadow.plan import INLINED, Plan, plan_graph
from qdefense.converters.shadow.registry import Mode

Array = NDArray[Any]
Operator = tuple[str, str]
Verdict = Literal["agrees", "differs", "refused", "unregistered"]
VARIANTS = ("live", "weights", "folded")
NEEDS_CONSTANT = "is not a constant"
REFUSALS: tuple[type[Exception], ...] = (
    onnx.checker.ValidationError,
    onnx.shape_inference.InferenceError,
    *RUNTIME_ERRORS,
    ValueError,
    TypeError,
)
SMALLEST = 1e-6
"""Absolute difference that float outputs may have beside the case's own relative one."""


@dataclass(frozen=True)
class Outcome:
    """What came of a case, or of one variant of it: the reason is empty where it agrees."""

    verdict: Verdict
    reason: str = ""
    variants: tuple[str, ...] = ()


@dataclass(frozen=True)
class NodeCase:
    """One case of the suite; `operator` is the one that it tests, `operators` those that its graph holds."""

    name: str
    operator: Operator
    operators: frozenset[Operator]
    model: onnx.ModelProto
    inputs: Sequence[Any]
    outputs: Sequence[Any]
    rtol: float


def load_cases(operator: str | None = None) -> dict[str, NodeCase]:
    """The cases by name: all of them (seconds to import), or those in the suite's file of one operator."""
    names = {module.name for module in pkgutil.iter_modules(suite.__path__)}
    wanted = names if operator is None else names & {operator.lower()}
    for name in sorted(wanted):
        _import(name)
    tested: dict[str, Operator] = {}
    for case in suite._NodeTestCases:  # noqa: SLF001
        if "_expanded" not in case.name:
            node = case.model.graph.node[0]
            tested[case.name] = (plain_domain(node.domain), node.op_type)
    cases = [_node_case(case, tested[case.name.split("_expanded")[0]]) for case in suite._NodeTestCases]  # noqa: SLF001
    return {case.name: case for case in cases if operator is None or case.operator[1].lower() == operator.lower()}


@cache
def _import(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module(f"{suite.__name__}.{name}")


def _node_case(case: Any, operator: Operator) -> NodeCase:
    ((inputs, outputs),) = case.data_sets
    held = frozenset(_operators(case.model.graph.node))
    return NodeCase(case.name, operator, held, case.model, inputs, outputs, case.rtol)


def _operators(nodes: Iterable[onnx.NodeProto]) -> Iterator[Operator]:
    for node in nodes:
        yield plain_domain(node.domain), node.op_type
        for _, body in bodies(node):
            yield from _operators(body.node)


def known_operators() -> frozenset[Operator]:
    """Operators that the shadow has a function for, or resolves while it reads the graph."""
    return frozenset(("", name) for name in INLINED) | {(domain, name) for domain, name, _ in registered()}


def judge(case: NodeCase) -> Outcome:
    """What the shadow makes of a case."""
    missing = case.operators - known_operators()
    if missing:
        return Outcome("unregistered", ", ".join(sorted(name for _, name in missing)))
    found = {variant: _judge_variant(case, variant) for variant in _variants(case)}
    agreed = tuple(variant for variant, outcome in found.items() if outcome.verdict == "agrees")
    telling = {variant: outcome for variant, outcome in found.items() if NEEDS_CONSTANT not in outcome.reason}
    for verdict in ("differs", "refused"):
        for variant, outcome in telling.items():
            if outcome.verdict == verdict:
                return Outcome(verdict, f"{variant}: {outcome.reason}", agreed)
    return Outcome("agrees", variants=agreed) if agreed else next(iter(found.values()))


def _variants(case: NodeCase) -> tuple[str, ...]:
    return VARIANTS if len(case.inputs) > 1 else ("live", "folded") if case.inputs else ("live",)


def _judge_variant(case: NodeCase, variant: str) -> Outcome:
    try:
        feeds = [_tensor(value, given) for value, given in zip(case.model.graph.input, case.inputs, strict=True)]
        wanted = [_tensor(value, given) for value, given in zip(case.model.graph.output, case.outputs, strict=True)]
    except TypeError as error:
        return Outcome("refused", str(error))
    live = {"live": len(feeds), "weights": 1, "folded": 0}[variant]
    try:
        found, plan = _run(_with_initializers(case.model, feeds[live:]), feeds[:live])
    except ShadowError as error:
        return Outcome("refused", str(error))
    except Exception as error:  # noqa: BLE001 - whatever it is, the case did not agree
        return Outcome("differs", f"{type(error).__name__}: {error}")
    reasons = [_difference(found[tensor.name], plan, tensor, case.rtol) for tensor in wanted]
    reason = "; ".join(filter(None, reasons))
    return Outcome("differs", reason) if reason else Outcome("agrees")


def _tensor(value: onnx.ValueInfoProto, given: Any) -> TensorProto:
    """A value of the suite under the name that it has in the graph."""
    if not value.type.HasField("tensor_type"):
        raise TypeError(f"{value.name!r} is a {value.type.WhichOneof('value')}, not a tensor")
    tensor = TensorProto()
    tensor.CopyFrom(given if isinstance(given, TensorProto) else numpy_helper.from_array(np.asarray(given)))
    if tensor.data_type == TensorProto.STRING:
        raise TypeError(f"{value.name!r} holds text")
    tensor.name = value.name
    return tensor


def _with_initializers(model: onnx.ModelProto, tensors: Iterable[TensorProto]) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.graph.initializer.extend(tensors)
    return copy


@torch.no_grad()
def _run(model: onnx.ModelProto, feeds: Sequence[TensorProto]) -> tuple[dict[str, Any], Plan]:
    plan = plan_graph(model)
    values = {name: constant.value for name, constant in plan.constants_in_use().items()}
    given = {tensor.name: constant_of(tensor, None).value for tensor in feeds}
    first = next(iter(given.values()), torch.zeros(()))
    rows = first.shape[0] if first.ndim else 1
    answers = plan.run(values | given, Mode(exact=True, rows=rows, group=max(1, rows)))
    return {
        name: _of_the_batch(answers[name]) if name in plan.per_row else answers[name] for name in plan.outputs
    }, plan


def _of_the_batch(value: torch.Tensor) -> torch.Tensor:
    """What a batch computes once and the shadow holds once for each of its images."""
    return value[0] if bool((value == value[:1]).all()) else value


def _difference(found: torch.Tensor, plan: Plan, expected: TensorProto, rtol: float) -> str:
    kind = plan.element_types[expected.name]
    if kind != expected.data_type:
        return f"{expected.name!r} is said to be {type_name(kind)}, expected {type_name(expected.data_type)}"
    wanted = constant_of(expected, None).value
    if found.shape != wanted.shape:
        return f"{expected.name!r} has shape {tuple(found.shape)}, expected {tuple(wanted.shape)}"
    if found.dtype != wanted.dtype and kind != TensorProto.INT32:  # int32 sums of codes are floats
        return f"{expected.name!r} is carried as {found.dtype}, expected {wanted.dtype}"
    found = found.to(wanted.dtype) if found.dtype.is_floating_point else found
    inexact = expected.data_type in (TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    rtol, atol = (rtol, SMALLEST) if inexact else (0.0, 0.0)
    if torch.allclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True):
        return ""
    wrong = ~torch.isclose(found, wanted, rtol=rtol, atol=atol, equal_nan=True)
    at = tuple(int(index) for index in wrong.nonzero()[0])
    return f"{expected.name!r} differs in {int(wrong.sum())} of {wrong.numel()} values: " + (
        f"at {at} it is {found[at].item():.7g}, expected {wanted[at].item():.7g}"
    )


def older_versions(case: NodeCase) -> Iterator[NodeCase]:
    """The case at each earlier version of its operator that ONNX Runtime runs, with the runtime's answers.

    The suite tests the newest version only. Each version stands in the last opset that has it.
    """
    domain, op_type = case.operator
    if domain or len(case.model.graph.node) != 1:
        return
    history = sorted(_history()[op_type])
    present = onnx.defs.get_schema(op_type, stated_versions(case.model)[""], "").since_version
    for since, following in pairwise(history[: history.index(present) + 1]):
        model = onnx.ModelProto()
        model.CopyFrom(case.model)
        model.opset_import[0].version = following - 1
        outputs = _runtime_answers(model, case)
        if outputs is not None:
            yield replace(case, name=f"{case.name} at {since}", model=model, outputs=outputs)


@cache
def _history() -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for schema in onnx.defs.get_all_schemas_with_history():
        if schema.domain == "" and not schema.deprecated:
            found.setdefault(schema.name, set()).add(schema.since_version)
    return found


def _runtime_answers(model: onnx.ModelProto, case: NodeCase) -> list[Array] | None:
    """None where this version has no such attribute, input or type, or the runtime no kernel for it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        onnx.checker.check_model(model, full_check=True)
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        feeds = {value.name: np.asarray(given) for value, given in zip(model.graph.input, case.inputs, strict=True)}
        answers: list[Array] = session.run(None, feeds)
    except REFUSALS:
        return None
    return answers


def exceptions() -> dict[str, str]:
    """The listed cases that need not agree, each with its reason."""
    listed: dict[str, str] = {}
    for reason, names in EXCEPTIONS.items():
        for name in names:
            if name in listed:
                raise ValueError(f"the exception {name!r} is listed twice")
            listed[name] = reason
    return listed
