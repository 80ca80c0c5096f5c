"""From an ONNX graph to the steps that run: constants folded, branches that constants choose inlined."""

from __future__ import annotations

from collections import ChainMap, Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper

from qdefense.converters.operator_versions import quoted, stated_versions
from qdefense.converters.reading import every_graph, plain_domain
from qdefense.converters.shadow.constants import constant_node, constant_of
from qdefense.converters.shadow.quantization_parameters import Shape, check_quantization
from qdefense.converters.shadow.registry import (
    MALFORMED,
    Constant,
    Kernel,
    Mode,
    Node,
    ShadowError,
    build_kernel,
    malformed_refused,
    one_line,
)

INLINED = ("Constant", "If")
"""Operators of ONNX that are resolved while the graph is read, and never run."""

_ITERATING = {
    "Loop": "it repeats a graph while the file runs",
    "Scan": "it repeats a graph along an axis",
    "SequenceMap": "it repeats a graph for each tensor of a sequence",
}


@dataclass(frozen=True)
class Step:
    """One node of the running graph: its kernel, the names it reads and writes, and those nobody reads later.

    Attributes:
        live: by position, the inputs that the kernel has folded and that change from pass to pass nevertheless.
    """

    node: Node
    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...] = ()
    live: Mapping[int, str] = field(default_factory=dict)

    def kernel_of(self, values: Mapping[str, Any]) -> Kernel:
        """The kernel of this pass: built anew, by the same function, where what it folded has changed."""
        if not self.live:
            return self.kernel
        known = self.node.constants
        now = {index: replace(known[index], value=values[name]) for index, name in self.live.items()}
        return build_kernel(replace(self.node, constants={**known, **now}, folded=set()))


@dataclass
class Plan:
    """A parsed graph: what is constant, what runs, and what is known of each tensor.

    Attributes:
        inputs: names of the graph's inputs that no initializer gives.
        outputs: names of its outputs.
        constants: every tensor known at build time, by name.
        initializers: by the name of such a tensor, that of the initializer that holds it in the file. One in a branch
            has another name here; it is there if no other graph of the file has an initializer of its name.
        steps: what runs, in order.
        element_types: ONNX types by name, UNDEFINED where they are unknown.
        per_row: names of the tensors that hold one value per image.
        live: the constants that are recomputed in each pass, because they depend on a weight that is trained.
        nodes: every node that was built, folded ones included, in order.
        shape_of: the shape of a tensor by name, None in it for a free axis, as far as it can be told.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    constants: dict[str, Constant]
    initializers: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    element_types: dict[str, int] = field(default_factory=dict)
    per_row: set[str] = field(default_factory=set)
    live: set[str] = field(default_factory=set)
    nodes: list[Node] = field(default_factory=list)
    shape_of: Callable[[str], Shape | None] = lambda _name: None

    def run(self, values: dict[str, Any], mode: Mode, wanted: Sequence[str] = ()) -> dict[str, Any]:
        """Run the steps; of what they compute, the outputs and the wanted tensors are in `values` afterwards.

        Args:
            values: the inputs, `constants_in_use` and the weights in training, by name; it is changed and returned.
            mode: how the pass computes.
            wanted: names of intermediate tensors to keep.
        """
        for step in self.steps:
            inputs = [values[name] if name else None for name in step.inputs]
            result = _answer(step.node, step.kernel_of(values), mode, inputs)
            values.update(zip(step.outputs, result, strict=False))
            for name in step.last_uses:
                if name not in wanted:
                    del values[name]
        return values

    def constants_in_use(self) -> dict[str, Constant]:
        """The constants that a step reads or that are an output, by name, without those that a pass recomputes."""
        read = ({name for step in self.steps for name in step.inputs} | set(self.outputs)) - self.live
        return {name: constant for name, constant in self.constants.items() if name in read}


@dataclass(frozen=True)
class _Scope:
    """What a name of the file stands for here: a branch has names of its own, and sees those around it.

    Attributes:
        opsets: version of each domain.
        initializers: names that one initializer of the file has.
        taken: names that a tensor of a branch can't have in the plan.
        names: what names of the file stand for, those of this branch in the first map.
        prefix: of the names of this branch in the plan, "" outside of branches.
    """

    opsets: Mapping[str, int]
    initializers: Collection[str]
    taken: set[str]
    names: ChainMap[str, str] = field(default_factory=ChainMap)
    prefix: str = ""

    def read(self, name: str) -> str:
        return self.names.get(name, name)

    def write(self, name: str) -> str:
        if name and self.prefix and name not in self.names.maps[0]:
            own = self.prefix + name
            while own in self.taken:
                own += "'"
            self.taken.add(own)
            self.names[name] = own
        return self.read(name)

    def inner(self, prefix: str) -> _Scope:
        return replace(self, names=self.names.new_child(), prefix=prefix)


def plan_graph(model: onnx.ModelProto, live: Collection[str] = ()) -> Plan:
    """The plan of a model's graph, with any number of inputs and outputs.

    Args:
        model: the model.
        live: initializers that are given anew in each pass; what depends on them is not folded.

    Raises:
        ShadowError: the graph can't be read.
        UnsupportedOperatorError: an operator of the graph, or a use of one, has no registered function.
    """
    graph = model.graph
    constants = {tensor.name: constant_of(tensor, tensor.name) for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in constants]
    plan = Plan(tuple(value.name for value in inputs), tuple(value.name for value in graph.output), constants)
    plan.live.update(live)
    plan.element_types = {value.name: value.type.tensor_type.elem_type for value in inputs}
    plan.element_types |= {name: constant.element_type for name, constant in constants.items()}
    plan.shape_of = _shapes_when_asked(model)
    plan.initializers = {tensor.name: tensor.name for tensor in graph.initializer}
    held = Counter(tensor.name for body in every_graph(graph) for tensor in body.initializer)
    scope = _Scope(stated_versions(model), [name for name, count in held.items() if count == 1], _names(graph))
    plan.steps = _with_last_uses(plan, list(_steps(plan, graph.node, scope)))
    for name in plan.outputs:
        if name not in plan.element_types:
            raise ShadowError(f"nothing computes the output {quoted(name)}; check the file with onnx.checker")
    return plan


def _names(graph: onnx.GraphProto) -> set[str]:
    found = {value.name for value in graph.input}
    for body in every_graph(graph):
        found.update(tensor.name for tensor in body.initializer)
        found.update(name for node in body.node for name in node.output)
    return found


def _shapes_when_asked(model: onnx.ModelProto) -> Callable[[str], Shape | None]:
    @cache
    def shapes() -> dict[str, Shape]:
        graph = _inferred(model).graph
        declared = [
            value
            for value in (*graph.input, *graph.value_info, *graph.output)
            if value.type.tensor_type.HasField("shape")
        ]
        return {
            value.name: tuple(
                axis.dim_value if axis.HasField("dim_value") else None for axis in value.type.tensor_type.shape.dim
            )
            for value in declared
        }

    return lambda name: shapes().get(name)


def _inferred(model: onnx.ModelProto) -> onnx.ModelProto:
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        declared = value.type.tensor_type
        # on such a declaration onnx's shape inference ends the process
        if declared.elem_type not in TensorProto.DataType.values() or any(a.dim_value < 0 for a in declared.shape.dim):
            return model
    try:
        return onnx.shape_inference.infer_shapes(model)
    except (onnx.shape_inference.InferenceError, ValueError, RuntimeError):
        return model


def _steps(plan: Plan, protos: Iterable[onnx.NodeProto], scope: _Scope) -> Iterator[Step]:
    for proto in protos:
        node = _node(plan, proto, scope)
        for name in node.inputs:
            if name and name not in plan.element_types:
                raise ShadowError(
                    f"node {quoted(node.name)} reads {quoted(name)}, which nothing before it computes; sort the graph"
                )
        if node.domain == "" and node.op_type == "Constant":
            with malformed_refused(node):
                _hold(plan, node, constant_node(node))
        elif node.domain == "" and node.op_type == "If":
            yield from _chosen_branch(plan, node, scope)
        elif node.domain == "" and node.op_type in _ITERATING:
            raise node.unsupported(f"{_ITERATING[node.op_type]}, which the shadow can't")
        else:
            yield from _place(plan, node)


def _node(plan: Plan, proto: onnx.NodeProto, scope: _Scope) -> Node:
    domain = plain_domain(proto.domain)
    inputs = tuple(scope.read(name) for name in proto.input)
    outputs = tuple(scope.write(name) for name in proto.output)
    return Node(
        name=proto.name or next(filter(None, outputs), ""),
        op_type=proto.op_type,
        domain=domain,
        opset=scope.opsets.get(domain, 0),
        inputs=inputs,
        outputs=outputs,
        attributes={attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute},
        constants={index: plan.constants[name] for index, name in enumerate(inputs) if name in plan.constants},
        element_types=[plan.element_types.get(name) for name in inputs],
        per_row=[name in plan.per_row for name in inputs],
    )


def _place(plan: Plan, node: Node) -> Iterator[Step]:
    """The step that runs a node; none for one whose inputs are constants, which is folded."""
    with malformed_refused(node):
        check_quantization(node, plan.shape_of)
    kernel = build_kernel(node)
    plan.nodes.append(node)
    _announce(plan, node)
    if node.inputs and all(not name or name in plan.constants for name in node.inputs):
        _fold(plan, node, kernel)
        if plan.live.isdisjoint(node.inputs):
            return
        plan.live.update(filter(None, node.outputs))
    given = tuple("" if index in node.folded else name for index, name in enumerate(node.inputs))
    rebuilt = {index: node.inputs[index] for index in node.folded if node.inputs[index] in plan.live}
    yield Step(node, kernel, given, node.outputs, live=rebuilt)


def _chosen_branch(plan: Plan, node: Node, scope: _Scope) -> Iterator[Step]:
    """The steps of the branch that a constant condition chooses, under names of their own."""
    if 0 not in node.constants:
        raise node.unsupported(
            f"its condition {quoted(node.inputs[0] if node.inputs else '')} is not a constant, so that either "
            "branch may be taken"
        )
    condition = node.constants[0].value
    if condition.numel() != 1:
        raise node.unsupported(f"its condition has the shape {tuple(condition.shape)}, expected one value")
    branch = node.attributes.get("then_branch" if bool(condition) else "else_branch")
    if not isinstance(branch, onnx.GraphProto) or len(branch.output) != len(node.outputs):
        raise node.unsupported("the branch that is taken is missing or has another number of outputs")
    inner = scope.inner(f"{next(filter(None, node.outputs), node.name)}/")
    for tensor in branch.initializer:
        unique, name = tensor.name in scope.initializers, inner.write(tensor.name)
        plan.constants[name] = constant = constant_of(tensor, tensor.name if unique else None)
        plan.element_types[name] = constant.element_type
        if unique:
            plan.initializers[name] = tensor.name
    yield from _steps(plan, branch.node, inner)
    outside = replace(scope, names=ChainMap(), prefix="")
    for value, output in zip(branch.output, node.outputs, strict=True):
        alias = helper.make_node("Identity", [inner.read(value.name)], [output], name=node.name)
        yield from _steps(plan, [alias] if output else [], outside)


def _hold(plan: Plan, node: Node, constant: Constant) -> None:
    plan.constants[node.outputs[0]] = constant
    plan.element_types[node.outputs[0]] = constant.element_type


def _announce(plan: Plan, node: Node) -> None:
    """Tell the plan the types of a node's outputs, and which of them hold one value per image."""
    first = node.element_types[0] if node.element_types else None
    for index, name in enumerate(node.outputs):
        if name in plan.element_types:
            raise ShadowError(
                f"node {quoted(node.name)} computes {quoted(name)}, which is there already; export the model again"
            )
        kind = node.emits[index] if index < len(node.emits) else first
        if name:
            plan.element_types[name] = kind or TensorProto.UNDEFINED
    moving = [flag for index, flag in enumerate(node.per_row) if node.inputs[index] and index not in node.constants]
    flags = node.emits_per_row or (bool(moving) and all(moving),) * len(node.outputs)
    plan.per_row.update(name for name, flag in zip(node.outputs, flags, strict=False) if name and flag)


def _answer(node: Node, kernel: Kernel, mode: Mode, inputs: Sequence[Any]) -> tuple[Any, ...]:
    try:
        result = kernel(mode, *inputs)
    except ShadowError:
        raise
    except MALFORMED as error:
        raise ShadowError(
            f"{node.label}: it can't be computed ({one_line(error)}); check the shape of the images, or export the "
            "model again"
        ) from error
    answers = result if isinstance(result, tuple) else (result,)
    if len(answers) < len(node.outputs):
        raise node.unsupported(f"only its first {len(answers)} outputs are covered")
    return answers


@torch.no_grad()
def _fold(plan: Plan, node: Node, kernel: Kernel) -> None:
    """Compute a node of constants once; a dequantized initializer keeps its initializer's name."""
    result = _answer(node, kernel, Mode(), [plan.constants[name].value if name else None for name in node.inputs])
    origin = plan.constants[node.inputs[0]].initializer if node.op_type in ("DequantizeLinear", "Identity") else None
    for name, value in zip(node.outputs, result, strict=False):
        if name:
            plan.constants[name] = Constant(value, plan.element_types[name], origin)


def _with_last_uses(plan: Plan, steps: Sequence[Step]) -> list[Step]:
    seen, finished = set(plan.outputs), []
    for step in reversed(steps):
        free = {name for name in (*step.inputs, *step.outputs) if name and name not in plan.constants} - seen
        seen |= free
        finished.append(replace(step, last_uses=tuple(sorted(free))))
    return finished[::-1]
