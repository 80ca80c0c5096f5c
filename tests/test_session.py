from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from pydantic import ValidationError

from qdefense.artifact import Artifact
from qdefense.converters.contract import METADATA_KEY
from qdefense.converters.reading import safe_text
from qdefense.converters.runtime_graph import optimized_model
from qdefense.data.images import ImageSet
from qdefense.session import DeployedSession, SessionError, SessionProfile, profile_for, rows_at_once, runtime

NAMES = ("first", "first.int8-static", "first.int8-dynamic")


def _deployed(data: bytes, **changes: object) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    profile = profile_for(artifact)
    return DeployedSession(artifact, SessionProfile.model_validate({**profile.model_dump(), **changes}))


def _direct(data: bytes, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": x})[0])


def _with_fixed_batch(data: bytes, batch: int) -> bytes:
    model = onnx.load_from_string(data)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    for entry in model.metadata_props:
        if entry.key == METADATA_KEY:
            entry.value = json.dumps({**json.loads(entry.value), "batch": batch})
    return bytes(model.SerializeToString())


@pytest.fixture
def pixels(small_signs: Any) -> np.ndarray:
    x: np.ndarray = small_signs.test.pixels[:70]
    return x


@pytest.mark.parametrize(("name", "batch"), [("first", 64), ("first.int8-static", 64), ("first.int8-dynamic", 1)])
def test_profile_for_picks_batch_1_when_rows_share_a_scale(
    small_files: dict[str, bytes], name: str, batch: int
) -> None:
    artifact = Artifact.from_bytes(small_files[name])
    expected = SessionProfile(provider="CPUExecutionProvider", optimization="all", threads=3, batch=batch)
    assert profile_for(artifact, threads=3) == expected


@pytest.mark.parametrize("field", ["batch", "threads"])
def test_session_profile_refuses_zero(field: str) -> None:
    with pytest.raises(ValidationError, match="greater than or equal to 1"):
        SessionProfile.model_validate({field: 0})


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_the_runtime_group_by_group(small_files: dict[str, bytes], pixels: np.ndarray, name: str) -> None:
    session = _deployed(small_files[name], batch=32)
    groups = [pixels[:32], pixels[32:64], pixels[64:]]
    expected = np.concatenate([_direct(small_files[name], rows) for rows in groups])
    found = session.logits(pixels)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


def test_logits_are_empty_when_there_are_no_images(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    session = _deployed(small_files["first"])
    found = session.logits(pixels[:0])
    assert (found.shape, found.dtype, session.forwards) == ((0, 12), np.float32, 0)


@pytest.mark.parametrize(
    ("size", "rows"),
    [
        ((16, 16), 64),
        ((32, 32), 64),
        ((64, 128), 64),
        ((91, 91), 63),
        ((224, 224), 10),
        ((512, 1024), 1),
        ((4000, 3000), 1),
        ((1, 1), 64),
    ],
)
def test_rows_at_once_are_fewer_when_images_are_large(size: tuple[int, int], rows: int) -> None:
    assert rows_at_once(*size) == rows


def test_profile_for_runs_large_images_a_few_at_a_time(make_graph: Callable[..., bytes]) -> None:
    model = onnx.load_from_string(make_graph([helper.make_node("Flatten", ["image"], ["logits"])], classes=12))
    for axis, length in ((2, 224), (3, 448)):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = length
    assert profile_for(Artifact.from_bytes(model.SerializeToString())).batch == 5


@pytest.mark.parametrize(
    ("name", "batch"),
    [("first", 64), ("first", 300), ("first.int8-static", 64), ("first.int8-dynamic", 1), ("first.int8-dynamic", 3)],
)
def test_logits_of_images_equal_those_of_their_pixels(
    small_files: dict[str, bytes], small_signs: Any, name: str, batch: int
) -> None:
    """Whole groups at a time: where a batch shares a scale, another grouping would give other answers."""
    images: ImageSet = small_signs.test.take(np.arange(300))
    session = _deployed(small_files[name], batch=batch)
    np.testing.assert_array_equal(session.logits_of(images), session.logits(images.pixels))
    assert session.forwards == 600


@pytest.mark.parametrize("batch", [1, 7, 299])
def test_logits_of_images_equal_those_of_their_pixels_when_a_fixed_batch_does_not_divide_them(
    small_files: dict[str, bytes], small_signs: Any, batch: int
) -> None:
    images: ImageSet = small_signs.test.take(np.arange(300))
    artifact = Artifact.from_bytes(_with_fixed_batch(small_files["first.int8-dynamic"], batch))
    session = DeployedSession(artifact, profile_for(artifact))
    np.testing.assert_array_equal(session.logits_of(images), session.logits(images.pixels))
    assert session.forwards == 2 * batch * -(-300 // batch)


def test_logits_of_no_images_are_empty(small_files: dict[str, bytes], small_signs: Any) -> None:
    session = _deployed(small_files["first"])
    found = session.logits_of(small_signs.test.take(np.arange(0)))
    assert (found.shape, found.dtype, session.forwards) == ((0, 12), np.float32, 0)


def test_logits_are_those_of_another_contract_when_one_is_given(
    small_files: dict[str, bytes], small_signs: Any
) -> None:
    session = _deployed(small_files["first"])
    images: ImageSet = small_signs.test.take(np.arange(20))
    bgr = session.artifact.contract.model_copy(update={"channels": "BGR"})
    found = session.logits_of(images, contract=bgr)
    np.testing.assert_array_equal(found, session.logits(images.pixels[:, ::-1]))
    assert np.abs(found - session.logits_of(images)).max() > 0.1


def test_logits_accept_a_view_that_is_not_contiguous(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    session = _deployed(small_files["first"])
    np.testing.assert_array_equal(session.logits(pixels[::2]), session.logits(pixels[::2].copy()))


def test_dynamic_logits_depend_on_the_batch_only_above_batch_1(
    small_files: dict[str, bytes], pixels: np.ndarray
) -> None:
    x = pixels[:8].copy()
    x[7] = 1.0  # an outlier widens the scale of whatever shares its batch
    together = _deployed(small_files["first.int8-dynamic"], batch=8)
    assert np.abs(together.logits(x)[:7] - together.logits(x[:7])).max() > 1e-3
    alone = _deployed(small_files["first.int8-dynamic"], batch=1)
    np.testing.assert_array_equal(alone.logits(x)[:7], alone.logits(x[:7]))
    np.testing.assert_array_equal(alone.logits(x)[::-1], alone.logits(x[::-1]))


def test_static_logits_do_not_depend_on_the_batch(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    runs = [_deployed(small_files["first.int8-static"], batch=size).logits(pixels[:9]) for size in (1, 4, 9)]
    np.testing.assert_array_equal(runs[0], runs[1])
    np.testing.assert_array_equal(runs[0], runs[2])


def test_optimization_level_changes_static_logits_a_little(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    """Whether one of these logits falls on another code depends on the CPU."""
    fused = _deployed(small_files["first.int8-static"])
    plain = _deployed(small_files["first.int8-static"], optimization="disable")
    assert len(onnx.load_from_string(fused.graph).graph.node) < len(onnx.load_from_string(plain.graph).graph.node)
    assert np.abs(fused.logits(pixels) - plain.logits(pixels)).max() < 0.5


def test_forwards_count_every_row_run(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    session = _deployed(small_files["first"])
    session.logits(pixels)
    session.logits(pixels[:5])
    assert session.forwards == 75
    session.activations(pixels[:5], session.artifact.contract.output_name)
    assert session.forwards == 80
    session.activations(pixels[:5], _tensors(session)[0])
    assert session.forwards == 90  # the tapped run and the one it is checked against


@pytest.mark.parametrize("name", NAMES)
def test_activations_tap_every_tensor_without_changing_a_logit(
    small_files: dict[str, bytes], pixels: np.ndarray, name: str
) -> None:
    session = _deployed(small_files[name])
    before = session.logits(pixels[:3])
    tensors = _tensors(session)
    assert len(tensors) > 15
    for tensor in tensors:
        assert len(session.activations(pixels[:3], tensor)) in {3, 1}
    np.testing.assert_array_equal(session.logits(pixels[:3]), before)


def test_activations_give_one_scale_per_image_when_it_is_computed_at_batch_1(
    small_files: dict[str, bytes], pixels: np.ndarray
) -> None:
    session = _deployed(small_files["first.int8-dynamic"])
    graph = onnx.load_from_string(optimized_model(session.artifact.data)).graph
    quantizer = next(node for node in graph.node if node.op_type == "DynamicQuantizeLinear")
    x = session.activations(pixels[:4], quantizer.input[0])
    scales = session.activations(pixels[:4], quantizer.output[1])
    low, high = x.min(axis=(1, 2, 3), initial=0), x.max(axis=(1, 2, 3), initial=0)
    np.testing.assert_allclose(scales, (high - low) / 255, rtol=1e-6)


def test_activations_are_the_logits_when_the_output_is_named(small_files: dict[str, bytes], pixels: np.ndarray) -> None:
    session = _deployed(small_files["first.int8-static"])
    np.testing.assert_array_equal(session.activations(pixels, "logits"), session.logits(pixels))


@pytest.mark.parametrize("tensor", ["no such tensor", "", "no\nsuch"])
def test_activations_refuse_a_tensor_that_is_not_there(
    small_files: dict[str, bytes], pixels: np.ndarray, tensor: str
) -> None:
    with pytest.raises(SessionError) as caught:
        _deployed(small_files["first"]).activations(pixels[:1], tensor)
    assert str(caught.value) == (
        f"neither the file nor what the runtime makes of it has a tensor '{safe_text(tensor)}'; "
        "see the outputs of its nodes"
    )


@pytest.mark.parametrize("name", ["first", "first.int8-static"])
def test_activations_refuse_a_tap_that_changes_the_logits(
    small_files: dict[str, bytes], pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    session = _deployed(small_files[name])
    tensor = _tensors(session)[-2]
    honest = session.logits
    monkeypatch.setattr(session, "logits", lambda x: honest(x) + np.float32(0.01))
    with pytest.raises(SessionError, match=f"tapping {tensor!r} changes the logits"):
        session.activations(pixels[:2], tensor)


def test_activations_refuse_to_join_groups_when_the_first_axis_is_not_the_batch(
    make_graph: Callable[..., bytes],
) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Transpose", ["flat"], ["turned"]),
        helper.make_node("Exp", ["turned"], ["grown"]),
        helper.make_node("Transpose", ["grown"], ["logits"]),
    ]
    session = _deployed(make_graph(nodes, classes=12), batch=2)
    x = np.zeros((4, 3, 2, 2), dtype=np.float32)
    with pytest.raises(SessionError, match=r"tensor 'grown' has shape \(12, 2\) for 2 images; its first axis"):
        session.activations(x, "grown")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("batch", [1, 4])
def test_logits_fill_the_last_group_when_the_batch_is_fixed(
    small_files: dict[str, bytes], pixels: np.ndarray, name: str, batch: int
) -> None:
    artifact = Artifact.from_bytes(_with_fixed_batch(small_files[name], batch))
    assert profile_for(artifact).batch == artifact.contract.batch == batch
    session = DeployedSession(artifact, profile_for(artifact))
    x = pixels[:7]
    expected = np.concatenate(
        [_direct(small_files[name], x[at : at + batch]) for at in range(0, 7, batch)]
    )  # a free batch runs the last 3 rows as they are; copies of one of them widen no range
    np.testing.assert_allclose(session.logits(x), expected, rtol=0, atol=1e-4)
    assert session.forwards == {1: 7, 4: 8}[batch]
    tensor = _tensors(session)[2]
    assert len(session.activations(x, tensor)) == 7


def test_session_refuses_another_batch_than_the_fixed_one(small_files: dict[str, bytes]) -> None:
    with pytest.raises(SessionError, match="batch is fixed at 4, the profile's is 64; use profile_for"):
        _deployed(_with_fixed_batch(small_files["first"], 4), batch=64)


def test_session_refuses_a_file_that_the_runtime_cannot_load(small_files: dict[str, bytes]) -> None:
    artifact = replace(Artifact.from_bytes(small_files["first"]), data=b"not a model")
    with pytest.raises(SessionError, match="ONNX Runtime cannot load the file"):
        DeployedSession(artifact, SessionProfile())


def test_session_refuses_an_operator_without_a_kernel(make_graph: Callable[..., bytes]) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("NoSuchOperator", ["flat"], ["logits"], domain="com.microsoft"),
    ]
    with pytest.raises(SessionError, match=r"ONNX Runtime cannot load the file.*NoSuchOperator"):
        _deployed(make_graph(nodes, classes=12))


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 1, 16, 16), (2, 3, 16)])
def test_logits_refuse_images_of_another_shape(small_files: dict[str, bytes], shape: tuple[int, ...]) -> None:
    with pytest.raises(SessionError, match=r"ONNX Runtime refused an input of shape \(2, "):
        _deployed(small_files["first"]).logits(np.zeros(shape, dtype=np.float32))


def test_logits_refuse_float64_images(small_files: dict[str, bytes]) -> None:
    with pytest.raises(SessionError, match=r"ONNX Runtime refused an input of shape \(2, 3, 16, 16\)"):
        _deployed(small_files["first"]).logits(np.zeros((2, 3, 16, 16)))  # type: ignore[arg-type]


def test_logits_refuse_an_output_that_is_not_one_row_per_image(make_graph: Callable[..., bytes]) -> None:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"], axis=0),
        helper.make_node("Identity", ["flat"], ["logits"]),
    ]
    session = _deployed(make_graph(nodes, classes=12))
    assert session.logits(np.zeros((1, 3, 2, 2), dtype=np.float32)).shape == (1, 12)
    with pytest.raises(SessionError, match=r"answers 2 images with an output of shape \(1, 24\), not \(2, 12\)"):
        session.logits(np.zeros((2, 3, 2, 2), dtype=np.float32))


def test_runtime_names_what_the_logits_depend_on() -> None:
    facts = runtime()
    assert (facts.onnxruntime, facts.machine, facts.system) == (
        onnxruntime.__version__,
        platform.machine(),
        platform.system(),
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
    known = ("avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
    assert facts.isa == tuple(flag for flag in known if flag in flags)


def test_runtime_has_no_isa_when_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", refuse)
    assert runtime().isa == ()


@pytest.fixture
def make_graph() -> Callable[..., bytes]:
    def make(nodes: list[onnx.NodeProto], *, classes: int) -> bytes:
        graph = helper.make_graph(
            nodes,
            "test",
            [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", classes])],
        )
        opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())

    return make


def _tensors(session: DeployedSession) -> list[str]:
    graph = onnx.load_from_string(optimized_model(session.artifact.data)).graph
    output = session.artifact.contract.output_name
    return [name for node in graph.node for name in node.output if name and name != output]
