"""One small classifier in every form that a file can hold weights in, for the tests of writing back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

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


class _Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Array]] = iter([{"x": pictures(16, seed)} for seed in (1, 2)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


def static_file(folder: Path, model: onnx.ModelProto | None = None, **options: Any) -> bytes:
    """The classifier in static INT8; QDQ, u8 x s8, per channel and in 7 bits unless said otherwise."""
    source, target = folder / "float.onnx", folder / "static.onnx"
    onnx.save(network() if model is None else model, source)
    settings = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
    settings |= {"quant_format": QuantFormat.QDQ, "reduce_range": True} | options
    quantize_static(source, target, _Calibration(), **settings)
    return target.read_bytes()


def dynamic_file(folder: Path, weight_type: QuantType, *, per_channel: bool) -> bytes:
    """The classifier in dynamic INT8."""
    source, target = folder / "float.onnx", folder / "dynamic.onnx"
    onnx.save(network(), source)
    quantize_dynamic(source, target, weight_type=weight_type, per_channel=per_channel)
    return target.read_bytes()


def int4_file(block: int, *, signed: bool, packed_raw: bool = True) -> bytes:
    """The classifier with its weights in INT4 behind DequantizeLinear: per channel, or in blocks along axis 1."""
    nodes, tensors = network_nodes(), []
    for name, value in random_weights().items():
        if not name.endswith(".w"):
            tensors.append(numpy_helper.from_array(value, name))
            continue
        tensors += _int4_tensors(name, value, block, signed=signed, packed_raw=packed_raw)
        settings = {"axis": 1, "block_size": block} if block else {"axis": 0}
        inputs = [f"{name}.q", f"{name}.s", f"{name}.z"]
        nodes.insert(0, helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}.dq", **settings))
    return bytes(model_of(nodes, tensors).SerializeToString())


def _int4_tensors(name: str, value: Array, block: int, *, signed: bool, packed_raw: bool) -> list[TensorProto]:
    count, size = (-(-value.shape[1] // block), block) if block else (1, value[0].size)
    rows = value.reshape(len(value), 1, -1) if not block else value
    groups = [rows[:, at * size : (at + 1) * size] if block else rows for at in range(count)]
    low = np.concatenate([np.minimum(group.min(1 if block else (1, 2), keepdims=True), 0) for group in groups], 1)
    high = np.concatenate([np.maximum(group.max(1 if block else (1, 2), keepdims=True), 0) for group in groups], 1)
    scale = (np.maximum(-low, high) / 7 if signed else (high - low) / 15).astype(np.float32)
    zero = np.zeros_like(scale) if signed else np.round(-low / scale)
    wide = [np.repeat(part, size, 1)[:, : value.shape[1]] if block else part for part in (scale, zero)]
    step, shift = (part if block else part.reshape(-1, *(1,) * (value.ndim - 1)) for part in wide)
    codes = np.clip(np.round(value / step) + shift, -7 if signed else 0, 7 if signed else 15)
    kind = TensorProto.INT4 if signed else TensorProto.UINT4
    scale, zero = (part if block else part.reshape(-1) for part in (scale, zero))
    return [
        _packed(f"{name}.q", kind, codes, raw=packed_raw),
        numpy_helper.from_array(scale, f"{name}.s"),
        _packed(f"{name}.z", kind, zero, raw=packed_raw),
    ]


def _packed(name: str, kind: int, codes: Array, *, raw: bool) -> TensorProto:
    array = codes.astype(helper.tensor_dtype_to_np_dtype(kind))
    if raw:
        return numpy_helper.from_array(array, name)
    return helper.make_tensor(name, kind, array.shape, array.reshape(-1))


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


def every_file(folder: Path) -> dict[str, bytes]:
    """The classifier by the name of its scheme."""
    operators = {"quant_format": QuantFormat.QOperator}
    unsigned = {"weight_type": QuantType.QUInt8, "per_channel": False, "reduce_range": False}
    signed = {"activation_type": QuantType.QInt8, "reduce_range": False}
    return {
        "fp32": bytes(network().SerializeToString()),
        "fp32 unfolded": unfolded_file(),
        "fp16": half_file(),
        "qdq u8s8 channel reduced": static_file(folder),
        "qdq u8s8 tensor": static_file(folder, per_channel=False, reduce_range=False),
        "qdq s8s8 channel": static_file(folder, **signed),
        "qdq u8u8 tensor": static_file(folder, **unsigned),
        "qoperator u8s8 channel reduced": static_file(folder, **operators),
        "qoperator u8u8 tensor": static_file(folder, **operators, **unsigned),
        "dynamic u8": dynamic_file(folder, QuantType.QUInt8, per_channel=False),
        "dynamic s8 channel": dynamic_file(folder, QuantType.QInt8, per_channel=True),
        "int4 channel": int4_file(0, signed=True),
        "uint4 blocks": int4_file(16, signed=False, packed_raw=False),
    }
