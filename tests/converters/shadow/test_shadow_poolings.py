from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .shadow_graphs import assert_equals_runtime, assert_gradient_is_right, operator_model

SHAPES = {1: (2, 3, 9), 2: (2, 3, 9, 8), 3: (2, 2, 5, 6, 7)}
WINDOWS: dict[str, dict[str, Any]] = {
    "line": {"kernel_shape": [3], "strides": [2], "pads": [1, 0]},
    "plane": {"kernel_shape": [3, 2], "strides": [2, 1]},
    "volume": {"kernel_shape": [2, 3, 2], "pads": [1, 1, 0, 0, 1, 1], "strides": [2, 2, 2]},
    "ceil": {"kernel_shape": [3, 3], "strides": [2, 3], "ceil_mode": 1},
    "ceil and padding": {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]},
    "ceil, window behind the input": {"kernel_shape": [1, 2], "strides": [3, 3], "ceil_mode": 1, "pads": [0, 1, 0, 1]},
    "dilated": {"kernel_shape": [2, 3], "dilations": [3, 2], "pads": [1, 2, 1, 1]},
    "dilated volume": {"kernel_shape": [2, 2, 2], "dilations": [2, 1, 2]},
    "same, upper": {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
    "same, lower": {"kernel_shape": [2, 3], "strides": [2, 2], "auto_pad": "SAME_LOWER"},
    "valid": {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "VALID"},
}
POOLS: dict[str, dict[str, Any]] = {
    "MaxPool": {},
    "AveragePool": {},
    "AveragePool with padding": {"count_include_pad": 1},
    "LpPool": {},
    "LpPool of 3": {"p": 3},
}


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("window", WINDOWS)
def test_pooling_equals_runtime(pool: str, window: str) -> None:
    attributes = WINDOWS[window] | POOLS[pool]
    x = np.random.default_rng(0).normal(0, 1, SHAPES[len(attributes["kernel_shape"])]).astype(np.float32)
    model = operator_model(pool.split(maxsplit=1)[0], x, {}, opset=21, **attributes)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


@pytest.mark.parametrize("op_type", ["GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool"])
@pytest.mark.parametrize("rank", SHAPES)
def test_global_pooling_equals_runtime(op_type: str, rank: int) -> None:
    x = np.random.default_rng(0).normal(0, 1, SHAPES[rank]).astype(np.float32)
    model = operator_model(op_type, x, {}, opset=21)
    assert_equals_runtime(model, x)
    assert_gradient_is_right(model, x)


def test_norm_of_zeros_has_a_gradient() -> None:
    x = np.zeros((1, 1, 4, 4), dtype=np.float32)
    x[0, 0, 0, 0] = 2
    assert_gradient_is_right(operator_model("LpPool", x, {}, kernel_shape=[2, 2], strides=[2, 2], p=1), x + 1)
    assert_equals_runtime(operator_model("LpPool", x, {}, kernel_shape=[2, 2], strides=[2, 2]), x)
