"""Which integer weights can push two neighbouring u8 x s8 products out of int16, on a CPU without VNNI."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from qdefense.converters.flat_graph import Graph, Node
from qdefense.converters.reading import tensor_array
from qdefense.converters.weighted_operators import WEIGHTED, Operand


def can_saturate(graph: Graph, node: Node, activation: Operand, weight: Operand) -> bool:
    """Whether two neighbouring u8 x s8 products of an integer layer can exceed int16.

    Signed activations count too: the runtime turns them into unsigned ones and keeps the weights. ConvInteger and
    depthwise convolutions have kernels of their own, which don't saturate (measured on AVX2), as has MatMulNBits.
    """
    if weight.type != "int8" or node.operator == "ConvInteger" or _is_depthwise(graph, node):
        return False
    if WEIGHTED[node.operator].scale is not None and activation.type == "int8":
        return False
    if weight.constant is None or weight.constant.data_type != TensorProto.INT8:
        # Codes that are computed at run time may be any.
        return True
    codes = tensor_array(weight.constant)
    return codes.size > 0 and _pair_overflows(_reduction_rows(node, codes))


def _is_depthwise(graph: Graph, node: Node) -> bool:
    kind = WEIGHTED[node.operator]
    shape = graph.shape(node.input(kind.weight))
    return kind.family == "conv" and shape is not None and shape[:2] == [node.attribute("group", 1), 1]


def _reduction_rows(node: Node, codes: NDArray[Any]) -> NDArray[Any]:
    """The weights as (outputs, K), K in the order of the kernel's dot product: (kh, kw, cin) or the inner dimension."""
    family = WEIGHTED[node.operator].family
    if family == "conv" and codes.ndim > 2:
        return np.moveaxis(codes, 1, -1).reshape(codes.shape[0], -1)
    if codes.ndim < 2 or (family == "gemm" and node.attribute("transB", 0)):
        return np.atleast_2d(codes).reshape(-1, np.atleast_2d(codes).shape[-1])
    return np.moveaxis(codes, -2, -1).reshape(-1, codes.shape[-2])


def _pair_overflows(rows: NDArray[Any]) -> bool:
    wide = rows.astype(np.int32)
    pairs = np.pad(wide, ((0, 0), (0, wide.shape[1] % 2))).reshape(wide.shape[0], -1, 2)
    highest = np.maximum(pairs, 0).sum(axis=2) * 255
    lowest = np.minimum(pairs, 0).sum(axis=2) * 255
    return bool((highest > 32767).any() or (lowest < -32768).any())
