"""InputContract: what pixels a file expects and what its output means."""

from __future__ import annotations

import json
from typing import Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError

METADATA_KEY = "qdefense.contract"
MAX_CLASSES = 65_536
_DRIVEN = ("layout", "channels", "dtype", "height", "width", "range", "mean", "std", "batch", "head")


class ContractError(ValueError):
    """The file's input or output is nothing this tool can drive; the message says what and what to do."""


class InputContract(BaseModel):
    """What the file expects and answers.

    A model's door takes images as ``x: (N, C, H, W) float32 in [0, 1]``, RGB. The contract says how the
    file wants them (layout, channel order, type, size, value range, mean and std) and how its output is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_name: str
    output_name: str
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channels: Literal["RGB", "BGR"] = "RGB"
    dtype: Literal["float32", "float16", "uint8"] = "float32"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    resize: Literal["none", "bilinear"] = "none"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    batch: int | None = Field(default=None, description="a fixed batch size; null when the batch is dynamic")
    head: Literal["logits", "softmax", "log-softmax", "sigmoid"] = "logits"
    class_names: tuple[str, ...]
    source: Literal["metadata", "graph"] = "metadata"

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)


def write_contract(model: onnx.ModelProto, contract: InputContract) -> None:
    """Put the contract into the model's metadata, replacing an older one."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA_KEY}
    body = contract.model_dump(mode="json", exclude={"source"})
    kept[METADATA_KEY] = json.dumps(body, sort_keys=True, separators=(",", ":"))
    onnx.helper.set_model_props(model, kept)


def read_contract(model: onnx.ModelProto) -> InputContract:
    """The contract in the model's metadata, else one read off the graph's own shapes.

    Raises:
        ContractError: the metadata is not a contract, or the graph is no single-image classifier.
    """
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            return _from_metadata(entry.value, model)
    return _from_graph(model)


def _from_metadata(text: str, model: onnx.ModelProto) -> InputContract:
    try:
        contract = InputContract.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ContractError(
            f"metadata '{METADATA_KEY}' is not a contract: {where}: {first['msg']}; export the model again or remove it"
        ) from error
    read = _from_graph(model, classes=contract.classes)
    if (read.input_name, read.output_name) != (contract.input_name, contract.output_name):
        raise ContractError(
            f"the contract names {contract.input_name!r} -> {contract.output_name!r}, "
            f"the graph has {read.input_name!r} -> {read.output_name!r}; export the model again"
        )
    for field in _DRIVEN:
        stated, driven = getattr(contract, field), getattr(read, field)
        if stated != driven:
            raise ContractError(
                f"the contract says {field} {stated!r}, but this version drives this graph with {driven!r}; "
                "export the model again to fit, normalisation inside"
            )
    return contract.model_copy(update={"source": "metadata"})


def _from_graph(model: onnx.ModelProto, classes: int | None = None) -> InputContract:
    inputs = _free_inputs(model.graph)
    if len(inputs) != 1 or len(model.graph.output) != 1:
        raise ContractError(
            f"expected one image input and one output, found inputs {[i.name for i in inputs]} and outputs "
            f"{[o.name for o in model.graph.output]}; cut the graph down to the classifier"
        )
    shape, output = _dimensions(inputs[0]), _dimensions(model.graph.output[0])
    if inputs[0].type.tensor_type.elem_type != onnx.TensorProto.FLOAT or len(shape) != 4 or shape[1] != 3:
        raise ContractError(
            f"input {inputs[0].name!r} is not a float32 (N, 3, H, W) image batch but {shape}; "
            "this version drives NCHW RGB float32 images in [0, 1]"
        )
    if shape[2] is None or shape[3] is None:
        raise ContractError(f"input {inputs[0].name!r} has no fixed height and width: {shape}; export it with both")
    count = output[1] if len(output) == 2 and output[1] is not None else classes
    if not count or len(output) not in (0, 2) or (classes is not None and count != classes):
        raise ContractError(
            f"output {model.graph.output[0].name!r} has shape {output}, not (N, {classes or 'classes'})"
        )
    if count > MAX_CLASSES:
        raise ContractError(f"output {model.graph.output[0].name!r} has {count} classes, more than {MAX_CLASSES}")
    return InputContract(
        input_name=inputs[0].name,
        output_name=model.graph.output[0].name,
        height=shape[2],
        width=shape[3],
        batch=shape[0],
        class_names=tuple(str(index) for index in range(count)),
        source="graph",
    )


def _free_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def _dimensions(value: onnx.ValueInfoProto) -> list[int | None]:
    dims = value.type.tensor_type.shape.dim
    # Some exporters write 0 or -1 for a dynamic dimension.
    return [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
