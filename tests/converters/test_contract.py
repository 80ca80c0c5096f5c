from __future__ import annotations

import json
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from qdefense.converters.contract import METADATA_KEY, ContractError, InputContract, read_contract, write_contract

Shape = list[int | str | None] | None
IMAGE: Shape = ["batch", 3, 16, 24]
LOGITS: Shape = ["batch", 3]
CONTRACT = InputContract(input_name="image", output_name="logits", height=16, width=24, class_names=("a", "b", "ç"))


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
        input_name="image", output_name="logits", height=16, width=24, class_names=("0", "1", "2"), source="graph"
    )
    assert contract.batch is None


@pytest.mark.parametrize(("stated", "batch"), [(4, 4), ("N", None), (None, None), (0, None), (-1, None)])
def test_read_contract_reads_the_batch_off_the_graph(stated: int | str | None, batch: int | None) -> None:
    model = _model(inputs=(("image", TensorProto.FLOAT, [stated, 3, 16, 24]),))
    assert read_contract(model).batch == batch


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


NOT_AN_IMAGE = "this version drives NCHW RGB float32 images in [0, 1]"


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            _model(inputs=(("image", TensorProto.FLOAT, IMAGE), ("size", TensorProto.FLOAT, [1]))),
            "expected one image input and one output, found inputs ['image', 'size'] and outputs ['logits']; "
            "cut the graph down to the classifier",
        ),
        (
            _model(outputs=(("logits", LOGITS), ("boxes", LOGITS))),
            "expected one image input and one output, found inputs ['image'] and outputs ['logits', 'boxes']; "
            "cut the graph down to the classifier",
        ),
        (
            _model(initializers=("image",)),
            "expected one image input and one output, found inputs [] and outputs ['logits']; "
            "cut the graph down to the classifier",
        ),
        (
            _model(inputs=(("image", TensorProto.UINT8, IMAGE),)),
            f"input 'image' is not a float32 (N, 3, H, W) image batch but [None, 3, 16, 24]; {NOT_AN_IMAGE}",
        ),
        (
            _model(inputs=(("image", TensorProto.FLOAT, ["N", 16, 24, 3]),)),
            f"input 'image' is not a float32 (N, 3, H, W) image batch but [None, 16, 24, 3]; {NOT_AN_IMAGE}",
        ),
        (
            _model(inputs=(("image", TensorProto.FLOAT, ["N", 3, 16]),)),
            f"input 'image' is not a float32 (N, 3, H, W) image batch but [None, 3, 16]; {NOT_AN_IMAGE}",
        ),
        (
            _model(inputs=(("image", TensorProto.FLOAT, None),)),
            f"input 'image' is not a float32 (N, 3, H, W) image batch but []; {NOT_AN_IMAGE}",
        ),
        (
            _model(inputs=(("image", TensorProto.FLOAT, ["N", 3, "H", 24]),)),
            "input 'image' has no fixed height and width: [None, 3, None, 24]; export it with both",
        ),
        (
            _model(inputs=(("image", TensorProto.FLOAT, ["N", 3, 16, -1]),)),
            "input 'image' has no fixed height and width: [None, 3, 16, None]; export it with both",
        ),
        (_model(outputs=(("logits", ["N", "K"]),)), "output 'logits' has shape [None, None], not (N, classes)"),
        (_model(outputs=(("logits", ["N", 0]),)), "output 'logits' has shape [None, None], not (N, classes)"),
        (_model(outputs=(("logits", ["N", 3, 4, 4]),)), "output 'logits' has shape [None, 3, 4, 4], not (N, classes)"),
        (_model(outputs=(("logits", ["N", 65_537]),)), "output 'logits' has 65537 classes, more than 65536"),
    ],
)
def test_read_contract_says_what_is_wrong_when_the_graph_is_no_classifier(model: onnx.ModelProto, message: str) -> None:
    with pytest.raises(ContractError) as caught:
        read_contract(model)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input_name": "x"}, "the contract names 'x' -> 'logits', the graph has 'image' -> 'logits'"),
        ({"output_name": "y"}, "the contract names 'image' -> 'y', the graph has 'image' -> 'logits'"),
        ({"class_names": ["a", "b"]}, "output 'logits' has shape [None, 3], not (N, 2)"),
        ({"class_names": []}, "output 'logits' has shape [None, 3], not (N, classes)"),
        ({"colour": "RGB"}, f"metadata '{METADATA_KEY}' is not a contract: colour: Extra inputs are not permitted"),
        ({"height": 0}, f"metadata '{METADATA_KEY}' is not a contract: height: Input should be greater than 0"),
        ({"layout": "CHWN"}, f"metadata '{METADATA_KEY}' is not a contract: layout: Input should be 'NCHW' or 'NHWC'"),
        ({"layout": "NHWC"}, "the contract says layout 'NHWC', but this version drives this graph with 'NCHW'"),
        ({"channels": "BGR"}, "the contract says channels 'BGR', but this version drives this graph with 'RGB'"),
        ({"dtype": "uint8"}, "the contract says dtype 'uint8', but this version drives this graph with 'float32'"),
        ({"height": 24}, "the contract says height 24, but this version drives this graph with 16"),
        ({"width": 16}, "the contract says width 16, but this version drives this graph with 24"),
        ({"batch": 8}, "the contract says batch 8, but this version drives this graph with None"),
        ({"head": "softmax"}, "the contract says head 'softmax', but this version drives this graph with 'logits'"),
        (
            {"range": [0, 255]},
            "the contract says range (0.0, 255.0), but this version drives this graph with (0.0, 1.0)",
        ),
        (
            {"mean": [0.5, 0.5, 0.5]},
            "the contract says mean (0.5, 0.5, 0.5), but this version drives this graph with (0.0, 0.0, 0.0)",
        ),
        (
            {"std": [2, 2, 2]},
            "the contract says std (2.0, 2.0, 2.0), but this version drives this graph with (1.0, 1.0, 1.0)",
        ),
    ],
)
def test_read_contract_says_what_is_wrong_when_the_metadata_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ContractError) as caught:
        read_contract(_with_metadata(changes))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "where"), [("not json", ": Invalid JSON"), ("[]", ": "), ("{}", "input_name: Field")])
def test_read_contract_says_what_is_wrong_when_the_metadata_are_no_contract(text: str, where: str) -> None:
    model = _model()
    helper.set_model_props(model, {METADATA_KEY: text})
    with pytest.raises(ContractError) as caught:
        read_contract(model)
    assert str(caught.value).startswith(f"metadata '{METADATA_KEY}' is not a contract: {where}")
    assert str(caught.value).endswith("; export the model again or remove it")


def test_read_contract_refuses_a_shape_that_only_the_metadata_make_a_classifier() -> None:
    model = _with_metadata({}, _model(outputs=(("logits", ["N", 3, 4, 4]),)))
    with pytest.raises(ContractError, match=r"^output 'logits' has shape \[None, 3, 4, 4\], not \(N, 3\)$"):
        read_contract(model)
