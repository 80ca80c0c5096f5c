"""The weights of a file: which initializers hold them, on which grid of codes, and how a trained one is rounded to it.

A weight in training is a float tensor. Each pass rounds it to what the file would hold, with a gradient that runs
straight through inside the range of its codes, so that the pass computes what the file would compute.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters.shadow.code_parameters import expanded
from qdefense.converters.shadow.door import round_half
from qdefense.converters.shadow.plan import Plan
from qdefense.converters.shadow.registry import CODE_RANGES, Constant, Node
from qdefense.converters.shadow.rounding import Range, round_quotient

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE}
_INT32_RANGE = (-(2**31), 2**31 - 1)
_STATISTICS = {("BatchNormalization", 3), ("BatchNormalization", 4)}
_ARITHMETIC = {"Sub", "Div"}
_NO_SCALE = "the graph says no scale of the tensor or its channels"
_BIASED = {"Conv", "ConvTranspose", "Gemm"}


@dataclass(frozen=True)
class Grid:
    """What codes stand for: ``(code - zero_point) * step``.

    Attributes:
        factors: scales whose product is the step; a bias has those of the input and of the weights.
        zero_point: None where it is zero.
        axis: the axis along which scales and zero points run.
        block: entries of that axis that share a scale; 0 where there is one for the whole tensor or per channel.
        limits: smallest and largest code that the file uses.
    """

    factors: tuple[Constant, ...]
    zero_point: Constant | None
    axis: int
    block: int
    limits: Range

    @property
    def step(self) -> Tensor:
        """The product of the scales, in the shape that the file has them."""
        product = self.factors[0].value
        for factor in self.factors[1:]:
            product = product * factor.value
        return product

    @property
    def shift(self) -> Tensor:
        """The zero point, in the shape that the file has it."""
        return torch.zeros(()) if self.zero_point is None else self.zero_point.value

    def laid(self, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Step and zero point, ready to meet a tensor of `shape`; a block of zeros may have the step 0."""
        step = expanded(self.step, shape, self.axis, self.block)
        return step, self.shift if self.zero_point is None else expanded(self.shift, shape, self.axis, self.block)

    def misfit(self, shape: torch.Size) -> str | None:
        """Why these can't be the scales of codes of this shape, None where they can."""
        step = self.step
        if not bool(torch.isfinite(step).all()) or not (self.block or bool(step.all())):
            return "the product of its scales is 0 or not finite"
        try:
            torch.zeros(shape) * self.laid(shape)[0]
        except (RuntimeError, IndexError):
            return f"its scale of shape {tuple(self.step.shape)} doesn't fit"
        return None


@dataclass(frozen=True)
class Weight:
    """One initializer that training may change.

    Attributes:
        initializer: its name.
        tensor: the name of the tensor in the plan, another one in a branch.
        stored: what the file holds, codes or floats.
        grids: the grids of the nodes that read it, equal in value; none where it is held in floats.
        trained: whether training should change it unasked: no statistics, no constants of arithmetic.
    """

    initializer: str
    tensor: str
    stored: Constant
    grids: tuple[Grid, ...]
    trained: bool

    def value(self) -> Tensor:
        """The real numbers that the file holds: float32, float64 where float32 can't tell codes apart."""
        if not self.grids:
            return self.stored.value
        dtype = torch.float64 if self._wide else torch.float32
        codes, shift, step = (each.to(dtype) for each in (self.stored.value, self._laid[1], self._laid[0]))
        return (codes - shift) * step

    def held(self, value: Tensor) -> Tensor:
        """What the file would hold for real numbers, codes or floats, in a tensor with a straight-through gradient."""
        if not self.grids:
            return round_half(value) if self.stored.element_type == TensorProto.FLOAT16 else value
        step, shift = self._divisor, self._laid[1]
        if self._wide:
            return round_quotient(value.double(), step.double(), shift.double(), self.grids[0].limits)
        return round_quotient(value, step, shift, self.grids[0].limits)

    def beyond(self, value: Tensor) -> Tensor:
        """Which numbers lie outside the range of the codes, and are held as its end."""
        if not self.grids:
            return torch.zeros(value.shape, dtype=torch.bool)
        low, high = self.grids[0].limits
        unclipped = (value.double() / self._divisor).round() + self._laid[1]
        return (unclipped < low) | (unclipped > high)

    @property
    def _wide(self) -> bool:
        return self.stored.element_type == TensorProto.INT32

    @cached_property
    def _laid(self) -> tuple[Tensor, Tensor]:
        return self.grids[0].laid(self.stored.value.shape)

    @cached_property
    def _divisor(self) -> Tensor:
        """The step; where it is 0 every code stands for 0, so a number is held as any of them."""
        step = self._laid[0]
        return step.where(step != 0, torch.full_like(step, torch.inf))


@dataclass(frozen=True)
class FollowingBias:
    """A dequantized int32 bias, whose scale is by convention that of the input times that of the weights.

    Attributes:
        initializer: its name.
        weight: that of the weights beside it.
        input_scale: scale of the input.
    """

    initializer: str
    weight: str
    input_scale: Constant


@dataclass(frozen=True)
class Weights:
    """What training may change in a file, and what it may not.

    Attributes:
        trainable: by initializer.
        frozen: why an initializer that looks like a weight is none, by its name.
        biases: the int32 biases that have a scale of their own.
        copied: initializers that a node is given in another form, computed once where nothing is trained: a change
            of the parameter doesn't reach that node then.
    """

    trainable: Mapping[str, Weight]
    frozen: Mapping[str, str]
    biases: tuple[FollowingBias, ...]
    copied: frozenset[str]


@dataclass(frozen=True)
class _Codes:
    """Where a node takes codes, and where it says what they stand for."""

    at: int
    scales: tuple[int, ...]
    zero_point: int | None
    axis: int
    block: int = 0


_BOTH_SIDES = (_Codes(0, (1,), 2, 0), _Codes(3, (4,), 5, 0))
_CODES: Mapping[str, tuple[_Codes, ...]] = {
    "QLinearConv": (_Codes(3, (4,), 5, 0), _Codes(8, (1, 4), None, 0)),
    "QLinearMatMul": (_Codes(3, (4,), 5, -1),),
    "QLinearAdd": _BOTH_SIDES,
    "QLinearMul": _BOTH_SIDES,
    "DynamicQuantizeMatMul": (_Codes(1, (2,), 3, -1),),
    "MatMulIntegerToFloat": (_Codes(1, (3,), 5, -1),),
}
# The scale of their weights stands in a product of scales further down; see `_scale_behind`.
_SUMS = {"ConvInteger": _Codes(1, (), 3, 0), "MatMulInteger": _Codes(1, (), 3, -1)}


def weights_of(plan: Plan, foreign: Collection[str] = ()) -> Weights:
    """The weights among the initializers of a graph, those with a foreign name left out."""
    uses, (grids, misfits) = _uses(plan), _grids(plan)
    parameters = {name for found in grids.values() for grid in found for name in _parameter_names(grid)}
    trainable, frozen = {}, {plan.initializers[name]: reason for name, reason in misfits.items()}
    for name, initializer in plan.initializers.items():
        constant = plan.constants[name]
        if initializer in {*parameters, *frozen, *foreign} or name not in uses:
            continue
        if name in grids and all(_equal(grids[name][0], other) for other in grids[name]):
            trainable[initializer] = Weight(initializer, name, constant, tuple(grids[name]), trained=True)
        elif name in grids:
            frozen[initializer] = "nodes read its codes on different scales"
        elif constant.element_type in _FLOATS and any(index not in node.folded for node, index in uses[name]):
            trained = _is_trained(constant, uses[name])
            trainable[initializer] = Weight(initializer, name, constant, (), trained=trained)
        elif constant.value.is_floating_point() and constant.value.ndim > 1:
            frozen[initializer] = _why_none(*uses[name][0])
    biases = (bias for bias in _biases(plan) if {bias.initializer, bias.weight} <= trainable.keys())
    return Weights(trainable, frozen, tuple(biases), frozenset(_copied(plan)))


def _copied(plan: Plan) -> Iterator[str]:
    for node in plan.nodes:
        made = {plan.constants[name].initializer for name in node.outputs if name in plan.constants}
        for index, constant in node.constants.items():
            name = constant.initializer
            if name is not None and (index in node.folded or (made and name not in made)):
                yield name


def _why_none(node: Node, index: int) -> str:
    return f"node {node.name!r} ({node.op_type}) takes it as input {index}, which is not trained"


def _uses(plan: Plan) -> Mapping[str, Sequence[tuple[Node, int]]]:
    found = defaultdict(list)
    for node in plan.nodes:
        for index, name in enumerate(node.inputs):
            found[name].append((node, index))
    return found


def _is_trained(constant: Constant, uses: Sequence[tuple[Node, int]]) -> bool:
    """No scalar, no statistics of a normalisation, and nothing that images or features are shifted or divided by."""
    return constant.value.ndim > 0 and not any(
        (node.op_type, index) in _STATISTICS or node.op_type in _ARITHMETIC for node, index in uses
    )


def _parameter_names(grid: Grid) -> Iterator[str]:
    for constant in (*grid.factors, grid.zero_point):
        if constant is not None and constant.initializer is not None:
            yield constant.initializer


def _grids(plan: Plan) -> tuple[dict[str, list[Grid]], dict[str, str]]:
    """By the tensor's name, the grids of its codes; and why what nodes say of others is no grid."""
    grids, misfits = defaultdict(list), {}
    for node in plan.nodes:
        for codes, factors in _codes_of(plan, node):
            name = node.inputs[codes.at] if node.has(codes.at) else ""
            if name not in plan.initializers:
                continue
            held = node.constants[codes.at]
            grid = _grid(node, codes, held, factors)
            reason = (
                grid.misfit(held.value.shape)
                if grid.factors
                else "the graph says no scale of the tensor or its channels"
            )
            if reason is None:
                grids[name].append(grid)
            else:
                misfits[name] = f"node {node.name!r} ({node.op_type}): {reason}"
    return grids, misfits


def _codes_of(plan: Plan, node: Node) -> Iterator[tuple[_Codes, tuple[Constant, ...]]]:
    """Where a node takes codes, with the factors of their step."""
    known = node.constants
    if node.op_type in _SUMS and 1 in known:
        scale = _scale_behind(plan, node)
        # the scale meets the sums, whose channels are their second axis or their last
        place = known[1].value.ndim - 1 if node.op_type == "ConvInteger" else 1
        yield _SUMS[node.op_type], (scale,) if scale is not None and _lies_at(scale.value, place) else ()
    for codes in _direct(node):
        if all(index in known for index in codes.scales):
            yield codes, tuple(known[index] for index in codes.scales)


def _direct(node: Node) -> Sequence[_Codes]:
    if node.op_type == "DequantizeLinear":
        return (_Codes(0, (1,), 2, node.integer("axis", 1), node.integer("block_size", 0)),)
    if node.op_type == "QGemm":
        axis = 0 if node.integer("transB", 0) else 1
        return (_Codes(3, (4,), 5, axis), _Codes(6, (1, 4), None, -1))
    return _CODES.get(node.op_type, ())


def _grid(node: Node, codes: _Codes, held: Constant, factors: tuple[Constant, ...]) -> Grid:
    zero_point = None if codes.zero_point is None else node.constants.get(codes.zero_point)
    if node.op_type == "QGemm" and codes.at == 6 and node.number("alpha", 1.0) != 1:
        factors = (*factors, Constant(torch.tensor(node.number("alpha", 1.0)), TensorProto.FLOAT))
    return Grid(factors, zero_point, codes.axis, codes.block, _range_in_use(held, zero_point))


def _range_in_use(held: Constant, zero_point: Constant | None) -> Range:
    """The range that the quantizer chose: 7 bits where it left one to avoid saturation, symmetric where it is.

    A quantizer's rule reaches the end of its range, so codes that end at exactly 64 or 127 tell of it.
    """
    kind, shift = held.element_type, torch.zeros(1) if zero_point is None else zero_point.value
    if kind not in CODE_RANGES:
        return _INT32_RANGE
    low, high = CODE_RANGES[kind]
    reached = torch.cat([held.value.reshape(-1), shift.reshape(-1)])
    lowest, highest = int(reached.min()), int(reached.max())
    if low < 0 and not bool(shift.any()) and lowest > low:
        seven_bits = kind == TensorProto.INT8 and max(-lowest, highest) == 64
        return (-64, 64) if seven_bits else (-high, high)
    return (0, 127) if kind == TensorProto.UINT8 and highest == 127 else (low, high)


def _biases(plan: Plan) -> Iterator[FollowingBias]:
    dequantized = {node.outputs[0]: node for node in plan.nodes if node.op_type == "DequantizeLinear"}
    for node in plan.nodes:
        before = [dequantized.get(name) for name in node.inputs[:3]]
        if node.op_type not in _BIASED or len(before) < 3:
            continue
        x, weight, bias = before
        if x is None or weight is None or bias is None or 1 not in x.constants:
            continue
        if bias.element_type(0) == TensorProto.INT32:
            own, beside = (plan.initializers.get(part.inputs[0], "") for part in (bias, weight))
            yield FollowingBias(own, beside, x.constants[1])


def _equal(a: Grid, b: Grid) -> bool:
    same_axes = (a.axis, a.block, a.limits) == (b.axis, b.block, b.limits)
    return same_axes and torch.equal(a.step, b.step) and torch.equal(a.shift.reshape(-1), b.shift.reshape(-1))


def _scale_behind(plan: Plan, node: Node) -> Constant | None:
    """The weights' scale of dynamic quantization: ``Cast(sums) * (scale of the input * scale of the weights)``."""
    sums = _only_reader(plan, node.outputs[0], "Cast")
    product = _only_reader(plan, sums.outputs[0], "Mul") if sums is not None else None
    if sums is None or product is None:
        return None
    other = next((name for name in product.inputs if name != sums.outputs[0]), "")
    scales = next((found for found in plan.nodes if other in found.outputs and found.op_type == "Mul"), None)
    if scales is None or len(scales.constants) != 1 or not any(scales.per_row):
        return None
    ((index, constant),) = scales.constants.items()
    return constant if constant.initializer == scales.inputs[index] else None


def _lies_at(scale: Tensor, place: int) -> bool:
    """Whether a scale is one for all, or runs along one axis, counted from the last."""
    return scale.numel() == 1 or (scale.ndim >= place and scale.shape[-place] == scale.numel())


def _only_reader(plan: Plan, name: str, op_type: str) -> Node | None:
    readers = [node for node in plan.nodes if name in node.inputs]
    return readers[0] if len(readers) == 1 and readers[0].op_type == op_type else None
