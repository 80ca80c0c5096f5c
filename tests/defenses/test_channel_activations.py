from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from qdefense.artifact import Artifact
from qdefense.converters.channels import FeatureMap, last_feature_map
from qdefense.converters.shadow import build_shadow, runtime_saturates
from qdefense.defenses.channel_activations import ActivationError, mean_activations
from qdefense.evidence import Evidence
from qdefense.fidelity import FidelityCertificate, uncertified
from qdefense.session import DeployedSession, SessionError, profile_for

if TYPE_CHECKING:
    from ..conftest import ToyForms  # noqa: TID252 (the fixtures are there)

FORMS = ("fp32", "static", "dynamic")
CERTIFIED = FidelityCertificate(
    certified=True, reason="all pass", source="optimized", saturation_emulated=runtime_saturates()
)


def evidence_of(forms: ToyForms, form: str, **changes: Any) -> tuple[Evidence, FeatureMap]:
    artifact = Artifact.from_bytes(forms[form])
    session = DeployedSession(artifact, profile_for(artifact))
    shadow = build_shadow(artifact.data, source="optimized", contract=artifact.contract)
    usual = {"session": session, "shadow": shadow, "certificate": CERTIFIED, "clean": forms.images, "seed": 0}
    return Evidence(**{**usual, **changes}), last_feature_map(artifact.data, "logits")


def positive(forms: ToyForms, form: str, *, saturate: bool | None = None) -> np.ndarray[Any, Any]:
    """Means of the rectified map as the shipped graph has it, whose floats never saturate, or the runtime's graph."""
    clipped = runtime_saturates() if saturate is None else saturate
    contract = Artifact.from_bytes(forms[form]).contract
    shadow = build_shadow(forms[form], source="optimized" if clipped else "shipped", contract=contract)
    name = "positive_QuantizeLinear_Output" if form == "static" else "positive"
    with torch.no_grad():
        found = shadow.activations(torch.from_numpy(forms.images.pixels), [name], saturate=clipped)
    means: np.ndarray[Any, Any] = found[name].numpy().mean(axis=(0, 2, 3), dtype=np.float64)
    return means


class _Untappable:
    """A session that no tap can read without changing its logits."""

    def __init__(self, session: DeployedSession) -> None:
        self.graph, self.artifact = session.graph, session.artifact

    def activations(self, _x: object, tensor: str) -> None:
        raise SessionError(f"tapping {tensor} changes the logits")


@pytest.mark.parametrize("form", FORMS)
def test_means_are_read_off_the_session_after_the_rectifier(toy_forms: ToyForms, form: str) -> None:
    evidence, feature_map = evidence_of(toy_forms, form)
    found = mean_activations(evidence, feature_map, toy_forms.images)
    assert found.measured_on == "session"
    assert found.tensor.startswith("positive")
    np.testing.assert_allclose(found.means, positive(toy_forms, form), rtol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_means_are_read_off_the_certified_shadow_where_no_tap_reaches(toy_forms: ToyForms, form: str) -> None:
    evidence, feature_map = evidence_of(toy_forms, form)
    blocked = replace(evidence, session=_Untappable(evidence.session))
    found = mean_activations(blocked, feature_map, toy_forms.images)
    assert found.measured_on == "shadow"
    np.testing.assert_allclose(found.means, positive(toy_forms, form), rtol=1e-5)


@pytest.mark.parametrize("saturate", [False, True])
def test_means_off_the_shadow_saturate_where_the_certificate_says_so(toy_forms: ToyForms, saturate: bool) -> None:
    evidence, feature_map = evidence_of(toy_forms, "static")
    certificate = CERTIFIED.model_copy(update={"saturation_emulated": saturate})
    blocked = replace(evidence, session=_Untappable(evidence.session), certificate=certificate)
    found = mean_activations(blocked, feature_map, toy_forms.images)
    np.testing.assert_allclose(found.means, positive(toy_forms, "static", saturate=saturate), rtol=1e-5)
    assert not np.allclose(found.means, positive(toy_forms, "static", saturate=not saturate), rtol=1e-5)


@pytest.mark.parametrize("shadow", ["none", "not certified"])
def test_means_are_refused_where_neither_gives_them(toy_forms: ToyForms, shadow: str) -> None:
    evidence, feature_map = evidence_of(toy_forms, "fp32")
    changes: dict[str, Any] = {"shadow": None} if shadow == "none" else {"certificate": uncertified("too few")}
    blocked = replace(evidence, session=_Untappable(evidence.session), **changes)
    with pytest.raises(ActivationError, match="can be read neither from the session nor from a certified shadow"):
        mean_activations(blocked, feature_map, toy_forms.images)


def test_a_tensor_of_another_layout_is_passed_over(toy_forms: ToyForms) -> None:
    evidence, feature_map = evidence_of(toy_forms, "fp32")
    odd = replace(feature_map, tensors=("flat", "no such tensor", *feature_map.tensors))
    assert mean_activations(evidence, odd, toy_forms.images).tensor == "positive"
