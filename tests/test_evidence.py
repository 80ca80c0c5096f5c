from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.shadow import ShadowError, UnsupportedOperatorError, registered
from qdefense.data.images import ImageSet
from qdefense.evidence import Evidence, gather_evidence, no_progress
from qdefense.session import DeployedSession, profile_for

CLASSES = 6
UNKNOWN = "RandomUniformLike"


def _session(data: bytes) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact))


def _model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]) -> bytes:
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return bytes(model.SerializeToString())


def _ending_in(*nodes: onnx.NodeProto) -> bytes:
    weight = np.random.default_rng(0).standard_normal((12, CLASSES)).astype(np.float32)
    body = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], ["product"], name="product"),
    ]
    return _model([*body, *nodes], {"weight": weight})


@pytest.fixture(scope="module")
def noise(make_noise: Callable[..., ImageSet]) -> ImageSet:
    return make_noise(256, size=2, classes=CLASSES)


def test_gather_evidence_certifies_the_optimized_shadow(small_files: dict[str, bytes], small_signs: Any) -> None:
    images: ImageSet = small_signs.test
    session = _session(small_files["first.int8-static"])
    evidence = gather_evidence(session, images, seed=3, threads=2)
    assert evidence.shadow is not None
    assert (evidence.shadow.source, evidence.certificate.certified) == ("optimized", True)
    assert (evidence.session, evidence.clean, evidence.seed, evidence.threads) == (session, images, 3, 2)
    assert evidence.gradient_blind_nodes == ()
    assert (evidence.training_set, evidence.inputs, evidence.reference) == (None, None, None)
    assert evidence.progress is no_progress


def test_evidence_has_no_field_for_the_answer() -> None:
    assert {field.name for field in dataclasses.fields(Evidence)} == {
        "session", "shadow", "certificate", "clean", "seed", "threads", "gradient_blind_nodes",
        "stated_accuracy", "training_set", "inputs", "reference", "calibrations", "progress",
    }  # fmt: skip


def test_gather_evidence_names_the_node_when_an_operator_has_no_twin(noise: ImageSet) -> None:
    assert UNKNOWN not in {operator for _, operator, _ in registered()}
    data = _ending_in(helper.make_node(UNKNOWN, ["product"], ["logits"], name="the culprit"))
    evidence = gather_evidence(_session(data), noise, seed=0)
    assert evidence.shadow is None
    assert not evidence.certificate.certified
    cause = evidence.certificate.cause
    assert cause is not None
    assert (cause.kind, cause.layers) == ("unsupported-operator", ("the culprit",))
    assert cause.detail == evidence.certificate.reason
    assert cause.detail.startswith(f"node 'the culprit': operator {UNKNOWN!r} of domain 'ai.onnx', opset 18: no func")


def test_gather_evidence_escapes_the_node_s_name_when_it_is_hostile(noise: ImageSet) -> None:
    data = _ending_in(helper.make_node(UNKNOWN, ["product"], ["logits"], name="evil\x1b[2J\nname"))
    cause = gather_evidence(_session(data), noise, seed=0).certificate.cause
    assert cause is not None
    assert cause.layers == (r"evil\x1b[2J\nname",)
    assert cause.detail.isprintable()


def test_unsupported_operator_error_carries_the_node() -> None:
    error = UnsupportedOperatorError("message", node="culprit")
    assert (str(error), error.node, isinstance(error, ShadowError)) == ("message", "culprit", True)


def test_gather_evidence_gives_the_reason_when_no_shadow_can_be_built(
    noise: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_data: bytes, *, source: str, **_: object) -> None:
        raise ShadowError(f"no {source} shadow of this")

    monkeypatch.setattr("qdefense.converters.shadow.build_shadow", refuse)
    data = _ending_in(helper.make_node("Relu", ["product"], ["logits"]))
    certificate = gather_evidence(_session(data), noise, seed=0).certificate
    assert (certificate.certified, certificate.reason, certificate.cause) == (
        False,
        "no optimized shadow of this",
        None,
    )


def test_gather_evidence_lists_gradient_blind_nodes(noise: ImageSet) -> None:
    data = _ending_in(
        helper.make_node("Floor", ["product"], ["floored"], name="blind"),
        helper.make_node("Add", ["product", "floored"], ["logits"]),
    )
    assert gather_evidence(_session(data), noise, seed=0).gradient_blind_nodes == ("blind",)


def test_gather_evidence_is_uncertified_when_images_are_few(noise: ImageSet) -> None:
    data = _ending_in(helper.make_node("Relu", ["product"], ["logits"]))
    certificate = gather_evidence(_session(data), noise.take(np.arange(200)), seed=0).certificate
    assert (certificate.certified, certificate.reason) == (False, "200 clean images; the certificate needs 256")
