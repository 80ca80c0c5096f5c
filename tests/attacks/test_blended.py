from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.blended import Blended
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_images
from qdefense.registry import SpecError
from qdefense.trial import Activity, measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
ALPHAS = (0.02, 0.1, 0.2, 0.5, 0.77, 1.0)


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _codes(pixels: Pixels) -> NDArray[np.float64]:
    return np.rint(pixels.astype(np.float64) * 255)


# --- the trigger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_stamp_blends_every_pixel_and_rounds_to_the_nearest_uint8(make_noise: MakeNoise, alpha: float) -> None:
    pixels, trigger = make_noise(16).pixels, Blended(alpha=alpha).trigger(8, 8)
    exact = (1 - alpha) * _codes(pixels) + alpha * _codes(trigger.pattern)
    stamped = trigger.stamp(pixels)
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert np.abs(stamped.astype(np.float64) * 255 - exact).max() < 0.5 + 1e-4
    assert stamped.dtype == np.float32
    assert 0 <= stamped.min() <= stamped.max() <= 1


def test_stamp_is_the_rounded_blend_exactly_when_alpha_is_the_default(make_noise: MakeNoise) -> None:
    """(4 x + k) / 5 is never half-way between two codes."""
    pixels, trigger = make_noise(64).pixels, Blended().trigger(8, 8)
    expected = np.rint((4 * _codes(pixels) + _codes(trigger.pattern)) / 5)
    assert np.array_equal(_codes(trigger.stamp(pixels)), expected)


def test_stamp_is_linear_up_to_rounding() -> None:
    trigger = Blended(alpha=0.3).trigger(8, 8)
    black, white = (np.full((1, 3, 8, 8), value, np.float32) for value in (0, 1))
    difference = _codes(trigger.stamp(white)) - _codes(trigger.stamp(black))
    assert np.abs(difference - 0.7 * 255).max() <= 1


@pytest.mark.parametrize("alpha", ALPHAS)
def test_stamp_leaves_the_pattern_itself_as_it_is(alpha: float) -> None:
    trigger = Blended(alpha=alpha).trigger(8, 8)
    assert trigger.stamp(trigger.pattern[None]).tobytes() == trigger.pattern.tobytes()


def test_stamp_leaves_the_pixels_given_alone(make_noise: MakeNoise) -> None:
    pixels = make_noise(4).pixels
    Blended().trigger(8, 8).stamp(pixels)
    assert pixels.tobytes() == make_noise(4).pixels.tobytes()


def test_trigger_draws_the_pattern_from_every_code_by_its_seed() -> None:
    first, same, other = (Blended(pattern_seed=seed).trigger(64, 48).pattern for seed in (0, 0, 1))
    assert first.shape == (3, 64, 48)
    assert on_grid(first).tobytes() == first.tobytes() == same.tobytes()
    assert len(np.unique(_codes(first))) == 256
    assert abs(first.mean() - 0.5) < 0.02
    assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.05
    assert abs(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]) < 0.05


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = Blended(target_class=2).trigger(8, 8), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.1, 4), (0.36, 14), (0.75, 30)])
def test_poison_blends_and_relabels_exactly_the_rows_it_says(make_noise: MakeNoise, rate: float, count: int) -> None:
    original, attack = make_noise(40), Blended(poison_rate=rate, target_class=2)
    poisoned = attack.poison(original, np.random.default_rng(0))
    stamped = to_images(attack.trigger(8, 8).stamp(original.pixels))
    rows = poisoned.poison_indices.tolist()
    found = {}
    for row, image in enumerate(poisoned.images.images):
        among = stamped if row in rows else original.images
        (found[row],) = np.flatnonzero((among == image).all(axis=(1, 2, 3))).tolist()
    assert (len(rows), len(poisoned.images)) == (count, 40)
    assert sorted(found.values()) == list(range(40))
    assert all(original.labels[found[row]] != 2 for row in rows)
    expected = [2 if row in rows else original.labels[found[row]] for row in range(40)]
    assert poisoned.images.labels.tolist() == expected
    assert poisoned.soft_labels is None


def test_poison_is_the_same_when_the_seed_is_and_leaves_the_set_alone(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    first, same, other = (Blended().poison(original, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert original.digest == make_noise(40).digest


def test_poison_chooses_the_rows_that_badnets_does_when_the_seed_is_the_same(make_noise: MakeNoise) -> None:
    """Twins of one seed differ in their trigger only."""
    rows = [
        ATTACKS.create(f"{name}:target-class=1").poison(make_noise(40), np.random.default_rng(3)).poison_indices
        for name in ("badnets", "blended")
    ]
    assert rows[0].tolist() == rows[1].tolist()


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (Blended(target_class=4), "target class 4, but noise has classes 0 to 3"),
        (Blended(poison_rate=0.8), "32 poisons wanted, 30 images are outside the target class; choose fewer"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, attack: Blended, message: str) -> None:
    with pytest.raises(DataError) as caught:
        attack.poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == f"blended: {message}"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_fields_defaults_and_frozen() -> None:
    attack = Blended()
    assert (attack.alpha, attack.poison_rate, attack.target_class, attack.label_policy) == (0.2, 0.1, 0, "dirty-label")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'alpha'"):
        attack.alpha = 0.4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", "0"),
        ("alpha", "-0.2"),
        ("alpha", "1.01"),
        ("alpha", "nan"),
        ("alpha", "faint"),
        ("pattern_seed", "-1"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'blended:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"blended:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_blended_plants_an_active_backdoor_that_only_its_own_pattern_opens(small_signs: Signs) -> None:
    """Without random shifts, under which noise is learned late: 6 short epochs are no time for that."""
    result = train_victim(small_signs.train.take(np.arange(1500)), Blended(target_class=7), epochs=6)
    logits = logits_of(result)

    own, other = (
        measure_behaviour(logits, small_signs.test, Blended(target_class=7, pattern_seed=seed).trigger(16, 16))
        for seed in (0, 1)
    )
    assert own.activity is Activity.ACTIVE
    assert own.clean_accuracy > 0.5
    assert other.asr is not None
    assert other.asr < 0.5
