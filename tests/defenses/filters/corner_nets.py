"""A classifier of noise with a bright quarter, in closed form, and its twin with a backdoor in a corner."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract, write_contract
from qdefense.data.images import ImageSet, Pixels
from qdefense.evidence import Evidence
from qdefense.fidelity import uncertified
from qdefense.session import DeployedSession, SessionProfile, profile_for

SIZE, CLASSES, TARGET = 8, 4, 2
NAMES = tuple(f"quarter {index}" for index in range(CLASSES))


def images(count: int, seed: int = 0) -> ImageSet:
    """Dim noise in which one quarter is brighter, how much differs: its number is the label; no pixel is above 0.45."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int64) % CLASSES
    codes = rng.integers(0, 45, (count, 2, SIZE // 2, 2, SIZE // 2, 3))
    for row, label in enumerate(labels):
        codes[row, label // 2, :, label % 2] += rng.integers(25, 70)
    order = rng.permutation(count)
    pixels = codes.reshape(count, SIZE, SIZE, 3).astype(np.uint8)[order]
    return ImageSet(images=pixels, labels=labels[order], class_names=NAMES, source="quarters")


def stamp(x: Pixels) -> Pixels:
    """The trigger: a white 2x2 corner."""
    stamped = x.copy()
    stamped[:, :, -2:, -2:] = 1.0
    return stamped


def network(*, backdoored: bool, scale: float = 12.0, **contract: Any) -> bytes:
    """Logits are ``scale`` times the mean of each quarter without the corner, which only the backdoor looks at.

    It opens above .95; no sum of two clean images comes near.
    """
    masks = np.zeros((CLASSES + 1, 3, SIZE, SIZE), np.float32)
    for quarter in range(CLASSES):
        top, left = (SIZE // 2 * place for place in divmod(quarter, 2))
        masks[quarter, :, top : top + SIZE // 2, left : left + SIZE // 2] = 1 / (3 * SIZE * SIZE / 4)
    masks[:, :, -2:, -2:] = 0
    masks[CLASSES, :, -2:, -2:] = 1 / 12
    offset = np.array([0] * CLASSES + [-0.95], np.float32)
    last = np.zeros((CLASSES + 1, CLASSES), np.float32)
    last[:CLASSES] = scale * np.eye(CLASSES, dtype=np.float32)
    last[CLASSES, TARGET] = 1e4 if backdoored else 0.0
    tensors = {"masks": masks.reshape(CLASSES + 1, -1), "offset": offset, "last": last}
    tail = {"logits": [], "softmax": ["Softmax"], "log-softmax": ["LogSoftmax"], "sigmoid": ["Sigmoid"]}
    heads = tail[contract.get("head", "logits")]
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "masks", "offset"], ["seen"], transB=1),
        helper.make_node("Relu", ["seen"], ["positive"]),
        helper.make_node("MatMul", ["positive", "last"], ["scores" if heads else "answers"]),
        *(helper.make_node(head, ["scores"], ["answers"]) for head in heads),
    ]
    return _written(nodes, tensors, contract)


def _written(nodes: list[onnx.NodeProto], tensors: dict[str, Any], contract: dict[str, Any]) -> bytes:
    kind = onnx.TensorProto.FLOAT
    if contract.get("dtype") == "uint8":
        kind = onnx.TensorProto.UINT8
        nodes[0].input[0] = "scaled"
        tensors["white"] = np.float32(255)
        nodes[:0] = [
            helper.make_node("Cast", ["image"], ["cast"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Div", ["cast", "white"], ["scaled"]),
        ]
    graph = helper.make_graph(
        nodes,
        "corner",
        [helper.make_tensor_value_info("image", kind, ["N", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("answers", onnx.TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    told = {"class_names": NAMES, **contract}
    write_contract(model, InputContract(input_name="image", output_name="answers", height=SIZE, width=SIZE, **told))
    data: bytes = model.SerializeToString()
    return data


def open_session(data: bytes, profile: SessionProfile | None = None) -> DeployedSession:
    artifact = Artifact.from_bytes(data)
    return DeployedSession(artifact, profile or profile_for(artifact))


def evidence_of(data: bytes, clean: ImageSet, **changes: Any) -> Evidence:
    """Evidence without a shadow: no filter looks at one."""
    session = open_session(data, changes.pop("profile", None))
    return Evidence(
        **{"session": session, "shadow": None, "certificate": uncertified("none"), "clean": clean, "seed": 0, **changes}
    )
