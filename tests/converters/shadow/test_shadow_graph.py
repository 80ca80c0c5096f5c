from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import pytest
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static

from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.converters.shadow import Shadow, ShadowError, build_shadow, optimized_model, runtime_saturates

from .shadow_graphs import Array, graph_model, run_shadow, session_output

Source = Literal["optimized", "shipped"]
CLASSES = 7


def images(count: int, seed: int = 0) -> Array:
    """Flat patches with noise, so that rows differ much and logits too."""
    rng = np.random.default_rng(seed)
    levels = rng.uniform(0, 1, (count, 3, 4, 4)).repeat(3, 2).repeat(3, 3)
    return np.clip(levels + rng.normal(0, 0.1, levels.shape), 0, 1).astype(np.float32)


class Weights:
    """Random weights of a residual network, collected under their initializers' names."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(11)
        self.values: dict[str, Array] = {
            "mean": np.array([0.49, 0.48, 0.44], dtype=np.float32).reshape(1, 3, 1, 1),
            "std": np.array([0.2, 0.19, 0.21], dtype=np.float32).reshape(1, 3, 1, 1),
        }

    def conv(self, name: str, x: str, y: str, size: tuple[int, int, int], stride: int = 1) -> NodeProto:
        """A convolution with bias; the size is outputs, inputs and kernel."""
        outputs, inputs, kernel = size
        spread = (2 / (inputs * kernel**2)) ** 0.5
        self.values[f"{name}.w"] = self.rng.normal(0, spread, (outputs, inputs, kernel, kernel)).astype(np.float32)
        self.values[f"{name}.b"] = self.rng.normal(0, 0.2, outputs).astype(np.float32)
        return helper.make_node(
            "Conv", [x, f"{name}.w", f"{name}.b"], [y], name=name, strides=[stride] * 2, pads=[kernel // 2] * 4
        )


def residual_network() -> bytes:
    """Normalisation, a stem, one identity block, one strided block, global pooling, a linear layer."""
    weights = Weights()
    weights.values["fc.w"] = weights.rng.normal(0, 0.5, (CLASSES, 16)).astype(np.float32)
    weights.values["fc.b"] = weights.rng.normal(0, 0.2, CLASSES).astype(np.float32)
    nodes = [
        helper.make_node("Sub", ["x", "mean"], ["centred"]),
        helper.make_node("Div", ["centred", "std"], ["normal"]),
        weights.conv("stem", "normal", "stem.c", (8, 3, 3)),
        helper.make_node("Relu", ["stem.c"], ["stem"]),
        weights.conv("one", "stem", "one.c", (8, 8, 3)),
        helper.make_node("Relu", ["one.c"], ["one"]),
        weights.conv("two", "one", "two.c", (8, 8, 3)),
        helper.make_node("Add", ["two.c", "stem"], ["first.s"]),
        helper.make_node("Relu", ["first.s"], ["first"]),
        weights.conv("three", "first", "three.c", (16, 8, 3), stride=2),
        helper.make_node("Relu", ["three.c"], ["three"]),
        weights.conv("four", "three", "four.c", (16, 16, 3)),
        weights.conv("short", "first", "short.c", (16, 8, 1), stride=2),
        helper.make_node("Add", ["four.c", "short.c"], ["second.s"]),
        helper.make_node("Relu", ["second.s"], ["second"]),
        helper.make_node("GlobalAveragePool", ["second"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"], axis=1),
        helper.make_node("Gemm", ["flat", "fc.w", "fc.b"], ["y"], name="fc", transB=1),
    ]
    return graph_model(nodes, images(1), weights.values, opset=21)


class Calibration(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self) -> None:
        self.batches: Iterator[dict[str, Array]] = iter([{"x": images(16, seed)} for seed in (1, 2, 3, 4)])

    def get_next(self) -> dict[str, Array] | None:
        return next(self.batches, None)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The network in float, static INT8 with reduced and full range, and dynamic INT8."""
    folder: Path = tmp_path_factory.mktemp("models")
    (folder / "float.onnx").write_bytes(residual_network())
    for name, reduced in (("static", True), ("static full", False)):
        quantize_static(
            folder / "float.onnx", folder / f"{name}.onnx", Calibration(), quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True, reduce_range=reduced,
        )  # fmt: skip
    quantize_dynamic(folder / "float.onnx", folder / "dynamic.onnx", weight_type=QuantType.QUInt8)
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shadows(models: dict[str, bytes]) -> dict[tuple[str, Source], Shadow]:
    sources: tuple[Source, Source] = ("optimized", "shipped")
    return {(name, source): build_shadow(model, source=source) for name, model in models.items() for source in sources}


Shadows = dict[tuple[str, Source], Shadow]
SOURCES: tuple[Source, Source] = ("optimized", "shipped")
LEVELS = {"optimized": "ORT_ENABLE_ALL", "shipped": "ORT_DISABLE_ALL"}


@pytest.mark.parametrize("source", SOURCES)
def test_float_shadow_equals_session(models: dict[str, bytes], shadows: Shadows, source: Source) -> None:
    x = images(64)
    expected = session_output(models["float"], x, level=LEVELS[source])
    assert np.abs(run_shadow(shadows["float", source], x) - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("name", ["static", "static full"])
def test_static_shadow_of_optimized_graph_equals_session_bit_for_bit(
    models: dict[str, bytes], shadows: Shadows, name: str
) -> None:
    x = images(256)
    expected = session_output(models[name], x)
    assert len(np.unique(expected.argmax(1))) > 1
    np.testing.assert_array_equal(run_shadow(shadows[name, "optimized"], x, saturate=runtime_saturates()), expected)


def test_static_shadow_is_exact_on_the_gradient_path_too(models: dict[str, bytes], shadows: Shadows) -> None:
    x = images(64)
    np.testing.assert_array_equal(
        run_shadow(shadows["static", "optimized"], x, exact=False), session_output(models["static"], x)
    )


def test_static_shadow_of_shipped_graph_is_within_one_step_of_session(
    models: dict[str, bytes], shadows: Shadows
) -> None:
    # this graph convolves in floats before it rounds: a sum that differs in its last bit may cross a rounding point
    x = images(256)
    expected = session_output(models["static"], x, level="ORT_DISABLE_ALL")
    found = run_shadow(shadows["static", "shipped"], x)
    step = np.diff(np.unique(expected)).min()
    assert np.abs(found - expected).max() <= 1.01 * step
    assert (found == expected).all(1).mean() > 0.9
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.995


@pytest.mark.parametrize("source", SOURCES)
def test_dynamic_shadow_equals_session_at_batch_one(models: dict[str, bytes], shadows: Shadows, source: Source) -> None:
    x = images(64)
    expected = session_output(models["dynamic"], x, level=LEVELS[source], batch=1)
    found = run_shadow(shadows["dynamic", source], x)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("source", SOURCES)
def test_row_of_dynamic_shadow_does_not_depend_on_its_batch(shadows: Shadows, source: Source) -> None:
    shadow, x = shadows["dynamic", source], images(16)
    x[3] *= 0.1
    alone = np.concatenate([run_shadow(shadow, x[at : at + 1]) for at in range(16)])
    np.testing.assert_allclose(run_shadow(shadow, x), alone, rtol=0, atol=1e-6 * np.abs(alone).max())


@pytest.mark.parametrize("name", ["float", "static", "static full", "dynamic"])
@pytest.mark.parametrize("source", SOURCES)
def test_gradients_are_finite_and_not_zero(shadows: Shadows, name: str, source: Source) -> None:
    x = torch.from_numpy(images(32)).requires_grad_()
    logits = shadows[name, source](x)
    torch.nn.functional.cross_entropy(logits, torch.arange(32) % CLASSES).backward()
    assert x.grad is not None
    assert torch.isfinite(x.grad).all()
    assert (x.grad.flatten(1).abs().amax(1) > 0).all()


@pytest.mark.parametrize("name", ["static", "static full", "dynamic"])
def test_gradient_points_the_way_of_the_float_network(shadows: Shadows, name: str) -> None:
    gradients = []
    for chosen in ("float", name):
        x = torch.from_numpy(images(32)).requires_grad_()
        (gradient,) = torch.autograd.grad(shadows[chosen, "optimized"](x)[:, 2].sum(), x)
        gradients.append(gradient.flatten(1))
    assert torch.nn.functional.cosine_similarity(*gradients).median() > 0.9


def test_gradient_is_zero_where_the_input_is_clipped(shadows: Shadows) -> None:
    x = torch.from_numpy(images(8))
    x[:4] = x[:4] * 1e-3 + 40.0
    x.requires_grad_()
    shadows["static", "optimized"](x)[:, 1].sum().backward()
    assert x.grad is not None
    assert (x.grad[:4] == 0).all()
    assert (x.grad[4:] != 0).any()


@pytest.mark.parametrize("name", ["float", "static", "dynamic"])
def test_same_input_gives_same_bits(shadows: Shadows, name: str) -> None:
    shadow, x = shadows[name, "optimized"], images(32)
    np.testing.assert_array_equal(run_shadow(shadow, x, exact=False), run_shadow(shadow, x, exact=False))


def test_double_twin_agrees_with_finite_differences(shadows: Shadows) -> None:
    twin = shadows["float", "optimized"].to_double()
    x = torch.from_numpy(images(4)).double().requires_grad_()
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits = twin(x)
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    step = 1e-6
    with torch.no_grad():
        change = twin(x + step * direction)[:, 1].sum() - twin(x - step * direction)[:, 1].sum()
    assert logits.dtype == torch.float64
    torch.testing.assert_close(change / (2 * step), (gradient * direction).sum(), rtol=1e-6, atol=0)


def test_double_twin_of_quantized_graph_is_refused(shadows: Shadows) -> None:
    with pytest.raises(ShadowError, match="a quantized shadow can't run in float64: rounding has no derivative"):
        shadows["static", "shipped"].to_double()


def test_shadow_states_what_it_was_built_from(shadows: Shadows) -> None:
    shipped = shadows["float", "shipped"]
    assert (shipped.source, shipped.input_name, shipped.output_name) == ("shipped", "x", "y")
    assert (shipped.quantization, shipped.is_quantized) == ("float", False)
    assert shipped.operators[:4] == ("Sub", "Div", "Conv", "Relu")
    assert shipped.node_names[2] == "stem"
    assert len(shipped.operators) == len(shipped.node_names) == 18
    for name, kind in (("static", "static"), ("static full", "static"), ("dynamic", "dynamic")):
        for source in SOURCES:
            assert (shadows[name, source].quantization, shadows[name, source].is_quantized) == (kind, True)
    assert "QLinearConv" in shadows["static", "optimized"].operators
    assert "QuantizeLinear" in shadows["static", "shipped"].operators


def initializers(model: bytes) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load_from_string(model).graph.initializer}


def test_parameters_carry_the_names_and_values_of_initializers(models: dict[str, bytes], shadows: Shadows) -> None:
    held = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(models["float"]).graph.initializer
    }
    found = shadows["float", "shipped"].parameters_by_initializer
    assert set(found) == set(held)
    for name, parameter in found.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), held[name])
        assert not parameter.requires_grad


def test_integer_weight_appears_dequantized_under_its_initializer(models: dict[str, bytes], shadows: Shadows) -> None:
    held = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in onnx.load_from_string(models["static"]).graph.initializer
    }
    found = shadows["static", "shipped"].parameters_by_initializer["stem.w_quantized"]
    scale = held["stem.w_scale"].reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(found.detach().numpy(), held["stem.w_quantized"].astype(np.float32) * scale)


def test_changed_parameter_changes_the_logits(models: dict[str, bytes]) -> None:
    shadow, x = build_shadow(models["float"], source="shipped"), images(4)
    before = run_shadow(shadow, x)
    with torch.no_grad():
        shadow.parameters_by_initializer["fc.b"] += 1
    np.testing.assert_allclose(run_shadow(shadow, x), before + 1, rtol=1e-5)
    np.testing.assert_allclose(run_shadow(shadow.to_double(), x), before + 1, rtol=1e-4)


def test_weights_can_be_trained_when_they_are_freed(models: dict[str, bytes]) -> None:
    shadow = build_shadow(models["static"], source="shipped")
    weight = shadow.parameters_by_initializer["two.w_quantized"].requires_grad_()
    shadow(torch.from_numpy(images(8)))[:, 0].sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() > 0


def test_activations_equal_those_of_the_session(models: dict[str, bytes], shadows: Shadows) -> None:
    x = images(8)
    tapped = onnx.load_from_string(models["float"])
    del tapped.graph.output[:]
    tapped.graph.output.append(helper.make_tensor_value_info("first", TensorProto.FLOAT, None))
    expected = session_output(tapped.SerializeToString(), x)
    with torch.no_grad():
        found = shadows["float", "shipped"].activations(torch.from_numpy(x), ["first", "y"])
    np.testing.assert_allclose(found["first"].numpy(), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found["y"].numpy(), run_shadow(shadows["float", "shipped"], x, exact=False))


def test_activation_that_is_not_computed_is_named(shadows: Shadows) -> None:
    with pytest.raises(KeyError, match=r"the shipped graph computes no tensor 'no\\\\nsuch'"):
        shadows["float", "shipped"].activations(torch.from_numpy(images(1)), ["no\nsuch"])


def test_optimized_model_runs_as_the_shipped_one(models: dict[str, bytes]) -> None:
    x = images(16)
    dumped = optimized_model(models["static"])
    assert {node.op_type for node in onnx.load_from_string(dumped).graph.node} >= {"QLinearConv", "QLinearAdd", "QGemm"}
    np.testing.assert_array_equal(
        session_output(dumped, x, level="ORT_DISABLE_ALL"), session_output(models["static"], x)
    )


def test_optimized_model_says_nothing_on_stderr(models: dict[str, bytes], capfd: pytest.CaptureFixture[str]) -> None:
    optimized_model(models["static"])
    assert capfd.readouterr() == ("", "")


def test_unreadable_bytes_are_refused() -> None:
    with pytest.raises(ShadowError, match=r"the bytes are no ONNX model; pass the content of an \.onnx file"):
        build_shadow(b"\xff\xfe not a model", source="shipped")
    with pytest.raises(ShadowError, match="the bytes are no ONNX model: there is no graph in them"):
        build_shadow(b"", source="shipped")
    with pytest.raises(RuntimeGraphError, match="ONNX Runtime cannot load the file"):
        build_shadow(b"\xff\xfe not a model", source="optimized")


def test_unknown_source_is_refused() -> None:
    with pytest.raises(ValueError, match="source is 'guessed', expected 'optimized' or 'shipped'"):
        build_shadow(residual_network(), source="guessed")  # type: ignore[arg-type]


def relu_model(**changes: object) -> onnx.ModelProto:
    model = onnx.load_from_string(graph_model([helper.make_node("Relu", ["x"], ["y"])], images(1), {}))
    for name, value in changes.items():
        getattr(model.graph, name).append(value)
    return model


def test_second_input_is_refused() -> None:
    extra = helper.make_tensor_value_info("mask", TensorProto.FLOAT, [1])
    with pytest.raises(ShadowError, match=r"found inputs \['x', 'mask'\] and outputs \['y'\]; cut the graph down"):
        build_shadow(relu_model(input=extra).SerializeToString(), source="shipped")


def test_input_of_unknown_type_is_refused() -> None:
    model = relu_model()
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.DOUBLE
    expected = "input 'x' has element type DOUBLE, expected float32 or float16 images or integer codes; export the"
    with pytest.raises(ShadowError, match=expected):
        build_shadow(model.SerializeToString(), source="shipped")


def test_tensor_in_external_file_is_refused_unread() -> None:
    tensor = numpy_helper.from_array(np.ones(1, dtype=np.float32), "w")
    onnx.external_data_helper.set_external_data(tensor, location="/etc/passwd")
    tensor.ClearField("raw_data")
    with pytest.raises(ShadowError, match=r"tensor 'w' lies in an external file; load it with onnx.load and save"):
        build_shadow(relu_model(initializer=tensor).SerializeToString(), source="shipped")


@pytest.mark.parametrize(
    ("kind", "name"), [(TensorProto.COMPLEX64, "COMPLEX64"), (TensorProto.STRING, "STRING"), (999, "999")]
)
def test_tensor_of_unknown_type_is_refused(kind: int, name: str) -> None:
    tensor = TensorProto(name="w", data_type=kind, dims=[1], raw_data=b"\0\0")
    with pytest.raises(ShadowError, match=f"tensor 'w' has element type {name}, which the shadow can't carry"):
        build_shadow(relu_model(initializer=tensor).SerializeToString(), source="shipped")


def test_tensor_of_wrong_length_is_refused() -> None:
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[7], raw_data=b"\0\0\0\0")
    with pytest.raises(ShadowError, match=r"tensor 'w' can't be read: .*; check the file with onnx\.checker"):
        build_shadow(relu_model(initializer=tensor).SerializeToString(), source="shipped")


def test_graph_out_of_order_is_refused() -> None:
    nodes = [helper.make_node("Relu", ["late"], ["y"], name="early"), helper.make_node("Relu", ["x"], ["late"])]
    with pytest.raises(ShadowError, match="node 'early' reads 'late', which nothing before it computes; sort"):
        build_shadow(graph_model(nodes, images(1), {}), source="shipped")


def test_output_that_nothing_computes_is_refused() -> None:
    model = graph_model([helper.make_node("Relu", ["x"], ["z"])], images(1), {})
    with pytest.raises(ShadowError, match=r"nothing computes the output 'y'; check the file with onnx\.checker"):
        build_shadow(model, source="shipped")


def test_quantizer_away_from_the_batch_axis_is_refused_when_run() -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2, 3]),
        helper.make_node("DynamicQuantizeLinear", ["t"], ["q", "s", "z"], name="d"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    shadow = build_shadow(graph_model(nodes, images(1), {}), source="shipped")
    with pytest.raises(ShadowError, match=r"node 'd': .* axis 0 of its input \(3, 2, 12, 12\) is not the batch of 2"):
        shadow(torch.from_numpy(images(2)))
