"""Exactness of the shadow on networks trained on real images: the figures about our code that the issue names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from qdefense.artifact import Artifact
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow
from qdefense.data.images import ImageSet
from qdefense.data.opening import open_data
from qdefense.fidelity import FidelityCertificate, certify
from qdefense.session import DeployedSession, profile_for

ZOO = Path(__file__).parents[1] / "benchmarks" / "first_verdict" / "results"
MODELS = ("gtsrb-a0", "gtsrb-b0", "cifar10-a0", "cifar10-b0")


def _images(folder: Path, model: str, split: str, limit: int) -> ImageSet:
    return open_data(str(folder / model.partition("-")[0]), split=split, limit=limit, seed=0)


def _certificate(data: bytes, clean: ImageSet) -> tuple[FidelityCertificate, float]:
    artifact = Artifact.from_bytes(data)
    session = DeployedSession(artifact, profile_for(artifact))
    largest = float(np.abs(session.logits(clean.pixels)).max())
    return certify(session, build_shadow(data, source="optimized"), clean, seed=0), largest


@pytest.mark.real
@pytest.mark.parametrize("model", MODELS)
def test_static_int8_shadow_is_bit_exact_on_every_row_when_range_is_reduced(real_data: Path, model: str) -> None:
    pixels = _images(real_data, model, "train", 256).pixels
    data = quantize((ZOO / f"{model}.onnx").read_bytes(), "int8-static", calibration=pixels)
    certificate, _ = _certificate(data, _images(real_data, model, "test", 300))
    assert certificate.certified, certificate.reason
    assert [(entry.bit_exact_rows, entry.max_abs_logit_diff) for entry in certificate.sets] == [(1.0, 0.0)] * 4


@pytest.mark.real
@pytest.mark.parametrize("model", MODELS)
def test_dynamic_int8_shadow_agrees_on_every_row_at_batch_1(real_data: Path, model: str) -> None:
    data = quantize((ZOO / f"{model}.onnx").read_bytes(), "int8-dynamic")
    certificate, _ = _certificate(data, _images(real_data, model, "test", 300))
    assert certificate.certified, certificate.reason
    assert [entry.top1_agreement for entry in certificate.sets] == [1.0] * 4


@pytest.mark.real
@pytest.mark.parametrize("model", MODELS)
def test_fp32_shadow_is_within_a_hundred_thousandth_of_the_largest_logit(real_data: Path, model: str) -> None:
    certificate, largest = _certificate((ZOO / f"{model}.onnx").read_bytes(), _images(real_data, model, "test", 300))
    assert certificate.certified, certificate.reason
    clean = certificate.sets[0]
    assert clean.max_abs_logit_diff is not None
    assert clean.max_abs_logit_diff <= 1e-5 * largest
