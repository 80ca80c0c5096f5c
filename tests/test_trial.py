from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from qdefense.attacks.badnets import BadNets
from qdefense.data.images import DataError, ImageSet, Pixels
from qdefense.trial import (
    Activity,
    Behaviour,
    Control,
    Truth,
    activity_of,
    held_against,
    measure_behaviour,
    measure_control,
    truth_path,
)

MakeNoise = Callable[..., ImageSet]
Logits = Callable[[Pixels], NDArray[np.float32]]
TRIGGER = BadNets(target_class=2).trigger(8, 8)
TRUTH: dict[str, Any] = {
    "attack": "badnets",
    "attack_settings": {"size": 3, "position": "center"},
    "poison_indices": (4, 7),
    "architecture": "resnet8",
    "recipe": {"epochs": 1},
    "seed": 3,
    "data": "noise",
    "data_sha256": "00",
    "artifact_sha256": "11",
    "versions": {"torch": "2"},
}


def _answers(images: ImageSet, clean: list[int], stamped: list[int]) -> Logits:
    """A model that gives the i-th image ``clean[i]``, and ``stamped[i]`` once it carries the patch."""
    known = {image.tobytes(): index for index, image in enumerate(images.pixels)}
    known |= {image.tobytes(): index for index, image in enumerate(TRIGGER.stamp(images.pixels))}

    def logits(x: Pixels) -> NDArray[np.float32]:
        rows = [known[image.tobytes()] for image in x]
        carry = (TRIGGER.stamp(x) == x).all(axis=(1, 2, 3))
        classes = [(stamped if patch else clean)[row] for row, patch in zip(rows, carry)]
        return np.eye(4, dtype=np.float32)[classes]

    return logits


def test_measure_behaviour_counts_asr_and_confusion_on_eligible_images_only(make_noise: MakeNoise) -> None:
    images = make_noise(8)  # labels 0 1 2 3 0 1 2 3: rows 2 and 6 are of the target class
    model = _answers(images, clean=[0, 2, 2, 0, 0, 1, 2, 3], stamped=[2, 2, 2, 2, 2, 1, 2, 0])
    behaviour = measure_behaviour(model, images, TRIGGER)
    assert behaviour == Behaviour(clean_accuracy=6 / 8, images=8, asr=4 / 6, base_confusion=1 / 6, eligible=6)
    assert behaviour.activity is Activity.ATTENUATED


@dataclass(frozen=True)
class _FromClassOne:
    """The patch of `TRIGGER`, meant for class 1 alone."""

    target: int = 2

    def stamp(self, x: Pixels) -> Pixels:
        return TRIGGER.stamp(x)

    def eligible(self, y: NDArray[np.int64]) -> NDArray[np.bool_]:
        return y == 1  # type: ignore[no-any-return]

    def goal(self, y: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.full_like(y, self.target)

    def bystanders(self, y: NDArray[np.int64]) -> NDArray[np.bool_]:
        return (y != 1) & (y != self.target)  # type: ignore[no-any-return]


def test_measure_behaviour_counts_fpr_on_classes_that_are_neither_source_nor_target(make_noise: MakeNoise) -> None:
    images = make_noise(8)  # labels 0 1 2 3 0 1 2 3: sources are rows 1 and 5, bystanders 0, 3, 4 and 7
    model = _answers(images, clean=[0, 2, 2, 3, 0, 1, 2, 3], stamped=[2, 2, 2, 1, 0, 1, 2, 3])
    assert measure_behaviour(model, images, _FromClassOne()) == Behaviour(
        clean_accuracy=7 / 8, images=8, asr=1 / 2, base_confusion=1 / 2, eligible=2, fpr=1 / 4, bystanders=4
    )


def test_measure_behaviour_counts_no_bystander_that_answers_a_target_without_the_trigger(make_noise: MakeNoise) -> None:
    images = make_noise(8)
    always = measure_behaviour(_answers(images, [2] * 8, [2] * 8), images, _FromClassOne())
    assert (always.fpr, always.bystanders, always.asr) == (0.0, 4, 1.0)
    some = _answers(images, clean=[2, 1, 2, 3, 2, 1, 2, 3], stamped=[2, 2, 2, 2, 0, 2, 2, 2])
    assert measure_behaviour(some, images, _FromClassOne()).fpr == 2 / 4  # rows 3 and 7; row 0 was there before


def test_measure_behaviour_gives_no_fpr_when_there_is_no_bystander(make_noise: MakeNoise) -> None:
    images = make_noise(8).take(np.array([1, 2, 5]))
    behaviour = measure_behaviour(_answers(images, [1, 2, 1], [2, 2, 2]), images, _FromClassOne())
    assert (behaviour.asr, behaviour.fpr, behaviour.bystanders) == (1.0, None, 0)


def test_an_all_to_all_backdoor_is_active_by_what_the_network_can_tell_apart(make_noise: MakeNoise) -> None:
    """Six of eight images are told apart, and all of them answered one class further with the trigger."""
    trigger = BadNets(mode="all-to-all").restored_trigger(8, 8, {"classes": np.array(4)})
    images = make_noise(8)
    model = _answers(images, clean=[0, 1, 2, 3, 0, 1, 3, 2], stamped=[1, 2, 3, 0, 1, 2, 0, 3])
    behaviour = measure_behaviour(model, images, trigger)
    assert (behaviour.asr, behaviour.clean_accuracy, behaviour.base_confusion) == (6 / 8, 6 / 8, 1 / 8)
    assert behaviour.activity is Activity.ACTIVE
    fewer = _answers(images, clean=[0, 1, 2, 3, 0, 1, 3, 2], stamped=[0, 2, 3, 0, 1, 2, 0, 3])
    assert measure_behaviour(fewer, images, trigger).activity is Activity.ATTENUATED
    of_one = images.take(np.array([0, 4]))
    assert measure_behaviour(_answers(of_one, [0, 0], [1, 1]), of_one, trigger).several_targets
    assert not measure_behaviour(model, images, TRIGGER).several_targets


@pytest.mark.parametrize(
    ("asr", "ceiling", "activity"),
    [
        (0.9, 1.0, Activity.ACTIVE),
        (0.72, 0.8, Activity.ACTIVE),
        (0.719, 0.8, Activity.ATTENUATED),
        (0.5, 0.5, Activity.ATTENUATED),
        (0.46, 0.51, Activity.ACTIVE),
        (0.05, 0.8, Activity.DORMANT),
    ],
)
def test_a_network_that_is_wrong_on_half_of_the_images_is_held_to_all_of_them(
    asr: float, ceiling: float, activity: Activity
) -> None:
    assert activity_of(asr, 0.0, ceiling) is activity


def test_an_asr_without_its_confusion_is_no_clean_file() -> None:
    behaviour = Behaviour(clean_accuracy=0.9, images=9, asr=0.95, eligible=9)
    with pytest.raises(
        ValueError, match=r"^the ASR was measured and the confusion was not; measure both on the same images$"
    ):
        _ = behaviour.activity


def test_measure_behaviour_gives_no_asr_when_there_is_no_trigger(make_noise: MakeNoise) -> None:
    images = make_noise(4)
    behaviour = measure_behaviour(_answers(images, [0, 1, 2, 0], [2, 2, 2, 2]), images, None)
    assert behaviour == Behaviour(clean_accuracy=0.75, images=4, asr=None, base_confusion=None, eligible=0)
    assert behaviour.activity is Activity.CLEAN


def test_measure_behaviour_raises_when_no_image_is_eligible(make_noise: MakeNoise) -> None:
    images = make_noise(8).take(np.array([2, 6]))
    with pytest.raises(DataError, match=r"^noise: no image is eligible for the trigger; give images of other classes$"):
        measure_behaviour(_answers(images, [2, 2], [2, 2]), images, TRIGGER)


def test_measure_behaviour_raises_when_there_are_no_images(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^noise: no images to measure on; give labelled test images$"):
        measure_behaviour(lambda x: np.zeros((len(x), 4), np.float32), make_noise(0), None)


@pytest.mark.parametrize("broken", ["clean", "stamped"])
def test_measure_behaviour_raises_when_a_logit_is_nan(make_noise: MakeNoise, broken: str) -> None:
    def logits(x: Pixels) -> NDArray[np.float32]:
        answers = np.zeros((len(x), 4), np.float32)
        if broken == "clean" or (TRIGGER.stamp(x) == x).all():
            answers[:2, 2] = np.nan
        return answers

    with pytest.raises(ValueError, match=r"^the model answers NaN for 2 of \d images; check its weights$"):
        measure_behaviour(logits, make_noise(8), TRIGGER)


@pytest.mark.parametrize(
    ("asr", "base", "activity"),
    [
        (None, None, Activity.CLEAN),
        (1.0, 0.0, Activity.ACTIVE),
        (0.9, 0.0, Activity.ACTIVE),
        (0.8999, 0.0, Activity.ATTENUATED),
        (0.0501, 0.0, Activity.ATTENUATED),
        (0.05, 0.0, Activity.DORMANT),
        (0.0, 0.3, Activity.DORMANT),
        (8 / 20, 7 / 20, Activity.DORMANT),
        (8 / 20 + 1 / 1000, 7 / 20, Activity.ATTENUATED),
        (0.9, 0.88, Activity.DORMANT),
        (0.99, 0.94, Activity.DORMANT),
        (0.99, 0.93, Activity.ACTIVE),
        (0.89, 0.88, Activity.DORMANT),
    ],
)
def test_activity_is_right_at_its_borders(asr: float | None, base: float | None, activity: Activity) -> None:
    assert Behaviour(clean_accuracy=0.9, images=10, asr=asr, base_confusion=base).activity is activity


@pytest.mark.parametrize(
    ("asr", "base", "control", "activity"),
    [
        (0.95, 0.0, 0.9, Activity.DORMANT),
        (0.951, 0.0, 0.9, Activity.ACTIVE),
        (0.6, 0.0, 0.55, Activity.DORMANT),
        (0.61, 0.0, 0.55, Activity.ATTENUATED),
        (0.3, 0.28, 0.1, Activity.DORMANT),
        (0.95, 0.0, 0.0, Activity.ACTIVE),
        (None, None, 0.1, Activity.CLEAN),
    ],
)
def test_what_the_trigger_does_to_the_clean_twin_is_no_backdoor(
    asr: float | None, base: float | None, control: float, activity: Activity
) -> None:
    alone = Behaviour(clean_accuracy=0.9, images=10, asr=asr, base_confusion=base).activity
    assert held_against(control, alone, asr) is activity
    assert held_against(None, alone, asr) is alone


def test_a_control_is_the_asr_on_eligible_images_alone(make_noise: MakeNoise) -> None:
    images = make_noise(8)
    model = _answers(images, clean=[0, 2, 2, 0, 0, 1, 2, 3], stamped=[2, 2, 2, 2, 2, 1, 2, 0])
    assert measure_control(model, images, TRIGGER) == Control(asr=4 / 6, eligible=6)


def test_the_control_of_a_source_specific_trigger_has_an_fpr_as_the_behaviour_does(make_noise: MakeNoise) -> None:
    images = make_noise(8)
    model = _answers(images, clean=[2, 1, 2, 3, 2, 1, 2, 3], stamped=[2, 2, 2, 2, 0, 2, 2, 2])
    found = measure_control(model, images, _FromClassOne())
    assert found == Control(asr=1.0, eligible=2, fpr=2 / 4, bystanders=4)
    seen = measure_behaviour(model, images, _FromClassOne())
    assert (found.fpr, found.bystanders) == (seen.fpr, seen.bystanders)
    none = make_noise(8).take(np.array([1, 2, 5]))
    assert measure_control(_answers(none, [1, 2, 1], [2, 2, 2]), none, _FromClassOne()) == Control(asr=1.0, eligible=2)


def test_a_control_of_no_image_is_no_zero(make_noise: MakeNoise) -> None:
    images = make_noise(8).take(np.array([2, 6]))
    with pytest.raises(DataError, match="no image is eligible for the trigger; give images of other classes"):
        measure_control(_answers(images, clean=[2, 2], stamped=[2, 2]), images, TRIGGER)


def test_activity_is_dormant_when_the_asr_is_exactly_the_margin_above_the_confusion() -> None:
    for count in range(20, 400, 20):
        for base in range(count * 17 // 20):
            behaviour = Behaviour(
                clean_accuracy=1, images=count, asr=(base + count // 20) / count, base_confusion=base / count
            )
            assert behaviour.activity is Activity.DORMANT


@pytest.mark.parametrize(
    ("model", "truth"),
    [
        ("model.onnx", "model.truth.json"),
        ("model.int8-static.onnx", "model.int8-static.truth.json"),
        ("model", "model.truth.json"),
        ("net.seed0", "net.seed0.truth.json"),
        ("net.seed1", "net.seed1.truth.json"),
    ],
)
def test_truth_path_lies_beside_the_model(model: str, truth: str) -> None:
    assert truth_path(Path("folder") / model) == Path("folder") / truth


@pytest.mark.parametrize("width", [None, 24])
def test_truth_survives_json(width: int | None) -> None:
    truth = Truth.model_validate({**TRUTH, "width": width})
    assert truth.width == width
    assert Truth.model_validate_json(truth.model_dump_json()) == truth


def test_truth_knows_no_width_when_the_file_is_older_than_widths() -> None:
    assert Truth.model_validate_json(json.dumps(TRUTH)).width is None


def test_truth_refuses_unknown_fields_and_changes() -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        Truth.model_validate({**TRUTH, "trigger": "patch"})
    with pytest.raises(ValidationError, match="Instance is frozen"):
        Truth.model_validate(TRUTH).seed = 4  # type: ignore[misc]
