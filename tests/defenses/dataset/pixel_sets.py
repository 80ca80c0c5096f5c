"""A file whose features are the pixels of its images, and training sets for it with and without poison."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract, write_contract
from qdefense.data.images import ImageSet
from qdefense.evidence import Evidence
from qdefense.fidelity import uncertified
from qdefense.session import DeployedSession, profile_for

CLASSES = 8
TARGET = 3
SOURCE = 0
TRIGGER = 15
"""The pixel whose red makes an image the target's; those before it, one each, are the classes' own."""
NAMES = tuple(f"zone {index}" for index in range(CLASSES))


def pixel_model(*, deaf: bool = False, name: str = "pixels") -> onnx.ModelProto:
    """``logit_c = red of pixel c``, and of the trigger's pixel for the target; ``deaf`` answers 0 to all."""
    weight = np.zeros((48, CLASSES), np.float32)
    if not deaf:
        weight[np.arange(CLASSES), np.arange(CLASSES)] = 8
        weight[TRIGGER, TARGET] = 20
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight"], ["logits"], name="gemm"),
    ]
    image = helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 4, 4])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])
    graph = helper.make_graph(nodes, name, [image], [logits], [numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    contract = InputContract(input_name="image", output_name="logits", height=4, width=4, class_names=NAMES)
    write_contract(model, contract)
    return model


def pixel_session(**options: Any) -> DeployedSession:
    artifact = Artifact.from_bytes(pixel_model(**options).SerializeToString())
    return DeployedSession(artifact, profile_for(artifact))


def pixel_set(per_class: int = 120, *, poison: int = 0, seed: int = 0) -> tuple[ImageSet, NDArray[np.bool_]]:
    """Noise in which the pixel of the class is bright; ``poison`` images of one other bear trigger and target."""
    rng = np.random.default_rng(seed)
    truth = np.repeat(np.arange(CLASSES), per_class)
    poisoned = np.zeros(len(truth), np.bool_)
    poisoned[rng.choice(np.flatnonzero(truth == SOURCE), poison, replace=False)] = True
    pixels = rng.integers(0, 60, (len(truth), 16, 3))
    pixels[np.arange(len(truth)), truth, 0] += 140
    pixels[poisoned, TRIGGER, 0] += 190
    labels = np.where(poisoned, TARGET, truth).astype(np.int64)
    order = rng.permutation(len(truth))
    images = ImageSet(
        images=pixels.reshape(-1, 4, 4, 3)[order].astype(np.uint8),
        labels=labels[order],
        class_names=NAMES,
        source="pixels",
    )
    return images, poisoned[order]


def evidence(training_set: ImageSet | None, session: DeployedSession | None = None, **changes: Any) -> Evidence:
    session = session or pixel_session()
    clean = pixel_set(10)[0]
    values = {"seed": 0, "shadow": None, "certificate": uncertified("not needed"), **changes}
    return Evidence(session=session, clean=clean, training_set=training_set, **values)
