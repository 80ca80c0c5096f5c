"""MatMulNBits: float activations times packed weights of 2, 4 or 8 bits with a scale for each block of the inputs.

ONNX Runtime makes it of a DequantizeLinear of such weights before a MatMul. At accuracy level 4, which it then sets
unless the session option `session.qdq_matmulnbits_accuracy_level` says otherwise, it also quantizes the activations:
each block of each row to int8 with the scale ``max |a| / 127``. That is emulated here, since it was measured to agree:
within 3e-7 of the largest output, as far as float32 sums of another order go, on AVX2 and on AVX512. A whole network
may differ by more (6e-5 of the largest logit was seen): where a float layer before differs by its last digit, an
activation may cross a rounding boundary here. At levels 0 and 1 nothing is rounded. With float zero points the runtime
leaves the activations alone at every level.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from onnx import TensorProto
from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.registry import MICROSOFT, Kernel, Node, operator
from qdefense.converters.shadow.rounding import value_of

_BYTE = 8
_INT8_ACTIVATIONS = 4
_LARGEST = 127.0


@dataclass(frozen=True)
class _Layout:
    """How the weights of a node lie in their bytes: N rows of blocks, each block a whole number of bytes."""

    rows: int
    depth: int
    block: int
    bits: int

    @property
    def blocks(self) -> int:
        return -(-self.depth // self.block)


@operator("MatMulNBits", MICROSOFT)
def matmul_nbits(node: Node) -> Kernel:
    """``a W^T + bias`` with ``W = (codes - zero_point) * scale`` block by block.

    Raises:
        UnsupportedOperatorError: the weights are computed, reordered (`g_idx`) or prepacked, or have another number of
            bits; or the activations of 2 bit weights are quantized.
    """
    layout = _layout(node)
    weight = _dequantized(node, layout)
    rounds = _rounds(node, layout)

    def kernel(a: Tensor, *rest: Tensor | None) -> Tensor:
        a = _through_int8(a, layout.block) if rounds else a
        return functional.linear(a, weight.to(a.dtype), rest[4] if len(rest) > 4 else None)

    return kernel


def _layout(node: Node) -> _Layout:
    rows, depth, block = (node.integer(name, 0) for name in ("N", "K", "block_size"))
    bits = node.integer("bits", 4)
    if bits not in (2, 4, 8):
        raise node.unsupported(f"attribute 'bits' is {bits}, covered are 2, 4 and 8")
    if min(rows, depth, block) < 1:
        raise node.unsupported(f"'N' {rows}, 'K' {depth} or 'block_size' {block} is not positive")
    node.require("weight_prepacked", 0)
    if node.has(4):
        raise node.unsupported("input 'g_idx' reorders the weights, which is not covered")
    return _Layout(rows, depth, block, bits)


def quantizes_activations(node: Node) -> bool:
    """Whether the node is a MatMulNBits at accuracy level 4 whose zero points, where it has any, are codes."""
    if node.op_type != "MatMulNBits" or node.integer("accuracy_level", 0) != _INT8_ACTIVATIONS:
        return False
    return not node.has(3) or node.element_type(3) == TensorProto.UINT8


def _rounds(node: Node, layout: _Layout) -> bool:
    rounds = quantizes_activations(node)
    if rounds and layout.bits == 2:
        raise node.unsupported(
            "at accuracy level 4 ONNX Runtime quantizes the activations of 2 bit weights for some block sizes only; "
            "pin the session option session.qdq_matmulnbits_accuracy_level to 1"
        )
    return rounds


def _dequantized(node: Node, layout: _Layout) -> Tensor:
    """The weights: (N, K) float32."""
    codes = _unpacked(node.constant(1), layout.bits, layout.rows, layout.blocks * layout.block, node)
    scale = node.constant(2).reshape(layout.rows, layout.blocks)
    zero_point = _zero_points(node, layout)
    centred = codes.reshape(layout.rows, layout.blocks, layout.block) - zero_point.unsqueeze(-1)
    return (centred * scale.unsqueeze(-1)).reshape(layout.rows, -1)[:, : layout.depth].contiguous()


def _zero_points(node: Node, layout: _Layout) -> Tensor:
    """One for each block: (N, blocks), the middle of the range where there are none."""
    given = node.optional_constant(3)
    if given is None:
        return torch.full((layout.rows, layout.blocks), float(2 ** (layout.bits - 1)))
    if node.element_type(3) != TensorProto.UINT8:
        return given.reshape(layout.rows, layout.blocks)
    return _unpacked(given, layout.bits, layout.rows, layout.blocks, node)


def _unpacked(packed: Tensor, bits: int, rows: int, columns: int, node: Node) -> Tensor:
    """Codes of a number of bits from bytes whose low bits come first, each row padded to whole bytes."""
    per_byte = _BYTE // bits
    if packed.numel() != rows * -(-columns // per_byte):
        raise node.unsupported(f"{packed.numel()} bytes are not {rows} rows of {columns} codes of {bits} bits")
    shifts = torch.arange(0, _BYTE, bits, dtype=torch.int32)
    codes: Tensor = packed.reshape(rows, -1, 1).int().bitwise_right_shift(shifts) & (2**bits - 1)
    return codes.reshape(rows, -1)[:, :columns].float()


def _through_int8(a: Tensor, block: int) -> Tensor:
    """The activations, rounded to int8 block by block in value; the gradient goes straight through."""
    with torch.no_grad():
        depth = a.shape[-1]
        blocks = functional.pad(a, (0, -depth % block)).reshape(*a.shape[:-1], -1, block)
        largest = blocks.abs().amax(-1, keepdim=True)
        # the kernels multiply by the reciprocal scale, which rounds otherwise than a division
        codes = (blocks * torch.where(largest == 0, largest, _LARGEST / largest)).round_()
        rounded = (codes * (largest / _LARGEST)).flatten(-2)[..., :depth]
    return value_of(rounded, a)
