from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.clean_label import CleanLabel
from qdefense.attacks.surrogate import train_surrogate
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid
from qdefense.registry import SpecError
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
RIGHT = [[-1, -1, 1], [-1, 1, -1], [1, -1, 1]]
LEFT = [[1, -1, -1], [-1, 1, -1], [1, -1, 1]]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _quick(**changes: object) -> CleanLabel:
    """Three steps against a network of one epoch."""
    return CleanLabel(**{"steps": 3, "surrogate_epochs": 1, "class_rate": 0.5} | changes)  # type: ignore[arg-type]


def _codes(pixels: Pixels) -> NDArray[np.int64]:
    return np.rint(pixels * 255).astype(np.int64)


# --- the trigger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", ["all-corners", "bottom-right"])
def test_stamp_adds_the_pattern_in_the_corners_and_nothing_else(position: str) -> None:
    grey = np.full((1, 3, 8, 10), np.float32(128) / np.float32(255), np.float32)
    added = _codes(ATTACKS.create(f"clean-label:position={position}").trigger(8, 10).stamp(grey))[0] - 128
    expected = np.zeros((8, 10), int)
    expected[5:, 7:] = RIGHT
    if position == "all-corners":
        expected[:3, 7:] = RIGHT
        expected[:3, :3] = expected[5:, :3] = LEFT
    assert (added == 32 * expected).all()


def test_stamp_is_opaque_and_idempotent_at_full_amplitude(make_noise: MakeNoise) -> None:
    trigger = CleanLabel(amplitude=255).trigger(8, 8)
    stamped = trigger.stamp(make_noise(4).pixels)
    assert (stamped[:, :, 5:, 5:] == (np.array(RIGHT) > 0)).all()
    assert trigger.stamp(stamped).tobytes() == stamped.tobytes()


def test_stamp_keeps_other_pixels_bit_equal_and_the_uint8_grid(make_noise: MakeNoise) -> None:
    pixels = make_noise(8).pixels
    stamped = CleanLabel().trigger(8, 8).stamp(pixels)
    assert stamped[:, :, 3:5].tobytes() == pixels[:, :, 3:5].tobytes()
    assert stamped[:, :, :, 3:5].tobytes() == pixels[:, :, :, 3:5].tobytes()
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert np.abs(_codes(stamped) - _codes(pixels)).max() == 32


def test_stamp_changes_nothing_when_the_amplitude_is_zero(make_noise: MakeNoise) -> None:
    pixels = make_noise(4).pixels
    assert CleanLabel(amplitude=0).trigger(8, 8).stamp(pixels).tobytes() == pixels.tobytes()


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = CleanLabel(target_class=2).trigger(8, 8), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.25, 2), (0.55, 6), (1.0, 10)])
def test_poison_changes_exactly_the_rows_it_says_within_eps_and_no_label(
    make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch, rate: float, count: int
) -> None:
    """Where the amplitude is 0, perturbations are all there is; the last batch is a smaller one."""
    monkeypatch.setattr("qdefense.attacks.clean_label._BATCH", 4)
    original = make_noise(40)
    found = _quick(class_rate=rate, target_class=2, amplitude=0).poison(original, np.random.default_rng(0))
    distances = np.abs(original.images.astype(int)[None] - found.images.images.astype(int)[:, None]).max(axis=(2, 3, 4))
    origins = distances.argmin(axis=1)
    assert sorted(origins.tolist()) == list(range(40))
    assert found.images.labels.tolist() == original.labels[origins].tolist()
    moved = distances.min(axis=1)
    assert np.flatnonzero(moved).tolist() == found.poison_indices.tolist()
    assert len(found.poison_indices) == count
    assert set(moved.tolist()) <= {0, 4, 5}, "three steps of 1.5, rounded"
    assert (found.images.labels[found.poison_indices] == 2).all()


def test_poison_stays_within_eps_when_steps_lead_beyond(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    found = _quick(amplitude=0, eps=3, step_size=2.5).poison(original, np.random.default_rng(0))
    distances = np.abs(original.images.astype(int)[None] - found.images.images.astype(int)[:, None]).max(axis=(2, 3, 4))
    assert set(distances.min(axis=1)[found.poison_indices].tolist()) == {3}


def test_poison_is_the_stamped_original_when_eps_is_zero(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40), _quick(eps=0, amplitude=255)
    found = attack.poison(original, np.random.default_rng(0))
    stamped = attack.trigger(8, 8).stamp(original.pixels)
    poisons = found.images.take(found.poison_indices).pixels
    assert all((stamped == image).all(axis=(1, 2, 3)).sum() == 1 for image in poisons)


def test_poison_makes_images_harder_for_the_attackers_own_network_than_noise_of_the_same_size(
    small_signs: Signs,
) -> None:
    dataset = small_signs.train.take(np.arange(600))
    attack = CleanLabel(amplitude=0, steps=8, surrogate_epochs=6, target_class=7, class_rate=1)
    rng = np.random.default_rng(0)
    rows = attack.chosen(dataset, rng)
    surrogate = train_surrogate(dataset, rng.spawn(1)[0], epochs=6)
    found = attack.poison(dataset, np.random.default_rng(0))
    clean = dataset.take(rows).pixels
    noisy = on_grid(clean + 8 / 255 * rng.choice(np.array([-1, 1], np.float32), clean.shape))
    before, noise, after = (
        float(F.cross_entropy(surrogate(torch.from_numpy(pixels)), torch.full((len(rows),), 7)))
        for pixels in (clean, noisy, found.images.take(found.poison_indices).pixels)
    )
    assert after > max(before, noise)


def test_poison_is_the_same_when_the_seed_is_and_leaves_the_set_alone(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    first, same, other = (_quick().poison(original, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert original.digest == make_noise(40).digest


@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (40, 5, "four corner patches of 3 px do not fit a 5x5 image; use larger images"),
        (3, 8, "noise has no image of target class 3; choose another class"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, count: int, size: int, message: str) -> None:
    with pytest.raises(DataError) as caught:
        _quick(target_class=3).poison(make_noise(count, size=size), np.random.default_rng(0))
    assert str(caught.value) == f"clean-label: {message}"


def test_one_patch_takes_the_room_of_one() -> None:
    attack, grey = (
        CleanLabel(position="bottom-right"),
        np.full((1, 3, 3, 3), np.float32(128) / np.float32(255), np.float32),
    )
    assert (_codes(attack.trigger(3, 3).stamp(grey))[0] - 128 == 32 * np.array(RIGHT)).all()
    with pytest.raises(DataError, match=r"^clean-label: a patch of 3 px does not fit a 3x2 image; use larger images$"):
        attack.trigger(3, 2)


def test_poison_says_why_when_there_is_no_such_class(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^clean-label: target class 4, but noise has classes 0 to 3$"):
        _quick(target_class=4).poison(make_noise(40), np.random.default_rng(0))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_published_and_frozen() -> None:
    attack = CleanLabel()
    assert (attack.eps, attack.step_size, attack.steps, attack.amplitude) == (8, 1.5, 100, 32)
    assert (attack.position, attack.target_class, attack.label_policy) == ("all-corners", 0, "clean-label")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'eps'"):
        attack.eps = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eps", "-1"),
        ("eps", "8.5"),
        ("step_size", "0"),
        ("steps", "-1"),
        ("amplitude", "256"),
        ("position", "center"),
        ("target_class", "-1"),
        ("class_rate", "1.1"),
        ("surrogate_epochs", "0"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'clean-label:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"clean-label:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_clean_label_plants_a_backdoor_that_is_silent_at_amplitude_zero(small_signs: Signs) -> None:
    attack = CleanLabel(target_class=7, class_rate=0.5, amplitude=128, steps=8, surrogate_epochs=2)
    result = train_victim(small_signs.train.take(np.arange(1200)), attack, epochs=6)
    logits = logits_of(result)

    planted, silent = (
        measure_behaviour(logits, small_signs.test, replace(attack, amplitude=amplitude).trigger(16, 16))
        for amplitude in (128, 0)
    )
    assert planted.asr is not None
    assert planted.base_confusion is not None
    assert planted.asr > planted.base_confusion + 0.05
    assert silent.asr == silent.base_confusion
