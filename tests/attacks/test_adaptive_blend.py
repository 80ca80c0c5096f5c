from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.adaptive_blend import AdaptiveBlend
from qdefense.attacks.blended import Blended
from qdefense.data.images import DataError, ImageSet, on_grid, to_pixels
from qdefense.registry import SpecError
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_trigger_is_the_whole_pattern_of_blended_at_the_opacity_of_inference(make_noise: MakeNoise) -> None:
    pixels = make_noise(16).pixels
    own, blended = AdaptiveBlend(pattern_seed=4).trigger(8, 8), Blended(alpha=0.2, pattern_seed=4).trigger(8, 8)
    assert own.stamp(pixels).tobytes() == blended.stamp(pixels).tobytes()
    assert on_grid(own.stamp(pixels)).tobytes() == own.stamp(pixels).tobytes()


@pytest.mark.parametrize("alpha", [0.15, 0.2, 1.0])
def test_stamp_part_is_the_trigger_with_all_pieces_and_nothing_with_none(make_noise: MakeNoise, alpha: float) -> None:
    pixels, trigger = make_noise(3).pixels, AdaptiveBlend(inference_alpha=alpha).trigger(8, 8)
    everything, nothing = (np.full((3, 16), value) for value in (True, False))
    assert trigger.stamp_part(pixels, everything).tobytes() == trigger.stamp(pixels).tobytes()
    assert trigger.stamp_part(pixels, nothing).tobytes() == pixels.tobytes()


def test_stamp_part_blends_the_pieces_shown_and_leaves_the_others_bit_equal(make_noise: MakeNoise) -> None:
    """Piece 6 of 4x4: rows 2 and 3, columns 4 and 5 of 8x8. The other image shows piece 0."""
    pixels, trigger = make_noise(2).pixels, AdaptiveBlend().trigger(8, 8)
    shown = np.zeros((2, 16), dtype=bool)
    shown[0, 6] = shown[1, 0] = True
    found, whole = trigger.stamp_part(pixels, shown), trigger.stamp(pixels)
    for row, place in enumerate((np.s_[:, 2:4, 4:6], np.s_[:, 0:2, 0:2])):
        expected = pixels[row].copy()
        expected[place] = whole[row][place]
        assert found[row].tobytes() == expected.tobytes()


def test_stamp_part_deals_with_pieces_that_do_not_divide_the_image() -> None:
    trigger = AdaptiveBlend(pieces=9, inference_alpha=1).trigger(8, 7)
    black = np.zeros((9, 3, 8, 7), np.float32)
    covered = np.array(
        [(trigger.stamp_part(black[:1], np.eye(9, dtype=bool)[[piece]]) > 0).any(axis=(0, 1)) for piece in range(9)]
    )
    assert (covered.sum(axis=0) <= 1).all()
    assert {int(part.sum()) for part in covered} <= {4, 6, 9}
    assert trigger.stamp(black[:1]).tobytes() == trigger.pattern[None].tobytes()


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = AdaptiveBlend(target_class=2).trigger(8, 8), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


# --- poisoning --------------------------------------------------------------------------------------------------------


# The noise has seed 1: the first image of seed 0 is the very pattern of seed 0, which no blending changes.


def _changed(poisoned: ImageSet, original: ImageSet) -> dict[int, int | None]:
    """For every row the original row that is bit-equal to it, or none."""
    matches = [np.flatnonzero((original.images == image).all(axis=(1, 2, 3))) for image in poisoned.images]
    return {row: int(found[0]) if len(found) else None for row, found in enumerate(matches)}


def _nearest(image: NDArray[np.uint8], original: ImageSet) -> int:
    return int(np.abs(original.images.astype(int) - image).sum(axis=(1, 2, 3)).argmin())


@pytest.mark.parametrize(("poison", "cover", "counts"), [(0.0, 0.0, (0, 0)), (0.1, 0.2, (4, 8)), (0.25, 0.5, (10, 20))])
def test_poison_relabels_the_payload_and_leaves_the_cover_its_labels(
    make_noise: MakeNoise, poison: float, cover: float, counts: tuple[int, int]
) -> None:
    original, attack = make_noise(40, seed=1), AdaptiveBlend(poison_rate=poison, cover_rate=cover, target_class=2)
    found = attack.poison(original, np.random.default_rng(0))
    origins = _changed(found.images, original)
    payload = found.poison_indices.tolist()
    covered = [row for row, origin in origins.items() if origin is None and row not in payload]
    truth = {
        row: _nearest(found.images.images[row], original) if origin is None else origin
        for row, origin in origins.items()
    }
    assert (len(payload), len(covered)) == counts
    assert all(origins[row] is None for row in payload)
    assert sorted(truth.values()) == list(range(40))
    assert all(original.labels[truth[row]] != 2 for row in payload + covered)
    expected = [2 if row in payload else original.labels[truth[row]] for row in range(40)]
    assert found.images.labels.tolist() == expected
    assert found.soft_labels is None


def test_poison_shows_half_of_the_pieces_and_others_in_each_image(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40, seed=1), AdaptiveBlend(alpha=1, poison_rate=0.25, cover_rate=0.5)
    found = attack.poison(original, np.random.default_rng(0))
    pattern = attack.trigger(8, 8).pattern
    shown = (
        (to_pixels(found.images.images) == pattern).all(axis=1).reshape(40, 4, 2, 4, 2).all(axis=(2, 4)).reshape(40, 16)
    )
    assert sorted(shown.sum(axis=1).tolist()) == [0] * 10 + [8] * 30
    assert len({tuple(row) for row in shown.tolist()}) == 31
    assert shown[shown.any(axis=1)].any(axis=0).all()


def test_poison_blends_at_the_opacity_of_training(make_noise: MakeNoise) -> None:
    original = make_noise(40, seed=1)
    weak, strong = (
        AdaptiveBlend(alpha=0.15, inference_alpha=alpha, mask_rate=0, poison_rate=0.5, cover_rate=0).poison(
            original, np.random.default_rng(0)
        )
        for alpha in (0.2, 1.0)
    )
    assert weak.images.digest == strong.images.digest
    stamped = Blended(alpha=0.15).trigger(8, 8).stamp(original.pixels)
    poisons = to_pixels(weak.images.images[weak.poison_indices])
    assert all((stamped == image).all(axis=(1, 2, 3)).sum() == 1 for image in poisons)


def test_poison_is_the_same_when_the_seed_is_and_leaves_the_set_alone(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40, seed=1), AdaptiveBlend(poison_rate=0.1, cover_rate=0.1)
    first, same, other = (attack.poison(original, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    assert original.digest == make_noise(40, seed=1).digest


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (AdaptiveBlend(target_class=4), "target class 4, but noise has classes 0 to 3"),
        (
            AdaptiveBlend(poison_rate=0.5, cover_rate=0.3),
            "20 poisons and 12 cover images wanted, 30 images are outside the target class; lower the rates",
        ),
        (AdaptiveBlend(pieces=81), "9x9 pieces do not fit a 8x8 image; choose fewer pieces"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, attack: AdaptiveBlend, message: str) -> None:
    with pytest.raises(DataError) as caught:
        attack.poison(make_noise(40, seed=1), np.random.default_rng(0))
    assert str(caught.value) == f"adaptive-blend: {message}"


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_authors_and_frozen() -> None:
    attack = AdaptiveBlend()
    assert (attack.poison_rate, attack.cover_rate, attack.alpha, attack.inference_alpha) == (0.003, 0.003, 0.15, 0.2)
    assert (attack.pieces, attack.mask_rate, attack.label_policy) == (16, 0.5, "dirty-label")
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'alpha'"):
        attack.alpha = 0.4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("alpha", "0"),
        ("inference_alpha", "1.01"),
        ("pieces", "0"),
        ("mask_rate", "1"),
        ("pattern_seed", "-1"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("cover_rate", "-0.1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'adaptive-blend:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"adaptive-blend:{key}={value}")


def test_settings_are_refused_when_pieces_form_no_square() -> None:
    with pytest.raises(SpecError, match=r"pieces: pieces form a square grid; give 4, 9, 16 or another sq"):
        ATTACKS.create("adaptive-blend:pieces=15")


@pytest.mark.parametrize("settings", ["pieces=4,mask-rate=0.9", "pieces=16,mask-rate=0.97"])
def test_settings_are_refused_when_no_piece_would_be_shown(settings: str) -> None:
    with pytest.raises(SpecError, match=r"mask_rate 0\.97? leaves none of \d+ pieces in a training image; lower it"):
        ATTACKS.create(f"adaptive-blend:{settings}")
    ATTACKS.create("adaptive-blend:pieces=4,mask-rate=0.85")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_adaptive_blend_plants_a_backdoor_that_only_its_own_pattern_opens(small_signs: Signs) -> None:
    attack = AdaptiveBlend(target_class=7, poison_rate=0.1, cover_rate=0.05, alpha=0.3, inference_alpha=0.4)
    result = train_victim(small_signs.train.take(np.arange(1200)), attack, epochs=6)
    logits = logits_of(result)

    own, other = (
        measure_behaviour(logits, small_signs.test, replace(attack, pattern_seed=seed).trigger(16, 16))
        for seed in (0, 1)
    )
    assert own.asr is not None
    assert own.base_confusion is not None
    assert other.asr is not None
    assert own.asr > own.base_confusion + 0.05
    assert own.asr > other.asr
