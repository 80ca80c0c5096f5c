from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdefense import mismatch
from qdefense.artifact import Artifact
from qdefense.converters.contract import METADATA_KEY
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow, runtime_saturation
from qdefense.data.images import ImageSet, Pixels
from qdefense.fidelity import certify, compare_logits, shadow_logits
from qdefense.mismatch import find_cause
from qdefense.session import DeployedSession, SessionProfile, profile_for

CLASSES = 6


def _deployed(data: bytes, **changes: object) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    profile = profile_for(artifact)
    return DeployedSession(artifact, SessionProfile.model_validate({**profile.model_dump(), **changes}))


def _model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], size: int) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, size, size])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return bytes(model.SerializeToString())


def _large_codes(size: int) -> bytes:
    """A float convolution whose codes are all near 127, so that two bright neighbours pass int16."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["wide"], name="convolution", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["wide"], ["positive"]),
        helper.make_node("Flatten", ["positive"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "bias"], ["logits"], name="classifier"),
    ]
    width = 4 * (size - 2) ** 2
    constants = {
        "kernel": rng.uniform(0.9, 1.0, (4, 3, 3, 3)).astype(np.float32),
        "weight": rng.standard_normal((width, CLASSES)).astype(np.float32),
        "bias": np.zeros(CLASSES, dtype=np.float32),
    }
    return _model(nodes, constants, size)


@pytest.fixture(scope="module")
def noise(make_noise: Callable[..., ImageSet]) -> ImageSet:
    return make_noise(256, size=6, classes=CLASSES)


@pytest.fixture(scope="module")
def full_range(noise: ImageSet) -> bytes:
    return quantize(_large_codes(6), "int8-static", calibration=noise.pixels, reduce_range=False)


def test_certify_names_saturation_and_the_layer_when_the_shadow_is_wrong_about_this_cpu(
    full_range: bytes, noise: ImageSet
) -> None:
    here = bool(runtime_saturation())
    session, shadow = _deployed(full_range), build_shadow(full_range, source="optimized")
    assert certify(session, shadow, noise, seed=0).certified
    certificate = certify(session, shadow, noise, seed=0, saturate=not here)
    assert not certificate.certified
    assert certificate.saturation_emulated is not here
    assert certificate.cause is not None
    assert certificate.cause.kind == "saturation"
    assert certificate.cause.layers == session.artifact.inspection.saturation_layers
    assert "convolution" in certificate.cause.layers
    where = "on this CPU, which the shadow left out" if here else "emulated by the shadow but absent on this CPU"
    assert where in certificate.cause.detail
    assert "reduce_range" in certificate.cause.detail
    assert f"cause: saturation, {certificate.cause.detail}" in certificate.reason


def test_certify_passes_either_way_when_the_range_is_reduced(noise: ImageSet) -> None:
    data = quantize(_large_codes(6), "int8-static", calibration=noise.pixels, reduce_range=True)
    session, shadow = _deployed(data), build_shadow(data, source="optimized")
    assert session.artifact.inspection.saturation_layers == ()
    for saturate in (False, True):
        certificate = certify(session, shadow, noise, seed=0, saturate=saturate)
        assert [entry.bit_exact_rows for entry in certificate.sets] == [1.0] * 4


def _dynamic() -> bytes:
    """Fourth powers of pixels share a scale: a bright image rounds a dark one of its batch away."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Mul", ["image", "image"], ["square"]),
        helper.make_node("Mul", ["square", "square"], ["steep"]),
        helper.make_node("Flatten", ["steep"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["logits"], name="classifier"),
    ]
    weight = rng.standard_normal((108, CLASSES)).astype(np.float32)
    return quantize(_model(nodes, {"weight": weight}, 6), "int8-dynamic")


def _with_outliers(images: ImageSet) -> ImageSet:
    dark = images.images // 4
    dark[::20] = 255
    return ImageSet(images=dark, labels=images.labels, class_names=images.class_names, source="noise")


def test_certify_names_the_batch_and_its_quantizers_when_dynamic_rows_share_a_scale(noise: ImageSet) -> None:
    data, images = _dynamic(), _with_outliers(noise)
    shadow = build_shadow(data, source="optimized")
    assert certify(_deployed(data), shadow, images, seed=0, saturate=False).certified
    session = _deployed(data, batch=32)
    certificate = certify(session, shadow, images, seed=0, saturate=False)
    assert not certificate.certified
    assert certificate.cause is not None
    assert certificate.cause.kind == "batch"
    assert certificate.cause.layers == session.artifact.batch_coupled_layers != ()
    assert certificate.cause.detail == "1 dynamic quantizers scale a batch of 32 as one; run it at batch 1"


def test_find_cause_names_the_batch_when_it_is_fixed_in_the_file(noise: ImageSet) -> None:
    model = onnx.load_from_string(_dynamic())
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 32
    assert METADATA_KEY not in {entry.key for entry in model.metadata_props}
    session = _deployed(model.SerializeToString())
    shadow = build_shadow(_dynamic(), source="optimized")
    cause = find_cause(session, shadow, _with_outliers(noise).pixels[:64], saturate=False)
    assert cause.kind == "batch"
    assert cause.detail.endswith("a batch of 32 as one; export it with a batch of 1")


def test_find_cause_does_not_blame_the_batch_when_no_scale_is_shared(
    small_files: dict[str, bytes], small_signs: Any
) -> None:
    data = small_files["first.int8-static"]
    cause = find_cause(
        _deployed(data),
        build_shadow(data, source="optimized"),
        small_signs.test.pixels[:8],
        saturate=False,
    )
    assert cause.kind != "batch"


def _halves() -> bytes:
    """A sum of codes over two: every odd sum is a tie, which floats break by their last bit and integers to even."""
    rng = np.random.default_rng(0)
    scalars = {"fine": 0.43, "coarse": 0.86}
    constants = {name: np.array(value, dtype=np.float32) for name, value in scalars.items()}
    constants |= {
        "zero": np.array(0, dtype=np.uint8),
        "codes": rng.integers(0, 4, (1, 108), dtype=np.uint8),
        "shape": np.array([-1, 108], dtype=np.int64),
        "weight": rng.standard_normal((108, CLASSES)).astype(np.float32),
    }
    nodes = [
        helper.make_node("Reshape", ["image", "shape"], ["flat"], name="reshape"),
        helper.make_node("QuantizeLinear", ["flat", "fine", "zero"], ["flat_q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["flat_q", "fine", "zero"], ["flat_d"], name="dequantize"),
        helper.make_node("DequantizeLinear", ["codes", "fine", "zero"], ["constant"], name="constant"),
        helper.make_node("Add", ["flat_d", "constant"], ["sum"], name="addition"),
        helper.make_node("QuantizeLinear", ["sum", "coarse", "zero"], ["sum_q"], name="quantize_sum"),
        helper.make_node("DequantizeLinear", ["sum_q", "coarse", "zero"], ["sum_d"], name="dequantize_sum"),
        helper.make_node("MatMul", ["sum_d", "weight"], ["logits"], name="product"),
    ]
    return _model(nodes, constants, 6)


def test_certify_names_the_optimization_level_when_the_shadow_follows_the_shipped_graph(noise: ImageSet) -> None:
    data = _halves()
    session, shadow = _deployed(data), build_shadow(data, source="shipped")
    assert certify(session, build_shadow(data, source="optimized"), noise, seed=0).certified
    certificate = certify(session, shadow, noise, seed=0)
    assert not certificate.certified
    assert certificate.cause is not None
    assert certificate.cause.kind == "optimization-level"
    assert "dequantize" in certificate.cause.layers
    assert certificate.cause.detail.startswith("the shadow follows the shipped graph, the session runs at 'all'")
    assert certificate.cause.detail.endswith("build the shadow from the optimized graph")


def test_certify_names_the_optimization_level_when_the_session_runs_unoptimized(noise: ImageSet) -> None:
    data = _halves()
    session, shadow = _deployed(data, optimization="disable"), build_shadow(data, source="optimized")
    assert certify(session, build_shadow(data, source="shipped"), noise, seed=0).certified
    cause = certify(session, shadow, noise, seed=0).cause
    assert cause is not None
    assert (cause.kind, cause.layers) == ("optimization-level", ())
    assert cause.detail.endswith("run the session at 'all'")


@pytest.mark.parametrize("at", [3, -1])
def test_certify_names_the_first_tensor_that_differs_when_a_constant_was_tampered_with(
    small_files: dict[str, bytes], small_signs: Any, at: int
) -> None:
    data = small_files["first"]
    shadow = build_shadow(data, source="optimized")
    steps = [step for step in shadow._plan.steps if step.node.op_type in {"Conv", "FusedConv", "Gemm"}]
    with torch.no_grad():
        shadow._parameter_of[steps[at].inputs[1]].mul_(-1)
    certificate = certify(_deployed(data), shadow, small_signs.test, seed=0)
    assert not certificate.certified
    assert certificate.cause is not None
    assert (certificate.cause.kind, certificate.cause.layers) == ("numerics", (steps[at].outputs[0],))
    assert certificate.cause.detail == f"first difference at {steps[at].outputs[0]!r}"


def test_find_cause_locates_a_difference_when_the_file_is_dynamic(
    small_files: dict[str, bytes], small_signs: Any
) -> None:
    data = small_files["first.int8-dynamic"]
    shadow = build_shadow(data, source="optimized")
    step = next(step for step in shadow._plan.steps if step.node.op_type == "Div")
    with torch.no_grad():
        shadow._parameter_of[step.inputs[1]].mul_(4)
    x = small_signs.test.pixels[:16]
    for batch in (1, 16):
        cause = find_cause(_deployed(data, batch=batch), shadow, x, saturate=False)
        assert (cause.kind, cause.layers) == ("numerics", (step.outputs[0],))


def test_find_cause_says_so_when_no_tensor_can_be_tapped(
    small_files: dict[str, bytes], small_signs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_files["first"]
    shadow = build_shadow(data, source="optimized")
    with torch.no_grad():
        next(iter(shadow.parameters_by_initializer.values())).mul_(3)
    monkeypatch.setattr(shadow, "tensor_names", ())
    x = small_signs.test.pixels[:8]
    cause = find_cause(_deployed(data), shadow, x, saturate=False)
    assert (cause.kind, cause.layers) == ("numerics", ())
    assert cause.detail == "no tensor that can be tapped differs"


def test_find_cause_escapes_names_when_they_are_hostile(small_files: dict[str, bytes], small_signs: Any) -> None:
    model = onnx.load_from_string(small_files["first"])
    first = next(node for node in model.graph.node if node.op_type == "Conv")
    old, new = first.output[0], "evil\x1b[31m\n" + "x" * 500
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    data = model.SerializeToString()
    shadow = build_shadow(data, source="shipped")
    step = next(step for step in shadow._plan.steps if step.node.op_type == "Conv")
    with torch.no_grad():
        shadow._parameter_of[step.inputs[1]].mul_(-1)
    x = small_signs.test.pixels[:8]
    cause = find_cause(_deployed(data), shadow, x, saturate=False)
    assert all(name.isprintable() and len(name) <= 120 for name in cause.layers)
    assert cause.detail.isprintable()


def test_certify_looks_for_the_cause_where_the_failure_is(
    small_files: dict[str, bytes], small_signs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backdoored shadow of a clean file differs on the stamped images only, say; clean ones would show nothing."""
    data = small_files["first"]
    shadow = build_shadow(data, source="optimized")
    real = shadow.forward

    def odd_on_bright(x: torch.Tensor, **keywords: bool) -> torch.Tensor:
        y: torch.Tensor = real(x, **keywords)
        noisy = (x.flatten(1).std(1) > 0.28).float()[:, None]  # uniform noise has 0.289, few signs come near
        return y * (1 - 2 * noisy)

    monkeypatch.setattr(shadow, "forward", odd_on_bright)
    asked: list[Pixels] = []
    monkeypatch.setattr(
        mismatch,
        "find_cause",
        lambda session, shadow, x, *, saturate: asked.append(x) or find_cause(session, shadow, x, saturate=saturate),
    )
    certificate = certify(_deployed(data), shadow, small_signs.test, seed=0)
    assert [entry.passes for entry in certificate.sets][1] is False
    worst = min(certificate.sets, key=lambda entry: entry.top1_agreement)
    assert worst.name == "uniform"
    session = _deployed(data)
    assert len(asked) == 1
    found = compare_logits(session.logits(asked[0]), shadow_logits(shadow, asked[0]))
    assert found.top1_agreement == worst.top1_agreement
    assert certificate.cause is not None
    assert certificate.cause.kind == "numerics"
    json.loads(certificate.model_dump_json())
