"""Runs one operator in ONNX Runtime by itself, to measure what its kernel does on this CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

_OPSETS = (helper.make_opsetid("", 13), helper.make_opsetid("com.microsoft", 1))


def run_alone(
    node: onnx.NodeProto,
    given: Mapping[str, NDArray[Any]],
    stored: Mapping[str, NDArray[Any]],
    *,
    output: int = TensorProto.FLOAT,
) -> NDArray[Any]:
    """The node's first output, of the ONNX type ``output``, on one thread at the runtime's own optimization level.

    Inputs that are ``given`` come when it runs; ``stored`` ones are initializers, which the runtime may lay out anew.
    """
    graph = helper.make_graph(
        [node],
        "lone-operator",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)
            for name, value in given.items()
        ],
        [helper.make_tensor_value_info(node.output[0], output, None)],
        [numpy_helper.from_array(value, name) for name, value in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=_OPSETS, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(given))[0])
