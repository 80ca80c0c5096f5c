"""The order in which ONNX Runtime's float kernels add: what an exact pass follows, so that a Quantize rounds alike.

Float sums depend on their order in the last bit. A bit is nothing to a logit, and everything to a value that lies on a
rounding boundary of the Quantize after it. The order of convolutions (at the optimization level "all"), of
BatchNormalization and of LayerNormalization was found by experiment, bit for bit, on x86-64 with ONNX Runtime 1.32;
elsewhere, and for other shapes, a pass computes as torch does.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import torch
from onnx import helper
from torch import Tensor

from qdefense.converters.lone_operator import run_alone
from qdefense.converters.shadow.windows import Window, slid

_BLOCKS = (16, 8)
_POINTWISE_CHANNELS = 128
_CHANNELS_ALIGNED = 4
_LANES = 8
_QUAD = 4
_STRIDE = 128
_LEAST_COLUMNS = 16
_LONGEST_CHAIN = 384
_ROWS_OF_A_CHAIN = 64
_LARGEST_EXPANSION = 2**24


def convolve_in_order(
    x: Tensor, weight: Tensor, bias: Tensor | None, sliding: Window, groups: int, *, stored: bool
) -> Tensor | None:
    """The convolution of `x`: (N, C, H, W) float32, its products added as the runtime does; None where that is unknown.

    A weight that is `stored` as an initializer of the running graph is laid out in blocks of channels by the runtime;
    one that a node of the graph computes, a DequantizeLinear, is multiplied as a matrix.
    """
    if x.ndim != 4 or x.dtype != torch.float32:
        return None
    y = (_blocked if stored else _expanded)(x, weight, sliding, groups)
    return y if y is None or bias is None else y + bias.reshape(-1, 1, 1)


def _convolved(tensors: dict[str, Tensor], given: tuple[str, ...]) -> Tensor:
    """What the runtime answers; tensors that are not `given` at run time are stored in the graph."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    node = helper.make_node("Conv", ["x", "weight"], ["y"], pads=[1, 1, 1, 1])
    stored = {name: array for name, array in arrays.items() if name not in given}
    return torch.from_numpy(run_alone(node, {name: arrays[name] for name in given}, stored))


def _probe_tensors(channels: int) -> dict[str, Tensor]:
    draw = np.random.default_rng(0)
    shapes = {"x": (2, channels, 6, 6), "weight": (32, channels, 3, 3)}
    return {name: torch.from_numpy(draw.normal(size=shape).astype(np.float32)) for name, shape in shapes.items()}


_PROBE_WINDOW = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET")


@cache
def channel_block() -> int | None:
    """How many input channels a convolution of this CPU adds up before it adds the sum to those of the others.

    Measured: 16 with AVX-512, 8 with AVX2; None where no such order gives the runtime's bits.
    """
    tensors = _probe_tensors(32)
    measured = _convolved(tensors, ("x",))
    found = (
        block
        for block in _BLOCKS
        if torch.equal(_in_parts(tensors["x"], tensors["weight"], _PROBE_WINDOW, 1, block), measured)
    )
    return next(found, None)


@cache
def adds_in_chains() -> bool:
    """Whether torch's matrix product, chained as `_chain` does, gives the runtime's bits: measured on this CPU."""
    tensors = _probe_tensors(64)
    return torch.equal(
        _as_product(tensors["x"], tensors["weight"], _PROBE_WINDOW, 1), _convolved(tensors, ("x", "weight"))
    )


def _blocked(x: Tensor, weight: Tensor, sliding: Window, groups: int) -> Tensor | None:
    size = _channels_at_once(weight, sliding, groups)
    if size is None or (sliding.kernel == (1, 1) and not _is_matrix_product(x, weight, sliding, groups)):
        return None
    return _in_parts(x, weight, sliding, groups, size)


def _is_matrix_product(x: Tensor, weight: Tensor, sliding: Window, groups: int) -> bool:
    """Whether torch adds a kernel of one cell as it adds larger ones: not in products of a vector, or few columns."""
    return groups == 1 and len(weight) > 1 and math.prod(_positions(x, sliding)) >= _BLOCKS[0]


def _channels_at_once(weight: Tensor, sliding: Window, groups: int) -> int | None:
    block, (outputs, channels) = channel_block(), weight.shape[:2]
    if block is None:
        return None
    if groups > 1:
        depthwise = channels == 1 and outputs == groups and groups % block == 0
        blocked = channels % block == 0 and (outputs // groups) % block == 0
        return block if depthwise or blocked else None
    if channels < block:
        return 1
    if channels % _CHANNELS_ALIGNED:
        return None
    pointwise = sliding.kernel == (1, 1) and sliding.auto_pad in ("NOTSET", "VALID") and not any(sliding.pads)
    return _POINTWISE_CHANNELS if pointwise else block


def _in_parts(x: Tensor, weight: Tensor, sliding: Window, groups: int, size: int) -> Tensor:
    """The products of `size` channels are added in one chain, then the sums of the channels' parts."""
    if len(x) == 1:  # torch has another kernel for one image alone, which adds in another order
        return _in_parts(x.expand(2, -1, -1, -1), weight, sliding, groups, size)[:1]
    x = sliding.padding(x.shape[2:]).apply(x)
    grouped = x.reshape(len(x), groups, weight.shape[1], *x.shape[2:])
    parts = []
    for first in range(0, weight.shape[1], size):
        # with channels last, or with a bias, torch has other kernels, which add in another order
        channels = grouped[:, :, first : first + size].flatten(1, 2).contiguous()
        kernel = weight[:, first : first + size].contiguous()
        parts.append(
            torch.convolution(channels, kernel, None, sliding.strides, (0, 0), sliding.dilations, False, (0,), groups)
        )
    return _added(parts)


def _added(parts: list[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _expanded(x: Tensor, weight: Tensor, sliding: Window, groups: int) -> Tensor | None:
    one_row = len(weight) == groups and weight.shape[1] > 1
    one_column = max(_positions(x, sliding)) == 1
    known = adds_in_chains() and not one_row and not one_column  # a vector's product is added in yet another order
    return _as_product(x, weight, sliding, groups) if known else None


def _positions(x: Tensor, sliding: Window) -> tuple[int, ...]:
    sizes = x.shape[2:]
    return sliding.outputs(sizes, sliding.padding(sizes))


def _as_product(x: Tensor, weight: Tensor, sliding: Window, groups: int) -> Tensor:
    """The weight's matrix times the image's windows, one group of a few images at a time."""
    sizes = _positions(x, sliding)
    x = sliding.padding(x.shape[2:]).apply(x)
    depth, columns = weight[0].numel(), sizes[0] * sizes[1]
    images = max(1, _LARGEST_EXPANSION // (depth * columns))
    matrices = weight.flatten(1).chunk(groups)
    rows = []
    for part in torch.split(x, images):
        windows = [_windows(group, sliding) for group in part.contiguous().chunk(groups, 1)]
        sums = torch.cat([_product(*pair, columns) for pair in zip(matrices, windows, strict=True)])
        rows.append(sums.reshape(len(weight), len(part), columns).movedim(1, 0))
    return torch.cat(rows).reshape(len(x), len(weight), *sizes)


def _windows(x: Tensor, sliding: Window) -> Tensor:
    """What each place of padded images sees: (C kh kw, N oh ow)."""
    seen = slid(x, sliding).permute(1, 4, 5, 0, 2, 3)
    return seen.reshape(math.prod(seen.shape[:3]), -1)


def _product(matrix: Tensor, windows: Tensor, columns: int) -> Tensor:
    """(O, K) times (K, N L) of N images with L = `columns` places, `_depth_at_once` products of a sum added as one."""
    depth = _depth_at_once(columns, matrix.shape[1])
    pairs = zip(torch.split(matrix, depth, 1), torch.split(windows, depth), strict=True)
    chained = _quads if len(matrix) == 1 and matrix.shape[1] % _QUAD <= 1 else _chain
    return _added([chained(left, right) for left, right in pairs])


def _depth_at_once(columns: int, depth: int) -> int:
    """How many products of a sum the runtime's matrix product takes at a time: its panels hold 128 x 128 values."""
    size, width = _STRIDE, _STRIDE
    if columns >= depth:
        while size // 2 >= depth:
            size //= 2
        return size
    while width > _LEAST_COLUMNS and width // 2 >= columns:
        width //= 2
        size *= 2
    return size


def _quads(row: Tensor, columns: Tensor) -> Tensor:
    """(1, K) times (K, L): four products are added, then their sum to those before. A last one stands alone."""
    products = row.t() * columns
    return _added([_added(list(four)) for four in torch.split(products, _QUAD)]).unsqueeze(0)


def _chain(matrix: Tensor, columns: Tensor) -> Tensor:
    """(O, K) times (K, L), each sum one chain of fused multiply-adds from the first product to the last.

    torch's product is such a chain up to a length; a longer one goes on from the sums so far, which come first in the
    next product, times the identity.
    """
    return torch.cat([_chain_of_rows(rows, columns) for rows in torch.split(matrix, _ROWS_OF_A_CHAIN)])


def _chain_of_rows(matrix: Tensor, columns: Tensor) -> Tensor:
    length = _LONGEST_CHAIN - len(matrix)
    pairs = zip(torch.split(matrix, length, 1), torch.split(columns, length), strict=True)
    left, right = next(pairs)
    total = left.contiguous() @ right.contiguous()
    for left, right in pairs:
        total = torch.cat([torch.eye(len(matrix)), left], 1) @ torch.cat([total, right])
    return total


def batch_norm_in_order(
    x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, epsilon: float
) -> Tensor:
    """Stored statistics folded into ``x * factor + shift``, each rounded on its own."""
    along = (-1, *(1 for _ in x.shape[2:]))
    factor = scale * (1 / (variance + epsilon).sqrt())
    return x * factor.reshape(along) + (bias - mean * factor).reshape(along)


def layer_norm_in_order(x: Tensor, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor | None:
    """The normalisation along the last axis; None where its length is no multiple of eight.

    The mean is summed in float64; the variance in eight lanes of fused multiply-adds; the answer is one more.
    """
    length = x.shape[-1]
    if length % _LANES:
        return None
    deviation = x - x.double().mean(-1, keepdim=True).float()
    lanes = torch.zeros((), dtype=x.dtype)
    for part in torch.split(deviation, _LANES, -1):
        lanes = fused(part, part, lanes)
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return fused(deviation * (1 / (lanes / length + epsilon).sqrt()), scale, bias)


def fused(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """``a b + c`` rounded once, but for the rare double rounding of a float64 sum; numbers are taken as they are."""
    return (a.double() * b + c).float()
