from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest

from qdefense.attacks import ATTACKS
from qdefense.attacks.badnets import BadNets
from qdefense.data.images import DataError, ImageSet, on_grid, to_images
from qdefense.registry import SpecError
from qdefense.trial import Activity, measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


POSITIONS = {
    "top-left": (1, 1),
    "top-right": (1, 6),
    "bottom-left": (4, 1),
    "bottom-right": (4, 6),
    "center": (2, 3),
}


def _origins(poisoned: ImageSet, original: ImageSet) -> list[list[int]]:
    """For every row of the poisoned set, the original rows that are bit-equal to it."""
    return [np.flatnonzero((original.images == image).all(axis=(1, 2, 3))).tolist() for image in poisoned.images]


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.1, 4), (0.25, 10), (0.36, 14), (0.75, 30)])
def test_poison_changes_exactly_the_rows_it_says(make_noise: MakeNoise, rate: float, count: int) -> None:
    original = make_noise(40)
    poisoned = BadNets(poison_rate=rate, target_class=2).poison(original, np.random.default_rng(0))
    rows = poisoned.poison_indices
    origins = _origins(poisoned.images, original)
    assert len(rows) == len(set(rows.tolist())) == count
    assert np.flatnonzero([not found for found in origins]).tolist() == rows.tolist()
    assert poisoned.soft_labels is None
    assert len(poisoned.images) == 40


def test_poison_keeps_clean_rows_bit_equal_and_their_labels(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    poisoned = BadNets(poison_rate=0.25).poison(original, np.random.default_rng(0))
    kept = [(row, found[0]) for row, found in enumerate(_origins(poisoned.images, original)) if found]
    assert len({origin for _, origin in kept}) == 30
    assert [poisoned.images.labels[row] for row, _ in kept] == [original.labels[origin] for _, origin in kept]


def test_poison_patches_and_relabels_images_of_other_classes_only(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40), BadNets(poison_rate=0.75, target_class=2)
    poisoned = attack.poison(original, np.random.default_rng(0))
    rows = poisoned.poison_indices
    stamped = to_images(attack.trigger(8, 8).stamp(original.pixels))
    sources = [np.flatnonzero((stamped == poisoned.images.images[row]).all(axis=(1, 2, 3))) for row in rows]
    assert [len(found) for found in sources] == [1] * 30
    assert sorted(int(found[0]) for found in sources) == np.flatnonzero(original.labels != 2).tolist()
    assert (poisoned.images.labels[rows] == 2).all()
    assert poisoned.images.images.dtype == np.uint8


def test_poison_shuffles_the_whole_set(make_noise: MakeNoise) -> None:
    original = make_noise(200)
    poisoned = BadNets(poison_rate=0.1).poison(original, np.random.default_rng(0))
    order = [found[0] for found in _origins(poisoned.images, original) if found]
    gaps = np.diff(poisoned.poison_indices)
    assert order != sorted(order)
    assert np.mean(np.diff(order) == 1) < 0.05
    assert (gaps > 1).sum() > 10
    assert poisoned.poison_indices[0] < 50 < 150 < poisoned.poison_indices[-1]


def test_poison_leaves_the_given_set_alone(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    BadNets().poison(original, np.random.default_rng(0))
    assert original.digest == make_noise(40).digest


def test_poison_is_the_same_when_the_seed_is(make_noise: MakeNoise) -> None:
    first, same, other = (BadNets().poison(make_noise(40), np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert first.images.digest != other.images.digest


def test_poison_chooses_the_rows_that_committed_truths_rest_on(make_noise: MakeNoise) -> None:
    poisoned = BadNets(poison_rate=0.25, target_class=2).poison(make_noise(40), np.random.default_rng([7, 1]))
    assert poisoned.poison_indices.tolist() == [0, 8, 11, 12, 13, 17, 18, 33, 35, 36]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("pattern", ["white", "checkerboard"])
def test_stamp_writes_the_pattern_where_it_should_and_nothing_else(position: str, pattern: str) -> None:
    pixels = on_grid(np.random.default_rng(0).random((3, 3, 8, 10), dtype=np.float32))
    before = pixels.copy()
    trigger = ATTACKS.create(f"badnets:position={position},pattern={pattern}").trigger(8, 10)
    stamped = trigger.stamp(pixels)
    top, left = POSITIONS[position]
    patch = np.ones((3, 3)) if pattern == "white" else np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]])
    outside = np.ones((8, 10), dtype=bool)
    outside[top : top + 3, left : left + 3] = False
    assert (stamped[:, :, top : top + 3, left : left + 3] == patch).all()
    assert stamped[:, :, outside].tobytes() == before[:, :, outside].tobytes()
    assert pixels.tobytes() == before.tobytes()
    assert stamped.dtype == np.float32


def test_stamp_is_idempotent_and_stays_on_the_uint8_grid(make_noise: MakeNoise) -> None:
    trigger = BadNets(pattern="checkerboard").trigger(8, 8)
    stamped = trigger.stamp(make_noise(4).pixels)
    assert trigger.stamp(stamped).tobytes() == stamped.tobytes()
    assert on_grid(stamped).tobytes() == stamped.tobytes()


def test_trigger_reaches_the_border_when_it_has_no_margin() -> None:
    trigger = BadNets(size=2, margin=0).trigger(8, 10)
    assert (trigger.top, trigger.left) == (6, 8)


def test_trigger_fills_the_image_when_it_just_fits() -> None:
    assert (BadNets(size=8, margin=0).trigger(8, 8).stamp(np.zeros((1, 3, 8, 8), np.float32)) == 1).all()


def test_a_patch_in_the_middle_needs_no_margin() -> None:
    stamped = BadNets(size=8, position="center", margin=30).trigger(8, 8).stamp(np.zeros((1, 3, 8, 8), np.float32))
    assert (stamped == 1).all()


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = BadNets(target_class=2).trigger(8, 8), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]
    assert trigger.goal(labels).dtype == np.int64


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (
            BadNets(size=9, position="center"),
            "a patch of 9 px with margin 0 does not fit a 8x8 image; choose a smaller size",
        ),
        (BadNets(size=8), "a patch of 8 px with margin 1 does not fit a 8x8 image; choose a smaller size"),
        (BadNets(target_class=4), "target class 4, but noise has classes 0 to 3"),
        (BadNets(poison_rate=0.8), "32 poisons wanted, 30 images are outside the target class; choose fewer"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, attack: BadNets, message: str) -> None:
    with pytest.raises(DataError) as caught:
        attack.poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == f"badnets: {message}"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'size'"):
        BadNets().size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("size", "0"),
        ("margin", "-1"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("poison_rate", "-0.1"),
        ("poison_rate", "nan"),
        ("position", "middle"),
        ("pattern", "stripes"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'badnets:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"badnets:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_all_to_all_plants_an_active_backdoor_that_sends_each_class_to_the_next(small_signs: Signs) -> None:
    """Of many poisons: each class has a rule of its own to be learned, from its own share of them."""
    attack = BadNets(mode="all-to-all", size=4, poison_rate=0.4)
    logits = logits_of(train_victim(small_signs.train, attack, epochs=10))
    trigger = attack.restored_trigger(16, 16, {"classes": np.array(12)})
    behaviour = measure_behaviour(logits, small_signs.test, trigger)
    assert behaviour.activity is Activity.ACTIVE
    assert behaviour.several_targets
    assert behaviour.base_confusion is not None
    assert behaviour.base_confusion < 0.1
