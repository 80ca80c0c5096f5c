"""Tensors known when a shadow is built: initializers and `Constant` nodes, in the form the shadow carries them."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto, numpy_helper

from qdefense.converters.operator_versions import quoted
from qdefense.converters.shadow.registry import CODE_RANGES, NARROW_FLOATS, UNSIGNED_RANGES, Constant, Node, ShadowError

_CARRIED = {
    TensorProto.FLOAT,
    TensorProto.DOUBLE,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
    *CODE_RANGES,
    *NARROW_FLOATS,
    *UNSIGNED_RANGES,
}
_ATTRIBUTES = {
    "value_float": (TensorProto.FLOAT, torch.float32),
    "value_floats": (TensorProto.FLOAT, torch.float32),
    "value_int": (TensorProto.INT64, torch.int64),
    "value_ints": (TensorProto.INT64, torch.int64),
}


def type_name(element_type: int) -> str:
    """The ONNX name of an element type, its number where it has none."""
    return (
        TensorProto.DataType.Name(element_type) if element_type in TensorProto.DataType.values() else str(element_type)
    )


def constant_of(tensor: TensorProto, initializer: str | None) -> Constant:
    """A tensor of the file; codes and floats of 16 bits or fewer become float32, unsigned integers int64.

    Args:
        tensor: the tensor.
        initializer: name of the initializer that a change would have to be written to, None where there is none.

    Raises:
        ShadowError: its data lie elsewhere or are not there, or its element type is not carried.
    """
    name = quoted(tensor.name)
    if tensor.data_location == TensorProto.EXTERNAL:
        raise ShadowError(
            f"tensor {name} lies in an external file; load it with onnx.load and save the model in one file"
        )
    if tensor.data_type not in _CARRIED:
        raise ShadowError(
            f"tensor {name} has element type {type_name(tensor.data_type)}, which the shadow can't carry; "
            "export the model in float32"
        )
    try:
        array = numpy_helper.to_array(tensor)
    except ValueError as error:
        raise ShadowError(f"tensor {name} can't be read: {error}; check the file with onnx.checker") from error
    if tensor.data_type in CODE_RANGES or tensor.data_type in NARROW_FLOATS:
        array = array.astype(np.float32)
    if tensor.data_type in UNSIGNED_RANGES:
        if array.size and array.max() > UNSIGNED_RANGES[tensor.data_type][1]:
            raise ShadowError(f"tensor {name} holds an integer of 2**63 or more; store it as INT64")
        array = array.astype(np.int64)
    return Constant(torch.from_numpy(np.array(array)), tensor.data_type, initializer)


def constant_node(node: Node) -> Constant:
    """What a `Constant` node holds.

    Raises:
        UnsupportedOperatorError: it holds not exactly one value, or a sparse one or text.
        ShadowError: its tensor can't be read.
    """
    if len(node.attributes) != 1:
        raise node.unsupported(f"it has the attributes {sorted(node.attributes)}, expected exactly one")
    ((name, value),) = node.attributes.items()
    if name == "value" and isinstance(value, TensorProto):
        return constant_of(value, None)
    if name not in _ATTRIBUTES:
        raise node.unsupported(f"attribute {name!r} is not covered")
    kind, dtype = _ATTRIBUTES[name]
    return Constant(torch.tensor(value, dtype=dtype), kind)
