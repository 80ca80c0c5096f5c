"""Small ONNX graphs, and ONNX Runtime's answer to them, for the tests of the shadow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdefense.converters.shadow import Shadow, build_shadow

Array = NDArray[Any]
MICROSOFT = "com.microsoft"


def graph_model(
    nodes: Sequence[NodeProto],
    x: Array,
    constants: Mapping[str, Array],
    output: str = "y",
    output_type: int = TensorProto.FLOAT,
    *,
    opset: int = 21,
) -> bytes:
    """A model with the input `x`, whose batch axis is free, and one output."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(x.dtype), ["batch", *x.shape[1:]])],
        [helper.make_tensor_value_info(output, output_type, None)],
        [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(MICROSOFT, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def session_output(model: bytes, x: Array, *, level: str = "ORT_ENABLE_ALL", batch: int = 0) -> Array:
    """ONNX Runtime's output, computed in batches of the given size."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    step = batch or len(x)
    outputs = [session.run(None, {"x": x[at : at + step]})[0] for at in range(0, len(x), step)]
    return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)


def shadow_output(model: bytes, x: Array, **options: int) -> Array:
    """The output of the shadow of the shipped graph, exact unless said otherwise."""
    return run_shadow(build_shadow(model, source="shipped"), x, **options)


def run_shadow(shadow: Shadow, x: Array, **options: int) -> Array:
    """The output of a shadow, exact unless said otherwise."""
    with torch.no_grad():
        y: Array = shadow(torch.from_numpy(x), **{"exact": True, **options}).numpy()
    return y


def scalars(**values: tuple[float, Any]) -> dict[str, Array]:
    """Named scalars, each given with its element type."""
    return {name: np.array(value, dtype=kind) for name, (value, kind) in values.items()}


def operator_model(
    op_type: str,
    x: Array,
    constants: Mapping[str, Array | None],
    *,
    opset: int = 21,
    outputs: int = 1,
    kind: int = TensorProto.FLOAT,
    **attributes: Any,
) -> bytes:
    """A model of one operator with the input `x` and further inputs that are constants, None where they are left out.

    Its output, of the element type `kind`, is the last of the operator's.
    """
    names = [name if value is not None else "" for name, value in constants.items()]
    written = [f"y{index}" for index in range(outputs - 1)] + ["y"]
    node = helper.make_node(op_type, ["x", *names], written, **attributes)
    held = {name: value for name, value in constants.items() if value is not None}
    return graph_model([node], x, held, opset=opset, output_type=kind)


def assert_equals_runtime(model: bytes, x: Array, *, rtol: float = 1e-5) -> None:
    """The shadow gives ONNX Runtime's shape and values, floats up to `rtol` times the largest."""
    expected, found = session_output(model, x), shadow_output(model, x)
    assert found.shape == expected.shape
    if not np.issubdtype(expected.dtype, np.floating):
        np.testing.assert_array_equal(found, expected)
        return
    finite = expected[np.isfinite(expected)]
    np.testing.assert_allclose(found, expected, rtol=0, atol=rtol * np.abs(finite).max(initial=1e-3))


def assert_gradient_is_right(model: bytes, x: Array) -> None:
    """The gradient of a random combination of the outputs agrees with finite differences in float64."""
    twin = build_shadow(model, source="shipped").to_double()
    generator = torch.Generator().manual_seed(0)
    at = torch.from_numpy(x).double().requires_grad_()
    weights = torch.randn(twin(at).shape, generator=generator, dtype=torch.float64)
    direction = torch.randn(at.shape, generator=generator, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((twin(at) * weights).sum(), at)
    step = 1e-6
    with torch.no_grad():
        change = ((twin(at + step * direction) - twin(at - step * direction)) * weights).sum() / (2 * step)
    assert gradient.abs().sum() > 0
    torch.testing.assert_close(change, (gradient * direction).sum(), rtol=1e-5, atol=1e-7)
