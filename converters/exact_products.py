"""Exact integer arithmetic on every x86 CPU: products of u8 and s8 codes, rewritten as products of u8 and u8 codes.

Without VNNI, u8 x s8 kernels clip pairs of products to int16; u8 x u8 kernels do not. With ``w' = w + 128`` and
``z' = z + 128`` every sum stays what it is, ``sum (a - za) (w' - z') = sum (a - za) (w - z)``, in integers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.reading import bodies, every_graph, node_label, plain_domain, safe_text, tensor_array

_MICROSOFT = "com.microsoft"
_OFFSET = 128


class UnsupportedArithmeticError(ValueError):
    """An operator multiplies u8 by s8 codes, or may do so, in a way that has no exact form here."""


@dataclass(frozen=True)
class ExactModel:
    """A model without products of u8 and s8 codes, and the labels of the nodes that were rewritten for it."""

    data: bytes
    rewritten: tuple[str, ...]


class _Operands(NamedTuple):
    """Where an operator takes its two operands and their zero points; one without ``left`` quantizes it to u8."""

    left: int | None
    left_zero: int | None
    right: int
    right_zero: int


_PRODUCTS = {
    ("", "ConvInteger"): _Operands(0, 2, 1, 3),
    ("", "MatMulInteger"): _Operands(0, 2, 1, 3),
    ("", "QLinearConv"): _Operands(0, 2, 3, 5),
    ("", "QLinearMatMul"): _Operands(0, 2, 3, 5),
    (_MICROSOFT, "DynamicQuantizeMatMul"): _Operands(None, None, 1, 3),
    (_MICROSOFT, "MatMulIntegerToFloat"): _Operands(0, 4, 1, 5),
    (_MICROSOFT, "QAttention"): _Operands(0, 6, 1, 7),
    (_MICROSOFT, "QGemm"): _Operands(0, 2, 3, 5),
    (_MICROSOFT, "QLinearConv"): _Operands(0, 2, 3, 5),
}
_WITHOUT_EXACT_FORM = frozenset(
    (_MICROSOFT, name) for name in ("DynamicQuantizeLSTM", "QMoE", "QOrderedAttention", "QOrderedMatMul")
)


def exact_model(model: bytes) -> ExactModel:
    """The same model, value for value, in which nothing multiplies u8 by s8 codes; without such a product, its bytes.

    Raises:
        UnsupportedArithmeticError: an operator has no exact form, or the types of its operands are unknown.
    """
    proto = onnx.load_from_string(model)
    rewriting = _Rewriting(proto)
    rewriting.rewrite(proto.graph, {})
    if not rewriting.rewritten:
        return ExactModel(model, ())
    proto.graph.initializer.extend(rewriting.constants.values())
    _drop_replaced(proto.graph, {name for name, *_ in rewriting.constants})
    return ExactModel(proto.SerializeToString(), tuple(rewriting.rewritten))


_Initializers = Mapping[str, TensorProto]
_Constant = tuple[str, str, tuple[int, ...], bytes]
"""Name in the file, type, shape and values."""


class _Rewriting:
    """A model under work: its new constants go to the main graph, whose names are seen in every branch."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.rewritten: list[str] = []
        self.constants: dict[_Constant, TensorProto] = {}
        self._types = _element_types(model)
        self._taken = {name for graph in every_graph(model.graph) for name in _names(graph)}

    def rewrite(self, graph: onnx.GraphProto, outer: _Initializers) -> None:
        """Rewrite the products of a graph and of its branches."""
        visible = {**outer, **{tensor.name: tensor for tensor in graph.initializer}}
        nodes: list[onnx.NodeProto] = []
        for node in graph.node:
            for _, body in bodies(node):
                self.rewrite(body, visible)
            operands = _PRODUCTS.get(_key(node))
            if operands is not None and self._is_mixed(node, operands, visible):
                nodes += self._to_unsigned(node, operands, visible)
                self.rewritten.append(node_label(node))
            nodes.append(node)
        copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
        del graph.node[:]
        graph.node.extend(copies)

    def _is_mixed(self, node: onnx.NodeProto, operands: _Operands, visible: _Initializers) -> bool:
        def type_of(*indices: int | None) -> int | None:
            names = [_input(node, index) for index in indices]
            kinds = [visible[name].data_type if name in visible else self._types.get(name) for name in names if name]
            return next((kind for kind in kinds if kind is not None), None)

        left = TensorProto.UINT8 if operands.left is None else type_of(operands.left_zero, operands.left)
        right = type_of(operands.right_zero, operands.right)
        if left is None or right is None:
            raise _unsupported(node, "multiplies codes of unknown types")
        return left == TensorProto.UINT8 and right == TensorProto.INT8

    def _to_unsigned(self, node: onnx.NodeProto, operands: _Operands, visible: _Initializers) -> list[onnx.NodeProto]:
        """Give the node an u8 right operand; returns the nodes that compute it where it is no constant."""
        added: list[onnx.NodeProto] = []
        node.input.extend([""] * (operands.right_zero + 1 - len(node.input)))
        for index in (operands.right, operands.right_zero):
            name = node.input[index]
            if not name:
                node.input[index] = self._constant("zero_point", np.array(_OFFSET, dtype=np.uint8))
            elif name in visible:
                node.input[index] = self._constant(name, _unsigned(tensor_array(visible[name])))
            else:
                added += self._shift(name)
                node.input[index] = added[-1].output[0]
        return added

    def _constant(self, name: str, value: NDArray[np.generic]) -> str:
        # By value, too: sibling branches may each have a constant of one name, and a file's own may be "zero_point".
        key = (name, value.dtype.str, value.shape, value.tobytes())
        if key not in self.constants:
            self.constants[key] = numpy_helper.from_array(value, self._fresh(name))
        return self.constants[key].name

    def _shift(self, name: str) -> list[onnx.NodeProto]:
        offset = self._constant("offset", np.array(_OFFSET, dtype=np.int32))
        wide, moved, codes = (self._fresh(f"{name}/{part}") for part in ("wide", "moved", "codes"))
        return [
            helper.make_node("Cast", [name], [wide], name=wide, to=TensorProto.INT32),
            helper.make_node("Add", [wide, offset], [moved], name=moved),
            helper.make_node("Cast", [moved], [codes], name=codes, to=TensorProto.UINT8),
        ]

    def _fresh(self, name: str) -> str:
        fresh = f"{name}/u8"
        while fresh in self._taken:
            fresh += "_"
        self._taken.add(fresh)
        return fresh


def _unsigned(codes: NDArray[np.generic]) -> NDArray[np.uint8]:
    moved: NDArray[np.uint8] = (codes.astype(np.int16) + _OFFSET).astype(np.uint8)
    return moved


def _key(node: onnx.NodeProto) -> tuple[str, str]:
    key = (plain_domain(node.domain), node.op_type)
    if key in _WITHOUT_EXACT_FORM:
        raise _unsupported(node, "has no exact form here")
    return key


def _unsupported(node: onnx.NodeProto, why: str) -> UnsupportedArithmeticError:
    domain = plain_domain(node.domain) or "ai.onnx"
    return UnsupportedArithmeticError(
        f"node '{node_label(node)}': operator '{safe_text(node.op_type)}' of domain '{safe_text(domain)}' {why}; judge "
        "the file in as-run arithmetic, on the CPU that it is for"
    )


def _input(node: onnx.NodeProto, index: int | None) -> str:
    return node.input[index] if index is not None and index < len(node.input) else ""


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (tensor.name for tensor in graph.initializer)
    yield from (value.name for value in graph.input)
    for node in graph.node:
        yield from (node.name, *node.output)


def _element_types(model: onnx.ModelProto) -> dict[str, int]:
    """Types of the operands that the main graph computes; ONNX Runtime infers them."""
    wanted = {
        _input(node, index)
        for graph in every_graph(model.graph)
        for node in graph.node
        for index in _PRODUCTS.get((plain_domain(node.domain), node.op_type), ())
    }
    computed = sorted(wanted.intersection(name for node in model.graph.node for name in node.output if name))
    known = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    return {**known, **_inferred(model, computed)} if computed else known


def _inferred(model: onnx.ModelProto, names: Iterable[str]) -> dict[str, int]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    del probe.graph.output[:]
    probe.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    codes = {"tensor(uint8)": TensorProto.UINT8, "tensor(int8)": TensorProto.INT8}
    return {output.name: codes.get(output.type, TensorProto.UNDEFINED) for output in session.get_outputs()}


def _drop_replaced(graph: onnx.GraphProto, replaced: set[str]) -> None:
    """Remove the s8 constants that nothing reads any more; one that is an input's default would leave it required."""
    graphs = list(every_graph(graph))
    used = {name for body in graphs for node in body.node for name in node.input}
    used |= {value.name for body in graphs for value in body.output}
    for body in graphs:
        dropped = [tensor for tensor in body.initializer if tensor.name in replaced - used]
        names = {tensor.name for tensor in dropped}
        for tensor in dropped:
            body.initializer.remove(tensor)
        for value in [value for value in body.input if value.name in names]:
            body.input.remove(value)
