"""The order in which ONNX Runtime's float kernels add: what an exact pass follows, so that a Quantize rounds alike.

Float sums depend on their order in the last bit. A bit is nothing to a logit, and everything to a value that lies on a
rounding boundary of the Quantize after it. Of convolutions in the channel-blocked layout (that of the optimization
level "all") and of LayerNormalization the order was found by experiment, bit for bit, on x86-64 with ONNX Runtime 1.32;
elsewhere, and for other shapes, a pass computes as torch does.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qdefense.converters.shadow.windows import Window

_BLOCKS = (16, 8)
_POINTWISE_CHANNELS = 128
_CHANNELS_ALIGNED = 4
_LANES = 8


@cache
def channel_block() -> int | None:
    """How many input channels a convolution of this CPU adds up before it adds the sum to those of the others.

    Measured: 16 with AVX-512, 8 with AVX2; None where no such order gives the runtime's bits.
    """
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, 32, 8, 8)).astype(np.float32)
    weight = draw.normal(size=(32, 32, 3, 3)).astype(np.float32)
    bias = draw.normal(size=32).astype(np.float32)
    measured = torch.from_numpy(_convolved(x, weight, bias))
    sliding = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1), "NOTSET")
    tensors = torch.from_numpy(x), torch.from_numpy(weight), torch.from_numpy(bias)
    for block in _BLOCKS:
        if torch.equal(_in_parts(*tensors, sliding, 1, block), measured):
            return block
    return None


def convolve_in_order(x: Tensor, weight: Tensor, bias: Tensor | None, sliding: Window, groups: int) -> Tensor | None:
    """The convolution of `x`: (N, C, H, W) float32, its products added as the runtime does; None where that is unknown.

    The products of one part of the channels are added in one chain, then the parts, the bias last.
    """
    size = None if x.ndim != weight.ndim or x.ndim != 4 else _channels_at_once(weight, sliding, groups)
    return None if size is None else _in_parts(x, weight, bias, sliding, groups, size)


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


def _in_parts(x: Tensor, weight: Tensor, bias: Tensor | None, sliding: Window, groups: int, size: int) -> Tensor:
    x = sliding.padding(x.shape[2:]).apply(x)
    strides, dilations = sliding.strides, sliding.dilations
    grouped = x.unflatten(1, (groups, -1))
    y: Tensor | None = None
    for first in range(0, weight.shape[1], size):
        # with channels last, torch has other kernels, which add in another order
        channels = grouped[:, :, first : first + size].flatten(1, 2).contiguous()
        kernel = weight[:, first : first + size].contiguous()
        part = torch.convolution(channels, kernel, None, strides, (0, 0), dilations, False, (0,), groups)
        y = part if y is None else y + part
    assert y is not None  # noqa: S101 (a convolution has channels)
    return y if bias is None else y + bias.reshape(-1, 1, 1)


def _convolved(x: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]) -> NDArray[np.float32]:
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "weight", "bias"], ["y"], pads=[1, 1, 1, 1])],
        "order-probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "weight"), numpy_helper.from_array(bias, "bias")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    answer: NDArray[np.float32] = session.run(None, {"x": x})[0]
    return answer


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
    for part in deviation.split(_LANES, -1):
        lanes = _fused(part, part, lanes)
    while lanes.shape[-1] > 1:
        low, high = lanes.chunk(2, -1)
        lanes = low + high
    return _fused(deviation * (1 / (lanes / length + epsilon).sqrt()), scale, bias)


def _fused(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """``a b + c`` rounded once, but for the rare double rounding of a float64 sum."""
    return (a.double() * b + c).float()
