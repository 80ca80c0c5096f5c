from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.contract import InputContract
from qdefense.converters.quantize import QuantizationError, quantize
from qdefense.converters.quantize import opset as subject

from .quantized_nets import CLASSES, LEVELS, NET, SIDE, images, logits, small_net, wide_net


@pytest.mark.parametrize("scheme", ["int4", "int4-a8"])
@pytest.mark.parametrize("opset", [11, 13, 17, 20])
def test_quantize_raises_the_opset_and_answers_as_from_a_new_file(scheme: Any, opset: int) -> None:
    made = quantize(small_net(opset=opset).SerializeToString(), scheme, calibration=images())
    assert [entry.version for entry in onnx.load_from_string(made).opset_import] == [21]
    new = quantize(NET, scheme, calibration=images())
    for level in LEVELS:
        got, expected = (logits(file, images(seed=3), level) for file in (made, new))
        assert np.allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_raised_gives_the_model_itself_when_it_is_new_enough() -> None:
    model = small_net(opset=22)
    assert subject.raised(model, 21, None) is model


def test_quantize_keeps_metadata_when_it_raises_the_opset() -> None:
    model = small_net(opset=13)
    helper.set_model_props(model, {"owner": "us"})
    made = onnx.load_from_string(quantize(model.SerializeToString(), "int4"))
    assert {entry.key for entry in made.metadata_props} == {"owner", "qdefense.quantization"}


def test_raised_feeds_the_model_as_its_contract_says() -> None:
    model = wide_net(opset=17)
    model.graph.input.append(helper.make_tensor_value_info("gain", TensorProto.FLOAT, [1]))
    model.graph.node.insert(0, helper.make_node("Mul", ["image", "gain"], ["louder"]))
    model.graph.node[1].input[0] = "louder"
    contract = InputContract(
        input_name="image",
        output_name="logits",
        height=SIDE,
        width=SIDE,
        class_names=tuple("abc"[:CLASSES]),
        fixed_inputs={"gain": 2.0},
    )
    assert subject.opset_of(subject.raised(model, 21, contract)) == 21
    with pytest.raises(QuantizationError, match="expected one image input, found 2"):
        subject.raised(model, 21, None)


def changed(model: onnx.ModelProto, factor: float) -> onnx.ModelProto:
    for tensor in model.graph.initializer:
        if tensor.name == "w3":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(factor), "w3"))
    return model


@pytest.mark.parametrize("factor", [1.01, np.nan])
def test_raised_refuses_when_the_model_answers_differently(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    converter = subject.version_converter
    real = converter.convert_version
    monkeypatch.setattr(converter, "convert_version", lambda model, opset: changed(real(model, opset), factor))
    message = r"raised from opset 17 to 21 the model answers differently \(by .* of its largest answer\); export it at"
    with pytest.raises(QuantizationError, match=message):
        subject.raised(small_net(opset=17), 21, None)


@pytest.mark.parametrize("kind", [subject.version_converter.ConvertError, RuntimeError])
def test_raised_refuses_when_the_converter_fails(monkeypatch: pytest.MonkeyPatch, kind: type[Exception]) -> None:
    def fail(*_: object) -> None:
        raise kind("no adapter\nfor Upsample")

    monkeypatch.setattr(subject.version_converter, "convert_version", fail)
    with pytest.raises(QuantizationError) as caught:
        subject.raised(small_net(opset=17), 21, None)
    assert str(caught.value) == (
        "the model's opset 17 cannot be raised to 21: no adapter for Upsample; export it at opset 21"
    )


def test_raised_refuses_when_the_two_cannot_be_compared() -> None:
    model = small_net(opset=17)
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = 0
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "side"
    shape = numpy_helper.from_array(np.array([-1, 3, SIDE, SIDE], np.int64), "shape")
    model.graph.initializer.append(shape)
    model.graph.initializer.append(numpy_helper.from_array(np.ones((1, 3, SIDE, SIDE), np.float32), "ones"))
    model.graph.node.insert(0, helper.make_node("Add", ["image", "ones"], ["shifted"]))
    model.graph.node[1].input[0] = "shifted"
    with pytest.raises(QuantizationError, match="the model at opset 21 could not be compared with the one at 17: "):
        subject.raised(model, 21, None)
