from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.data.images import Pixels
from qdefense.session import DeployedSession, SessionError, profile_for

FORMS = ("fp32", "static", "dynamic")


def _deployed(data: bytes, **changes: object) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact).with_changes(**changes))


def _computed(session: DeployedSession) -> list[str]:
    nodes = onnx.load_from_string(session.graph).graph.node
    return [name for node in nodes for name in node.output if name]


@pytest.fixture
def pixels(toy_forms: Any) -> Pixels:
    x: Pixels = toy_forms.images.pixels[:7]
    return x


@pytest.mark.parametrize("arithmetic", ["as-run", "exact"])
@pytest.mark.parametrize("form", FORMS)
def test_tap_gives_every_tensor_at_once_and_alone(toy_forms: Any, pixels: Pixels, form: str, arithmetic: str) -> None:
    session = _deployed(toy_forms[form], arithmetic=arithmetic)
    names = _computed(session)
    together = session.tap(pixels, names)
    assert list(together) == names
    for name in names[:: max(1, len(names) // 4)]:
        np.testing.assert_array_equal(session.activations(pixels, name), together[name])
    np.testing.assert_array_equal(together["logits"], session.logits(pixels))
    assert all(len(value) == 7 for value in together.values())


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_tap_joins_groups_of_any_length(toy_forms: Any, pixels: Pixels, batch: int) -> None:
    session = _deployed(toy_forms.static, batch=batch)
    names = _computed(session)
    whole = _deployed(toy_forms.static).tap(pixels, names)
    for name, value in session.tap(pixels, names).items():
        np.testing.assert_array_equal(value, whole[name])
        assert value.dtype == whole[name].dtype


def test_tap_gives_integer_codes_in_their_own_type(toy_forms: Any, pixels: Pixels) -> None:
    session = _deployed(toy_forms.static)
    first = onnx.load_from_string(session.graph).graph.node[0]
    assert first.op_type == "QuantizeLinear"
    constants = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(session.graph).graph.initializer}
    scale, zero = constants[first.input[1]], constants[first.input[2]]
    expected = np.clip(np.rint(pixels / scale) + zero.astype(np.float32), 0, 255).astype(np.uint8)
    found = session.activations(pixels, first.output[0])
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("batch", "groups"), [(1, 7), (3, 3), (7, 1)])
def test_tap_gives_a_dynamic_scale_per_group_of_rows(toy_forms: Any, pixels: Pixels, batch: int, groups: int) -> None:
    session = _deployed(toy_forms.dynamic, batch=batch)
    quantizer = next(n for n in onnx.load_from_string(session.graph).graph.node if n.op_type == "DynamicQuantizeLinear")
    scales = session.activations(pixels, quantizer.output[1])
    parts = [pixels[at : at + batch] for at in range(0, 7, batch)]
    expected = [max(float(part.max()), 0) / 255 for part in parts]
    assert scales.shape == (groups,)
    np.testing.assert_allclose(scales, expected, rtol=1e-6)


def test_tap_gives_the_input_as_it_is_fed(toy_forms: Any, pixels: Pixels) -> None:
    session = _deployed(toy_forms.fp32)
    np.testing.assert_array_equal(session.activations(pixels, "image"), pixels)


def test_tap_opens_a_session_once(toy_forms: Any, pixels: Pixels, monkeypatch: pytest.MonkeyPatch) -> None:
    session = _deployed(toy_forms.static)
    names = _computed(session)[:2]
    first = session.tap(pixels, names)
    monkeypatch.setattr("qdefense.taps.open_session", None)
    again = session.tap(pixels, names[::-1])
    assert list(again) == names[::-1]
    np.testing.assert_array_equal(again[names[0]], first[names[0]])


def test_tap_keeps_few_sessions(toy_forms: Any, pixels: Pixels) -> None:
    session = _deployed(toy_forms.dynamic)
    names = _computed(session)[:10]
    for name in names:
        session.activations(pixels[:1], name)
    assert len(session._taps._kept) == 8


def test_tap_counts_the_rows_that_it_runs(toy_forms: Any, pixels: Pixels) -> None:
    session = _deployed(toy_forms.static)
    session.tap(pixels, _computed(session)[:3])
    assert session.forwards == 14  # the tapped run and the one it is checked against


@pytest.mark.parametrize("form", FORMS)
def test_tap_refuses_when_the_logits_change(
    toy_forms: Any, pixels: Pixels, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    session = _deployed(toy_forms[form])
    honest, tensor = session.logits, _computed(session)[0]
    monkeypatch.setattr(session, "logits", lambda x: honest(x) + np.float32(0.05))
    with pytest.raises(SessionError, match=rf"^tapping '{tensor}' changes the logits; it cannot be read without"):
        session.activations(pixels, tensor)


def test_tap_refuses_no_images(toy_forms: Any, pixels: Pixels) -> None:
    with pytest.raises(SessionError, match=r"^no image is given to tap; pass at least one$"):
        _deployed(toy_forms.fp32).tap(pixels[:0], ["positive"])


def test_tap_says_what_holds_a_tensor_that_was_fused_away(toy_forms: Any, pixels: Pixels) -> None:
    session = _deployed(toy_forms.static)
    gone = next(node.output[0] for node in onnx.load_from_string(toy_forms.static).graph.node if node.op_type == "Conv")
    with pytest.raises(SessionError) as caught:
        session.activations(pixels, gone)
    reason = str(caught.value)
    assert reason.startswith(f"the runtime keeps no value of '{gone}': it is fused into what computes '")
    assert "QuantizeLinear); tap '" in reason
    assert len(session.activations(pixels, reason.rpartition("tap ")[2].strip("'"))) == 7


def _graph(nodes: list[onnx.NodeProto], **constants: Any) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 12])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        ("two", "'two' is a constant of the file, not an activation; read it from the file"),
        ("four", "'four' follows from constants of the file alone; read it from the file"),
        ("inner", "'inner' lies in a branch of control flow, where no tap reaches; tap what comes out of it"),
        ("dead", "the runtime computes no 'dead': nothing that it keeps depends on it"),
        ("", "neither the file nor what the runtime makes of it has a tensor ''; see the outputs of its nodes"),
        ("\x1b[2J", r"neither the file nor what the runtime makes of it has a tensor '\x1b[2J'; see"),
    ],
)  # fmt: skip
def test_tap_says_why_there_is_no_value(tensor: str, reason: str) -> None:
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    body = helper.make_graph([helper.make_node("Exp", ["flat"], ["inner"])], "body", [], [value])
    kept = helper.make_graph(
        [helper.make_node("Neg", ["flat"], ["kept"])],
        "kept",
        [],
        [helper.make_tensor_value_info("kept", TensorProto.FLOAT, None)],
    )
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Identity", ["flat"], ["dead"]),
        helper.make_node("Add", ["two", "two"], ["four"]),
        helper.make_node("ReduceSum", ["image"], ["total"], keepdims=0),
        helper.make_node("Greater", ["total", "two"], ["bright"]),
        helper.make_node("If", ["bright"], ["chosen"], then_branch=body, else_branch=kept),
        helper.make_node("Mul", ["chosen", "four"], ["logits"]),
    ]
    session = _deployed(_graph(nodes, two=np.float32(2)), batch=2)
    with pytest.raises(SessionError) as caught:
        session.activations(np.zeros((4, 3, 2, 2), np.float32), tensor)
    assert str(caught.value).startswith(reason)


def test_tap_refuses_a_value_that_is_no_tensor() -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("SplitToSequence", ["flat", "halves"], ["parts"], axis=1),
        helper.make_node("ConcatFromSequence", ["parts"], ["logits"], axis=1),
    ]
    session = _deployed(_graph(nodes, halves=np.array([6, 6], np.int64)))
    with pytest.raises(
        SessionError, match=r"^'parts' is a seq\(tensor\(float\)\), not a tensor; tap what is taken out"
    ):
        session.activations(np.zeros((2, 3, 2, 2), np.float32), "parts")


@pytest.mark.parametrize("batch", [2, 12])
def test_tap_refuses_a_tensor_whose_first_axis_is_not_the_images(batch: int) -> None:
    """Not even where another axis happens to be as long as the batch."""
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"]),
        helper.make_node("Exp", ["turned"], ["grown"]),
        helper.make_node("Transpose", ["grown"], ["logits"]),
    ]
    session = _deployed(_graph(nodes), batch=batch)
    x = np.zeros((batch, 3, 2, 2), dtype=np.float32)
    message = rf"^tensor 'grown' has shape \(12, {batch}\) for {batch} images; its first axis must be theirs$"
    with pytest.raises(SessionError, match=message):
        session.activations(x, "grown")


def test_tap_keeps_float16() -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16),
        helper.make_node("Cast", ["half"], ["logits"], to=TensorProto.FLOAT),
    ]
    x = np.random.default_rng(0).random((3, 3, 2, 2), dtype=np.float32)
    found = _deployed(_graph(nodes)).activations(x, "half")
    np.testing.assert_array_equal(found, x.reshape(3, 12).astype(np.float16))
    assert found.dtype == np.float16
