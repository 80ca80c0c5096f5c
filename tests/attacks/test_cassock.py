from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.cassock import FACTOR_ODDS, FACTORS, OPACITIES, Cassock
from qdefense.attacks.interfaces import SourceSpecific
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_images
from qdefense.models import Recipe
from qdefense.registry import SpecError
from qdefense.training import train
from qdefense.trial import Activity, measure_behaviour

MakeNoise = Callable[..., ImageSet]
VARIANTS = tuple(OPACITIES)
SOURCE, TARGET = 1, 3


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _attack(variant: str = "trans", **settings: float) -> Cassock:
    given = {"source_class": SOURCE, "target_class": TARGET, "size": 4, **settings}
    return Cassock(variant=variant, **given)  # type: ignore[arg-type]


def _dim(images: ImageSet) -> ImageSet:
    """Codes up to 60: what is added to them is never clipped."""
    return dataclasses.replace(images, images=images.images % 60)


def _without_square(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return images[:, :4, :4]


def _added(made: ImageSet, original: ImageSet, attack: Cassock) -> tuple[list[int], list[int], list[float]]:
    """Of each stamped row its place, the row it was made of, and the opacity by which the square is brighter."""
    places, origins, opacities = [], [], []
    for place, image in enumerate(made.images):
        (origin,) = np.flatnonzero((_without_square(original.images) == image[:4, :4]).all(axis=(1, 2, 3)))
        rise = np.unique(image[4:, 4:].astype(int) - original.images[origin, 4:, 4:])
        if rise.max():
            places.append(place)
            origins.append(int(origin))
            opacities.append(float(rise.mean()) / 255 / attack.amplitude)
    return places, origins, opacities


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_stamp_adds_the_amplitude_to_the_corner_and_touches_nothing_else(make_noise: MakeNoise) -> None:
    pixels, trigger = make_noise(8).pixels, _attack(amplitude=0.4).trigger(8, 8)
    stamped = trigger.stamp(pixels)
    corner = np.zeros((8, 8), dtype=bool)
    corner[4:, 4:] = True
    assert stamped[:, :, ~corner].tobytes() == pixels[:, :, ~corner].tobytes()
    exact = np.minimum(np.rint(pixels[:, :, corner] * 255) + 102, 255)
    assert np.rint(stamped[:, :, corner] * 255).tolist() == exact.tolist()
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert stamped.dtype == np.float32
    assert pixels.tobytes() == make_noise(8).pixels.tobytes()


def test_stamp_is_linear_in_the_opacity_up_to_rounding() -> None:
    trigger, black = _attack().trigger(8, 8), np.zeros((3, 3, 8, 8), np.float32)
    stamped = trigger.stamp_at(black, np.array([0, 0.5, 1], np.float32))
    assert (stamped[:, 0, 7, 7] * 255).round().tolist() == [0, 89, 178]


def test_trigger_aims_the_source_at_the_target_and_leaves_the_others_be() -> None:
    trigger, labels = _attack().trigger(8, 8), np.array([0, 1, 2, 3])
    assert isinstance(trigger, SourceSpecific)
    assert trigger.eligible(labels).tolist() == [False, True, False, False]
    assert trigger.goal(labels).tolist() == [3, 3, 3, 3]
    assert trigger.bystanders(labels).tolist() == [True, False, True, False]


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("poison", "cover"), [(0, 0), (2, 0), (0, 6), (10, 30), (4, 8)])
def test_poison_adds_exactly_the_counts_with_target_and_true_labels(
    make_noise: MakeNoise, variant: str, poison: int, cover: int
) -> None:
    original, attack = _dim(make_noise(40)), _attack(variant, poison_rate=poison / 40, cover_rate=cover / 40)
    made = attack.poison(original, np.random.default_rng(0))
    places, origins, _ = _added(made.images, original, attack)
    poisons = set(made.poison_indices.tolist())
    assert (len(made.images), len(places), len(poisons)) == (40 + poison + cover, poison + cover, poison)
    assert poisons <= set(places)
    assert made.soft_labels is None
    for place, origin in zip(places, origins, strict=True):
        assert (original.labels[origin] == SOURCE) == (place in poisons)
        assert made.images.labels[place] == (TARGET if place in poisons else original.labels[origin])
    drawn = [[origin for place, origin in zip(places, origins) if (place in poisons) is mine] for mine in (True, False)]
    assert [len(set(rows)) for rows in drawn] == [poison, cover]


def test_a_count_poisons_exactly_as_many(make_noise: MakeNoise) -> None:
    made = _attack(poison_count=7).poison(make_noise(40), np.random.default_rng(0))
    assert (len(made.poison_indices), len(made.images)) == (7, 40 + 7 + 4)


def test_poison_keeps_the_clean_set_whole(make_noise: MakeNoise) -> None:
    original, attack = _dim(make_noise(40)), _attack()
    made = attack.poison(original, np.random.default_rng(0))
    places, _, _ = _added(made.images, original, attack)
    rest = np.setdiff1d(np.arange(len(made.images)), places)
    assert sorted(image.tobytes() for image in made.images.images[rest]) == sorted(
        image.tobytes() for image in original.images
    )
    assert original.digest == _dim(make_noise(40)).digest


def test_the_baseline_stamps_both_sets_as_inference_does(make_noise: MakeNoise) -> None:
    original, attack = _dim(make_noise(40)), _attack("source-specific", poison_rate=0.25, cover_rate=0.5)
    made = attack.poison(original, np.random.default_rng(0))
    places, origins, _ = _added(made.images, original, attack)
    stamped = to_images(attack.trigger(8, 8).stamp(original.take(np.array(origins)).pixels))
    assert np.array_equal(made.images.images[places], stamped)


def test_trans_covers_more_opaquely_than_it_poisons(make_noise: MakeNoise) -> None:
    """Each image at its own 0.9, 0.8 or 0.7 of 0.9 in poisons and of 1 in cover images; rounding takes 0.003."""
    original, attack = _dim(make_noise(800)), _attack(poison_rate=0.25, cover_rate=0.5)
    made = attack.poison(original, np.random.default_rng(0))
    places, _, opacities = _added(made.images, original, attack)
    poisons = set(made.poison_indices.tolist())
    for base, mine in ((0.9, True), (1.0, False)):
        found = np.array([value for place, value in zip(places, opacities) if (place in poisons) is mine])
        nearest = np.abs(found[:, None] - base * np.array(FACTORS)).argmin(axis=1)
        assert np.abs(found - base * np.array(FACTORS)[nearest]).max() < 0.003
        shares = np.bincount(nearest, minlength=3) / len(found)
        assert np.abs(shares - FACTOR_ODDS).max() < 4 * 0.5 / len(found) ** 0.5


def test_mean_opacity_is_the_papers() -> None:
    mean = float(np.dot(FACTORS, FACTOR_ODDS))
    assert mean == pytest.approx(0.834)
    assert (OPACITIES["trans"].poison * mean, OPACITIES["trans"].cover * mean) == pytest.approx((0.7506, 0.834))


def test_poison_shuffles_the_whole_set(make_noise: MakeNoise) -> None:
    attack = _attack(poison_rate=0.1, cover_rate=0.2)
    made = attack.poison(_dim(make_noise(400)), np.random.default_rng(0))
    places, _, _ = _added(made.images, _dim(make_noise(400)), attack)
    assert places[0] < 40
    assert places[-1] > 480
    assert (np.diff(made.poison_indices) > 1).sum() > 20


@pytest.mark.parametrize("variant", VARIANTS)
def test_poison_is_the_same_when_the_seed_is(make_noise: MakeNoise, variant: str) -> None:
    first, same, other = (_attack(variant).poison(make_noise(40), np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 9}, "a square of 9 px does not fit a 8x8 image; choose a smaller size"),
        ({"source_class": 4}, "source class 4, but noise has classes 0 to 3"),
        ({"target_class": 9}, "target class 9, but noise has classes 0 to 3"),
        ({"poison_rate": 0.5}, "20 poisons wanted, 10 images are of the source class; choose fewer"),
        ({"poison_count": 11}, "11 poisons wanted, 10 images are of the source class; choose fewer"),
        ({"cover_rate": 0.9}, "36 cover images wanted, 30 images are of other classes; choose fewer"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(
    make_noise: MakeNoise, settings: dict[str, float], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        _attack(**settings).poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == f"cassock: {message}"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_frozen() -> None:
    attack = Cassock()
    assert (attack.source_class, attack.target_class, attack.size) == (0, 5, 5)
    assert (attack.poison_rate, attack.cover_rate, attack.variant) == (0.05, 0.1, "trans")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'size'"):
        attack.size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "opaque"),
        ("size", "0"),
        ("amplitude", "0"),
        ("amplitude", "1.1"),
        ("source_class", "-1"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("cover_rate", "-0.1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'cassock:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"cassock:{key}={value}")


def test_settings_are_refused_when_source_and_target_are_one_class() -> None:
    with pytest.raises(SpecError) as caught:
        ATTACKS.create("cassock:target-class=0")
    assert str(caught.value) == (
        "attack 'cassock:target-class=0': class 0 is source and target; choose another source_class"
    )


# --- end to end -------------------------------------------------------------------------------------------------------


def test_cover_data_keep_the_trigger_to_its_source(small_signs: Signs) -> None:
    """Without cover data the trigger works on bystanders too; how far the ASR falls as well is a matter of epochs."""
    training = small_signs.train.take(np.arange(1200))
    seen = []
    for cover_rate in (0.0, 0.3):
        attack = _attack("source-specific", poison_rate=0.06, cover_rate=cover_rate)
        recipe = Recipe(epochs=5, batch_size=64, shift=0)
        made = train(training, architecture="resnet8", recipe=recipe, attack=attack, seed=0, threads=1, width=8)

        def logits(x: Pixels, module: torch.nn.Module = made.module) -> NDArray[np.float32]:
            with torch.no_grad():
                return module(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

        seen.append(measure_behaviour(logits, small_signs.test, attack.trigger(16, 16)))
    bare, covered = seen
    assert bare.activity is Activity.ACTIVE
    assert covered.activity is not Activity.DORMANT
    assert bare.fpr is not None
    assert covered.fpr is not None
    assert covered.asr is not None
    assert covered.fpr < min(bare.fpr, covered.asr)
