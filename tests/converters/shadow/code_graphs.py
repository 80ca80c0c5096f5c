"""Random codes, and the comparison with ONNX Runtime code by code, for the tests of quantized operators."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qdefense.converters.shadow import runtime_saturation

from .shadow_graphs import Array, session_output, shadow_output

TYPES = {np.uint8: TensorProto.UINT8, np.int8: TensorProto.INT8, np.int32: TensorProto.INT32}
SIGNS = [(np.uint8, np.int8), (np.uint8, np.uint8), (np.int8, np.int8)]


def codes(kind: type, *shape: int, seed: int = 0) -> Array:
    limits = np.iinfo(kind)
    return np.random.default_rng(seed).integers(limits.min, limits.max + 1, shape).astype(kind)


def assert_same_codes(model: bytes, x: Array, *, operator: str, batch: int = 0) -> None:
    expected = session_output(model, x, batch=batch)
    found = shadow_output(model, x, saturate=operator in runtime_saturation())
    assert expected.min() < expected.max(), "a constant output would prove nothing"
    np.testing.assert_array_equal(found, expected.astype(np.float64))


def dynamic_inputs() -> Array:
    rng = np.random.default_rng(7)
    x = rng.normal(0, 1, (12, 3, 6, 6)) * rng.uniform(0.1, 9, (12, 1, 1, 1))
    x[0], x[1], x[2] = 0, np.abs(x[1]), -np.abs(x[2])
    return x.astype(np.float32)
