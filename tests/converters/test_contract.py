from __future__ import annotations

import json
import time
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from qdefense.converters.contract import (
    METADATA_KEY,
    ContractError,
    InputContract,
    StatedContract,
    read_contract,
    write_contract,
)

Shape = list[int | str | None] | None
IMAGE: Shape = ["batch", 3, 16, 24]
LOGITS: Shape = ["batch", 3]
CONTRACT = InputContract(
    input_name="image", output_name="logits", height=16, width=24, class_names=("a", "b", "ç"), pixels_from="metadata"
)


def _model(
    inputs: tuple[tuple[str, int, Shape], ...] = (("image", TensorProto.FLOAT, IMAGE),),
    outputs: tuple[tuple[str, Shape], ...] = (("logits", LOGITS),),
    initializers: tuple[str, ...] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(
        [helper.make_node("Identity", [inputs[0][0]], [outputs[0][0]])],
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs],
        [helper.make_tensor(name, TensorProto.FLOAT, [1], [0.0]) for name in initializers],
    )
    return helper.make_model(graph)


def _image(shape: Shape, kind: int = TensorProto.FLOAT) -> onnx.ModelProto:
    return _model(inputs=(("image", kind, shape),))


def _scores(shape: Shape) -> onnx.ModelProto:
    return _model(outputs=(("logits", shape),))


def _ending_in(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A graph whose last nodes these are: they lead from "scores" to "logits"."""
    model = _model(outputs=(("logits", ["batch", 3]),))
    model.graph.node[0].output[0] = "scores"
    model.graph.node.extend(nodes)
    return model


def _problem(model: onnx.ModelProto, stated: StatedContract | None = None) -> str:
    """What is wrong, on one line."""
    with pytest.raises(ContractError) as caught:
        read_contract(model, stated)
    message = str(caught.value)
    assert message.splitlines() == [message]
    return message


def _with_metadata(changes: dict[str, Any], model: onnx.ModelProto | None = None) -> onnx.ModelProto:
    model = model or _model()
    body = {**CONTRACT.model_dump(mode="json", exclude={"source"}), **changes}
    helper.set_model_props(model, {METADATA_KEY: json.dumps(body)})
    return model


def test_read_contract_gives_back_what_was_written() -> None:
    model = _model()
    write_contract(model, CONTRACT)
    again = onnx.load_from_string(model.SerializeToString())
    assert read_contract(again) == CONTRACT
    assert CONTRACT.classes == 3
    assert read_contract(again).source == "metadata"


def test_write_contract_replaces_the_old_one_and_keeps_other_metadata() -> None:
    model = _model()
    helper.set_model_props(model, {"author": "someone", METADATA_KEY: "{}"})
    write_contract(model, CONTRACT)
    write_contract(model, CONTRACT)
    assert sorted(entry.key for entry in model.metadata_props) == ["author", METADATA_KEY]
    assert read_contract(model) == CONTRACT


def test_write_contract_gives_the_same_bytes_twice() -> None:
    first, second = _model(), _model()
    write_contract(first, CONTRACT)
    write_contract(second, CONTRACT)
    assert first.SerializeToString(deterministic=True) == second.SerializeToString(deterministic=True)


def test_read_contract_reads_the_graph_when_there_is_no_metadata() -> None:
    contract = read_contract(_model())
    assert contract == InputContract(
        input_name="image", output_name="logits", height=16, width=24, class_names=("0", "1", "2"), source="graph",
        pixels_from="graph",
    )  # fmt: skip
    assert contract.batch is None


def test_read_contract_says_who_said_what_the_pixels_are() -> None:
    """Whoever names the classes alone has not said how the file is fed."""
    model, names = _model(), {"class_names": ("a", "b", "c")}
    pixels = {"range": (0, 1), "mean": (0, 0, 0), "std": (1, 1, 1), "channels": "RGB"}
    nobody = read_contract(model, StatedContract.model_validate(names))
    write_contract(model, CONTRACT)
    some = {name: value for name, value in pixels.items() if name != "std"}
    found = [nobody, *(read_contract(model, StatedContract.model_validate(said)) for said in (names, some, pixels))]
    assert [one.source for one in found] == ["options"] * 4
    assert [one.pixels_from for one in found] == ["graph", "metadata", "metadata", "options"]


@pytest.mark.parametrize("fixed", [{}, {"training": 0.0}])
def test_write_contract_leaves_out_what_older_files_do_not_say(fixed: dict[str, float]) -> None:
    model = _model()
    write_contract(model, CONTRACT.model_copy(update={"fixed_inputs": fixed}))
    body = json.loads(next(entry.value for entry in model.metadata_props))
    assert "source" not in body
    assert body.get("fixed_inputs", {}) == fixed


@pytest.mark.parametrize(("stated", "batch"), [(4, 4), ("N", None), (None, None), (0, None), (-1, None)])
def test_read_contract_reads_the_batch_off_the_graph(stated: int | str | None, batch: int | None) -> None:
    assert read_contract(_image([stated, 3, 16, 24])).batch == batch


def test_read_contract_passes_over_inputs_that_have_an_initializer() -> None:
    model = _model(
        inputs=(("image", TensorProto.FLOAT, IMAGE), ("weight", TensorProto.FLOAT, [1])), initializers=("weight",)
    )
    assert read_contract(model).input_name == "image"


@pytest.mark.parametrize("output", [None, ["batch", None], ["batch", "classes"]])
def test_read_contract_takes_the_classes_of_the_metadata_when_the_graph_does_not_say(output: Shape) -> None:
    assert read_contract(_with_metadata({}, _model(outputs=(("logits", output),)))).classes == 3


def test_read_contract_says_metadata_when_the_metadata_claim_another_source() -> None:
    assert read_contract(_with_metadata({"source": "graph"})).source == "metadata"


def test_contract_is_frozen() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        CONTRACT.height = 8  # type: ignore[misc]


# --- which input, which output ----------------------------------------------------------------------------------------

TWO_INPUTS: tuple[tuple[str, int, Shape], ...] = (
    ("image", TensorProto.FLOAT, IMAGE),
    ("training", TensorProto.BOOL, []),
)
TWO_OUTPUTS: tuple[tuple[str, Shape], ...] = (("features", ["batch", 64]), ("logits", LOGITS))


def test_read_contract_takes_the_image_when_the_other_inputs_are_fixed() -> None:
    contract = read_contract(_model(inputs=TWO_INPUTS), StatedContract(fixed_inputs={"training": 0}))
    assert (contract.input_name, contract.fixed_inputs) == ("image", {"training": 0.0})
    named = StatedContract(input_name="image", fixed_inputs={"training": 0})
    assert read_contract(_model(inputs=TWO_INPUTS), named) == contract


def test_read_contract_takes_the_output_that_is_named() -> None:
    contract = read_contract(_model(outputs=TWO_OUTPUTS), StatedContract(output_name="logits"))
    assert (contract.output_name, contract.classes) == ("logits", 3)


NAME_THE_IMAGE = "; name the image with --input and give every other input a value with --fixed-input NAME=VALUE"


@pytest.mark.parametrize(
    ("model", "said", "message"),
    [
        (
            _model(inputs=TWO_INPUTS),
            {},
            f"expected one image input, found 'image' [None, 3, 16, 24], 'training' []{NAME_THE_IMAGE}",
        ),
        (
            _model(inputs=TWO_INPUTS),
            {"input_name": "image"},
            f"expected one image input, found 'image' [None, 3, 16, 24], 'training' []{NAME_THE_IMAGE}",
        ),
        (
            _model(),
            {"fixed_inputs": {"image": 0}},
            f"expected one image input, found 'image' [None, 3, 16, 24]{NAME_THE_IMAGE}",
        ),
        (
            _model(inputs=TWO_INPUTS),
            {"input_name": "training", "fixed_inputs": {"training": 0}},
            f"expected one image input, found 'image' [None, 3, 16, 24], 'training' []{NAME_THE_IMAGE}",
        ),
        (_model(initializers=("image",)), {}, f"expected one image input, found none{NAME_THE_IMAGE}"),
        (
            _model(inputs=TWO_INPUTS),
            {"input_name": "x"},
            "the contract names the input 'x', the graph has ['image', 'training']; name one of them",
        ),
        (
            _model(),
            {"fixed_inputs": {"mode": 0}},
            "the contract names the input 'mode', the graph has ['image']; name one of them",
        ),
        (
            _model(initializers=("weight",)),
            {"fixed_inputs": {"weight": 0}},
            "the contract names the input 'weight', the graph has ['image']; name one of them",
        ),
        (
            _model(outputs=TWO_OUTPUTS),
            {},
            "expected one output, found 'features' [None, 64], 'logits' [None, 3]; "
            "name the one with the class scores with --output",
        ),
        (
            _model(outputs=TWO_OUTPUTS),
            {"output_name": "y"},
            "the contract names the output 'y', the graph has ['features', 'logits']; name one of them",
        ),
    ],
)
def test_read_contract_says_what_to_name_when(model: onnx.ModelProto, said: dict[str, Any], message: str) -> None:
    assert _problem(model, StatedContract.model_validate(said)) == message


# --- the image --------------------------------------------------------------------------------------------------------

NOT_IMAGES = "; expected float32, float16 or uint8 of (N, 3, H, W) or (N, H, W, 3)"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_image(IMAGE, TensorProto.DOUBLE), f"double [None, 3, 16, 24]{NOT_IMAGES}"),
        (_image(IMAGE, TensorProto.INT64), f"int64 [None, 3, 16, 24]{NOT_IMAGES}"),
        (_image(["N", 3, 16]), f"float [None, 3, 16]{NOT_IMAGES}"),
        (_image(["N", 3, 1, 16, 24]), f"float [None, 3, 1, 16, 24]{NOT_IMAGES}"),
        (_image(None), f"float []{NOT_IMAGES}"),
        (_image(IMAGE, 99), f"? [None, 3, 16, 24]{NOT_IMAGES}"),
    ],
)
def test_read_contract_says_what_it_found_when_the_input_is_no_image(model: onnx.ModelProto, message: str) -> None:
    assert _problem(model) == f"input 'image' is no batch of images but {message}"


@pytest.mark.parametrize(
    ("kind", "dtype", "values"),
    [
        (TensorProto.FLOAT, "float32", (0.0, 1.0)),
        (TensorProto.FLOAT16, "float16", (0.0, 1.0)),
        (TensorProto.UINT8, "uint8", (0.0, 255.0)),
    ],
)
def test_read_contract_reads_the_type_off_the_graph(kind: int, dtype: str, values: tuple[float, float]) -> None:
    contract = read_contract(_image(IMAGE, kind))
    assert (contract.dtype, contract.range) == (dtype, values)


@pytest.mark.parametrize(
    ("shape", "said", "layout", "size"),
    [
        (["N", 3, 16, 24], {}, "NCHW", (16, 24)),
        (["N", 16, 24, 3], {}, "NHWC", (16, 24)),
        (["N", 3, 3, 24], {}, "NCHW", (3, 24)),
        (["N", 3, 16, 3], {"layout": "NCHW"}, "NCHW", (16, 3)),
        (["N", 3, 16, 3], {"layout": "nhwc"}, "NHWC", (3, 16)),
        (["N", "C", 16, 24], {"layout": "NCHW"}, "NCHW", (16, 24)),
        (["N", 16, 24, None], {"layout": "NHWC"}, "NHWC", (16, 24)),
        (["N", 3, "H", "W"], {"height": 16, "width": 24}, "NCHW", (16, 24)),
        (["N", "H", 24, 3], {"height": 16}, "NHWC", (16, 24)),
        (["N", 3, 16, -1], {"width": 24}, "NCHW", (16, 24)),
        (["N", 3, 16, 24], {"height": 16, "width": 24}, "NCHW", (16, 24)),
    ],
)
def test_read_contract_finds_layout_and_size(
    shape: Shape, said: dict[str, Any], layout: str, size: tuple[int, int]
) -> None:
    contract = read_contract(_image(shape), StatedContract.model_validate(said))
    assert (contract.layout, (contract.height, contract.width)) == (layout, size)


@pytest.mark.parametrize(
    ("shape", "said", "message"),
    [
        (
            ["N", 3, 16, 3],
            {},
            "is [None, 3, 16, 3]: two axes could be the channels; say --layout NCHW or NHWC",
        ),
        (
            ["N", 1, 16, 24],
            {},
            "is [None, 1, 16, 24]: no axis holds 3 channels; only RGB or BGR images can be driven, and --layout says "
            "which axis is theirs where the graph does not",
        ),
        (
            ["N", "C", "H", "W"],
            {},
            "is [None, None, None, None]: no axis holds 3 channels; only RGB or BGR images can be driven, and --layout "
            "says which axis is theirs where the graph does not",
        ),
        (
            ["N", 3, 16, 24],
            {"layout": "NHWC"},
            "is [None, 3, 16, 24], which is not NHWC with 3 channels; check --layout",
        ),
        (
            ["N", 1, 16, 24],
            {"layout": "NCHW"},
            "is [None, 1, 16, 24], which is not NCHW with 3 channels; check --layout",
        ),
        (
            ["N", 3, "H", 24],
            {},
            "has no fixed height and width: [None, 3, None, 24]; say --size HEIGHTxWIDTH",
        ),
        (
            ["N", 16, 0, 3],
            {},
            "has no fixed height and width: [None, 16, None, 3]; say --size HEIGHTxWIDTH",
        ),
    ],
)
def test_read_contract_says_what_is_unclear_of_the_axes_when(shape: Shape, said: dict[str, Any], message: str) -> None:
    assert _problem(_image(shape), StatedContract.model_validate(said)) == f"input 'image' {message}"


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("range", (0, 255), "(0.0, 255.0)"),
        ("range", (0, 1), "(0.0, 1.0)"),
        ("mean", (0, 0, 0), "(0.0, 0.0, 0.0)"),
        ("std", (1, 1, 1), "(1.0, 1.0, 1.0)"),
    ],
)
def test_read_contract_lets_a_neutral_scaling_pass_when_the_input_takes_codes(
    field: str, value: tuple[float, ...], shown: str
) -> None:
    contract = read_contract(_image(IMAGE, TensorProto.UINT8), StatedContract.model_validate({field: value}))
    assert (contract.range, contract.mean, contract.std) == ((0.0, 255.0), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    ("field", "value", "shown"),
    [
        ("range", (-1, 1), "(-1.0, 1.0)"),
        ("mean", (0.5, 0.5, 0.5), "(0.5, 0.5, 0.5)"),
        ("std", (1, 1, 2), "(1.0, 1.0, 2.0)"),
    ],
)
def test_read_contract_says_that_codes_take_no_scaling_when_one_is_stated(
    field: str, value: tuple[float, ...], shown: str
) -> None:
    message = _problem(_image(IMAGE, TensorProto.UINT8), StatedContract.model_validate({field: value}))
    assert message == f"input 'image' takes uint8 codes, so {field} {shown} can't apply; leave it out"


def test_read_contract_gives_back_a_uint8_contract_that_was_written() -> None:
    model = _image(IMAGE, TensorProto.UINT8)
    contract = read_contract(model)
    write_contract(model, contract)
    assert read_contract(model) == contract.model_copy(update={"source": "metadata", "pixels_from": "metadata"})


# --- what the output means --------------------------------------------------------------------------------------------

_node = helper.make_node
HEADS = {
    "nothing": ((_node("Relu", ["scores"], ["logits"]),), "logits"),
    "Softmax": ((_node("Softmax", ["scores"], ["logits"], axis=1),), "softmax"),
    "LogSoftmax": ((_node("LogSoftmax", ["scores"], ["logits"], axis=1),), "log-softmax"),
    "Sigmoid": ((_node("Sigmoid", ["scores"], ["logits"]),), "sigmoid"),
    "QLinearSoftmax": ((_node("QLinearSoftmax", ["scores"], ["logits"], domain="com.microsoft"),), "softmax"),
    "QLinearSigmoid": ((_node("QLinearSigmoid", ["scores"], ["logits"], domain="com.microsoft"),), "sigmoid"),
    "carriers": (
        (
            _node("Softmax", ["scores"], ["a"], axis=1),
            _node("QuantizeLinear", ["a", "s", "z"], ["b"]),
            _node("DequantizeLinear", ["b", "s", "z"], ["c"]),
            _node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
            _node("Reshape", ["d", "shape"], ["e"]),
            _node("Flatten", ["e"], ["f"]),
            _node("Squeeze", ["f"], ["g"]),
            _node("Identity", ["g"], ["logits"]),
        ),
        "softmax",
    ),
    "a softmax that something follows": (
        (_node("Softmax", ["scores"], ["a"], axis=1), _node("Relu", ["a"], ["logits"])),
        "logits",
    ),
    "a softmax on another output": (
        (_node("Softmax", ["scores"], ["a"], axis=1), _node("Identity", ["scores"], ["logits"])),
        "logits",
    ),
    "a circle": ((_node("Identity", ["a"], ["logits"]), _node("Identity", ["logits"], ["a"])), "logits"),
    "a constant": ((_node("Cast", [], ["logits"], to=TensorProto.FLOAT),), "logits"),
}


@pytest.mark.parametrize(("nodes", "head"), HEADS.values(), ids=list(HEADS))
def test_read_contract_reads_the_head_off_the_graph_when_it_ends_in(
    nodes: tuple[onnx.NodeProto, ...], head: str
) -> None:
    model = _ending_in(*nodes)
    assert read_contract(model).head == head
    assert read_contract(model, StatedContract.model_validate({"head": head})).head == head


def test_read_contract_takes_the_stated_head_when_the_graph_does_not_tell() -> None:
    assert read_contract(_model(), StatedContract(head="log-softmax")).head == "log-softmax"


@pytest.mark.parametrize(
    ("operator", "stated", "remedy"),
    [("Softmax", "logits", "softmax"), ("Sigmoid", "softmax", "sigmoid"), ("LogSoftmax", "softmax", "log-softmax")],
)
def test_read_contract_says_which_head_when_another_one_is_stated(operator: str, stated: Any, remedy: str) -> None:
    message = _problem(_ending_in(_node(operator, ["scores"], ["logits"])), StatedContract(head=stated))
    assert message == (
        f"the contract says that output 'logits' holds {stated}, but the graph ends in {operator}; say --head {remedy}"
    )


NAME_THE_CLASSES = "; name another with --output, or the classes with --classes"


@pytest.mark.parametrize(
    ("model", "said", "message"),
    [
        (_scores(["N", "K"]), {}, f"output 'logits' has shape [None, None], not (N, classes){NAME_THE_CLASSES}"),
        (_scores(["N", 0]), {}, f"output 'logits' has shape [None, None], not (N, classes){NAME_THE_CLASSES}"),
        (_scores(None), {}, f"output 'logits' has shape [], not (N, classes){NAME_THE_CLASSES}"),
        (_scores(["N", 3, 4, 4]), {}, f"output 'logits' has shape [None, 3, 4, 4], not (N, classes){NAME_THE_CLASSES}"),
        (
            _scores(["N", 3, 4, 4]),
            {"class_names": "abc"},
            "output 'logits' has shape [None, 3, 4, 4], not (N, 3); name another with --output",
        ),
        (_scores([3]), {}, f"output 'logits' has shape [3], not (N, classes){NAME_THE_CLASSES}"),
        (
            _model(),
            {"class_names": "ab"},
            "output 'logits' answers with 3 numbers per image, and 2 class names are given; give 3 names with "
            "--classes, or name another output with --output",
        ),
        (
            _model(),
            {"class_names": "a"},
            "output 'logits' answers with 3 numbers per image, and 1 class name is given; give 3 names",
        ),
        (_scores(["N", 1]), {}, "output 'logits' is one number per image; a classifier answers one per class"),
        (_scores(None), {"class_names": "a"}, "output 'logits' is one number per image; a classifier answers one per "),
        (_scores(["N", 65_537]), {}, "output 'logits' has 65537 classes, more than 65536"),
    ],
)
def test_read_contract_says_what_is_wrong_with_the_output_when(
    model: onnx.ModelProto, said: dict[str, Any], message: str
) -> None:
    names = {key: tuple(value) for key, value in said.items()}
    assert _problem(model, StatedContract.model_validate(names)).startswith(message)


@pytest.mark.parametrize("output", [None, ["batch", None]])
def test_read_contract_counts_the_stated_classes_when_the_graph_does_not_say(output: Shape) -> None:
    contract = read_contract(_scores(output), StatedContract(class_names=("dog", "cat")))
    assert (contract.classes, contract.class_names, contract.named) == (2, ("dog", "cat"), True)
    assert not read_contract(_model()).named


# --- who says it: options over sidecar over metadata over graph -------------------------------------------------------


def test_read_contract_takes_the_strongest_source_for_each_field() -> None:
    model = _with_metadata({"mean": [0.5, 0.5, 0.5], "std": [2, 2, 2], "class_names": ["x", "y", "z"]})
    stated = StatedContract(mean=(0.25, 0.25, 0.25), channels="BGR")
    contract = read_contract(model, stated)
    assert (contract.mean, contract.channels) == ((0.25, 0.25, 0.25), "BGR"), "stated"
    assert (contract.std, contract.class_names) == ((2.0, 2.0, 2.0), ("x", "y", "z")), "of the metadata"
    assert (contract.height, contract.dtype, contract.source) == (16, "float32", "options")


@pytest.mark.parametrize(
    ("metadata", "stated", "source"),
    [
        (False, None, "graph"),
        (False, StatedContract(), "graph"),
        (True, None, "metadata"),
        (True, StatedContract(source="sidecar"), "metadata"),
        (True, StatedContract(head="logits", source="sidecar"), "sidecar"),
        (True, StatedContract(head="logits"), "options"),
        (False, StatedContract(head="logits"), "options"),
    ],
)
def test_read_contract_names_the_strongest_source_that_said_anything(
    metadata: bool, stated: StatedContract | None, source: str
) -> None:
    assert read_contract(_with_metadata({}) if metadata else _model(), stated).source == source


def test_read_contract_drives_what_older_versions_refused() -> None:
    changes = {"layout": "NHWC", "channels": "BGR", "range": [0, 255], "mean": [1, 2, 3], "std": [4, 5, 6]}
    contract = read_contract(_with_metadata(changes, _image(["N", 16, 24, 3])))
    assert contract.model_dump(include=set(changes)) == {
        "layout": "NHWC",
        "channels": "BGR",
        "range": (0.0, 255.0),
        "mean": (1.0, 2.0, 3.0),
        "std": (4.0, 5.0, 6.0),
    }


NO_CONTRACT = f"metadata '{METADATA_KEY}' is not a contract: "


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "x"}, "the contract names the input 'x', the graph has ['image']; name one of them"),
        ({"output_name": "y"}, "the contract names the output 'y', the graph has ['logits']; name one of them"),
        ({"class_names": ["a", "b"]}, "output 'logits' answers with 3 numbers per image, and 2 class names are given"),
        ({"class_names": []}, "output 'logits' has shape [None, 3], not (N, classes)"),
        ({"class_names": ["a", "b", "a"]}, f"{NO_CONTRACT}class_names: class 'a' is named twice; export the model"),
        ({"colour": "RGB"}, f"{NO_CONTRACT}colour: there is no such entry; export the model again or remove"),
        ({"height": 0}, f"{NO_CONTRACT}height: Input should be greater than 0"),
        ({"layout": "CHWN"}, f"{NO_CONTRACT}layout: Input should be 'NCHW' or 'NHWC'"),
        ({"range": [1, 1]}, f"{NO_CONTRACT}range: 1 to 1 is no range from low to high"),
        ({"std": [1, 0, 1]}, f"{NO_CONTRACT}std: a standard deviation must be above 0"),
        ({"layout": "NHWC"}, "input 'image' is [None, 3, 16, 24], which is not NHWC with 3 channels; check --layout"),
        ({"dtype": "uint8"}, "the contract says dtype 'uint8', the graph has 'float32'; correct the contract"),
        ({"height": 24}, "the contract says height 24, the graph has 16; correct the contract"),
        ({"width": 16}, "the contract says width 16, the graph has 24; correct the contract"),
        ({"batch": 8}, "the contract says batch 8, the graph has None; correct the contract"),
    ],
)
def test_read_contract_says_what_is_wrong_when_the_metadata_do_not_fit(changes: dict[str, Any], message: str) -> None:
    assert _problem(_with_metadata(changes)).startswith(message)


@pytest.mark.parametrize("field", ["height", "width"])
def test_read_contract_says_what_is_wrong_when_the_stated_size_is_not_the_graphs(field: str) -> None:
    message = _problem(_model(), StatedContract.model_validate({field: 99}))
    actual = {"height": 16, "width": 24}[field]
    assert message == f"the contract says {field} 99, the graph has {actual}; correct the contract"


@pytest.mark.parametrize(
    ("text", "where"), [("not json", "Invalid JSON"), ("[]", "Input should be"), ("{}", "input_name: Field")]
)
def test_read_contract_says_what_is_wrong_when_the_metadata_are_no_contract(text: str, where: str) -> None:
    model = _model()
    helper.set_model_props(model, {METADATA_KEY: text})
    message = _problem(model)
    assert message.startswith(f"{NO_CONTRACT}{where}")
    assert message.endswith("; export the model again or remove it")


def test_read_contract_says_that_it_does_not_hold_together_when_only_the_whole_is_wrong() -> None:
    stated = StatedContract.model_construct(range=(1.0, 0.0), source="options")
    assert (
        _problem(_model(), stated) == "the contract does not hold together: range: 1 to 0 is no range from low to high"
    )


# --- values -----------------------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")
WRONG_VALUES = {
    "range that falls": ({"range": (1, 0)}, "1 to 0 is no range from low to high"),
    "range that stands": ({"range": (0.5, 0.5)}, "0.5 to 0.5 is no range from low to high"),
    "range from nan": ({"range": (NAN, 1)}, "nan to 1 is no range from low to high"),
    "range to infinity": ({"range": (0, INF)}, "0 to inf is no range from low to high"),
    "mean nan": ({"mean": (0, NAN, 0)}, "a value is not finite"),
    "mean infinite": ({"mean": (0, 0, -INF)}, "a value is not finite"),
    "mean of two": ({"mean": (0, 0)}, "Field required"),
    "std zero": ({"std": (1, 1, 0)}, "a standard deviation must be above 0"),
    "std negative": ({"std": (-1, 1, 1)}, "a standard deviation must be above 0"),
    "std nan": ({"std": (1, NAN, 1)}, "a value is not finite"),
    "class named twice": ({"class_names": ("a", "b", "b", "a")}, "class 'a' is named twice"),
    "fixed input nan": ({"fixed_inputs": {"flag": NAN}}, "Input should be a finite number"),
    "fixed input infinite": ({"fixed_inputs": {"flag": INF}}, "Input should be a finite number"),
    "height zero": ({"height": 0}, "Input should be greater than 0"),
    "resize rule": ({"resize": "lanczos"}, "Input should be 'none', 'nearest', 'bilinear', 'bicubic' or 'crop'"),
    "head": ({"head": "argmax"}, "Input should be 'logits', 'softmax', 'log-softmax' or 'sigmoid'"),
    "channels": ({"channels": "GBR"}, "Input should be 'RGB' or 'BGR'"),
    "an unknown field": ({"colour": "RGB"}, "Extra inputs are not permitted"),
}


@pytest.mark.parametrize(("values", "message"), WRONG_VALUES.values(), ids=list(WRONG_VALUES))
def test_contract_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        StatedContract.model_validate(values)
    with pytest.raises(ValidationError, match=message):
        InputContract.model_validate({**CONTRACT.model_dump(), **values})


def test_contract_takes_small_letters_and_a_single_precision_std() -> None:
    stated = StatedContract.model_validate({"layout": "nhwc", "channels": "bgr", "std": (1e-6, 1, 1)})
    assert stated.values == {"layout": "NHWC", "channels": "BGR", "std": (1e-6, 1.0, 1.0)}


def test_contract_checks_65536_class_names_in_no_time() -> None:
    names = tuple(map(str, range(65_536)))
    began = time.perf_counter()
    assert StatedContract(class_names=names).class_names == names
    assert time.perf_counter() - began < 1, "an early version compared every two of them, for minutes"


def test_stated_contract_is_empty_when_nothing_is_said() -> None:
    assert StatedContract().values == StatedContract(source="sidecar").values == {}


def test_read_contract_lets_no_metadata_choose_the_output_that_is_judged() -> None:
    model = _with_metadata({}, _model(outputs=(("logits", LOGITS), ("others", LOGITS))))
    with pytest.raises(ContractError, match="name the one with the class scores with --output"):
        read_contract(model)
    assert read_contract(model, StatedContract(output_name="others")).output_name == "others"


def test_read_contract_lets_no_metadata_set_the_other_inputs() -> None:
    inputs = (("image", TensorProto.FLOAT, IMAGE), ("mode", TensorProto.FLOAT, [1]))
    model = _with_metadata({"fixed_inputs": {"mode": 0.0}}, _model(inputs=inputs))
    with pytest.raises(ContractError, match="give every other input a value with --fixed-input"):
        read_contract(model)
    said = StatedContract(input_name="image", fixed_inputs={"mode": 1.0})
    assert read_contract(model, said).fixed_inputs == {"mode": 1.0}


def test_named_tells_stated_numbers_from_stand_ins() -> None:
    assert not read_contract(_model()).named
    assert read_contract(_model(), StatedContract(class_names=("0", "1", "2"))).named
