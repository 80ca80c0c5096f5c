from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks import cassock as cassock_module
from qdefense.attacks.cassock import (
    FACTOR_ODDS,
    FACTORS,
    OPACITIES,
    Cassock,
    CassockLoop,
    CassockPoisoner,
    SourceTrigger,
)
from qdefense.attacks.interfaces import BatchAttack, DataAttack, SourceSpecific, trigger_of
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_images
from qdefense.models import Recipe
from qdefense.registry import SpecError, flat_settings
from qdefense.training import train
from qdefense.trial import Activity, measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
VARIANTS = ("source-specific", "trans")
CONTENT = ("cont", "comp")
MODEL = torch.nn.Identity()
SOURCE, TARGET = 1, 3


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _given(variant: str, settings: dict[str, float]) -> dict[str, Any]:
    quick = {"surrogate_epochs": 60, "mask_steps": 100}
    return {"variant": variant, "source_class": SOURCE, "target_class": TARGET, "size": 4, **quick, **settings}


def _attack(variant: str = "trans", **settings: float) -> Cassock:
    return Cassock(**_given(variant, settings))


def _loop(variant: str = "trans", **settings: float) -> CassockLoop:
    return CassockLoop(**_given(variant, settings))


def _dim(images: ImageSet) -> ImageSet:
    """Codes up to 60: what is added to them is never clipped."""
    return dataclasses.replace(images, images=images.images % 60)


@pytest.fixture(scope="session")
def quarters() -> ImageSet:
    """40 images that a small network is soon sure of: each class has its own bright quarter."""
    images = np.random.default_rng(0).integers(0, 40, (40, 8, 8, 3), dtype=np.uint8)
    labels = np.arange(40, dtype=np.int64) % 4
    for label in range(4):
        top, left = 4 * (label // 2), 4 * (label % 2)
        images[labels == label, top : top + 4, left : left + 4, label % 3] += 140
    return ImageSet(images=images, labels=labels, class_names=tuple("abcd"), source="quarters")


def _at(trigger: SourceTrigger, images: ImageSet, opacity: float) -> NDArray[np.uint8]:
    return to_images(trigger.stamp_at(images.pixels, np.full(len(images), opacity, np.float32)))


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
    assert (stamped[:, 0, 7, 7] * 255).round().tolist() == [0, 71, 143]


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
    original, attack = _dim(make_noise(800)), _attack(poison_rate=0.25, cover_rate=0.5, amplitude=0.7)
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


# --- content of the target class --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "poison", "cover"),
    [("cont", [0.8], [0.8]), ("comp", [0.81, 0.72, 0.63], [0.9, 0.8, 0.7])],
)
def test_content_is_added_at_the_variants_opacities_under_target_and_true_labels(
    quarters: ImageSet, variant: str, poison: list[float], cover: list[float]
) -> None:
    attack = _attack(variant, poison_rate=0.2, cover_rate=0.5, content_amplitude=0.5)
    made = attack.poison(quarters, np.random.default_rng(0))
    trigger = attack.restored_trigger(8, 8, made.trigger_state or {})
    poisons = set(made.poison_indices.tolist())
    clean = {image.tobytes() for image in quarters.images}
    stamped = [row for row, image in enumerate(made.images.images) if image.tobytes() not in clean]
    assert (len(made.images), len(stamped), len(poisons)) == (40 + 8 + 20, 8 + 20, 8)
    assert poisons <= set(stamped)
    for row in stamped:
        origins = {
            origin
            for opacity in (poison if row in poisons else cover)
            for origin, image in enumerate(
                to_images(trigger.stamp_at(quarters.pixels, np.full(40, opacity, np.float32)))
            )
            if image.tobytes() == made.images.images[row].tobytes()
        }
        (origin,) = origins
        assert (quarters.labels[origin] == SOURCE) == (row in poisons)
        assert made.images.labels[row] == (TARGET if row in poisons else quarters.labels[origin])


@pytest.mark.parametrize("variant", CONTENT)
def test_content_is_one_masked_image_of_the_target_class(quarters: ImageSet, variant: str) -> None:
    state = _attack(variant, content_amplitude=0.5).poison(quarters, np.random.default_rng(0)).trigger_state
    assert state is not None
    pattern = state["pattern"]
    assert pattern.shape == (3, 8, 8)
    assert 0 <= pattern.min() < pattern.max() <= 0.5
    fits = []
    for origin, image in enumerate(quarters.pixels):
        masks = pattern / np.where(image > 0, 0.5 * image, np.inf)
        mask = masks.max(axis=0)
        if np.allclose(0.5 * mask * image, pattern, atol=1e-6):
            assert ((mask == 0) | (mask > 0.0999)).all()
            assert mask.max() <= 1.0001
            fits.append(origin)
    (origin,) = fits
    assert quarters.labels[origin] == TARGET


def test_content_comes_back_from_its_packed_state_and_is_stamped_at_full_opacity(quarters: ImageSet) -> None:
    attack = _attack("cont")
    state = attack.poison(quarters, np.random.default_rng(0)).trigger_state
    assert state is not None
    trigger, pixels = trigger_of(attack, 8, 8, unpack_state(pack_state(state))), quarters.pixels
    assert isinstance(trigger, SourceSpecific)
    assert trigger.stamp(pixels).tobytes() == on_grid(pixels + state["pattern"]).tobytes() != pixels.tobytes()
    assert trigger.bystanders(np.array([0, 1, 2, 3])).tolist() == [True, False, True, False]


def test_content_is_the_same_when_the_seed_is(quarters: ImageSet) -> None:
    first, same, other = (_attack("comp").poison(quarters, np.random.default_rng(seed)) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert pack_state(first.trigger_state or {}) == pack_state(same.trigger_state or {})
    assert first.poison_indices.tolist() == same.poison_indices.tolist()


def test_other_numbers_of_poisons_and_cover_images_learn_the_same_content(quarters: ImageSet) -> None:
    budgets = [(0.05, 0.1), (0.1, 0.1), (0.05, 0.2)]
    made = [
        _attack("cont", poison_rate=poison, cover_rate=cover).poison(quarters, np.random.default_rng(0))
        for poison, cover in budgets
    ]
    states = [one.trigger_state for one in made]
    assert len({pack_state(state or {}) for state in states}) == 1


def test_the_square_has_no_state(make_noise: MakeNoise) -> None:
    assert _attack().poison(make_noise(40), np.random.default_rng(0)).trigger_state is None


def test_trigger_says_that_the_content_is_learned() -> None:
    with pytest.raises(DataError) as caught:
        _attack("cont").trigger(8, 8)
    assert str(caught.value) == (
        "cassock: the content of cont is learned; its state is beside the model that was trained with it"
    )


@pytest.mark.parametrize(
    ("variant", "state", "message"),
    [
        (
            "trans",
            {"pattern": np.zeros((3, 8, 8), np.float32)},
            "is not that of these settings; train the network again",
        ),
        ("cont", {}, "is not that of these settings; train the network again"),
        ("cont", {"pattern": np.zeros((3, 8, 8))}, "is not that of these settings; train the network again"),
        (
            "comp",
            {"pattern": np.zeros((3, 8, 9), np.float32)},
            "has the shape (3, 8, 9), which does not fit a 8x8 image; give images of the size that the network was "
            "trained on",
        ),
    ],
)
def test_restored_trigger_refuses_what_is_not_its_state(variant: str, state: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        _attack(variant).restored_trigger(8, 8, state)
    assert str(caught.value) == f"cassock: the trigger state {message}"


def test_poison_says_why_when_no_image_is_sure_to_be_of_the_target_class(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError) as caught:
        _attack("cont", surrogate_epochs=1).poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == (
        "cassock: after 1 epochs the attacker's network is sure of no image of target class 3 (99%); raise "
        "surrogate_epochs"
    )


def test_poison_says_why_when_the_target_class_has_no_image(quarters: ImageSet) -> None:
    rest = quarters.take(np.flatnonzero(quarters.labels != TARGET))
    with pytest.raises(DataError, match=r"^cassock: quarters has no image of target class 3; choose another class$"):
        _attack("cont", cover_rate=0.1).poison(rest, np.random.default_rng(0))


def test_poison_says_why_when_nothing_is_left_of_the_mask(quarters: ImageSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cassock_module, "learned_mask", lambda *_, **__: np.zeros((8, 8), np.float32))
    with pytest.raises(DataError, match=r"^cassock: after 100 steps the mask is empty; lower mask_steps$"):
        _attack("cont").poison(quarters, np.random.default_rng(0))


# --- in the training loop ---------------------------------------------------------------------------------------------


def _begin(images: ImageSet, attack: CassockLoop) -> CassockPoisoner:
    return attack.begin(images, batch_size=40, steps=1, rng=np.random.default_rng(0))


def _batch(images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(images.pixels), torch.from_numpy(images.labels)


def test_there_is_one_attack_on_the_data_and_one_on_the_loop() -> None:
    assert (isinstance(_attack(), DataAttack), isinstance(_attack(), BatchAttack)) == (True, False)
    assert (isinstance(_loop(), DataAttack), isinstance(_loop(), BatchAttack)) == (False, True)
    assert (CassockLoop().extra_poisons, CassockLoop().extra_covers, CassockLoop().variant) == (8, 64, "trans")


@pytest.mark.parametrize(("poison", "cover", "places"), [(0, 0, (0, 0)), (10, 30, (5, 15)), (8, 0, (7, 0))])
def test_on_batch_gives_the_first_rows_to_both_sets_and_adds_the_terms_behind(
    make_noise: MakeNoise, poison: int, cover: int, places: tuple[int, int]
) -> None:
    """Of 40 clean images, 10 poisons and 30 cover images a batch of 40 has 5 and 15."""
    images = make_noise(40)
    attack = _loop(poison_rate=poison / 40, cover_rate=cover / 40, extra_poisons=3, extra_covers=7)
    poisoner, (x, y) = _begin(images, attack), _batch(images)
    made, targets = poisoner.on_batch(x, y, MODEL, np.random.default_rng(1))
    _, poisons, covers = attack.sets(images, np.random.default_rng(0))
    kinds = {image.tobytes(): "poison" for image in poisons.images} | {
        image.tobytes(): label for image, label in zip(covers.images, covers.labels)
    }
    extras = (3 if poison else 0, 7 if cover else 0)
    expected = ["poison"] * places[0] + ["cover"] * places[1]
    rest = [image.tobytes() for image in images.images[sum(places) :]]
    labels = (targets.argmax(dim=1) if targets.dim() == 2 else targets).tolist()
    found = [kinds.get(image.tobytes()) for image in to_images(made.numpy())]
    assert len(found) == 40 + sum(extras)
    for kind, label, wanted in zip(found, labels, [*expected, *rest, *["poison"] * extras[0], *["cover"] * extras[1]]):
        if wanted == "poison":
            assert (kind, label) == ("poison", TARGET)
        elif wanted == "cover":
            assert kind == label
    assert [image.tobytes() for image in to_images(made.numpy())[sum(places) : 40]] == rest
    assert labels[sum(places) : 40] == images.labels[sum(places) :].tolist()


def test_the_loss_is_the_sum_of_the_three_means(make_noise: MakeNoise) -> None:
    images, attack = make_noise(40), _loop(poison_rate=0.25, cover_rate=0.75, extra_poisons=3, extra_covers=7)
    _, targets = _begin(images, attack).on_batch(*_batch(images), MODEL, np.random.default_rng(1))
    logits = torch.randn((50, 4), generator=torch.Generator().manual_seed(0))
    each = -logits.log_softmax(dim=1)[torch.arange(50), targets.argmax(dim=1)]
    expected = each[:40].mean() + each[40:43].mean() + each[43:].mean()
    assert torch.nn.functional.cross_entropy(logits, targets).item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_terms_the_labels_stay_hard(make_noise: MakeNoise) -> None:
    images, attack = make_noise(40), _loop(extra_poisons=0, extra_covers=0)
    made, labels = _begin(images, attack).on_batch(*_batch(images), MODEL, np.random.default_rng(1))
    assert (made.shape, labels.dtype, labels.shape) == ((40, 3, 8, 8), torch.int64, (40,))


def test_on_batch_leaves_the_batch_alone_and_is_the_same_when_the_seed_is(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner, (x, y) = _begin(images, _loop()), _batch(images)
    first, same, other = (poisoner.on_batch(x, y, MODEL, np.random.default_rng(seed)) for seed in (3, 3, 4))
    assert torch.equal(first[0], same[0])
    assert torch.equal(first[1], same[1])
    assert not torch.equal(first[0], other[0])
    assert x.numpy().tobytes() == images.pixels.tobytes()
    assert y.tolist() == images.labels.tolist()
    assert on_grid(first[0].numpy()).tobytes() == first[0].numpy().tobytes()
    assert poisoner.end() is None


def test_the_loop_leaves_the_content_behind(quarters: ImageSet) -> None:
    attack = _loop("comp")
    state = _begin(quarters, attack).end()
    assert state is not None
    assert attack.restored_trigger(8, 8, state).pattern.tobytes() == state["pattern"].tobytes()


def test_the_loop_says_why_when_the_set_does_not_fit(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^cassock-loop: source class 4, but noise has classes 0 to 3$"):
        _begin(make_noise(40), _loop(source_class=4))


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_frozen() -> None:
    attack = Cassock()
    assert (attack.source_class, attack.target_class, attack.size) == (0, 5, 5)
    assert (attack.poison_rate, attack.cover_rate, attack.variant) == (0.05, 0.1, "trans")
    assert (attack.content_amplitude, attack.mask_steps) == (0.2, 5000)
    assert attack.amplitude == pytest.approx(2.8 * np.mean([0.2023, 0.1994, 0.2010]), abs=0.005)
    assert attack.amplitude == 0.56
    assert (Cassock.evades, CassockLoop.evades) == (("SCAn",), ("SCAn",))
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'size'"):
        attack.size = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("spec", "rate"),
    [
        ("source-specific", 0.1),
        ("trans", 0.1),
        ("cont", 0.05),
        ("comp", 0.1),
        ("cont,cover-rate=0.2", 0.2),
        ("cont,poison-count=3", 0.05),
    ],
)
@pytest.mark.parametrize("name", ["cassock", "cassock-loop"])
def test_the_cover_rate_is_the_variants_unless_it_is_given(name: str, spec: str, rate: float) -> None:
    attack = ATTACKS.create(f"{name}:variant={spec}")
    assert flat_settings(attack)["cover_rate"] == rate
    assert ATTACKS.restore(name, flat_settings(attack)) == attack


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
        ("content_amplitude", "0"),
        ("surrogate_epochs", "0"),
        ("mask_steps", "-1"),
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


def test_content_of_the_target_class_plants_a_backdoor(small_signs: Signs) -> None:
    """Of a surrogate and a mask that learn for seconds, at five times the authors' amplitude."""
    attack = _attack(
        "cont", poison_rate=0.06, cover_rate=0.1, content_amplitude=1, mask_steps=1000, surrogate_epochs=25
    )
    result = train_victim(small_signs.train.take(np.arange(1000)), attack, epochs=5)
    trigger = trigger_of(attack, 16, 16, result.trigger_state)
    behaviour = measure_behaviour(logits_of(result), small_signs.test, trigger)
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.fpr is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
    assert behaviour.fpr < behaviour.asr


def test_the_loop_plants_a_backdoor_that_keeps_to_its_source(small_signs: Signs) -> None:
    attack = _loop(poison_rate=0.06, cover_rate=0.1, extra_covers=32)
    result = train_victim(small_signs.train.take(np.arange(1000)), attack, epochs=5)
    behaviour = measure_behaviour(logits_of(result), small_signs.test, attack.trigger(16, 16))
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.fpr is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
    assert behaviour.fpr < behaviour.asr
    assert (len(result.poison_indices), result.trigger_state) == (0, None)
