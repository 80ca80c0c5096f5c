"""Any classifier's graph as the one the shadow is built from: one image input of free batch, one output.

The deployed session runs the file as it is; what is changed here is only what the shadow could not be built from, and
the fidelity certificate compares the two.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableSequence

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.contract import ContractError, InputContract, free_inputs, shape_of

_BATCH = "qdefense_batch"


def fixed_values(model: onnx.ModelProto, contract: InputContract) -> dict[str, NDArray[np.generic]]:
    """The value of every input that is no image, in its own type and shape; a free axis has the length 1.

    Raises:
        ContractError: an input has no numbers, or its type cannot hold the value.
    """
    inputs = {value.name: value for value in free_inputs(model.graph)}
    return {name: _filled(inputs[name], value) for name, value in contract.fixed_inputs.items()}


def _filled(declared: onnx.ValueInfoProto, value: float) -> NDArray[np.generic]:
    element_type = declared.type.tensor_type.elem_type
    if not declared.type.HasField("tensor_type") or element_type in (TensorProto.STRING, TensorProto.UNDEFINED):
        raise ContractError(f"input {declared.name!r} holds no numbers, so --fixed-input can't set it")
    kind = helper.tensor_dtype_to_np_dtype(element_type)
    with np.errstate(invalid="ignore", over="ignore"):
        single = np.array(value).astype(kind)
    if float(single) != value and (kind.kind in "iub" or not np.isfinite(float(single))):
        raise ContractError(
            f"input {declared.name!r} holds {kind}, which can't hold {value:g}; give it another value with "
            "--fixed-input"
        )
    filled: NDArray[np.generic] = np.full([length or 1 for length in shape_of(declared)], single)
    return filled


def narrowed(data: bytes, contract: InputContract) -> bytes:
    """The file with its fixed inputs as constants, the contract's output alone, and a free batch.

    A file that is so already comes back as it is. A frozen batch is set free by rewriting the leading axis of constant
    ``Reshape`` targets; where a graph needs more than that, the shadow that is built from it does not run.
    """
    model = onnx.load_from_string(data)
    graph = model.graph
    if len(free_inputs(graph)) == 1 and len(graph.output) == 1 and contract.batch is None:
        return data
    values = fixed_values(model, contract)
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    _keep(graph.input, {contract.input_name})
    _keep(graph.output, {contract.output_name})
    if contract.batch is not None:
        _free_batch(graph, contract.batch)
    return bytes(model.SerializeToString())


def _keep(values: MutableSequence[onnx.ValueInfoProto], names: set[str]) -> None:
    kept = [value for value in values if value.name in names]
    del values[:]
    values.extend(kept)


def _free_batch(graph: onnx.GraphProto, batch: int) -> None:
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = _BATCH
    del graph.value_info[:]
    constants, moving = _constants(graph), {value.name for value in graph.input}
    for node in graph.node:
        if node.op_type in ("Shape", "Size") or not moving.intersection(node.input):
            continue  # neither a constant nor a shape has a batch, whatever its first axis is
        moving.update(node.output)
        if node.op_type == "Reshape" and len(node.input) == 2 and node.input[1] in constants:
            target = numpy_helper.to_array(constants[node.input[1]])
            zero_is_zero = any(attribute.name == "allowzero" and attribute.i for attribute in node.attribute)
            if target.size and target[0] == batch and not zero_is_zero:
                free = target.copy()
                free[0] = 0  # the length of the input's own first axis
                node.input[1] = f"{_BATCH}_{node.output[0]}"
                graph.initializer.append(numpy_helper.from_array(free, node.input[1]))


def _constants(graph: onnx.GraphProto) -> Mapping[str, TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            found.update((node.output[0], entry.t) for entry in node.attribute if entry.name == "value")
    return found
