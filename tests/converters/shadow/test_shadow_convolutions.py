from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .shadow_graphs import Array, assert_equals_runtime, assert_gradient_is_right, operator_model

RNG = np.random.default_rng(0)
SIZES = {1: (9,), 2: (9, 8), 3: (5, 6, 7)}


def case(rank: int, inputs: int, shape: tuple[int, ...], **attributes: Any) -> tuple[Array, Array, dict[str, Any]]:
    """An image, a weight of the given shape over `rank` axes, and the node's attributes."""
    x = RNG.normal(0, 1, (2, inputs, *SIZES[rank])).astype(np.float32)
    return x, RNG.normal(0, 0.3, shape).astype(np.float32), attributes


CONVOLUTIONS = {
    "line": case(1, 3, (4, 3, 3), pads=[1, 1], strides=[2]),
    "volume": case(3, 2, (4, 2, 2, 3, 3), pads=[0, 1, 1, 1, 0, 1]),
    "grouped": case(2, 4, (6, 2, 3, 3), group=2),
    "depthwise": case(2, 4, (4, 1, 3, 3), group=4, pads=[1, 1, 1, 1]),
    "depthwise with multiplier": case(2, 4, (8, 1, 3, 3), group=4, strides=[2, 1]),
    "dilated": case(2, 3, (4, 3, 3, 2), dilations=[2, 3], pads=[2, 0, 1, 3]),
    "asymmetric padding": case(2, 3, (4, 3, 3, 3), pads=[0, 1, 2, 0], strides=[2, 2]),
    "same, upper": case(2, 3, (4, 3, 4, 3), auto_pad="SAME_UPPER", strides=[2, 3]),
    "same, lower": case(2, 3, (4, 3, 4, 3), auto_pad="SAME_LOWER", strides=[2, 3]),
    "valid": case(2, 3, (4, 3, 3, 3), auto_pad="VALID"),
}
TRANSPOSES = {
    "line": case(1, 3, (3, 4, 3), strides=[2], pads=[1, 0]),
    "volume": case(3, 2, (2, 3, 2, 3, 3), strides=[2, 1, 2]),
    "padded": case(2, 3, (3, 4, 3, 3), strides=[2, 2], pads=[1, 1, 1, 1]),
    "asymmetric padding": case(2, 3, (3, 4, 3, 3), strides=[2, 2], pads=[0, 1, 2, 0]),
    "output padding": case(2, 3, (3, 4, 3, 3), strides=[3, 2], pads=[1, 1, 1, 1], output_padding=[2, 1]),
    "output shape": case(2, 3, (3, 4, 3, 3), strides=[2, 2], output_shape=[18, 16]),
    "smaller output": case(2, 3, (3, 4, 3, 3), strides=[2, 2], output_shape=[16, 14]),
    "smaller output, upper": case(2, 3, (3, 4, 4, 4), strides=[2, 2], output_shape=[17, 13], auto_pad="SAME_UPPER"),
    "smaller output, lower": case(2, 3, (3, 4, 4, 4), strides=[2, 2], output_shape=[17, 13], auto_pad="SAME_LOWER"),
    "same, upper": case(2, 3, (3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_UPPER"),
    "same, lower": case(2, 3, (3, 4, 3, 3), strides=[2, 2], auto_pad="SAME_LOWER"),
    "valid": case(2, 3, (3, 4, 3, 3), strides=[2, 2], auto_pad="VALID"),
    "grouped": case(2, 4, (4, 3, 3, 3), group=2, strides=[2, 2]),
    "dilated": case(2, 3, (3, 4, 3, 2), dilations=[2, 3]),
}
ALL = [("Conv", name) for name in CONVOLUTIONS] + [("ConvTranspose", name) for name in TRANSPOSES]


@pytest.mark.parametrize(("op_type", "name"), ALL)
@pytest.mark.parametrize("biased", [True, False])
def test_convolution_equals_runtime(op_type: str, name: str, biased: bool) -> None:
    x, weight, attributes = (CONVOLUTIONS if op_type == "Conv" else TRANSPOSES)[name]
    outputs = len(weight) if op_type == "Conv" else weight.shape[1] * attributes.get("group", 1)
    constants = {"w": weight} | ({"b": RNG.normal(0, 1, outputs).astype(np.float32)} if biased else {})
    model = operator_model(op_type, x, constants, **attributes)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)
