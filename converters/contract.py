"""InputContract: what pixels a file expects and what its output means."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import onnx
from onnx import TensorProto
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError

METADATA_KEY = "qdefense.contract"
_PIXELS = frozenset({"range", "mean", "std", "channels"})
MAX_CLASSES = 65_536
LARGEST_SIDE = 9_999
"""Pixels of height or width that a person can state."""

ResizeRule = Literal["none", "nearest", "bilinear", "bicubic", "crop"]
"""How images of another size reach the file's: not at all, stretched by an interpolation, or as ImageNet models are
tested: bilinear to a shorter side of 8/7 of the file's, then the centre cut out."""
Head = Literal["logits", "softmax", "log-softmax", "sigmoid"]
Source = Literal["options", "sidecar", "metadata", "graph"]
DType = Literal["float32", "float16", "uint8"]

_DTYPES: dict[int, DType] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
}
_HEADS: dict[str, Head] = {
    "Softmax": "softmax",
    "QLinearSoftmax": "softmax",
    "LogSoftmax": "log-softmax",
    "Sigmoid": "sigmoid",
    "QLinearSigmoid": "sigmoid",
}
CARRYING = frozenset({"Identity", "Cast", "QuantizeLinear", "DequantizeLinear", "Reshape", "Flatten", "Squeeze"})
"""Operators behind which an output still means what the one before them gave it."""
_LAYOUT_AXES = {"NCHW": (1, 2, 3), "NHWC": (3, 1, 2)}


_PROBLEMS = {"extra_forbidden": "there is no such entry", "tuple_type": "expected a list"}
"""What pydantic says of an entry, in the words of those who write one."""


class ContractError(ValueError):
    """The file's input or output is nothing this tool can drive; the message says what and what to do."""


def _rising(value: tuple[float, float]) -> tuple[float, float]:
    if not (math.isfinite(value[0]) and math.isfinite(value[1]) and value[0] < value[1]):
        raise ValueError(f"{value[0]:g} to {value[1]:g} is no range from low to high")
    return value


def _finite(value: tuple[float, float, float]) -> tuple[float, float, float]:
    if not all(map(math.isfinite, value)):
        raise ValueError("a value is not finite")
    return value


def _positive(value: tuple[float, float, float]) -> tuple[float, float, float]:
    if min(_finite(value)) <= 0:
        raise ValueError("a standard deviation must be above 0")
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _different(value: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(value)) != len(value):
        twice = next(name for name, count in Counter(value).items() if count > 1)
        raise ValueError(f"class {twice!r} is named twice")
    return value


Layout = Annotated[Literal["NCHW", "NHWC"], BeforeValidator(_upper)]
Channels = Annotated[Literal["RGB", "BGR"], BeforeValidator(_upper)]
Range = Annotated[tuple[float, float], AfterValidator(_rising)]
Mean = Annotated[tuple[float, float, float], AfterValidator(_finite)]
Std = Annotated[tuple[float, float, float], AfterValidator(_positive)]
ClassNames = Annotated[tuple[str, ...], AfterValidator(_different)]


class InputContract(BaseModel):
    """What the file expects and answers.

    A model's door takes images as ``x: (N, 3, H, W) float32 in [0, 1]``, RGB. The file is fed
    ``((low + x * (high - low)) - mean) / std`` in its own channel order, layout and type; ``mean`` and ``std`` are in
    the file's channel order. A uint8 file is fed the codes. ``head`` says how its output is read.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_name: str
    output_name: str
    layout: Layout = "NCHW"
    channels: Channels = "RGB"
    dtype: DType = "float32"
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    resize: ResizeRule = "none"
    range: Range = (0.0, 1.0)
    mean: Mean = (0.0, 0.0, 0.0)
    std: Std = (1.0, 1.0, 1.0)
    batch: int | None = Field(default=None, description="a fixed batch size; null when the batch is dynamic")
    head: Head = "logits"
    class_names: ClassNames
    fixed_inputs: dict[str, FiniteFloat] = Field(default={}, description="values of the inputs that are no image")
    numbers_stated: bool = Field(
        default=False, description="whether somebody named the classes 0 to K - 1, so that they are no stand-ins"
    )
    source: Source = Field(default="metadata", description="the strongest source that said anything")
    pixels_from: Source | None = Field(
        default=None,
        description="who said range, mean, std and channels: metadata if the file said any of them, graph if nobody "
        "said some; null in older reports",
    )

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def named(self) -> bool:
        """Whether the classes have names, not numbers that stand in for them."""
        return self.numbers_stated or self.class_names != numbered(self.classes)


class StatedContract(BaseModel):
    """What a person says of a file, in options or a TOML sidecar; what is left out is read off the file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    input_name: str | None = None
    output_name: str | None = None
    layout: Layout | None = None
    channels: Channels | None = None
    height: int | None = Field(default=None, gt=0, le=LARGEST_SIDE)
    width: int | None = Field(default=None, gt=0, le=LARGEST_SIDE)
    resize: ResizeRule | None = None
    range: Range | None = None
    mean: Mean | None = None
    std: Std | None = None
    head: Head | None = None
    class_names: ClassNames | None = None
    fixed_inputs: dict[str, FiniteFloat] | None = None
    source: Literal["options", "sidecar"] = "options"

    @property
    def values(self) -> dict[str, Any]:
        """What is stated, by the names of `InputContract`."""
        return self.model_dump(exclude_none=True, exclude={"source"})


def numbered(count: int) -> tuple[str, ...]:
    """Names of classes that nobody named."""
    return tuple(str(index) for index in range(count))


def write_contract(model: onnx.ModelProto, contract: InputContract) -> None:
    """Put the contract into the model's metadata, replacing an older one."""
    kept = {entry.key: entry.value for entry in model.metadata_props if entry.key != METADATA_KEY}
    # What older versions did not write is left out where it says nothing, so that equal models stay equal files.
    unsaid = {"source", "pixels_from", "numbers_stated"} | (set() if contract.fixed_inputs else {"fixed_inputs"})
    kept[METADATA_KEY] = json.dumps(
        contract.model_dump(mode="json", exclude=unsaid), sort_keys=True, separators=(",", ":")
    )
    onnx.helper.set_model_props(model, kept)


def with_contract(data: bytes, contract: InputContract) -> bytes:
    """The file with the contract in its metadata."""
    model = onnx.load_from_string(data)
    write_contract(model, contract)
    return bytes(model.SerializeToString(deterministic=True))


def read_contract(model: onnx.ModelProto, stated: StatedContract | None = None) -> InputContract:
    """The contract: what a person stated, else what the metadata say, else what the graph's own shapes say.

    Raises:
        ContractError: the metadata is not a contract, what is said does not fit the graph, or the graph is no
            single-image classifier.
    """
    said, source, pixels_from = _said(model, stated)
    image = _choose_input(model.graph, said)
    output = _choose_output(model.graph, said)
    drawn = _image_values(image, said) | {"output_name": output.name, "head": _head(model.graph, output.name, said)}
    names = _class_names(output, said.get("class_names"))
    named = stated is not None and stated.class_names is not None  # in metadata numbers may be stand-ins
    drawn |= {"class_names": names, "numbers_stated": named and names == numbered(len(names))}
    try:
        return InputContract(**{**said, **drawn, "source": source, "pixels_from": pixels_from})
    except ValidationError as error:
        raise ContractError(f"the contract does not hold together: {first_problem(error)}") from error


def first_problem(error: ValidationError) -> str:
    """Where and what the first problem is, on one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    what = _PROBLEMS.get(first["type"], first["msg"].removeprefix("Value error, "))
    return f"{where}: {what}" if where else what


def _said(model: onnx.ModelProto, stated: StatedContract | None) -> tuple[dict[str, Any], Source, Source]:
    """What is said, and by whom: of all of it the strongest source, of the pixels' values the weakest."""
    written = next((entry.value for entry in model.metadata_props if entry.key == METADATA_KEY), None)
    said: dict[str, Any] = {} if written is None else _from_metadata(written, model.graph)
    source: Source = "graph" if written is None else "metadata"
    if stated is None or not stated.values:
        return said, source, source
    left = _PIXELS - stated.values.keys()
    return {**said, **stated.values}, stated.source, source if left else stated.source


def _from_metadata(text: str, graph: onnx.GraphProto) -> dict[str, Any]:
    """What the file says of itself, but for what would let it choose the function that is judged.

    Which output counts, and what its other inputs are set to, is for the person who deploys it to say.
    """
    chosen = {"source", "pixels_from", "numbers_stated", "fixed_inputs"}
    chosen |= {"output_name"} if len(graph.output) > 1 else set()
    chosen |= {"input_name"} if len(free_inputs(graph)) > 1 else set()
    try:
        return InputContract.model_validate_json(text).model_dump(exclude=chosen)
    except ValidationError as error:
        raise ContractError(
            f"metadata '{METADATA_KEY}' is not a contract: {first_problem(error)}; export the model again or remove it"
        ) from error


def _choose_input(graph: onnx.GraphProto, said: Mapping[str, Any]) -> onnx.ValueInfoProto:
    inputs = {value.name: value for value in free_inputs(graph)}
    fixed = said.get("fixed_inputs", {})
    for name in (*([said["input_name"]] if "input_name" in said else []), *fixed):
        if name not in inputs:
            raise ContractError(
                f"the contract names the input {name!r}, the graph has {sorted(inputs)}; name one of them"
            )
    images = [name for name in inputs if name not in fixed]
    wanted = said.get("input_name", images[0] if len(images) == 1 else None)
    others = [name for name in images if name != wanted]
    if wanted not in images or others:
        shown = ", ".join(f"{name!r} {shape_of(value)}" for name, value in inputs.items()) or "none"
        raise ContractError(
            f"expected one image input, found {shown}; name the image with --input and give every other input a value "
            "with --fixed-input NAME=VALUE"
        )
    return inputs[wanted]


def _choose_output(graph: onnx.GraphProto, said: Mapping[str, Any]) -> onnx.ValueInfoProto:
    outputs = {value.name: value for value in graph.output}
    wanted = said.get("output_name", next(iter(outputs)) if len(outputs) == 1 else None)
    if wanted is None:
        shown = ", ".join(f"{name!r} {shape_of(value)}" for name, value in outputs.items())
        raise ContractError(f"expected one output, found {shown}; name the one with the class scores with --output")
    if wanted not in outputs:
        raise ContractError(
            f"the contract names the output {wanted!r}, the graph has {sorted(outputs)}; name one of them"
        )
    chosen: onnx.ValueInfoProto = outputs[wanted]
    return chosen


def _image_values(image: onnx.ValueInfoProto, said: Mapping[str, Any]) -> dict[str, Any]:
    shape, name = shape_of(image), image.name
    element_type = image.type.tensor_type.elem_type
    if element_type not in _DTYPES or len(shape) != 4:
        raise ContractError(
            f"input {name!r} is no batch of images but {_kind_of(image)}; expected float32, float16 or uint8 of "
            "(N, 3, H, W) or (N, H, W, 3)"
        )
    layout = _layout(name, shape, said.get("layout"))
    _, row, column = _LAYOUT_AXES[layout]
    height, width = (_side(name, shape, axis, key, said) for axis, key in ((row, "height"), (column, "width")))
    dtype = _DTYPES[element_type]
    drawn = {
        "input_name": name,
        "layout": layout,
        "dtype": dtype,
        "height": height,
        "width": width,
        "batch": shape[0],
    }
    _agree(said, drawn)
    return drawn | _codes(name, dtype, said)


def _kind_of(value: onnx.ValueInfoProto) -> str:
    kind = value.type.WhichOneof("value") or ""
    if kind != "tensor_type":
        return f"of another type ({kind.removesuffix('_type') or 'none'})"
    element_type = value.type.tensor_type.elem_type
    known = element_type in TensorProto.DataType.values()
    return f"{TensorProto.DataType.Name(element_type).lower() if known else '?'} {shape_of(value)}"


def _layout(name: str, shape: Sequence[int | None], stated: str | None) -> str:
    if stated is not None:
        channels = shape[_LAYOUT_AXES[stated][0]]
        if channels not in (3, None):
            raise ContractError(f"input {name!r} is {shape}, which is not {stated} with 3 channels; check --layout")
        return stated
    fitting = [layout for layout, axes in _LAYOUT_AXES.items() if shape[axes[0]] == 3]
    if not fitting:
        raise ContractError(
            f"input {name!r} is {shape}: no axis holds 3 channels; only RGB or BGR images can be driven, and --layout "
            "says which axis is theirs where the graph does not"
        )
    if len(fitting) == 2:
        raise ContractError(f"input {name!r} is {shape}: two axes could be the channels; say --layout NCHW or NHWC")
    return fitting[0]


def _side(name: str, shape: Sequence[int | None], axis: int, key: str, said: Mapping[str, Any]) -> int:
    length = said.get(key) if shape[axis] is None else shape[axis]
    if length is None:
        raise ContractError(f"input {name!r} has no fixed height and width: {shape}; say --size HEIGHTxWIDTH")
    return int(length)


def _agree(said: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    for field in ("dtype", "height", "width", "batch"):
        if field in said and said[field] != drawn[field]:
            raise ContractError(
                f"the contract says {field} {said[field]!r}, the graph has {drawn[field]!r}; correct the contract"
            )


def _codes(name: str, dtype: str, said: Mapping[str, Any]) -> dict[str, Any]:
    if dtype != "uint8":
        return {}
    neutral = {"range": (0.0, 255.0), "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    for field, value in neutral.items():
        if tuple(said.get(field, value)) != value and said[field] != InputContract.model_fields[field].default:
            raise ContractError(f"input {name!r} takes uint8 codes, so {field} {said[field]} can't apply; leave it out")
    return neutral


def _head(graph: onnx.GraphProto, output: str, said: Mapping[str, Any]) -> Head:
    found = _last_operator(graph, output)
    stated: Head | None = said.get("head")
    if stated is None:
        return _HEADS.get(found, "logits")
    if found in _HEADS and _HEADS[found] != stated:
        raise ContractError(
            f"the contract says that output {output!r} holds {stated}, but the graph ends in {found}; "
            f"say --head {_HEADS[found]}"
        )
    return stated


def _last_operator(graph: onnx.GraphProto, output: str) -> str:
    """The operator that gives the output its meaning, past those that only carry it."""
    producers = {name: node for node in graph.node for name in node.output if name}
    name = output
    for _ in range(len(graph.node)):
        node = producers.get(name)
        if node is None or node.op_type not in CARRYING or not node.input:
            return "" if node is None else node.op_type
        name = node.input[0]
    return ""


def _class_names(output: onnx.ValueInfoProto, stated: Sequence[str] | None) -> tuple[str, ...]:
    shape = shape_of(output)
    count = shape[1] if len(shape) == 2 and shape[1] is not None else len(stated or ())
    if not count or len(shape) not in (0, 2) or (stated is not None and count != len(stated)):
        raise ContractError(f"output {output.name!r} {_misfit(shape, stated)}")
    if count == 1:
        raise ContractError(
            f"output {output.name!r} is one number per image; a classifier answers one per class: export it so, or "
            "name another output with --output"
        )
    if count > MAX_CLASSES:
        raise ContractError(
            f"output {output.name!r} has {count} classes, more than {MAX_CLASSES}; name another with --output"
        )
    return numbered(count) if stated is None else tuple(stated)


def _misfit(shape: list[int | None], stated: Sequence[str] | None) -> str:
    if not stated:
        return f"has shape {shape}, not (N, classes); name another with --output, or the classes with --classes"
    if len(shape) != 2:
        return f"has shape {shape}, not (N, {len(stated)}); name another with --output"
    # They may be those of a sidecar or of the metadata, over which --classes goes.
    names = "1 class name is" if len(stated) == 1 else f"{len(stated)} class names are"
    return (
        f"answers with {shape[1]} numbers per image, and {names} given; give {shape[1]} names with --classes, or name "
        "another output with --output"
    )


def free_inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """The inputs that have to be fed: those without an initializer of their name."""
    constants = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in constants]


def shape_of(value: onnx.ValueInfoProto) -> list[int | None]:
    """The declared shape, ``None`` for a dynamic axis."""
    dims = value.type.tensor_type.shape.dim
    # Some exporters write 0 or -1 for a dynamic dimension.
    return [dim.dim_value if dim.dim_value > 0 else None for dim in dims]
