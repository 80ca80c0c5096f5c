from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.converters import quantize as subject
from qdefense.converters.inspection import inspect_model, runtime_operators
from qdefense.converters.quantize import QuantizationError, quantize, quantize_dynamic, quantize_static
from qdefense.converters.reading import FileRefusedError

CLASSES, SIDE = 3, 8


def small_net(*, opset: int = 21, batch: int | str = "batch", activation: str = "Relu") -> onnx.ModelProto:
    """(x - mean) / std, two convolutions with a residual addition, pooling, one fully connected layer."""
    rng = np.random.default_rng(7)
    tensors, nodes = [], []

    def const(name: str, array: NDArray[Any]) -> str:
        tensors.append(numpy_helper.from_array(array, name))
        return name

    def normal(name: str, *shape: int) -> str:
        return const(name, (rng.normal(size=shape) * 0.4).astype(np.float32))

    def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, [output], name=f"{output}_node", **attributes))

    const("mean", np.full((1, 3, 1, 1), 0.45, np.float32))
    const("std", np.full((1, 3, 1, 1), 0.25, np.float32))
    node("Sub", ["image", "mean"], "centred")
    node("Div", ["centred", "std"], "scaled")
    node("Conv", ["scaled", normal("w1", 4, 3, 3, 3), normal("b1", 4)], "conv1", pads=[1] * 4)
    node(activation, ["conv1"], "relu1", domain="com.microsoft" if activation == "Gelu" else "")
    node("Conv", ["relu1", normal("w2", 4, 4, 3, 3), normal("b2", 4)], "conv2", pads=[1] * 4)
    node("Add", ["conv2", "relu1"], "sum")
    node("Relu", ["sum"], "relu2")
    node("GlobalAveragePool", ["relu2"], "pooled")
    node("Flatten", ["pooled"], "flat")
    node("Gemm", ["flat", normal("w3", CLASSES, 4), normal("b3", CLASSES)], "logits", transB=1)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, CLASSES])],
        tensors,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets[: 2 if activation == "Gelu" else 1], ir_version=8)


def images(count: int = 32, seed: int = 0) -> NDArray[np.float32]:
    coarse = np.random.default_rng(seed).uniform(size=(count, 3, 2, 2))
    return coarse.repeat(4, axis=2).repeat(4, axis=3).astype(np.float32)


def logits(model: bytes, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    result: NDArray[np.float32] = session.run(None, {"image": x})[0]
    return result


def metadata(model: bytes) -> dict[str, str]:
    return {entry.key: entry.value for entry in onnx.load_from_string(model).metadata_props}


NET = small_net().SerializeToString()


@pytest.fixture(scope="module")
def static() -> bytes:
    return quantize(NET, "int8-static", calibration=images())


@pytest.fixture(scope="module")
def dynamic() -> bytes:
    return quantize(NET, "int8-dynamic")


def test_quantize_static_is_integer_from_first_to_last_layer_when_run(static: bytes) -> None:
    assert runtime_operators(static) == {
        "DequantizeLinear": 1,
        "Div": 1,
        "Flatten": 1,
        "QGemm": 1,
        "QLinearAdd": 1,
        "QLinearConv": 2,
        "QLinearGlobalAveragePool": 1,
        "QuantizeLinear": 1,
        "Sub": 1,
    }


def test_quantize_dynamic_uses_integer_kernels_with_unsigned_weights(dynamic: bytes) -> None:
    found = inspect_model(dynamic)
    assert (found.scheme, found.weight_types, found.integer_mac_share) == ("int8-dynamic", ("uint8",), 1.0)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_keeps_the_logits_when_static(method: Any, per_channel: bool) -> None:
    quantized = quantize(NET, "int8-static", calibration=images(), method=method, per_channel=per_channel)
    expected, got = logits(NET, images(64, seed=1)), logits(quantized, images(64, seed=1))
    assert 0 < np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()
    assert inspect_model(quantized).granularity == ("per-channel" if per_channel else "per-tensor")


def test_quantize_keeps_the_logits_when_dynamic(dynamic: bytes) -> None:
    expected, got = logits(NET, images(64, seed=1)), logits(dynamic, images(64, seed=1))
    assert 0 < np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * expected.std()


def test_quantize_static_stays_within_seven_bits_when_range_is_reduced(static: bytes) -> None:
    full = quantize(NET, "int8-static", calibration=images(), reduce_range=False)
    assert inspect_model(static).saturation_layers == ()
    assert largest_weight(static) <= 64 < largest_weight(full) == 127


def largest_weight(model: bytes) -> int:
    tensors = [t for t in onnx.load_from_string(model).graph.initializer if t.data_type == TensorProto.INT8]
    return max(int(np.abs(numpy_helper.to_array(t).astype(int)).max()) for t in tensors)


def test_quantize_static_cuts_outliers_when_percentile() -> None:
    outlier = images(64)
    outlier[:] = 0.5
    outlier[0, :, 0, 0] = 1.0
    scales = {}
    for method, percentile in (("minmax", 99.999), ("percentile", 90.0)):
        quantized = quantize(NET, "int8-static", calibration=outlier, method=method, percentile=percentile)  # type: ignore[arg-type]
        tensors = onnx.load_from_string(quantized).graph.initializer
        scales[method] = next(numpy_helper.to_array(t).item() for t in tensors if t.name == "scaled_scale")
    assert scales["percentile"] < 0.5 * scales["minmax"]


def test_quantize_records_how_it_was_made_when_static() -> None:
    made = quantize(NET, "int8-static", calibration=images(), method="percentile", percentile=99.9, per_channel=False)
    assert json.loads(metadata(made)["qdefense.quantization"]) == {
        "scheme": "int8-static",
        "per_channel": False,
        "reduce_range": True,
        "method": "percentile",
        "percentile": 99.9,
        "calibration_sha256": hashlib.sha256(images().tobytes()).hexdigest(),
        "calibration_images": 32,
        "onnxruntime": onnxruntime.__version__,
    }
    assert " " not in metadata(made)["qdefense.quantization"]


def test_quantize_records_no_percentile_when_minmax(static: bytes) -> None:
    assert "percentile" not in json.loads(metadata(static)["qdefense.quantization"])


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_quantize_keeps_metadata_and_drops_traces(scheme: Any) -> None:
    model = small_net()
    helper.set_model_props(model, {"qdefense.contract": "{}", "owner": "us"})
    model.doc_string = model.graph.doc_string = model.graph.node[2].doc_string = "/home/me/net.py"
    model.graph.node[2].metadata_props.add(key="stack_trace", value="/home/me/net.py")
    model.graph.initializer[0].doc_string = model.graph.input[0].doc_string = "/home/me/net.py"
    made = quantize(model.SerializeToString(), scheme, calibration=images())
    assert {key: value for key, value in metadata(made).items() if key != "qdefense.quantization"} == {
        "qdefense.contract": "{}",
        "owner": "us",
    }
    assert b"/home" not in made
    assert tempfile.gettempdir().encode() not in made


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_quantize_keeps_door_and_opset(scheme: Any) -> None:
    before, after = small_net(), onnx.load_from_string(quantize(NET, scheme, calibration=images()))
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    assert [(entry.domain, entry.version) for entry in after.opset_import] == [("", 21)]
    assert after.ir_version == before.ir_version


def test_quantize_gives_the_same_bytes_when_hashing_differs(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images())
    (tmp_path / "net.onnx").write_bytes(NET)
    code = """
import hashlib, sys, numpy as np
from pathlib import Path
from qdefense.converters.quantize import quantize
model, images = Path("net.onnx").read_bytes(), np.load("images.npy")
for scheme, method in (("int8-static", "minmax"), ("int8-static", "percentile"), ("int8-dynamic", "minmax")):
    print(hashlib.sha256(quantize(model, scheme, calibration=images, method=method)).hexdigest())
assert "torch" not in sys.modules
"""
    runs = [run_python(code, tmp_path, seed) for seed in ("0", "1")]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "net.onnx"]


def run_python(code: str, folder: Path, seed: str) -> str:
    # With telemetry on, importing onnxruntime 1.32 leaves a file in the temporary folder.
    environment = {"PYTHONHASHSEED": seed, "TMPDIR": str(folder), "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_quantize_leaves_console_and_logging_alone_when_percentile(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level)
    with caplog.at_level(logging.DEBUG):
        quantize(NET, "int8-static", calibration=images(), method="percentile")
        quantize(NET, "int8-dynamic")
        logging.getLogger().warning("ours")
    assert [record.message for record in caplog.records if record.name == "root"] == ["ours"]
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), list(root.filters), root.level) == before


def test_quiet_drops_only_the_quantizer_when_logging_on_the_root(caplog: pytest.LogCaptureFixture) -> None:
    with subject._quiet():
        theirs = logging.LogRecord(
            "root", logging.WARNING, subject._QUANTIZER_FOLDER + "/x.py", 1, "theirs", None, None
        )
        logging.getLogger().handle(theirs)
        logging.getLogger().warning("ours")
    logging.getLogger().handle(theirs)
    assert [record.message for record in caplog.records] == ["ours", "theirs"]


def test_quantize_works_when_only_symbolic_inference_knows_an_operator() -> None:
    model = small_net(activation="Gelu")
    assert not subject._types_are_known(model)
    quantized = quantize(model.SerializeToString(), "int8-static", calibration=images())
    assert inspect_model(quantized).integer_mac_share == 1.0
    assert {entry.domain for entry in onnx.load_from_string(quantized).opset_import} == {"", "com.microsoft"}


def test_types_are_unknown_when_inference_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: onnx.ModelProto) -> None:
        raise onnx.shape_inference.InferenceError("no")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert not subject._types_are_known(small_net())


def test_types_are_known_when_all_operators_are_standard() -> None:
    assert subject._types_are_known(small_net())


@pytest.mark.parametrize(("batch", "count"), [("batch", 17), ("batch", 100), (1, 17), (4, 16)])
@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_quantize_uses_every_image_when_count_is_odd(batch: Any, count: int, method: Any) -> None:
    calibration = images(count)
    calibration[:-1] *= 0.1
    model = small_net(batch=batch).SerializeToString()
    quantized = quantize(model, "int8-static", calibration=calibration, method=method)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(quantized).graph.initializer}
    reach = (255 - int(tensors["scaled_zero_point"])) * float(tensors["scaled_scale"])
    assert reach == pytest.approx((calibration.max() - 0.45) / 0.25, rel=0.02)


def test_quantize_takes_opset_eleven_when_per_tensor() -> None:
    quantized = quantize(
        small_net(opset=11).SerializeToString(), "int8-static", calibration=images(), per_channel=False
    )
    assert inspect_model(quantized).scheme == "int8-static"


def refused(match: str, model: bytes = NET, calibration: Any = None, **settings: Any) -> None:
    with pytest.raises(QuantizationError, match=match) as caught:
        quantize_static(model, images() if calibration is None else calibration, **{"input_name": "image"} | settings)
    assert "\n" not in str(caught.value)


def test_quantize_refuses_when_scheme_is_unknown() -> None:
    with pytest.raises(QuantizationError, match=r"unknown scheme 'int2'; choose one of int8-static, int8-dynamic"):
        quantize(NET, "int2")  # type: ignore[arg-type]


def test_quantize_refuses_static_when_images_are_missing() -> None:
    with pytest.raises(QuantizationError, match="int8-static needs calibration images; pass a few hundred"):
        quantize(NET, "int8-static")


@pytest.mark.parametrize("scheme", ["int8-static", "int8-dynamic"])
def test_quantize_refuses_when_already_quantized(scheme: Any, static: bytes, dynamic: bytes) -> None:
    for model in (static, dynamic):
        with pytest.raises(
            QuantizationError, match=r"already quantized \(it has .*Linear.*\); start from the FP32 file"
        ):
            quantize(model, scheme, calibration=images())


def test_quantize_refuses_when_nothing_can_be_quantized() -> None:
    model = small_net()
    del model.graph.node[2:]
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("scaled", TensorProto.FLOAT, None))
    model.graph.output[0].type.tensor_type.shape.SetInParent()
    refused("no Conv, Gemm or MatMul; there is nothing", model.SerializeToString())


def test_quantize_refuses_when_runtime_cannot_load() -> None:
    model = small_net()
    model.opset_import.add(domain="com.microsoft", version=1)
    model.graph.node[3].domain, model.graph.node[3].op_type = "com.microsoft", "NoSuchOperator"
    refused("ONNX Runtime cannot load the file: .*NoSuchOperator.*; export", model.SerializeToString())
    with pytest.raises(QuantizationError, match="cannot load"):
        quantize_dynamic(model.SerializeToString())


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
    with pytest.raises(
        QuantizationError, match=r"quantizer wrote an invalid file: .*sorted.*; take the control flow out"
    ):
        quantize_dynamic(model.SerializeToString())


def test_quantize_refuses_when_file_is_no_model() -> None:
    for scheme in ("int8-static", "int8-dynamic"):
        with pytest.raises(FileRefusedError, match="0 bytes"):
            quantize(b"", scheme, calibration=images())


def test_quantize_static_refuses_when_model_has_two_inputs() -> None:
    model = small_net()
    model.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
    refused("expected one image input, found 2; cut", model.SerializeToString())


def test_quantize_static_refuses_when_input_is_not_float32() -> None:
    model = small_net()
    model.graph.node.insert(0, helper.make_node("Cast", ["image"], ["float"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "float"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    refused("input 'image' is not float32; export", model.SerializeToString())


def test_quantize_static_refuses_when_input_name_is_wrong() -> None:
    refused("the model's input is 'image', not 'x'; name the right one", input_name="x")


def test_quantize_static_refuses_per_channel_when_opset_is_old() -> None:
    refused("per-channel scales need opset 13, the model has 11; export", small_net(opset=11).SerializeToString())


def test_quantize_static_refuses_when_method_is_unknown() -> None:
    refused("unknown calibration method 'entropy'; choose one of minmax, percentile", method="entropy")


@pytest.mark.parametrize("percentile", [50.0, 100.1, float("nan")])
def test_quantize_static_refuses_when_percentile_is_out_of_range(percentile: float) -> None:
    refused(r"percentile is .*, not within \(50, 100\]; 99.999 is usual", method="percentile", percentile=percentile)


@pytest.mark.parametrize("shape", [(32, 3, 8), (32, 3, 8, 9), (32, 1, 8, 8), (32, 8, 8, 3)])
def test_quantize_static_refuses_when_shape_differs(shape: tuple[int, ...]) -> None:
    refused(r"calibration has shape \(32, .*the model's input is \[None, 3, 8, 8\]", calibration=np.zeros(shape, "f4"))


def test_quantize_static_refuses_when_dtype_differs() -> None:
    refused("calibration is uint8, not float32; scale", calibration=np.zeros((32, 3, 8, 8), np.uint8))


def test_quantize_static_refuses_when_images_are_few() -> None:
    refused("calibration has 15 images, fewer than 16; use", calibration=images(15))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_quantize_static_refuses_when_pixels_are_not_finite(value: float) -> None:
    broken = images()
    broken[3, 0, 0, 0] = value
    refused("NaN or infinite pixels; check", calibration=broken)


@pytest.mark.parametrize(("factor", "shift"), [(255.0, 0.0), (1.0, -0.5)])
def test_quantize_static_refuses_when_pixels_leave_the_unit_range(factor: float, shift: float) -> None:
    refused(
        r"pixels in \[.*\], outside \[0, 1\]; divide by 255",
        calibration=images() * np.float32(factor) + np.float32(shift),
    )


def test_quantize_static_refuses_when_count_does_not_fill_fixed_batches() -> None:
    refused("batch is fixed at 3 and calibration has 32 images; use", small_net(batch=3).SerializeToString())
