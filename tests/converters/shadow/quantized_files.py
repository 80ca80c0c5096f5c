"""One small classifier in every form that a file can hold weights in, for the tests of writing back."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from qdefense.converters.quantize import Scheme, quantize

Array = NDArray[Any]
CLASSES, SIZE = 5, 8


def pictures(count: int, seed: int = 0) -> Array:
    """(N, 3, 8, 8) float32 in [0, 1]: flat patches with noise."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0, 1, (count, 3, 2, 2)).repeat(4, 2).repeat(4, 3)
    return np.clip(levels + rng.normal(0, 0.1, levels.shape), 0, 1).astype(np.float32)


def random_weights() -> dict[str, Array]:
    """Weights of `network` under their initializers' names."""
    rng = np.random.default_rng(5)
    return {
        "mean": np.full((1, 3, 1, 1), 0.5, np.float32),
        "one.w": rng.normal(0, 0.3, (8, 3, 3, 3)).astype(np.float32),
        "one.b": rng.normal(0, 0.2, 8).astype(np.float32),
        "wise.w": rng.normal(0, 0.5, (8, 1, 3, 3)).astype(np.float32),
        "wise.b": rng.normal(0, 0.2, 8).astype(np.float32),
        "mix.w": rng.normal(0, 0.3, (8, 36)).astype(np.float32),
        "fc.w": rng.normal(0, 0.3, (CLASSES, 36)).astype(np.float32),
        "fc.b": rng.normal(0, 0.2, CLASSES).astype(np.float32),
    }


def network_nodes() -> list[NodeProto]:
    """A convolution, a depthwise one, pooling, a matrix product and a linear layer."""
    make = helper.make_node
    return [
        make("Sub", ["x", "mean"], ["centred"], name="sub"),
        make("Conv", ["centred", "one.w", "one.b"], ["one.c"], name="one", strides=[2, 2], pads=[1, 1, 1, 1]),
        make("Relu", ["one.c"], ["one"], name="one.relu"),
        make("Conv", ["one", "wise.w", "wise.b"], ["wise.c"], name="wise", group=8, pads=[1, 1, 1, 1]),
        make("Relu", ["wise.c"], ["wise"], name="wise.relu"),
        make("GlobalAveragePool", ["wise"], ["pooled"], name="pool"),
        make("Flatten", ["pooled"], ["flat"], name="flatten"),
        make("MatMul", ["flat", "mix.w"], ["mixed"], name="mix"),
        make("Relu", ["mixed"], ["positive"], name="mix.relu"),
        make("Gemm", ["positive", "fc.w", "fc.b"], ["y"], name="fc", transB=1),
    ]


def model_of(nodes: list[NodeProto], tensors: list[TensorProto]) -> onnx.ModelProto:
    """A model from x to y with these initializers."""
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    scores = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", CLASSES])
    graph = helper.make_graph(nodes, "classifier", [image], [scores], tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    helper.set_model_props(model, {"origin": "tests"})
    return model


def network() -> onnx.ModelProto:
    """The classifier in float32."""
    return model_of(network_nodes(), [numpy_helper.from_array(value, name) for name, value in random_weights().items()])


def quantized(scheme: Scheme, model: onnx.ModelProto | None = None, **settings: Any) -> bytes:
    """The classifier, or another one, quantized."""
    images = pictures(32, seed=1) if scheme in ("int8-static", "int4-a8") else None
    source = network() if model is None else model
    return quantize(bytes(source.SerializeToString()), scheme, calibration=images, **settings)


def in_typed_fields(data: bytes) -> bytes:
    """The file with 4 bit codes in ``int32_data``, as `onnx.helper.make_tensor` writes them."""
    model = onnx.load_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4):
            codes = numpy_helper.to_array(tensor)
            tensor.CopyFrom(helper.make_tensor(tensor.name, tensor.data_type, codes.shape, codes.reshape(-1)))
    return bytes(model.SerializeToString())


def half_file() -> bytes:
    """The classifier with float16 weights, between casts."""
    nodes = [helper.make_node("Cast", ["x"], ["half"], name="in", to=TensorProto.FLOAT16), *network_nodes()]
    nodes[1].input[0], nodes[-1].output[0] = "half", "half.y"
    nodes.append(helper.make_node("Cast", ["half.y"], ["y"], name="out", to=TensorProto.FLOAT))
    tensors = [numpy_helper.from_array(value.astype(np.float16), name) for name, value in random_weights().items()]
    return bytes(model_of(nodes, tensors).SerializeToString())


def unfolded_file() -> bytes:
    """A convolution whose normalisation is not folded into it, with weights in typed fields, one of them used twice."""
    rng = np.random.default_rng(9)
    values = {
        "one.w": rng.normal(0, 0.3, (CLASSES, 3, 3, 3)),
        "gamma": rng.uniform(0.5, 1.5, CLASSES),
        "beta": rng.normal(0, 0.2, CLASSES),
        "running_mean": rng.normal(0, 0.2, CLASSES),
        "running_var": rng.uniform(0.5, 1.5, CLASSES),
        "shared": rng.normal(0, 0.3, (CLASSES, CLASSES)),
    }
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "one.w"], ["one"], name="one"),
        make("BatchNormalization", ["one", "gamma", "beta", "running_mean", "running_var"], ["normal"], name="bn"),
        make("Relu", ["normal"], ["positive"], name="relu"),
        make("GlobalAveragePool", ["positive"], ["pooled"], name="pool"),
        make("Flatten", ["pooled"], ["flat"], name="flatten"),
        make("MatMul", ["flat", "shared"], ["mixed"], name="mix"),
        make("Gemm", ["mixed", "shared"], ["y"], name="fc"),
    ]
    tensors = [
        helper.make_tensor(name, TensorProto.FLOAT, value.shape, value.astype(np.float32).reshape(-1))
        for name, value in values.items()
    ]
    return bytes(model_of(nodes, tensors).SerializeToString())


def every_file() -> dict[str, bytes]:
    """The classifier by the name of its scheme."""
    whole, single = {"reduce_range": False}, {"per_channel": False}
    return {
        "fp32": bytes(network().SerializeToString()),
        "fp32 unfolded": unfolded_file(),
        "fp16": half_file(),
        "qdq u8s8 channel reduced": quantized("int8-static"),
        "qdq u8s8 tensor": quantized("int8-static", **whole, **single),
        "qdq s8s8 channel": quantized("int8-static", types="s8s8", **whole),
        "qdq u8u8 tensor": quantized("int8-static", types="u8u8", **single),
        "qoperator u8s8 channel reduced": quantized("int8-static", format="qoperator"),
        "qoperator u8u8 tensor": quantized("int8-static", format="qoperator", types="u8u8", **single),
        "dynamic u8": quantized("int8-dynamic"),
        "dynamic s8 channel": quantized("int8-dynamic", types="u8s8", per_channel=True, **whole),
        "int4 channel": quantized("int4"),
        "uint4 blocks": in_typed_fields(quantized("int4", block_size=16, symmetric=False)),
        "int4-a8 blocks": quantized("int4-a8", block_size=16),
    }
