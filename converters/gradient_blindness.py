"""Why an operator on the pixels' way passes no useful gradient: by its kind, its types or its attributes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from onnx import TensorProto

from qdefense.converters.flat_graph import FLOATS, Graph, Node, Value, type_name
from qdefense.converters.weighted_operators import BYTES

if TYPE_CHECKING:
    from qdefense.converters.data_flow import Flow

_COMPARE, _LOGIC, _INDEX, _STEP = (
    "compares",
    "combines truth values or bits",
    "answers with an index",
    "is a step function",
)

_WHOLE = "computes in whole numbers, which round or wrap around"

_SELECT, _AT = (
    "chooses by a condition that depends on the image",
    "reads or writes at a place that depends on the image",
)

_BRANCH = "branches or iterates on the image"

BLIND_INPUTS: dict[str, tuple[str, tuple[int, ...] | None]] = {
    **dict.fromkeys(("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"), (_COMPARE, None)),
    **dict.fromkeys(("IsAllFinite", "IsInf", "IsNaN"), (_COMPARE, None)),
    **dict.fromkeys(("And", "Not", "Or", "Xor"), (_LOGIC, None)),
    **dict.fromkeys(("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor"), (_LOGIC, None)),
    **dict.fromkeys(("BitCast", "MurmurHash3", "NGramHashMapping", "VarlenNGramHashMapping"), (_LOGIC, None)),
    **dict.fromkeys(("ArgMax", "ArgMin", "NonMaxSuppression", "NonZero", "Unique"), (_INDEX, None)),
    **dict.fromkeys(("BeamSearch", "BifurcationDetector", "DynamicTimeWarping", "GreedySearch"), (_INDEX, None)),
    **dict.fromkeys(("PackedSparseAttentionIndexer", "Sampling", "SparseAttentionIndexer"), (_INDEX, None)),
    "WhisperBeamSearch": (_INDEX, None),
    **dict.fromkeys(("Ceil", "Floor", "Hardmax", "Mod", "Round", "Sign"), (_STEP, None)),
    **dict.fromkeys(("Bernoulli", "Binarizer", "Multinomial", "Shrink", "ThresholdedRelu"), (_STEP, None)),
    **dict.fromkeys(("QLinearWhere", "Where", "If"), (_SELECT, (0,))),
    **dict.fromkeys(("Loop", "Scan"), (_BRANCH, None)),
    **dict.fromkeys(("Compress", "Gather", "GatherElements", "GatherND", "MaxUnpool"), (_AT, (1,))),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND", "SequenceAt", "Tile", "Trilu"), (_AT, (1,))),
    **dict.fromkeys(("ExpandDims", "GatherBlockQuantized", "TorchEmbedding", "Upsample"), (_AT, (1,))),
    **dict.fromkeys(("MaxRoiPool", "MaxpoolWithMask", "ReverseSequence", "Split"), (_AT, (1,))),
    **dict.fromkeys(("CropAndResize", "Resize", "RoiAlign"), (_AT, (1, 2, 3))),
    "TensorScatter": (_AT, (2,)),
    **dict.fromkeys(("ConstantOfShape", "OneHot"), (_AT, (0,))),
    **dict.fromkeys(("Expand", "Reshape"), (_AT, (1,))),
    "Pad": (_AT, (1, 3)),
    "Range": (_AT, None),
    "Slice": (_AT, (1, 2, 3, 4)),
    "TopK": (_AT, (1,)),
}
"""Operators without a useful gradient, why, and the inputs that matter (None: any)."""

BLIND_OUTPUTS = {"Dropout": 1, "TopK": 1, "MaxPool": 1}
_WRAPPING = frozenset(
    {
        *("Abs", "Add", "CumSum", "Div", "Einsum", "Gemm", "MatMul", "Mean", "Mul", "Neg", "Pow", "Sub", "Sum"),
        *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMean", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
    }
)
"""Arithmetic that rounds or wraps around in whole numbers.

Pixels may be bytes without any cast, and the sums of integer kernels are; a cast is reported itself.
"""
_INTEGERS = BYTES | {"int16", "int32", "int64", "uint16", "uint32", "uint64"}
_SMOOTH_ML_OPERATORS = frozenset({"FeatureVectorizer", "LinearRegressor", "Normalizer", "Scaler"})


def blindness(graph: Graph, node: Node, flow: Flow) -> str | None:
    """Why no useful gradient passes the node on the pixels' way, or None."""
    given = [value for value in (*node.inputs, *node.inner) if value in flow.data]
    if not given:
        return None
    if reason := _own_blindness(graph, node, given, flow):
        return reason
    index = BLIND_OUTPUTS.get(node.operator, len(node.outputs))
    if any(out in flow.live for out in node.outputs[index : index + 1]):
        return _INDEX
    reason, positions = BLIND_INPUTS.get(node.operator, (None, None))
    if positions is None or any(node.input(position) in flow.data for position in positions):
        return reason
    return None


def _own_blindness(graph: Graph, node: Node, given: list[Value], flow: Flow) -> str | None:
    """The reason that lies in an attribute or a type rather than in the operator."""
    if node.domain == "ai.onnx.ml" and node.operator not in _SMOOTH_ML_OPERATORS:
        return "has no gradient"
    if node.operator in ("Cast", "CastLike") and _cast_target(graph, node) not in FLOATS:
        return "casts to integer or bool"
    if node.operator in _WRAPPING and any(graph.type(value) in _INTEGERS for value in given):
        return _WHOLE
    if node.operator == "GridSample" and node.input(1) in flow.data and _is_nearest(node):
        return _AT
    return None


def _is_nearest(node: Node) -> bool:
    return any(attribute.name == "mode" and attribute.s == b"nearest" for attribute in node.proto.attribute)


def _cast_target(graph: Graph, node: Node) -> str | None:
    if node.operator == "CastLike":
        return graph.type(node.input(1))
    return type_name(node.attribute("to", TensorProto.UNDEFINED))
