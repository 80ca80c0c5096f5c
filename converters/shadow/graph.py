"""From the bytes of an ONNX file to a differentiable module that computes what the file computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from qdefense.converters.contract import CARRYING, InputContract
from qdefense.converters.narrowing import narrowed
from qdefense.converters.reading import plain_domain
from qdefense.converters.runtime_graph import GraphOptions, optimized_model
from qdefense.converters.shadow import float_operators, quantized_operators, shape_operators  # noqa: F401
from qdefense.converters.shadow.door import enter, read_answers
from qdefense.converters.shadow.registry import CODE_RANGES, Constant, Kernel, Mode, Node, ShadowError, build_kernel

Source = Literal["optimized", "shipped"]
Quantization = Literal["float", "static", "dynamic"]

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
_STATIC = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm"}


@dataclass(frozen=True)
class Step:
    """One node of the running graph: its kernel, the names it reads and writes, and those nobody reads later."""

    node: Node
    kernel: Kernel
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    last_uses: tuple[str, ...]


@dataclass
class Plan:
    """A parsed graph: what is constant, what runs, and what is known of each tensor."""

    input_name: str
    output_name: str
    constants: dict[str, Constant]
    steps: list[Step] = field(default_factory=list)
    element_types: dict[str, int] = field(default_factory=dict)
    per_row: set[str] = field(default_factory=set)


def build_shadow(
    model: bytes, *, source: Source, contract: InputContract | None = None, options: GraphOptions | None = None
) -> Shadow:
    """The differentiable twin of an ONNX file.

    With a contract it stands at the model's door: it takes RGB images in [0, 1] and answers with logits or
    log-probabilities. Without one it takes and gives what the file does.

    Args:
        model: the file's bytes, weights included.
        source: "optimized" mirrors the graph that ONNX Runtime runs, for certificates and inversion;
            "shipped" mirrors the graph as it is in the file, for repairs and write-back.
        contract: what the file expects and answers. Fixed inputs become constants, a frozen batch is set free.
        options: of the session that the shadow stands for; they decide the optimized graph.

    Raises:
        RuntimeGraphError: ONNX Runtime refused the file ("optimized" only).
        UnsupportedArithmeticError: the options ask for exact arithmetic, and the optimized graph has no exact form.
        ShadowError: the bytes are no self-contained ONNX model with one input and one output.
        UnsupportedOperatorError: an operator of the graph, or a use of one, has no registered function.
    """
    if source not in ("optimized", "shipped"):
        raise ValueError(f"source is {source!r}, expected 'optimized' or 'shipped'")
    data = model if contract is None else narrowed(model, contract)
    plan = _plan(_parse(optimized_model(data, options) if source == "optimized" else data))
    shadow = Shadow(plan, source=source, contract=contract)
    if contract is not None and contract.batch is not None:
        _try_free_batch(shadow, contract)
    return shadow


@torch.no_grad()
def _try_free_batch(shadow: Shadow, contract: InputContract) -> None:
    rows = contract.batch + 1 if contract.batch else 2
    try:
        answers = shadow(torch.zeros(rows, 3, contract.height, contract.width))
    except (RuntimeError, ValueError, IndexError) as error:
        answers = None
        why = f": {str(error).splitlines()[0][:160]}"
    else:
        why = ""
    if answers is None or answers.shape != (rows, contract.classes):
        raise ShadowError(
            f"the file's batch is frozen at {contract.batch} and the graph cannot be freed of it{why}; export it with "
            "a dynamic batch axis"
        )


class Shadow(nn.Module):
    """A module whose forward pass is the arithmetic of an ONNX file.

    Attributes:
        contract: what stands between the model's door and the graph; nothing without one.
        source: "optimized" or "shipped".
        input_name: name of the graph's input.
        output_name: name of its output.
        node_names: names of the nodes that run, in order; folded ones are gone.
        tensor_names: names of the tensors that they compute, in the same order.
        operators: their operator types, in the same order.
        parameters_by_initializer: the float weights by the name of the initializer they come from. A weight that
            the file holds as integers appears dequantized, under the name of the integer initializer.
    """

    def __init__(
        self,
        plan: Plan,
        *,
        source: Source,
        dtype: torch.dtype = torch.float32,
        contract: InputContract | None = None,
    ) -> None:
        super().__init__()
        self.source, self.contract = source, contract
        self._scores = _scores_before_softmax(plan) if contract is not None and contract.head == "softmax" else None
        self.input_name, self.output_name = plan.input_name, plan.output_name
        self.node_names = tuple(step.node.name for step in plan.steps)
        self.tensor_names = tuple(name for step in plan.steps for name in step.outputs)
        self.operators = tuple(step.node.op_type for step in plan.steps)
        self._plan, self._dtype = plan, dtype
        self._buffer_names: dict[str, str] = {}
        self.parameters_by_initializer: dict[str, nn.Parameter] = {}
        self._parameter_of: dict[str, nn.Parameter] = {}
        for index, (name, constant) in enumerate(_constants_in_use(plan).items()):
            self._keep(index, name, constant)

    @property
    def quantization(self) -> Quantization:
        """Whether the graph is "float", or quantized with "static" or "dynamic" scales."""
        if _DYNAMIC.intersection(self.operators):
            return "dynamic"
        return "static" if _STATIC.intersection(self.operators) else "float"

    @property
    def is_quantized(self) -> bool:
        """Whether any activation is rounded to integer codes."""
        return self.quantization != "float"

    def forward(self, x: Tensor, *, exact: bool = False, saturate: bool = False) -> Tensor:
        """The logits.

        Args:
            x: (N, 3, H, W) float32 in [0, 1], RGB; without a contract whatever the file takes.
            exact: accumulate integer sums so that no value is rounded where the runtime's isn't; slower on wide
                layers. Without it this is the gradient path: float32 sums, equal unless they pass 2 ** 24.
            saturate: reproduce, in value, the int16 pair saturation of u8 x s8 kernels without VNNI; no gradient
                runs through the clipped part. Slow.

        Returns:
            (N, K) float32, float64 from a module made by `to_double`.
        """
        scores = self._scores
        values = self._run(x, () if scores is None else (scores.name,), exact=exact, saturate=saturate)
        answers: Tensor = values[self.output_name]
        if self.contract is None:
            return answers
        logits = None if scores is None else (values[scores.name] - scores.zero_point) * scores.scale
        return read_answers(answers, logits, self.contract)

    def activations(
        self, x: Tensor, tensors: Sequence[str], *, exact: bool = False, saturate: bool = False
    ) -> dict[str, Tensor]:
        """Chosen intermediate tensors by their ONNX names; integer ones as float32 codes.

        A value that dynamic quantization computes per image has the images as an additional first axis.

        Raises:
            KeyError: the running graph computes no such tensor.
        """
        known = {name for step in self._plan.steps for name in step.outputs}
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise KeyError(f"the {self.source} graph computes no tensor {unknown[0]!r}; see the outputs of its nodes")
        values = self._run(x, tensors, exact=exact, saturate=saturate)
        return {name: values[name] for name in tensors}

    def to_double(self) -> Shadow:
        """The same float graph computing in float64, for gradient checks by finite differences.

        Raises:
            ShadowError: the graph is quantized; its rounding has no finite differences.
        """
        if self.is_quantized:
            raise ShadowError("a quantized shadow can't run in float64: rounding has no derivative to check")
        twin = Shadow(self._plan, source=self.source, dtype=torch.float64, contract=self.contract)
        twin.load_state_dict(self.state_dict())
        return twin

    def _keep(self, index: int, name: str, constant: Constant) -> None:
        value = constant.value
        if value.dtype == torch.float32:
            value = value.to(self._dtype)
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        if constant.initializer is None or constant.element_type != TensorProto.FLOAT:
            self._buffer_names[name] = f"constant{index}"
            self.register_buffer(f"constant{index}", value)
            return
        known = self.parameters_by_initializer.get(constant.initializer)
        if known is None or not torch.equal(known, value):
            known = nn.Parameter(value.clone(memory_format=torch.preserve_format), requires_grad=False)
            self.register_parameter(f"parameter{index}", known)
        self._parameter_of[name] = self.parameters_by_initializer[constant.initializer] = known

    def _run(self, x: Tensor, wanted: Sequence[str], *, exact: bool, saturate: bool) -> dict[str, Tensor]:
        mode = Mode(exact=exact, saturate=saturate, rows=x.shape[0], dtype=self._dtype)
        values: dict[str, Any] = {name: self.get_buffer(key) for name, key in self._buffer_names.items()}
        values.update(self._parameter_of)
        x = x.to(self._dtype)
        x = x if self.contract is None else enter(x, self.contract)
        values[self.input_name] = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        for step in self._plan.steps:
            result = step.kernel(mode, *[values[name] if name else None for name in step.inputs])
            values.update(zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False))
            for name in step.last_uses:
                if name not in wanted:
                    del values[name]
        return values


def _parse(model: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.load_from_string(model)
    except DecodeError as error:
        raise ShadowError("the bytes are no ONNX model; pass the content of an .onnx file") from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise ShadowError("the bytes are no ONNX model: there is no graph in them; pass the content of an .onnx file")
    return proto


def _plan(model: onnx.ModelProto) -> Plan:
    graph = model.graph
    opsets = {plain_domain(entry.domain): entry.version for entry in model.opset_import}
    constants = {tensor.name: _constant(tensor, tensor.name) for tensor in graph.initializer}
    inputs = [value.name for value in graph.input if value.name not in constants]
    outputs = [value.name for value in graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ShadowError(
            f"expected one input and one output, found inputs {inputs} and outputs {outputs}; cut the graph down"
        )
    plan = Plan(inputs[0], outputs[0], constants)
    plan.element_types = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    if plan.element_types[plan.input_name] not in (TensorProto.FLOAT, TensorProto.FLOAT16, *CODE_RANGES):
        raise ShadowError(
            f"input {plan.input_name!r} has element type {_type_name(plan.element_types[plan.input_name])}, "
            "expected float32 or float16 images or integer codes; export the model in float32"
        )
    plan.element_types |= {name: constant.element_type for name, constant in constants.items()}
    built = [step for proto in graph.node if (step := _step(plan, proto, opsets)) is not None]
    if plan.output_name not in plan.element_types:
        raise ShadowError(f"nothing computes the output {plan.output_name!r}; check the file with onnx.checker")
    plan.steps = _with_last_uses(plan, built)
    return plan


def _step(plan: Plan, proto: onnx.NodeProto, opsets: Mapping[str, int]) -> Step | None:
    """The step that runs a node, None for one that is folded into the constants."""
    node = _node(plan, proto, opsets)
    if proto.op_type == "Constant" and node.domain == "":
        plan.constants[proto.output[0]] = _constant_node(node)
        plan.element_types[proto.output[0]] = plan.constants[proto.output[0]].element_type
        return None
    for name in node.inputs:
        if name and name not in plan.constants and name not in plan.element_types:
            raise ShadowError(f"node {node.name!r} reads {name!r}, which nothing before it computes; sort the graph")
    kernel = build_kernel(node)
    _announce(plan, node)
    if node.inputs and all(not name or name in plan.constants for name in node.inputs):
        _fold(plan, node, kernel)
        return None
    live = tuple("" if index in node.folded else name for index, name in enumerate(node.inputs))
    return Step(node, kernel, live, node.outputs, ())


def _node(plan: Plan, proto: onnx.NodeProto, opsets: Mapping[str, int]) -> Node:
    domain = plain_domain(proto.domain)
    inputs = tuple(proto.input)
    return Node(
        name=proto.name or (proto.output[0] if proto.output else ""),
        op_type=proto.op_type,
        domain=domain,
        opset=opsets.get(domain, 1),
        inputs=inputs,
        outputs=tuple(name for name in proto.output if name),
        attributes={attribute.name: helper.get_attribute_value(attribute) for attribute in proto.attribute},
        constants={index: plan.constants[name] for index, name in enumerate(inputs) if name in plan.constants},
        element_types=[plan.element_types.get(name) for name in inputs],
        per_row=[name in plan.per_row for name in inputs],
    )


def _announce(plan: Plan, node: Node) -> None:
    """Tell the plan the types of a node's outputs, and which of them hold one value per image."""
    first = node.element_types[0] if node.element_types else None
    for index, name in enumerate(node.outputs):
        kind = node.emits[index] if index < len(node.emits) else first
        plan.element_types[name] = kind or TensorProto.UNDEFINED
    moving = [flag for index, flag in enumerate(node.per_row) if node.inputs[index] and index not in node.constants]
    flags = node.emits_per_row or (bool(moving) and all(moving),) * len(node.outputs)
    plan.per_row.update(name for name, flag in zip(node.outputs, flags, strict=False) if flag)


@torch.no_grad()
def _fold(plan: Plan, node: Node, kernel: Kernel) -> None:
    """Compute a node of constants once; a dequantized initializer keeps its initializer's name."""
    result = kernel(Mode(), *[plan.constants[name].value if name else None for name in node.inputs])
    origin = plan.constants[node.inputs[0]].initializer if node.op_type in ("DequantizeLinear", "Identity") else None
    for name, value in zip(node.outputs, result if isinstance(result, tuple) else (result,), strict=False):
        plan.constants[name] = Constant(value, plan.element_types[name], origin)


@dataclass(frozen=True)
class Scores:
    """The tensor that the last softmax was given: ``(value - zero_point) * scale`` are logits."""

    name: str
    scale: float = 1.0
    zero_point: float = 0.0


def _scores_before_softmax(plan: Plan) -> Scores | None:
    """What the softmax that gives the output its meaning was given, past what only carries its answer."""
    producers = {name: step for step in plan.steps for name in step.outputs}
    step = producers.get(plan.output_name)
    while step is not None and step.node.op_type in CARRYING and step.inputs:
        step = producers.get(step.inputs[0])
    if step is None or step.node.op_type not in ("Softmax", "QLinearSoftmax"):
        return None
    if step.node.op_type == "Softmax":
        return Scores(step.inputs[0])
    scale, zero_point = (float(plan.constants[name].value) for name in step.node.inputs[1:3])
    return Scores(step.inputs[0], scale, zero_point)


def _with_last_uses(plan: Plan, steps: Sequence[Step]) -> list[Step]:
    seen, finished = {plan.output_name}, []
    for step in reversed(steps):
        free = {name for name in (*step.inputs, *step.outputs) if name and name not in plan.constants} - seen
        seen |= free
        finished.append(Step(step.node, step.kernel, step.inputs, step.outputs, tuple(sorted(free))))
    return finished[::-1]


def _constants_in_use(plan: Plan) -> dict[str, Constant]:
    read = {name for step in plan.steps for name in step.inputs} | {plan.output_name}
    return {name: constant for name, constant in plan.constants.items() if name in read}


def _constant(tensor: TensorProto, initializer: str | None) -> Constant:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ShadowError(
            f"tensor {tensor.name!r} lies in an external file; load it with onnx.load and save the model in one file"
        )
    if tensor.data_type not in _CARRIED and tensor.data_type not in CODE_RANGES:
        raise ShadowError(
            f"tensor {tensor.name!r} has element type {_type_name(tensor.data_type)}, which the shadow can't carry; "
            "export the model in float32"
        )
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise ShadowError(f"tensor {tensor.name!r} can't be read: {error}; check the file with onnx.checker") from error
    if tensor.data_type in CODE_RANGES or tensor.data_type == TensorProto.FLOAT16:
        array = array.astype(np.float32)
    return Constant(torch.from_numpy(np.array(array)), tensor.data_type, initializer)


def _type_name(element_type: int) -> str:
    return (
        TensorProto.DataType.Name(element_type) if element_type in TensorProto.DataType.values() else str(element_type)
    )


def _constant_node(node: Node) -> Constant:
    (name, value), *_ = node.attributes.items()
    if isinstance(value, TensorProto):
        return _constant(value, None)
    kinds = {"value_float": TensorProto.FLOAT, "value_floats": TensorProto.FLOAT,
             "value_int": TensorProto.INT64, "value_ints": TensorProto.INT64}  # fmt: skip
    if name not in kinds:
        raise node.unsupported(f"attribute {name!r} is not covered")
    return Constant(torch.tensor(value, dtype=_TORCH_TYPES[kinds[name]]), kinds[name])


_CARRIED = {
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
}
_TORCH_TYPES = {TensorProto.FLOAT: torch.float32, TensorProto.INT64: torch.int64}
