"""Every architecture as the files that ship: exported, quantized, run by ONNX Runtime, and mirrored by its shadow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from qdefense import fidelity
from qdefense.artifact import Artifact
from qdefense.converters.export import export_model
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow, optimized_model
from qdefense.data.images import Pixels, on_grid
from qdefense.fidelity import compare_logits, shadow_logits
from qdefense.models import architectures, build_model
from qdefense.session import DeployedSession, Logits, profile_for

SCHEMES = ("fp32", "int8-static", "int8-dynamic", "int4")
# INT4 is left out where a file is compared with the network: sixteen levels make it another one.
CLOSE = SCHEMES[:3]
# Root mean square over the logits' standard deviation. Random weights hardly tell images apart: a quantized file's only
# shows that it is this network at all.
MAX_RELATIVE_RMS = {"fp32": 1e-5, "int8-static": 0.1, "int8-dynamic": 0.1}
# Depthwise layers and linear bottlenecks lose far more to INT8 (0.25 and 0.21 here); another network would be above 1.
MAX_RELATIVE_RMS_OF_MOBILENET = MAX_RELATIVE_RMS | {"int8-static": 0.4, "int8-dynamic": 0.4}


@dataclass(frozen=True)
class Deployed:
    """A network of random weights and its files."""

    architecture: str
    module: nn.Module
    files: dict[str, bytes]


@pytest.fixture(scope="module", params=architectures())
def deployed(request: pytest.FixtureRequest, pixels: Pixels) -> Deployed:
    """At width 4; batch normalisation has statistics and weights that a folding mistake would show in."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model(request.param, classes=5, width=4).eval()
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                _randomise(part)
            if isinstance(part, nn.Conv2d):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")  # torch's own lets deep signals die
    data = export_model(module, height=16, width=16, class_names=tuple("abcde"))
    return Deployed(
        architecture=request.param,
        module=module,
        files={
            "fp32": data,
            "int8-static": quantize(data, "int8-static", calibration=pixels),
            "int8-dynamic": quantize(data, "int8-dynamic"),
            "int4": quantize(data, "int4"),
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


def _session(data: bytes, batch: int | None = None) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    profile = profile_for(artifact)
    return DeployedSession(artifact, profile if batch is None else profile.model_copy(update={"batch": batch}))


def test_export_gives_opset_21_and_a_contract_with_a_free_batch(deployed: Deployed) -> None:
    model = onnx.load_from_string(deployed.files["fp32"])
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 21)]
    contract = Artifact.from_bytes(deployed.files["fp32"]).contract
    assert (contract.height, contract.width, contract.class_names, contract.batch) == (16, 16, tuple("abcde"), None)


def test_export_leaves_no_operator_that_asks_for_a_shape(deployed: Deployed) -> None:
    operators = {node.op_type for node in onnx.load_from_string(deployed.files["fp32"]).graph.node}
    assert not operators & {"Shape", "Gather", "Expand", "Range", "ConstantOfShape", "ReduceMean"}
    assert "GlobalAveragePool" in operators


@pytest.mark.parametrize("scheme", ["fp32", "int8-static", "int4"])
def test_file_gives_an_image_the_same_answer_in_any_batch(deployed: Deployed, pixels: Pixels, scheme: str) -> None:
    together = _session(deployed.files[scheme]).logits(pixels)
    for batch in (1, 3):
        answers = _session(deployed.files[scheme], batch).logits(pixels[:7])
        assert np.abs(answers - together[:7]).max() < 1e-5 * np.abs(together).max()


@pytest.mark.parametrize("scheme", CLOSE)
def test_file_has_its_scheme_and_is_integer_throughout(deployed: Deployed, scheme: str) -> None:
    found = Artifact.from_bytes(deployed.files[scheme]).inspection
    assert found.scheme == scheme
    # Dynamic quantization multiplies activations by weights only: attention stays in float.
    attention = deployed.architecture == "vit" and scheme == "int8-dynamic"
    assert 0 < found.integer_mac_share < 1 if attention else found.integer_mac_share == (scheme != "fp32")
    assert found.gradient_blind_nodes == ()
    assert found.structure_warnings == ()


@pytest.mark.parametrize("scheme", CLOSE)
def test_session_answers_as_the_network_does(deployed: Deployed, pixels: Pixels, scheme: str) -> None:
    with torch.no_grad():
        expected = deployed.module(torch.from_numpy(pixels)).numpy()
    logits = _session(deployed.files[scheme]).logits(pixels)
    largest = MAX_RELATIVE_RMS_OF_MOBILENET if deployed.architecture == "mobilenetv2" else MAX_RELATIVE_RMS
    assert np.sqrt(np.square(logits - expected).mean()) < largest[scheme] * expected.std()


@pytest.mark.parametrize("source", ["optimized", "shipped"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_shadow_answers_as_the_session_does(deployed: Deployed, pixels: Pixels, scheme: str, source: str) -> None:
    """A code may be off by one where a float's last bit decides it, and where the runtime's fusions round elsewhere.

    The first is so behind a layer normalisation or a GELU, the second in the shipped form of static INT8.
    """
    data = deployed.files[scheme]
    logits = _session(data).logits(pixels)
    shadow = build_shadow(data, source=source)  # type: ignore[arg-type]
    answers = shadow_logits(shadow, pixels)
    if source == "shipped" and scheme == "int8-static":
        assert compare_logits(logits, answers).relative_rms < fidelity.MAX_RELATIVE_RMS
    elif deployed.architecture in ("convnext", "vit") and scheme.startswith("int8"):
        assert compare_logits(logits, answers).passes
    else:
        assert np.abs(answers - logits).max() < 1e-4 * _spread(logits)


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
