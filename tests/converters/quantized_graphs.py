"""Small quantized graphs of every form, built by hand, and what ONNX Runtime makes of each of their layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.inspection import inspect_model
from qdefense.converters.reading import parse_model
from qdefense.converters.runtime_facts import RuntimeFacts, runtime_facts

FOUR_BITS = {"int4": TensorProto.INT4, "uint4": TensorProto.UINT4}
MIDDLE = {"int8": 0, "uint8": 128, "int4": 0, "uint4": 8}
HIGHEST = {"int8": 127, "uint8": 255, "int4": 7, "uint4": 15}
LOWEST = {"int8": -127, "uint8": 0, "int4": -7, "uint4": 0}


class Quantized:
    """A graph under construction, fed with `image`."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[Any] = []
        self.tensors: list[Any] = []
        self.rng = np.random.default_rng(0)

    def const(self, name: str, array: Any, dtype: Any = np.float32) -> str:
        self.tensors.append(numpy_helper.from_array(np.asarray(array, dtype), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{output}_node", **attributes))
        return output

    def quantized(self, source: str, name: str, dtype: str, zero: int | None = None) -> str:
        """Codes of the source."""
        parameters = [self.const(f"{name}_scale", 0.05), self.const(f"{name}_zero", _middle(dtype, zero), dtype)]
        return self.node("QuantizeLinear", [source, *parameters], name)

    def dequantized(self, codes: str, name: str) -> str:
        return self.node("DequantizeLinear", [codes, f"{codes}_scale", f"{codes}_zero"], name)

    def passed(self, source: str, name: str, dtype: str, zero: int | None = None) -> str:
        """source -> QuantizeLinear -> DequantizeLinear."""
        return self.dequantized(self.quantized(source, f"{name}_codes", dtype, zero), name)

    def weights(self, name: str, shape: tuple[int, ...], dtype: str, *, axis: int | None = None, block: int = 0) -> str:
        """Dequantized constants: one scale, one per entry of the axis, or one per block along it."""
        codes = self.rng.integers(LOWEST[dtype], HIGHEST[dtype] + 1, shape)
        scales: tuple[int, ...] = () if axis is None else (shape[axis],)
        attributes: dict[str, int] = {} if axis is None else {"axis": axis}
        if block:
            scales = tuple(-(-size // block) if place == axis else size for place, size in enumerate(shape))
            attributes["block_size"] = block
        zeros = np.full(scales, MIDDLE[dtype])
        for suffix, array in (("codes", codes), ("zero", zeros)):
            kind = FOUR_BITS.get(dtype)
            tensor = (
                numpy_helper.from_array(array.astype(dtype), f"{name}_{suffix}")
                if kind is None
                else helper.make_tensor(f"{name}_{suffix}", kind, array.shape, array.ravel().tolist())
            )
            self.tensors.append(tensor)
        self.const(f"{name}_scale", np.full(scales, 0.01))
        return self.node("DequantizeLinear", [f"{name}_codes", f"{name}_scale", f"{name}_zero"], name, **attributes)

    def layer(self, kind: str, source: str, name: str, weight: str, **weights: Any) -> str:
        """A product of the source with square weights, named as its output is."""
        size = self.shape[0] if kind == "Conv" else self.shape[-1]
        shape = (size, size, 1, 1) if kind == "Conv" else (size, size)
        return self.node(kind, [source, self.weights(f"{name}_w", shape, weight, **weights)], name)

    def model(self, *outputs: str) -> bytes:
        free = [f"d{place}" for place in range(len(self.shape) + 1)]
        graph = helper.make_graph(
            self.nodes,
            "quantized",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, free) for name in outputs],
            self.tensors,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())


def _middle(dtype: str, zero: int | None) -> int:
    return MIDDLE[dtype] if zero is None else zero


def start(kind: str) -> Quantized:
    return Quantized(4, 6, 6) if kind == "Conv" else Quantized(8)


def facts(model: bytes) -> RuntimeFacts:
    proto = parse_model(model)
    return runtime_facts(proto, inspect_model(model).layers)


def predicted(model: bytes) -> list[bool]:
    return [layer.integer for layer in inspect_model(model).layers]


def run_by_runtime(model: bytes) -> list[bool]:
    return [layer.integer for layer in facts(model).layers]
