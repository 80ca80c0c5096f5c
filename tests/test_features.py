from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract, write_contract
from qdefense.converters.quantize import quantize
from qdefense.data.images import ImageSet
from qdefense.features import FeatureError, Penultimate, find_penultimate, penultimate_features
from qdefense.session import DeployedSession, profile_for

CLASSES = 4
Values = np.ndarray[Any, np.dtype[np.float32]]


def session_of(data: bytes, **changes: object) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact).with_changes(**changes))


def model(nodes: list[onnx.NodeProto], constants: dict[str, Values]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    names = tuple("abcd")
    write_contract(proto, InputContract(input_name="image", output_name="logits", height=4, width=4, class_names=names))
    return bytes(proto.SerializeToString())


def random(*shape: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture
def noise(make_noise: Callable[..., ImageSet]) -> ImageSet:
    return make_noise(70, size=4, classes=CLASSES)


def read(data: bytes, images: ImageSet, **changes: object) -> tuple[Penultimate, Values, Values]:
    session = session_of(data, **changes)
    place = find_penultimate(session)
    features, logits = penultimate_features(session, images, place)
    np.testing.assert_array_equal(logits, session.logits_of(images))
    return place, features, logits


# --- which tensor -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["as-run", "exact"])
def test_features_times_weights_are_the_logits_when_the_file_is_quantized(toy_forms: Any, arithmetic: str) -> None:
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(toy_forms.fp32).graph.initializer}
    images = toy_forms.images.take(np.arange(60))
    for form, tolerance in (("fp32", 1e-4), ("static", 0.35), ("dynamic", 0.35)):
        _, features, logits = read(toy_forms[form], images, arithmetic=arithmetic)
        assert features.shape == (60, 96)
        assert features.dtype == np.float32
        again = features @ constants["weight"] + constants["offset"]
        assert np.abs(again - logits).max() < tolerance, form


@pytest.mark.parametrize("form", ["static", "dynamic"])
def test_features_of_a_quantized_file_are_near_those_of_the_plain_one(toy_forms: Any, form: str) -> None:
    images = toy_forms.images.take(np.arange(40))
    _, plain, _ = read(toy_forms.fp32, images)
    _, features, _ = read(toy_forms[form], images)
    assert np.abs(features - plain).max() < 0.05 * np.abs(plain).max()


def test_features_of_codes_stand_on_the_grid_of_their_scale(toy_forms: Any) -> None:
    place, features, _ = read(toy_forms.static, toy_forms.images.take(np.arange(10)))
    assert place.scale != 1
    codes = features / np.float32(place.scale)
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-3)


def test_features_are_read_when_weights_are_int4_and_layouts_move_the_last_bit(
    small_files: Any, small_signs: Any
) -> None:
    data = quantize(small_files["first"], "int4")
    _, features, _ = read(data, small_signs.test.take(np.arange(5)))
    assert features.shape == (5, 64)


def test_features_lie_behind_what_comes_after_the_last_layer(noise: ImageSet) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["positive"]),
        helper.make_node("MatMul", ["positive", "second"], ["product"], name="last"),
        helper.make_node("Add", ["product", "bias"], ["sum"]),
        helper.make_node("Mul", ["sum", "scale"], ["logits"]),
    ]
    constants = {
        "first": random(48, 6), "second": random(6, CLASSES, seed=1), "bias": random(CLASSES), "scale": random(1),
    }  # fmt: skip
    _, features, logits = read(model(nodes, constants), noise)
    hidden = np.maximum(noise.pixels.reshape(70, -1) @ constants["first"], 0)
    np.testing.assert_allclose(features, hidden, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        (features @ constants["second"] + constants["bias"]) * constants["scale"], logits, rtol=1e-3, atol=1e-4
    )


def test_features_are_averaged_over_positions_when_the_last_layer_is_a_convolution(noise: ImageSet) -> None:
    nodes = [
        helper.make_node("Conv", ["image", "first"], ["maps"], name="first"),
        helper.make_node("Relu", ["maps"], ["positive"]),
        helper.make_node("Conv", ["positive", "second"], ["scores"], name="last"),
        helper.make_node("GlobalAveragePool", ["scores"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["logits"]),
    ]
    constants = {"first": random(5, 3, 1, 1), "second": random(CLASSES, 5, 1, 1, seed=1)}
    place, features, logits = read(model(nodes, constants), noise)
    assert (place.layer, features.shape) == ("last", (70, 5))
    np.testing.assert_allclose(features @ constants["second"][:, :, 0, 0].T, logits, rtol=1e-3, atol=1e-4)


def test_features_of_a_linear_model_are_its_pixels(noise: ImageSet) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], name="only"),
    ]
    _, features, _ = read(model(nodes, {"weight": random(48, CLASSES)}), noise)
    np.testing.assert_array_equal(features, noise.pixels.reshape(70, -1))


# --- behind logits ----------------------------------------------------------------------------------------------------

HIDDEN = {"first": random(48, 6), "second": random(6, CLASSES, seed=1), "eye": np.eye(CLASSES, dtype=np.float32)}
TO_SCORES = [
    helper.make_node("Flatten", ["image"], ["flat"]),
    helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
    helper.make_node("Relu", ["hidden"], ["positive"]),
    helper.make_node("MatMul", ["positive", "second"], ["scores"], name="second"),
]
WIDE = random(CLASSES, 9, seed=2)
APPENDED: dict[str, tuple[list[onnx.NodeProto], dict[str, Values]]] = {
    "an identity": ([helper.make_node("MatMul", ["scores", "eye"], ["logits"], name="appended")], {}),
    "an identity with a bias": ([helper.make_node("Gemm", ["scores", "eye", "zeros"], ["logits"])],
        {"zeros": np.zeros(CLASSES, np.float32)}),
    "two of them, and steps between": ([
        helper.make_node("MatMul", ["scores", "eye"], ["once"]),
        helper.make_node("Add", ["once", "shift"], ["moved"]),
        helper.make_node("Mul", ["moved", "two"], ["doubled"]),
        helper.make_node("MatMul", ["doubled", "eye2"], ["logits"])],
        {"shift": random(CLASSES), "two": np.array([2], np.float32), "eye2": np.eye(CLASSES, dtype=np.float32)}),
    "a detour through more numbers": ([
        helper.make_node("MatMul", ["scores", "there"], ["many"]),
        helper.make_node("MatMul", ["many", "back"], ["logits"])],
        {"there": WIDE, "back": np.linalg.pinv(WIDE).astype(np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize(("nodes", "constants"), APPENDED.values(), ids=list(APPENDED))
@pytest.mark.parametrize("scheme", [None, "int8-static", "int8-dynamic"])
def test_features_lie_before_the_logits_whatever_affine_is_appended(
    noise: ImageSet, nodes: list[onnx.NodeProto], constants: dict[str, Values], scheme: str | None
) -> None:
    data = model([*TO_SCORES, *nodes], HIDDEN | constants)
    if scheme is not None:
        data = quantize(data, scheme, calibration=noise.pixels)
    place, features, _ = read(data, noise)
    hidden = np.maximum(noise.pixels.reshape(70, -1) @ HIDDEN["first"], 0)
    assert features.shape == (70, 6), place
    assert np.abs(features - hidden).max() < 0.06 * hidden.max()


def test_find_penultimate_refuses_as_many_numbers_as_classes_behind_what_is_not_affine() -> None:
    """Here they are logits: all of them are above 0 when 1000 is added."""
    nodes = [
        *TO_SCORES,
        helper.make_node("Add", ["scores", "far"], ["up"]),
        helper.make_node("Relu", ["up"], ["same"]),
        helper.make_node("MatMul", ["same", "eye"], ["logits"], name="appended"),
    ]
    data = model(nodes, HIDDEN | {"far": np.full(1, 1000, np.float32)})
    with pytest.raises(FeatureError) as raised:
        find_penultimate(session_of(data))
    assert str(raised.value).endswith(
        "takes 4 numbers for 4 classes: nothing tells whether they are features or already logits"
    )


def test_features_of_a_narrow_layer_before_the_last_one_stay_what_they_were(noise: ImageSet) -> None:
    """Affine from end to end, but nowhere as narrow as the logits."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "first"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "second"], ["logits"]),
    ]
    _, features, _ = read(model(nodes, {"first": HIDDEN["first"], "second": HIDDEN["second"]}), noise)
    np.testing.assert_allclose(features, noise.pixels.reshape(70, -1) @ HIDDEN["first"], rtol=1e-4, atol=1e-5)


# --- where there are none ---------------------------------------------------------------------------------------------


def test_find_penultimate_refuses_a_graph_without_weights() -> None:
    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["means"], keepdims=0),
        helper.make_node("Pad", ["means", "pads"], ["logits"]),
    ]
    constants = {"axes": np.array([2, 3]), "pads": np.array([0, 0, 0, 1])}
    with pytest.raises(FeatureError, match="no layer with weights makes the logits"):
        find_penultimate(session_of(model(nodes, constants)))


def test_find_penultimate_refuses_two_last_layers() -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Relu", ["flat"], ["other"]),
        helper.make_node("MatMul", ["flat", "one"], ["a"], name="left"),
        helper.make_node("MatMul", ["other", "two"], ["b"], name="right"),
        helper.make_node("Max", ["a", "b"], ["logits"]),
    ]
    data = model(nodes, {"one": random(48, CLASSES), "two": random(48, CLASSES, seed=1)})
    with pytest.raises(FeatureError, match=r"2 layers make the logits together \('(left|right)', '(left|right)'\)"):
        find_penultimate(session_of(data))


def test_find_penultimate_refuses_logits_that_come_out_of_a_branch() -> None:
    branches = {}
    for name in ("then", "else"):
        value = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        part = helper.make_node("MatMul", ["flat", name], [f"{name}_out"])
        branches[f"{name}_branch"] = helper.make_graph([part], name, [], [value])
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("ReduceMax", ["flat"], ["largest"], keepdims=0),
        helper.make_node("Greater", ["largest", "half"], ["bright"]),
        helper.make_node("If", ["bright"], ["logits"], name="the switch", **branches),
    ]
    constants = {"then": random(48, CLASSES), "else": random(48, CLASSES, seed=1), "half": np.array(0.5, np.float32)}
    with pytest.raises(FeatureError, match="the logits come out of a branch, 'the switch', into which no tap reaches"):
        find_penultimate(session_of(model(nodes, constants)))


def test_find_penultimate_refuses_codes_without_a_scale() -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Mul", ["flat", "hundred"], ["large"]),
        helper.make_node("Cast", ["large"], ["codes"], to=TensorProto.UINT8),
        helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"], name="last"),
        helper.make_node("Cast", ["sums"], ["logits"], to=TensorProto.FLOAT),
    ]
    weight = np.random.default_rng(0).integers(-9, 9, (48, CLASSES)).astype(np.int8)
    data = model(nodes, {"weight": weight, "hundred": np.array(100, np.float32)})
    with pytest.raises(FeatureError, match="layer 'last' multiplies codes whose scale the graph does not tell"):
        find_penultimate(session_of(data))


def test_penultimate_features_refuse_an_empty_set(noise: ImageSet, toy_forms: Any) -> None:
    session = session_of(toy_forms.fp32)
    place = find_penultimate(session)
    with pytest.raises(FeatureError, match="noise: no images to read features of"):
        penultimate_features(session, noise.take(np.empty(0, np.int64)), place)


def test_penultimate_features_refuse_a_tensor_that_does_not_exist(noise: ImageSet, toy_forms: Any) -> None:
    with pytest.raises(FeatureError, match=r"the input of layer 'x' cannot be read: .* no.* tensor 'nowhere'"):
        penultimate_features(session_of(toy_forms.fp32), toy_forms.images, Penultimate("nowhere", "x", -1))


# --- how --------------------------------------------------------------------------------------------------------------


def test_penultimate_features_do_not_depend_on_how_images_are_grouped(toy_forms: Any) -> None:
    images = toy_forms.images
    _, whole, _ = read(toy_forms.static, images)
    for batch in (1, 7):
        np.testing.assert_array_equal(read(toy_forms.static, images, batch=batch)[1], whole)


def test_penultimate_features_tell_their_progress(toy_forms: Any) -> None:
    session = session_of(toy_forms.fp32)
    heard: list[tuple[int, int]] = []
    images = toy_forms.images
    many = images.take(np.tile(np.arange(len(images)), 17))
    penultimate_features(session, many, find_penultimate(session), progress=lambda *each: heard.append(each))
    assert heard[0] == (0, len(many))
    assert heard[-1] == (len(many), len(many))
    assert len(heard) > 2
