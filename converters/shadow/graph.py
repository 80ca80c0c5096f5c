"""From the bytes of an ONNX file to a differentiable module that computes what the file computes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import torch
from google.protobuf.message import DecodeError
from onnx import TensorProto
from torch import Tensor, nn

from qdefense.converters.contract import CARRYING, InputContract
from qdefense.converters.narrowing import narrowed
from qdefense.converters.runtime_graph import GraphOptions, RuntimeGraphError, optimized_model
from qdefense.converters.shadow import (  # noqa: F401
    activations,
    casting,
    code_operators,
    comparisons,
    convolutions,
    elementwise,
    fused_operators,
    generators,
    indexing,
    linear_quantizers,
    nbit_operators,
    normalizations,
    padding,
    poolings,
    product_operators,
    products,
    reductions,
    resizing,
    shape_operators,
)
from qdefense.converters.shadow.constants import type_name
from qdefense.converters.shadow.door import enter, read_answers
from qdefense.converters.shadow.local_functions import without_functions
from qdefense.converters.shadow.nbit_operators import quantizes_activations
from qdefense.converters.shadow.plan import Plan, plan_graph
from qdefense.converters.shadow.registry import CODE_RANGES, Constant, Mode, ShadowError, UnsupportedOperatorError
from qdefense.converters.shadow.weights import Weight, Weights, weights_of

Source = Literal["optimized", "shipped"]
Quantization = Literal["float", "static", "dynamic"]

_DYNAMIC = {"DynamicQuantizeLinear", "DynamicQuantizeMatMul"}
_STATIC = {"QuantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm"}


def build_shadow(
    model: bytes,
    *,
    source: Source,
    contract: InputContract | None = None,
    options: GraphOptions | None = None,
    trainable: bool = False,
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
        trainable: of the shipped graph, every weight becomes a float parameter that each pass rounds to what the
            file would hold: quantization-aware training, for `write_back`. Slower than a shadow of constants.

    Raises:
        ValueError: an unknown source, or the optimized graph is to be trained.
        RuntimeGraphError: ONNX Runtime refused the file ("optimized" only).
        UnsupportedArithmeticError: the options ask for exact arithmetic, and the optimized graph has no exact form.
        ShadowError: the bytes are no self-contained ONNX model with one input and one output.
        UnsupportedOperatorError: an operator of the graph, or a use of one, has no registered function.
    """
    if source not in ("optimized", "shipped"):
        raise ValueError(f"source is {source!r}, expected 'optimized' or 'shipped'")
    if trainable and source != "shipped":
        raise ValueError("the optimized graph is the runtime's own and can't be written back; train source='shipped'")
    data = model if contract is None else narrowed(model, contract)
    proto = _parse(_optimized(data, options) if source == "optimized" else data)
    plan, weights = _classifier_plan(proto), None
    if trainable:
        weights = weights_of(plan, () if contract is None else contract.fixed_inputs)
        plan = plan_graph(proto, live=[weight.tensor for weight in weights.trainable.values()])
    shadow = Shadow(plan, source=source, contract=contract, weights=weights)
    shadow.file_sha256 = hashlib.sha256(model).hexdigest()
    if contract is not None and contract.batch is not None:
        _try_free_batch(shadow, contract)
    return shadow


def file_weights(model: bytes, contract: InputContract | None = None) -> Weights:
    """The weights that a file holds, as a trainable shadow of it has them.

    Raises:
        ShadowError: see `build_shadow`.
    """
    data = model if contract is None else narrowed(model, contract)
    return weights_of(_classifier_plan(_parse(data)), () if contract is None else contract.fixed_inputs)


@torch.no_grad()
def _try_free_batch(shadow: Shadow, contract: InputContract) -> None:
    rows = contract.batch + 1 if contract.batch else 2
    try:
        answers = shadow(torch.zeros(rows, 3, contract.height, contract.width))
    except (RuntimeError, ValueError, IndexError) as error:
        answers = None
        why = f": {str(error).splitlines()[0][:400]}"
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
            the file holds as integers appears dequantized, under the name of the integer initializer. Biases of
            32 bits are float64 in a trainable shadow, since float32 can't tell their codes apart.
        trainable: whether these are all the weights, and each pass rounds them to what the file would hold. Scalars,
            statistics of a BatchNormalization and operands of Sub and Div are among them with `requires_grad` off.
        frozen: of a trainable shadow, why an initializer that looks like a weight is not among them, by its name.
        file_sha256: digest of the file's bytes, "" for a module that was built otherwise.
    """

    file_sha256: str = ""

    def __init__(
        self,
        plan: Plan,
        *,
        source: Source,
        dtype: torch.dtype = torch.float32,
        contract: InputContract | None = None,
        weights: Weights | None = None,
    ) -> None:
        super().__init__()
        self.source, self.contract, self.trainable = source, contract, weights is not None
        self._scores = _scores_before_softmax(plan) if contract is not None and contract.head == "softmax" else None
        (self.input_name,), (self.output_name,) = plan.inputs, plan.outputs
        self.node_names = tuple(step.node.name for step in plan.steps)
        self.tensor_names = tuple(name for step in plan.steps for name in step.outputs if name)
        self.operators = tuple(step.node.op_type for step in plan.steps)
        self._plan, self._dtype = plan, dtype
        self._buffer_names: dict[str, str] = {}
        self.parameters_by_initializer: dict[str, nn.Parameter] = {}
        self._parameter_of: dict[str, nn.Parameter] = {}
        for index, (name, constant) in enumerate(plan.constants_in_use().items()):
            self._keep(index, name, constant)
        self._weights: Mapping[str, Weight] = {} if weights is None else weights.trainable
        self.frozen: Mapping[str, str] = {} if weights is None else weights.frozen
        for index, weight in enumerate(self._weights.values()):
            self._train(index, weight)

    @property
    def quantization(self) -> Quantization:
        """Whether the graph is "float", or quantized with "static" or "dynamic" scales."""
        if _DYNAMIC.intersection(self.operators) or any(quantizes_activations(step.node) for step in self._plan.steps):
            return "dynamic"
        return "static" if _STATIC.intersection(self.operators) else "float"

    @property
    def is_quantized(self) -> bool:
        """Whether any activation is rounded to integer codes."""
        return self.quantization != "float"

    def forward(self, x: Tensor, *, exact: bool = False, saturate: bool = False, group: int = 1) -> Tensor:
        """The logits.

        Args:
            x: (N, 3, H, W) float32 in [0, 1], RGB; without a contract whatever the file takes.
            exact: accumulate integer sums so that no value is rounded where the runtime's isn't; slower on wide
                layers. Without it this is the gradient path: float32 sums, equal unless they pass 2 ** 24.
            saturate: reproduce, in value, the int16 pair saturation of u8 x s8 kernels without VNNI; no gradient
                runs through the clipped part. Slow.
            group: the batch at which the runtime would be run over these images, in order: so many images share each
                scale of dynamic quantization, the last ones may be fewer. It changes nothing else.

        Returns:
            (N, K) float32, float64 from a module made by `to_double`.

        Raises:
            ValueError: the group is less than one image.
        """
        scores = self._scores
        values = self._run(x, () if scores is None else (scores.name,), exact=exact, saturate=saturate, group=group)
        answers: Tensor = values[self.output_name]
        if self.contract is None:
            return answers
        logits = None if scores is None else (values[scores.name] - scores.zero_point) * scores.scale
        return read_answers(answers, logits, self.contract)

    def activations(
        self, x: Tensor, tensors: Sequence[str], *, exact: bool = False, saturate: bool = False, group: int = 1
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
        values = self._run(x, tensors, exact=exact, saturate=saturate, group=group)
        return {name: values[name] for name in tensors}

    def to_double(self) -> Shadow:
        """The same float graph computing in float64, for gradient checks by finite differences.

        Raises:
            ShadowError: the graph is quantized; its rounding has no finite differences. Or it is being trained.
        """
        if self.trainable:
            raise ShadowError("a trainable shadow can't run in float64; build one that is not, with source='shipped'")
        if self.is_quantized:
            raise ShadowError("a quantized shadow can't run in float64: rounding has no derivative to check")
        twin = Shadow(self._plan, source=self.source, dtype=torch.float64, contract=self.contract)
        twin.load_state_dict(self.state_dict())
        return twin

    def _keep(self, index: int, name: str, constant: Constant) -> None:
        value = constant.value
        if value.dtype == torch.float32:
            value = value.to(self._dtype)
        # what a folded node only expanded has no memory of its own for each element, which a copy needs
        layout = torch.channels_last if value.ndim == 4 else torch.contiguous_format
        value = value.contiguous(memory_format=layout)
        if self.trainable or constant.initializer is None or constant.element_type != TensorProto.FLOAT:
            self._buffer_names[name] = f"constant{index}"
            self.register_buffer(f"constant{index}", value)
            return
        known = self.parameters_by_initializer.get(constant.initializer)
        if known is None or not torch.equal(known, value):
            known = nn.Parameter(value.clone(memory_format=torch.preserve_format), requires_grad=False)
            self.register_parameter(f"parameter{index}", known)
        self._parameter_of[name] = self.parameters_by_initializer[constant.initializer] = known

    def _train(self, index: int, weight: Weight) -> None:
        value = weight.value()
        if value.ndim == 4:
            value = value.contiguous(memory_format=torch.channels_last)
        parameter = nn.Parameter(value.clone(memory_format=torch.preserve_format), requires_grad=weight.trained)
        self.register_parameter(f"weight{index}", parameter)
        self.parameters_by_initializer[weight.initializer] = parameter

    def _run(self, x: Tensor, wanted: Sequence[str], *, exact: bool, saturate: bool, group: int) -> dict[str, Tensor]:
        if group < 1:
            raise ValueError(f"group is {group}, expected the runtime's batch, at least 1")
        mode = Mode(exact=exact, saturate=saturate, rows=x.shape[0], group=group, dtype=self._dtype)
        values: dict[str, Any] = {name: self.get_buffer(key) for name, key in self._buffer_names.items()}
        values.update(self._parameter_of)
        parameters = self.parameters_by_initializer
        values.update((weight.tensor, weight.held(parameters[name])) for name, weight in self._weights.items())
        x = x.to(self._dtype)
        x = x if self.contract is None else enter(x, self.contract)
        values[self.input_name] = x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x
        return self._plan.run(values, mode, wanted)


def _optimized(data: bytes, options: GraphOptions | None) -> bytes:
    """The graph that ONNX Runtime runs; where it refuses the file, what the shipped graph's plan says is added."""
    try:
        return optimized_model(data, options)
    except RuntimeGraphError as error:
        try:
            _classifier_plan(_parse(data))
        except UnsupportedOperatorError:
            raise error from None
        except ShadowError as found:
            raise RuntimeGraphError(f"{error}; {found}") from error
        raise


def _parse(model: bytes) -> onnx.ModelProto:
    try:
        proto = onnx.load_from_string(model)
    except DecodeError as error:
        raise ShadowError("the bytes are no ONNX model; pass the content of an .onnx file") from error
    if not proto.HasField("graph") or not proto.graph.output:
        raise ShadowError("the bytes are no ONNX model: there is no graph in them; pass the content of an .onnx file")
    return without_functions(proto)


def _classifier_plan(model: onnx.ModelProto) -> Plan:
    """The plan of a graph that takes one tensor and gives one."""
    known = {tensor.name for tensor in model.graph.initializer}
    inputs = [value.name for value in model.graph.input if value.name not in known]
    outputs = [value.name for value in model.graph.output]
    if len(inputs) != 1 or len(outputs) != 1:
        raise ShadowError(
            f"expected one input and one output, found inputs {inputs} and outputs {outputs}; cut the graph down"
        )
    kinds = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    if kinds[inputs[0]] not in (TensorProto.FLOAT, TensorProto.FLOAT16, *CODE_RANGES):
        raise ShadowError(
            f"input {inputs[0]!r} has element type {type_name(kinds[inputs[0]])}, expected float32 or float16 images "
            "or integer codes; export the model in float32"
        )
    return plan_graph(model)


@dataclass(frozen=True)
class Scores:
    """The tensor that the last softmax was given: ``(value - zero_point) * scale`` are logits."""

    name: str
    scale: float = 1.0
    zero_point: float = 0.0


def _scores_before_softmax(plan: Plan) -> Scores | None:
    """What the softmax that gives the output its meaning was given, past what only carries its answer."""
    producers = {name: step for step in plan.steps for name in step.outputs}
    step = producers.get(plan.outputs[0])
    while step is not None and step.node.op_type in CARRYING and step.inputs:
        step = producers.get(step.inputs[0])
    if step is None or step.node.op_type not in ("Softmax", "QLinearSoftmax"):
        return None
    if step.node.op_type == "Softmax":
        return Scores(step.inputs[0])
    scale, zero_point = (float(plan.constants[name].value) for name in step.node.inputs[1:3])
    return Scores(step.inputs[0], scale, zero_point)
