from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch.nn import functional

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract, write_contract
from qdefense.converters.quantize import Format
from qdefense.converters.shadow import Shadow, build_shadow
from qdefense.converters.writeback import write_back
from qdefense.data.images import ImageSet
from qdefense.fidelity import certify
from qdefense.session import DeployedSession, profile_for

from .shadow.quantized_files import CLASSES, SIZE, Array, network, quantized
from .shadow.shadow_graphs import session_output


def trainable(model: bytes) -> Shadow:
    return build_shadow(model, source="shipped", trainable=True)


def zones(count: int, seed: int) -> tuple[Array, torch.Tensor]:
    """Noise in which one of four quarters is brighter, and its number."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 4
    pixels = rng.uniform(0, 0.5, (count, 3, SIZE, SIZE)).astype(np.float32)
    for row, label in enumerate(labels):
        pixels[row, :, 4 * (label // 2) :, 4 * (label % 2) :][:, :4, :4] += 0.3
    return pixels, torch.from_numpy(labels)


def fine_tuned(model: bytes, rate: float, steps: int) -> bytes:
    """The file after training through its shadow, with nothing but torch."""
    shadow, (x, labels) = trainable(model), zones(256, seed=1)
    optimizer, rows = torch.optim.Adam(shadow.parameters(), lr=rate), torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = torch.randperm(len(labels), generator=rows)[:64]
        optimizer.zero_grad()
        functional.cross_entropy(shadow(torch.from_numpy(x)[batch]), labels[batch]).backward()
        optimizer.step()
    return write_back(model, shadow).data


def deployed(model: bytes) -> tuple[float, float]:
    """Accuracy and loss of the session on images that nothing was fitted to."""
    x, labels = zones(200, seed=2)
    logits = torch.from_numpy(session_output(model, x))
    return float((logits.argmax(1) == labels).float().mean()), float(functional.cross_entropy(logits, labels))


@pytest.fixture(scope="module")
def fitted() -> onnx.ModelProto:
    """The classifier in float, trained through its own shadow."""
    data = fine_tuned(bytes(network().SerializeToString()), rate=0.01, steps=150)
    assert deployed(data)[0] > 0.95
    return onnx.load_from_string(data)


@pytest.mark.parametrize("form", ["qdq", "qoperator"])
def test_quantization_aware_training_repairs_a_static_file_on_the_session(
    fitted: onnx.ModelProto, form: Format
) -> None:
    # ranges that cut off three fifths of all activations
    model = quantized("int8-static", fitted, format=form, percentile=70.0)
    accuracy, loss = deployed(model)
    assert accuracy < 0.5
    better, less = deployed(fine_tuned(model, rate=0.003, steps=60))
    assert better > 0.9
    assert less < loss / 2


def test_quantization_aware_training_improves_four_bit_weights(fitted: onnx.ModelProto) -> None:
    model = quantized("int4-a8", fitted)
    (_, loss), (_, less) = deployed(model), deployed(fine_tuned(model, rate=0.01, steps=60))
    assert less < loss / 2


def test_repaired_file_is_certified_as_any_file(fitted: onnx.ModelProto) -> None:
    names = tuple(f"class {index}" for index in range(CLASSES))
    contract = InputContract(
        input_name="x", output_name="y", height=SIZE, width=SIZE, class_names=names, pixels_from="metadata"
    )
    model = onnx.ModelProto()
    model.CopyFrom(fitted)
    write_contract(model, contract)
    data = fine_tuned(quantized("int8-static", model, percentile=70.0), rate=0.003, steps=60)
    artifact = Artifact.from_bytes(data)
    assert artifact.contract == contract
    x, labels = zones(300, seed=4)
    pixels = np.rint(x.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    images = ImageSet(images=pixels, labels=labels.numpy(), class_names=names, source="zones")
    session = DeployedSession(artifact, profile_for(artifact))
    certificate = certify(session, build_shadow(data, source="optimized", contract=contract), images, seed=0)
    assert certificate.certified
    assert [entry.bit_exact_rows for entry in certificate.sets] == [1.0] * 4
