from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.sig import SIG
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_images
from qdefense.registry import SpecError, flat_settings
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _grey(size: int = 16, code: int = 128) -> Pixels:
    return np.full((1, 3, size, size), np.float32(code) / np.float32(255), np.float32)


def _codes(pixels: Pixels) -> NDArray[np.int64]:
    return np.rint(pixels * 255).astype(np.int64)


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_stamp_adds_the_sinusoid_to_each_row_of_each_channel() -> None:
    """Four periods on 16 columns: 0, 20, 0, -20 and so on."""
    added = _codes(SIG(frequency=4).trigger(16, 16).stamp(_grey())) - 128
    assert added[0, 0, 0].tolist() == [0, 20, 0, -20] * 4
    assert (added == added[0, 0, 0]).all()


def test_stamp_rounds_the_signal_to_whole_codes() -> None:
    """20 sin(2 pi / 16 j) of the first quarter: 0, 7.65, 14.14, 18.48, 20."""
    added = _codes(SIG(frequency=1).trigger(8, 16).stamp(_grey()[:, :, :8])) - 128
    assert added[0, 0, 0, :5].tolist() == [0, 8, 14, 18, 20]


def test_stamp_stays_within_delta_and_in_range_on_the_uint8_grid(make_noise: MakeNoise) -> None:
    pixels = make_noise(16, size=16).pixels
    stamped = SIG().trigger(16, 16).stamp(pixels)
    assert np.abs(_codes(stamped) - _codes(pixels)).max() <= 20
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert 0 <= stamped.min() <= stamped.max() <= 1
    assert stamped.dtype == np.float32


def test_stamp_is_clipped_addition_of_one_signal_whatever_the_image(make_noise: MakeNoise) -> None:
    pixels, trigger = make_noise(16, size=16).pixels, SIG().trigger(16, 16)
    signal = _codes(trigger.stamp(_grey())) - 128
    assert np.array_equal(_codes(trigger.stamp(pixels)), np.clip(_codes(pixels) + signal, 0, 255))


def test_stamp_changes_nothing_when_delta_is_zero(make_noise: MakeNoise) -> None:
    pixels = make_noise(4, size=16).pixels
    assert SIG(inference_delta=0).trigger(16, 16).stamp(pixels).tobytes() == pixels.tobytes()


def test_trigger_has_the_strength_of_inference_whatever_training_has() -> None:
    trigger = SIG(delta=5, inference_delta=60, frequency=4).trigger(16, 16)
    assert (_codes(trigger.stamp(_grey())) - 128)[0, 0, 0, :4].tolist() == [0, 60, 0, -60]


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = SIG(target_class=2).trigger(16, 16), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.2, 2), (0.25, 2), (0.55, 6), (1.0, 10)])
def test_poison_stamps_exactly_the_rows_it_says_of_the_target_class(
    make_noise: MakeNoise, rate: float, count: int
) -> None:
    original, attack = make_noise(40, size=16), SIG(class_rate=rate, target_class=2, inference_delta=90)
    poisoned = attack.poison(original, np.random.default_rng(0))
    stamped = to_images(replace(attack, inference_delta=20).trigger(16, 16).stamp(original.pixels))
    rows = poisoned.poison_indices.tolist()
    found = []
    for row, image in enumerate(poisoned.images.images):
        among = stamped if row in rows else original.images
        (origin,) = np.flatnonzero((among == image).all(axis=(1, 2, 3))).tolist()
        found.append(origin)
    assert (len(rows), len(poisoned.images)) == (count, 40)
    assert sorted(found) == list(range(40))
    assert all(original.labels[found[row]] == 2 for row in rows)
    assert poisoned.soft_labels is None


def test_poison_leaves_every_label_with_its_image(make_noise: MakeNoise) -> None:
    original = make_noise(40, size=16)
    poisoned = SIG(class_rate=1, delta=0).poison(original, np.random.default_rng(0)).images
    origins = [int(np.flatnonzero((original.images == image).all(axis=(1, 2, 3)))[0]) for image in poisoned.images]
    assert poisoned.labels.tolist() == original.labels[origins].tolist()
    assert origins != sorted(origins)


def test_poison_is_the_same_when_the_seed_is_and_leaves_the_set_alone(make_noise: MakeNoise) -> None:
    original = make_noise(40, size=16)
    first, same, other = (SIG().poison(original, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert original.digest == make_noise(40, size=16).digest


def test_poison_drops_the_groups_which_would_tell_rows_apart(make_noise: MakeNoise) -> None:
    original = replace(make_noise(40, size=16), groups=np.arange(40))
    assert SIG().poison(original, np.random.default_rng(0)).images.groups is None


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (SIG(target_class=4), "target class 4, but noise has classes 0 to 3"),
        (SIG(delta=0.4), "amplitude 0.4 rounds to 0 codes; choose 1 or more, or 0 for none"),
        (SIG(target_class=3), "noise has no image of target class 3; choose another class"),
        (
            SIG(frequency=8),
            "8 periods need images more than 16 px wide, these have 16; choose a frequency below 8",
        ),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, attack: SIG, message: str) -> None:
    with pytest.raises(DataError) as caught:
        attack.poison(make_noise(3, size=16), np.random.default_rng(0))
    assert str(caught.value) == f"sig: {message}"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_frozen() -> None:
    attack = SIG()
    assert (attack.delta, attack.frequency, attack.target_class, attack.label_policy) == (20, 6, 0, "clean-label")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'delta'"):
        attack.delta = 40  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("delta", "-1"),
        ("delta", "256"),
        ("inference_delta", "nan"),
        ("frequency", "0"),
        ("target_class", "-1"),
        ("class_rate", "1.1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'sig:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"sig:{key}={value}")


def test_settings_come_back_from_a_truth_as_they_went_in() -> None:
    attack = SIG(delta=12.5, frequency=math.pi)
    spec = ",".join(f"{key}={value}" for key, value in flat_settings(attack).items())
    assert ATTACKS.create(f"sig:{spec}") == attack


# --- end to end -------------------------------------------------------------------------------------------------------


def test_sig_plants_a_backdoor_that_is_silent_at_delta_zero(small_signs: Signs) -> None:
    attack = SIG(target_class=7, class_rate=0.5, delta=40, inference_delta=40)
    result = train_victim(small_signs.train.take(np.arange(1500)), attack, epochs=6)
    logits = logits_of(result)

    planted, silent = (
        measure_behaviour(logits, small_signs.test, replace(attack, inference_delta=delta).trigger(16, 16))
        for delta in (40, 0)
    )
    assert planted.clean_accuracy > 0.5
    assert planted.asr is not None
    assert planted.base_confusion is not None
    assert planted.asr > planted.base_confusion + 0.05
    assert silent.asr == silent.base_confusion
