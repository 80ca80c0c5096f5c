from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters.inspection import inspect_model
from qdefense.converters.quantize import QuantizationError, int4, preparing, quantize
from qdefense.converters.reading import FileRefusedError

from .quantized_nets import CLASSES, NET, images, small_net

SCHEMES: Any = ("int8-static", "int8-dynamic", "int4", "int4-a8")


def refused(match: str, model: onnx.ModelProto, scheme: Any = "int8-static") -> None:
    with pytest.raises(QuantizationError, match=match) as caught:
        quantize(model.SerializeToString(), scheme, calibration=images())
    assert "\n" not in str(caught.value)


def test_quiet_drops_only_the_quantizer_when_logging_on_the_root(caplog: pytest.LogCaptureFixture) -> None:
    with preparing._quiet():
        theirs = logging.LogRecord(
            "root", logging.WARNING, preparing._QUANTIZER_FOLDER + "/x.py", 1, "theirs", None, None
        )
        logging.getLogger().handle(theirs)
        logging.getLogger().warning("ours")
    logging.getLogger().handle(theirs)
    assert [record.message for record in caplog.records] == ["ours", "theirs"]


def test_quantize_works_when_only_symbolic_inference_knows_an_operator() -> None:
    model = small_net(activation="Gelu")
    assert not preparing._types_are_known(model)
    quantized = quantize(model.SerializeToString(), "int8-static", calibration=images())
    assert inspect_model(quantized).integer_mac_share == 1.0
    assert {entry.domain for entry in onnx.load_from_string(quantized).opset_import} == {"", "com.microsoft"}


def test_types_are_unknown_when_inference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: onnx.ModelProto) -> None:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert not preparing._types_are_known(small_net())


def test_types_are_known_when_all_operators_are_standard() -> None:
    assert preparing._types_are_known(small_net())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_refuses_when_already_quantized(scheme: Any) -> None:
    for model in (quantize(NET, kind, calibration=images()) for kind in SCHEMES):
        with pytest.raises(
            QuantizationError, match=r"already quantized \(it has .*Linear.*\); start from the FP32 file"
        ):
            quantize(model, scheme, calibration=images())


def test_quantize_refuses_when_nothing_can_be_quantized() -> None:
    model = small_net()
    del model.graph.node[2:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, None))
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    refused("no Conv, Gemm or MatMul; there is nothing", model)


def test_quantize_refuses_when_runtime_cannot_load() -> None:
    model = small_net()
    model.opset_import.add(domain="com.microsoft", version=1)
    model.graph.node[3].domain, model.graph.node[3].op_type = "com.microsoft", "NoSuchOperator"
    refused("ONNX Runtime cannot load the file: .*NoSuchOperator.*; export", model)
    for scheme in SCHEMES:
        refused("ONNX Runtime cannot load the file", model, scheme)


def test_quantize_refuses_when_quantizer_writes_an_invalid_file() -> None:
    """It moves the last layer behind a branch that reads the logits from outside."""
    model = small_net()
    bodies = {}
    for name in ("then_branch", "else_branch"):
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, [None, CLASSES])
        bodies[name] = helper.make_graph([helper.make_node("Identity", ["logits"], [name])], name, [], [out])
    first = helper.make_node("ReduceMax", ["image"], ["highest"], keepdims=0)
    model.graph.node.extend([first, helper.make_node("Cast", ["highest"], ["any"], to=TensorProto.BOOL)])
    model.graph.node.append(helper.make_node("If", ["any"], ["out"], **bodies))
    model.graph.output[0].name = "out"
    refused(r"quantizer wrote an invalid file: .*sorted.*; take the control flow out", model, "int8-dynamic")


def test_quantize_refuses_when_the_result_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(source: Any, target: Any, **_: Any) -> None:
        model = onnx.load(source)
        model.graph.node[2].domain, model.graph.node[2].op_type = "com.microsoft", "NoSuchOperator"
        model.opset_import.add(domain="com.microsoft", version=1)
        onnx.save(model, target)

    monkeypatch.setattr("onnxruntime.quantization.quantize_dynamic", breaking)
    refused("the quantized file does not load: .*NoSuchOperator.*; choose another", small_net(), "int8-dynamic")


def test_quantize_refuses_when_file_is_no_model() -> None:
    for scheme in SCHEMES:
        with pytest.raises(FileRefusedError, match="0 bytes"):
            quantize(b"", scheme, calibration=images())


def test_quantize_static_refuses_when_model_has_two_inputs() -> None:
    model = small_net()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    refused("expected one image input, found 2; cut", model)


def test_quantize_static_refuses_when_input_is_not_float32() -> None:
    model = small_net()
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "float"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    refused("input 'image' is not float32; export", model)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_failing_quantizer_is_told_in_one_line(scheme: Any) -> None:
    model = small_net()
    weight = next(tensor for tensor in model.graph.initializer if tensor.name == "w1")
    weight.CopyFrom(numpy_helper.from_array(np.full((4, 3, 3, 3), np.nan, np.float32), "w1"))
    refused(r"ONNX Runtime's quantizer fails \(.*\); check that the weights", model, scheme)


def test_failing_shape_inference_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = small_net()
    model.graph.node[3].CopyFrom(
        helper.make_node(
            "FusedConv", ["conv1", "w2"], ["relu1"], domain="com.microsoft", activation="Relu", pads=[1] * 4
        )
    )
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    refused(r"ONNX Runtime's quantizer fails \(Exception: Incomplete symbolic shape inference\)", model)
    assert not list(tmp_path.iterdir())  # what ONNX Runtime has of the model by then


def test_our_own_mistake_is_not_told_as_the_runtime_s(monkeypatch: pytest.MonkeyPatch) -> None:
    def mistake(*_: Any) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(int4, "pack_weights", mistake)
    with pytest.raises(KeyError, match="ours"):
        quantize(small_net().SerializeToString(), "int4")
