from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper

from .code_graphs import assert_same_codes, codes, dynamic_inputs
from .shadow_graphs import graph_model, scalars, session_output, shadow_output

QUANTIZERS: dict[str, tuple[tuple[int, ...], dict[str, int]]] = {
    "per tensor": ((), {}),
    "per channel": ((4,), {"axis": 1}),
    "last axis": ((6,), {"axis": -1}),
    "blocked": ((5, 2, 6), {"axis": 1, "block_size": 2}),
}


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_quantize_linear_equals_runtime_when_values_lie_on_ties(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng, limits = np.random.default_rng(5), np.iinfo(kind)
    scale = 2.0 ** rng.integers(-3, 0, shape)
    zero = rng.integers(max(limits.min, -20), 20, shape).astype(kind)
    node = helper.make_node("QuantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = (rng.integers(-400, 400, (5, 4, 6)) / 8).astype(np.float32)
    constants = {"s": np.asarray(scale, dtype=np.float32), "z": zero}
    kind_of_output = helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    assert_same_codes(graph_model([node], x, constants, output_type=kind_of_output), x, operator="")


@pytest.mark.parametrize("grain", QUANTIZERS)
@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int16])
def test_dequantize_linear_equals_runtime_when_codes_are_random(grain: str, kind: type) -> None:
    shape, attributes = QUANTIZERS[grain]
    rng = np.random.default_rng(6)
    constants = {"s": rng.uniform(0.01, 0.1, shape).astype(np.float32), "z": rng.integers(0, 20, shape).astype(kind)}
    node = helper.make_node("DequantizeLinear", ["x", "s", "z"], ["y"], **attributes)
    x = codes(kind, 5, 4, 6)
    assert_same_codes(graph_model([node], x, constants), x, operator="")


def test_quantize_linear_takes_type_from_attribute_when_zero_point_is_left_out() -> None:
    node = helper.make_node("QuantizeLinear", ["x", "s"], ["y"], output_dtype=TensorProto.INT8)
    x = np.linspace(-300, 300, 1000, dtype=np.float32)[:, None]
    model = graph_model([node], x, scalars(s=(1.5, np.float32)), output_type=TensorProto.INT8)
    assert_same_codes(model, x, operator="")


@pytest.mark.parametrize(
    ("output", "kind"), [("q", TensorProto.UINT8), ("s", TensorProto.FLOAT), ("z", TensorProto.UINT8)]
)
def test_dynamic_quantize_linear_equals_runtime_at_batch_one(output: str, kind: int) -> None:
    x = dynamic_inputs()
    model = graph_model([helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"])], x, {}, output, kind)
    expected = np.stack(
        [session_output(model, x[at : at + 1]).reshape(x.shape[1:] if output == "q" else ()) for at in range(12)]
    )
    np.testing.assert_array_equal(shadow_output(model, x), expected.astype(np.float32))
