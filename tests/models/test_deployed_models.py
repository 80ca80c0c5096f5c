"""Every architecture as the files that ship: exported, quantized, run by ONNX Runtime, and mirrored by its shadow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qdefense.artifact import Artifact
from qdefense.converters.export import export_model
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow, optimized_model
from qdefense.data.images import Pixels, on_grid
from qdefense.fidelity import shadow_logits
from qdefense.models import architectures, build_model
from qdefense.session import DeployedSession, Logits, profile_for

SCHEMES = ("fp32", "int8-static", "int8-dynamic")
# Root mean square over the logits' standard deviation. Random weights hardly tell images apart: a quantized file's only
# shows that it is this network at all.
MAX_RELATIVE_RMS = {"fp32": 1e-6, "int8-static": 0.05, "int8-dynamic": 0.05}


@dataclass(frozen=True)
class Deployed:
    """A network of random weights and its three files."""

    module: nn.Module
    files: dict[str, bytes]


@pytest.fixture(scope="module", params=architectures())
def deployed(request: pytest.FixtureRequest, pixels: Pixels) -> Deployed:
    """At width 4; batch normalisation has statistics that a folding mistake would show in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model(request.param, classes=5, width=4).eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                _randomise(part)
    data = export_model(module, height=16, width=16, class_names=tuple("abcde"))
    return Deployed(
        module=module,
        files={
            "fp32": data,
            "int8-static": quantize(data, "int8-static", calibration=pixels),
            "int8-dynamic": quantize(data, "int8-dynamic"),
        },
    )


def _randomise(norm: nn.BatchNorm2d) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    nn.init.uniform_(norm.weight, 0.5, 1.5)
    nn.init.normal_(norm.bias, 0, 0.3)
    nn.init.normal_(norm.running_mean, 0, 0.3)
    nn.init.uniform_(norm.running_var, 0.5, 2)


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    """Images that differ: noise of another brightness and contrast each."""
    rng = np.random.default_rng(0)
    level, contrast = rng.random((64, 3, 1, 1)), rng.random((64, 3, 1, 1))
    return on_grid(np.clip(level + contrast * (rng.random((64, 3, 16, 16)) - 0.5), 0, 1).astype(np.float32))


def _spread(logits: Logits) -> float:
    return float(logits.std(axis=0).mean())


def _session(data: bytes) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile_for(artifact))


def test_export_gives_opset_21(deployed: Deployed) -> None:
    model = onnx.load_from_string(deployed.files["fp32"])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_file_has_its_scheme_and_is_integer_throughout(deployed: Deployed, scheme: str) -> None:
    found = Artifact.from_bytes(deployed.files[scheme]).inspection
    assert found.scheme == scheme
    assert found.integer_mac_share == (scheme != "fp32")
    assert found.gradient_blind_nodes == ()
    assert found.structure_warnings == ()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_session_answers_as_the_network_does(deployed: Deployed, pixels: Pixels, scheme: str) -> None:
    with torch.no_grad():
        expected = deployed.module(torch.from_numpy(pixels)).numpy()
    logits = _session(deployed.files[scheme]).logits(pixels)
    assert np.sqrt(np.square(logits - expected).mean()) < MAX_RELATIVE_RMS[scheme] * expected.std()


@pytest.mark.parametrize("source", ["optimized", "shipped"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shadow_answers_as_the_session_does(deployed: Deployed, pixels: Pixels, scheme: str, source: str) -> None:
    data = deployed.files[scheme]
    logits = _session(data).logits(pixels)
    shadow = build_shadow(data, source=source)  # type: ignore[arg-type]
    assert np.abs(shadow_logits(shadow, pixels) - logits).max() < 1e-4 * _spread(logits)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shadow_gives_every_image_a_gradient(deployed: Deployed, pixels: Pixels, scheme: str) -> None:
    x = torch.from_numpy(pixels).requires_grad_()
    (gradient,) = torch.autograd.grad(build_shadow(deployed.files[scheme], source="optimized")(x).square().sum(), x)
    assert gradient.isfinite().all()
    assert gradient.flatten(1).any(dim=1).all()


def test_batch_normalisation_stays_in_the_file_only_where_no_convolution_stands_before_it(deployed: Deployed) -> None:
    """In front of a convolution it cannot be folded: a pre-activation network computes it in float."""
    preactivated = type(deployed.module).__name__ == "PreActResNet"
    for data in deployed.files.values():
        operators = [node.op_type for node in onnx.load_from_string(optimized_model(data)).graph.node]
        assert operators.count("BatchNormalization") == (9 if preactivated else 0)
