from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx.numpy_helper import from_array, to_array

from qdefense.accuracy import AccuracyDrop, NotMeasuredError, accuracy_drop, count_right
from qdefense.artifact import Artifact
from qdefense.converters.contract import StatedContract
from qdefense.data.images import ImageSet
from qdefense.data.npz import load_npz

if TYPE_CHECKING:
    from .conftest import Toy


def images_of(toy: Toy, count: int = 80) -> ImageSet:
    return load_npz(toy.data, split=None, limit=None, seed=0).take(np.arange(count))


def changed(artifact: Artifact, bias: float) -> Artifact:
    """The toy with another bias of class 0."""
    model = onnx.load_from_string(artifact.data)
    offset = next(tensor for tensor in model.graph.initializer if tensor.name == "offset")
    values = to_array(offset).copy()
    values[0] = bias
    offset.CopyFrom(from_array(values, "offset"))
    return Artifact.from_bytes(model.SerializeToString())


def test_drop_is_in_points_of_the_images_that_changed(toy: Toy) -> None:
    artifact, clean = Artifact.read(toy.clean), images_of(toy)
    drop = accuracy_drop(artifact, changed(artifact, -1000.0), clean)
    lost = int((clean.labels == 0).sum())
    assert lost > 0
    assert drop == AccuracyDrop(right_before=80, right_after=80 - lost, images=80)
    assert (drop.before, drop.after, drop.points) == (1.0, 1 - lost / 80, 100 * lost / 80)


def test_drop_of_two_points_is_two_points() -> None:
    assert AccuracyDrop(right_before=288, right_after=282, images=300).points == 2.0
    assert AccuracyDrop(right_before=282, right_after=288, images=300).points == -2.0


def test_an_answer_that_is_no_number_is_not_right(toy: Toy) -> None:
    """The largest of an array with a NaN is that NaN for numpy: class 0 would be right."""
    assert count_right(changed(Artifact.read(toy.clean), np.nan), images_of(toy)) == 0


def test_drop_is_not_measured_when_labels_are_missing_or_useless(toy: Toy) -> None:
    artifact, clean = Artifact.read(toy.clean), images_of(toy)
    unlabelled = replace(clean, labels=np.full_like(clean.labels, -1), class_names=(), labelled=False)
    for images in (unlabelled, clean.take(np.arange(0))):
        with pytest.raises(NotMeasuredError, match=r"npz toy\.npz: there are no labelled images; give some"):
            accuracy_drop(artifact, artifact, images)
    shifted = replace(clean, labels=(clean.labels + 1) % 8)
    with pytest.raises(NotMeasuredError, match=r"right on 0.0% of 80 images, near chance \(17.5%\), so that a drop"):
        accuracy_drop(artifact, artifact, shifted)


def test_drop_is_not_measured_when_the_file_is_multi_label(toy: Toy) -> None:
    model = onnx.load(toy.clean)
    del model.metadata_props[:]
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["scores"], ["logits"], name="sigmoid"))
    artifact = Artifact.from_bytes(model.SerializeToString(), StatedContract(head="sigmoid"))
    with pytest.raises(NotMeasuredError, match="multi-label"):
        accuracy_drop(artifact, artifact, images_of(toy))
