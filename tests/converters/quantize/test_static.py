from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from qdefense.converters.inspection import inspect_model, runtime_operators
from qdefense.converters.quantize import QuantizationError, quantize, quantize_static, settings_of
from qdefense.converters.reading import tensor_array

from .quantized_nets import (
    LEVELS,
    NET,
    WIDE,
    constants,
    images,
    logits,
    metadata,
    relative_error,
    small_net,
    weight_types,
)

TYPES = ["u8s8", "s8s8", "u8u8"]
FORMATS = ["qdq", "qoperator"]


@functools.cache
def wide(format_: Any, types: Any, per_channel: bool, reduce_range: bool | None = None) -> bytes:
    return quantize(
        WIDE,
        "int8-static",
        calibration=images(),
        format=format_,
        types=types,
        per_channel=per_channel,
        reduce_range=reduce_range,
    )


def test_quantize_static_is_integer_from_first_to_last_layer_when_run() -> None:
    assert runtime_operators(quantize_static(NET, images())) == {
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


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_static_has_the_types_of_its_name_and_keeps_the_logits(
    format_: Any, types: Any, per_channel: bool
) -> None:
    made = wide(format_, types, per_channel)
    assert weight_types(made) == {"UINT8" if types == "u8u8" else "INT8"}
    assert activation_types(made) == {"UINT8" if types.startswith("u8") else "INT8"}
    assert ("Conv" in operators(made)) == (format_ == "qdq")
    assert ("QLinearConv" in operators(made)) == (format_ == "qoperator")
    assert 0 < relative_error(WIDE, made) < 0.06
    assert {len(logits(made, images(2), level)) for level in LEVELS} == {2}
    expected = settings_of("int8-static", format=format_, types=types, per_channel=per_channel)
    assert json.loads(metadata(made)["qdefense.quantization"]).get("name", expected.name) == expected.name


def activation_types(model: bytes) -> set[str]:
    """Of the zero points that quantizers read, of one tensor: those of weights are constants already."""
    graph = onnx.load_from_string(model).graph
    zero_points = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {TensorProto.DataType.Name(t.data_type) for t in graph.initializer if t.name in zero_points}


def operators(model: bytes) -> set[str]:
    return {node.op_type for node in onnx.load_from_string(model).graph.node}


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("types", TYPES)
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_static_has_scales_above_zero_and_one_zero_point_for_all_channels(
    format_: Any, types: Any, per_channel: bool
) -> None:
    """ONNX Runtime's QLinearConv takes no other."""
    made = wide(format_, types, per_channel)
    arrays = constants(made)
    scales = [array for name, array in arrays.items() if name.endswith("_scale")]
    assert all((scale > 0).all() and np.isfinite(scale).all() for scale in scales)
    assert (max(scale.size for scale in scales) > 1) == per_channel
    for name in ("stem_w", "plain_w", "depthwise_w", "grouped_w", "gemm_w", "matmul_w"):
        zero_points = arrays[f"{name}_zero_point"]
        assert len(np.unique(zero_points)) == 1
        assert arrays[f"{name}_scale"].size == zero_points.size
        if types != "u8u8":
            assert (zero_points == 0).all()


@pytest.mark.parametrize("format_", FORMATS)
@pytest.mark.parametrize("types", ["u8s8", "s8s8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_static_stays_within_seven_bits_when_range_is_reduced(
    format_: Any, types: Any, per_channel: bool
) -> None:
    reduced, full = wide(format_, types, per_channel), wide(format_, types, per_channel, reduce_range=False)
    assert inspect_model(reduced).saturation_layers == ()
    assert largest_weight(reduced) <= 64 < largest_weight(full) == 127


def largest_weight(model: bytes) -> int:
    tensors = onnx.load_from_string(model).graph.initializer
    weights = [tensor_array(tensor) for tensor in tensors if tensor.data_type == TensorProto.INT8 and len(tensor.dims)]
    return max(int(np.abs(weight.astype(int)).max()) for weight in weights)


@pytest.mark.parametrize("method", ["minmax", "percentile"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_static_keeps_the_logits_whatever_the_method(method: Any, per_channel: bool) -> None:
    made = quantize(NET, "int8-static", calibration=images(), method=method, per_channel=per_channel)
    assert 0 < relative_error(NET, made) < 0.05
    assert inspect_model(made).granularity == ("per-channel" if per_channel else "per-tensor")


def test_quantize_static_cuts_outliers_when_percentile() -> None:
    outlier = images(64)
    outlier[:] = 0.5
    outlier[0, :, 0, 0] = 1.0
    scales = [
        constants(quantize(NET, "int8-static", calibration=outlier, percentile=percentile))["scaled_scale"]
        for percentile in (None, 99.5, 90.0)
    ]
    assert scales[2] < 0.5 * scales[0]
    assert scales[2] <= scales[1] <= scales[0]


def test_quantize_static_records_how_it_was_made() -> None:
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


def test_quantize_static_takes_opset_eleven_when_per_tensor() -> None:
    made = quantize(small_net(opset=11).SerializeToString(), "int8-static", calibration=images(), per_channel=False)
    assert inspect_model(made).scheme == "int8-static"


def test_quantize_static_refuses_per_channel_when_opset_is_old() -> None:
    with pytest.raises(QuantizationError, match="per-channel scales need opset 13, the model has 11; export"):
        quantize_static(small_net(opset=11).SerializeToString(), images())


def test_quantize_static_leaves_its_files_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    quantize(NET, "int8-static", calibration=images(), format="qoperator", types="u8u8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("attributes", "on_codes"), [({"mode": "linear"}, True), ({"mode": "cubic"}, False)])
def test_resize_runs_in_the_operator_format(attributes: dict[str, Any], on_codes: bool) -> None:
    """ONNX Runtime has the cubic mode for floats only, and finds that out when the file runs."""
    model = small_net()
    sizes = onnx.numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    model.graph.initializer.append(sizes)
    model.graph.node[6].output[0] = "small"
    model.graph.node.insert(7, onnx.helper.make_node("Resize", ["small", "", "scales"], ["relu2"], **attributes))
    file = quantize(model.SerializeToString(), "int8-static", calibration=images(), format="qoperator")
    nodes = onnx.load_from_string(file).graph.node
    producers = {name: node.op_type for node in nodes for name in node.output}
    (resize,) = (node for node in nodes if node.op_type == "Resize")
    assert (producers[resize.input[0]] != "DequantizeLinear") == on_codes
    assert np.isfinite(logits(file, images())).all()
