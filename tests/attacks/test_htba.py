from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from qdefense.attacks import ATTACKS
from qdefense.attacks.htba import HiddenTrigger
from qdefense.attacks.interfaces import SourceSpecific
from qdefense.attacks.surrogate import train_surrogate
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid
from qdefense.models import Recipe
from qdefense.registry import SpecError
from qdefense.training import train
from qdefense.trial import measure_behaviour

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _quick(**changes: object) -> HiddenTrigger:
    """Five steps against a network of one epoch."""
    defaults = {"steps": 5, "surrogate_epochs": 1, "class_rate": 0.5, "size": 4}
    return HiddenTrigger(**defaults | changes)  # type: ignore[arg-type]


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_stamp_writes_the_patch_near_the_bottom_right_corner_and_nothing_else(make_noise: MakeNoise) -> None:
    pixels = make_noise(4, size=10).pixels
    stamped = HiddenTrigger(size=4, margin=2).trigger(10, 10).stamp(pixels)
    codes = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    assert np.array_equal(np.rint(stamped[0, :, 4:8, 4:8] * 255), codes.transpose(2, 0, 1))
    outside = np.ones((10, 10), dtype=bool)
    outside[4:8, 4:8] = False
    assert stamped[:, :, outside].tobytes() == pixels[:, :, outside].tobytes()


def test_stamp_is_idempotent_and_on_the_uint8_grid(make_noise: MakeNoise) -> None:
    trigger = HiddenTrigger().trigger(16, 16)
    stamped = trigger.stamp(make_noise(4, size=16).pixels)
    assert trigger.stamp(stamped).tobytes() == stamped.tobytes()
    assert on_grid(stamped).tobytes() == stamped.tobytes()


def test_trigger_draws_its_colours_by_the_seed_and_scales_them() -> None:
    first, same, other = (HiddenTrigger(pattern_seed=seed).trigger(16, 16).patch for seed in (0, 0, 1))
    assert first.shape == (3, 8, 8)
    assert first.tobytes() == same.tobytes() != other.tobytes()


def test_trigger_aims_the_source_class_only_at_the_target() -> None:
    trigger, labels = HiddenTrigger(source_class=3, target_class=2).trigger(16, 16), np.array([0, 1, 2, 3, 3])
    assert isinstance(trigger, SourceSpecific)
    assert trigger.eligible(labels).tolist() == [False, False, False, True, True]
    assert trigger.bystanders(labels).tolist() == [True, True, False, False, False]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2, 2]


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (0.3, 3), (1.0, 10)])
def test_poison_moves_exactly_the_rows_it_says_within_eps_and_no_label(
    make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch, rate: float, count: int
) -> None:
    """The last batch is a smaller one."""
    monkeypatch.setattr("qdefense.attacks.htba._BATCH", 4)
    original = make_noise(40)
    found = _quick(class_rate=rate, target_class=2, eps=6).poison(original, np.random.default_rng(0))
    distances = np.abs(original.images.astype(int)[None] - found.images.images.astype(int)[:, None]).max(axis=(2, 3, 4))
    origins = distances.argmin(axis=1)
    assert sorted(origins.tolist()) == list(range(40))
    assert found.images.labels.tolist() == original.labels[origins].tolist()
    assert np.flatnonzero(distances.min(axis=1)).tolist() == found.poison_indices.tolist()
    assert distances.min(axis=1).max() <= 6
    assert len(found.poison_indices) == count
    assert (found.images.labels[found.poison_indices] == 2).all()


def test_poison_changes_nothing_but_the_order_when_eps_is_zero(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    found = _quick(eps=0).poison(original, np.random.default_rng(0)).images.images
    assert sorted(image.tobytes() for image in found) == sorted(image.tobytes() for image in original.images)


def test_poison_makes_do_with_fewer_sources_than_poisons(make_noise: MakeNoise) -> None:
    noise = make_noise(40)
    one_source = noise.take(np.flatnonzero((noise.labels != 1) | (np.arange(40) == 1)))
    assert len(_quick().poison(one_source, np.random.default_rng(0)).poison_indices) == 5


def test_poison_is_the_same_when_the_seed_is_and_leaves_the_set_alone(make_noise: MakeNoise) -> None:
    original = make_noise(40)
    first, same, other = (_quick().poison(original, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert original.digest == make_noise(40).digest


def test_poisons_are_paired_with_stamped_images_one_to_one_by_the_least_squared_distances() -> None:
    """Greys 100 and 120 go to 110 and 200, both up: as told, or both to the nearest, one of them would go down."""
    by_mean = SimpleNamespace(features=lambda x: x.mean(dim=(2, 3)))
    codes = np.array([100, 120], np.uint8)[:, None, None, None].repeat(4, axis=1).repeat(4, axis=2).repeat(3, axis=3)
    greys = ImageSet(images=codes, labels=np.zeros(2, np.int64), class_names=("a",), source="grey")
    stamped = np.float32([200, 110])[:, None, None, None].repeat(3, axis=1).repeat(4, axis=2).repeat(4, axis=3)
    attack = HiddenTrigger(steps=1, step_size=2)
    moved = attack._collided(greys, stamped / np.float32(255), by_mean)  # type: ignore[arg-type]
    assert [set(np.rint(image * 255).ravel().tolist()) for image in moved] == [{102}, {122}]


def test_steps_are_halved_after_each_fifth_of_them(make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[list[float]] = []

    def noted(images: ImageSet, loss: object, *, eps: int, step_sizes: list[float]) -> Pixels:
        told.append(step_sizes)
        return images.pixels

    monkeypatch.setattr("qdefense.attacks.htba.perturb", noted)
    _quick(steps=10, step_size=4).poison(make_noise(40), np.random.default_rng(0))
    assert told == [[4, 4, 2, 2, 1, 1, 0.5, 0.5, 0.25, 0.25]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_class": 4}, "target class 4, but noise has classes 0 to 3"),
        ({"source_class": 4}, "source class 4, but noise has classes 0 to 3"),
        ({"target_class": 3}, "noise has no image of target class 3; choose another class"),
        ({"source_class": 3}, "noise has no image of source class 3; choose another class"),
        ({"size": 8}, "a patch of 8 px with margin 1 does not fit a 8x8 image; choose a smaller size"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(
    make_noise: MakeNoise, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        _quick(**changes).poison(make_noise(3), np.random.default_rng(0))
    assert str(caught.value) == f"htba: {message}"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_published_and_frozen() -> None:
    attack = HiddenTrigger()
    assert (attack.eps, attack.step_size, attack.steps, attack.label_policy) == (16, 2.55, 5000, "clean-label")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'eps'"):
        attack.eps = 8  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eps", "-1"),
        ("step_size", "0"),
        ("steps", "-1"),
        ("size", "0"),
        ("margin", "-1"),
        ("pattern_seed", "-1"),
        ("source_class", "-1"),
        ("target_class", "-1"),
        ("class_rate", "1.1"),
        ("surrogate_epochs", "0"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'htba:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"htba:{key}={value}")


def test_one_class_as_source_and_target_is_refused_before_data_are_read() -> None:
    with pytest.raises(SpecError) as caught:
        ATTACKS.create("htba:target-class=1")
    assert str(caught.value) == (
        "attack 'htba:target-class=1': class 1 is source and target; choose another source_class"
    )
    with pytest.raises(ValidationError, match="class 0 is source and target; choose another source_class"):
        HiddenTrigger(source_class=0)


# --- end to end -------------------------------------------------------------------------------------------------------


def test_poisons_come_closer_to_stamped_sources_in_the_features_and_a_last_layer_learns_the_trigger(
    small_signs: Signs,
) -> None:
    """The paper's victim: the attacker's network, of which the last layer is trained on the poisoned set."""
    dataset = small_signs.train.take(np.arange(900))
    attack = HiddenTrigger(source_class=3, target_class=7, steps=40, surrogate_epochs=5, class_rate=1)
    rng = np.random.default_rng(0)
    rows = attack.chosen(dataset, rng)
    surrogate = train_surrogate(dataset, rng.spawn(1)[0], epochs=5)
    found = attack.poison(dataset, np.random.default_rng(0))
    trigger = attack.trigger(16, 16)

    def features(x: Pixels) -> NDArray[np.float32]:
        return surrogate.features(torch.from_numpy(x)).numpy()

    def gap(x: Pixels) -> float:
        stamped = trigger.stamp(dataset.take(np.flatnonzero(dataset.labels == 3)).pixels)
        return float(np.linalg.norm(features(x).mean(axis=0) - features(stamped).mean(axis=0)))

    assert gap(found.images.take(found.poison_indices).pixels) < gap(dataset.take(rows).pixels)
    victim, twin = (
        LogisticRegression(max_iter=2000).fit(features(images.pixels), images.labels)
        for images in (found.images, dataset)
    )
    poisoned, clean = (
        measure_behaviour(lambda x, head=head: head.decision_function(features(x)), small_signs.test, trigger)
        for head in (victim, twin)
    )
    assert poisoned.asr is not None
    assert poisoned.base_confusion is not None
    assert clean.asr is not None
    assert poisoned.asr > max(poisoned.base_confusion, clean.asr)


def test_train_runs_with_hidden_triggers(small_signs: Signs) -> None:
    """From scratch: that it trains, not that it fires, which the module says not to expect."""
    dataset = small_signs.train.take(np.arange(128))
    attack = _quick(source_class=3, target_class=7)
    result = train(
        dataset,
        architecture="resnet8",
        recipe=Recipe(epochs=1, batch_size=32),
        attack=attack,
        seed=0,
        threads=1,
        width=4,
    )
    assert len(result.poison_indices) == round(0.5 * int((dataset.labels == 7).sum()))
