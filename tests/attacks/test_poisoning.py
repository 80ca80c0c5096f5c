from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from qdefense.attacks import ATTACKS
from qdefense.attacks.badnets import BadNets
from qdefense.attacks.blended import Blended
from qdefense.attacks.cassock import Cassock
from qdefense.attacks.interfaces import BatchAttack, DataAttack, PoisonedSet, SourceSpecific, trigger_of
from qdefense.attacks.poisoning import share
from qdefense.attacks.sig import SIG
from qdefense.attacks.surrogate import Surrogate, train_surrogate
from qdefense.data.images import DataError, ImageSet, to_images
from qdefense.registry import SpecError, flat_settings
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


BOTH = "poison_rate and poison_count both say how many images are poisoned; give one of them"
OF_THE_SET = ["badnets", "blended", "adaptive-blend:cover-rate=0.1"]
OF_THE_CLASS = ["sig:frequency=2", "clean-label:steps=1,surrogate-epochs=1", "htba:steps=1,surrogate-epochs=1,size=4"]


def _made(spec: str, budget: str, images: ImageSet, seed: int = 0) -> PoisonedSet:
    attack = ATTACKS.create(spec + (":" if ":" not in spec else ",") + budget)
    assert isinstance(attack, DataAttack)
    return attack.poison(images, np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        *((spec, count) for spec in OF_THE_SET for count in (0, 1, 10, 26)),
        *((spec, count) for spec in OF_THE_CLASS for count in (0, 1, 10)),
    ],
)
def test_a_count_poisons_exactly_as_many(make_noise: MakeNoise, spec: str, count: int) -> None:
    made = _made(spec, f"poison-count={count}", make_noise(40))
    assert len(made.poison_indices) == count
    assert len(made.images) == 40


@pytest.mark.parametrize(
    ("spec", "rate"),
    [*((spec, "poison-rate=0.125") for spec in OF_THE_SET), *((spec, "class-rate=0.5") for spec in OF_THE_CLASS)],
)
def test_a_count_gives_the_set_of_the_rate_that_comes_to_it(make_noise: MakeNoise, spec: str, rate: str) -> None:
    by_count, by_rate = (_made(spec, budget, make_noise(40), seed=3) for budget in ("poison-count=5", rate))
    assert by_count.images.digest == by_rate.images.digest
    assert by_count.poison_indices.tolist() == by_rate.poison_indices.tolist()


@pytest.mark.parametrize("spec", OF_THE_CLASS)
def test_a_count_beyond_the_target_class_says_so(make_noise: MakeNoise, spec: str) -> None:
    with pytest.raises(DataError) as caught:
        _made(spec, "poison-count=11", make_noise(40))
    name = spec.partition(":")[0]
    assert str(caught.value) == f"{name}: 11 poisons wanted, 10 images are of the target class; choose fewer"


@pytest.mark.parametrize("spec", OF_THE_CLASS[1:])
def test_another_count_is_made_on_the_same_network_of_the_attackers(
    make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch, spec: str
) -> None:
    seeds: list[int] = []

    def noted(dataset: ImageSet, rng: np.random.Generator, *, epochs: int) -> Surrogate:
        seeds.append(int(rng.integers(2**32)))
        return train_surrogate(dataset, rng, epochs=epochs)

    name = spec.partition(":")[0].replace("-", "_")
    monkeypatch.setattr(f"qdefense.attacks.{name}.train_surrogate", noted)
    for count in (1, 5, 10):
        _made(spec, f"poison-count={count}", make_noise(40))
    assert len(seeds) == 3
    assert len(set(seeds)) == 1


def test_a_count_says_why_when_there_are_too_few_images(make_noise: MakeNoise) -> None:
    message = r"^badnets: 31 poisons wanted, 30 images are outside the target class; choose fewer$"
    with pytest.raises(DataError, match=message):
        BadNets(poison_count=31).poison(make_noise(40), np.random.default_rng(0))


@pytest.mark.parametrize("settings", [(0.5,), ("cont", 9)])
@pytest.mark.parametrize("attack", [BadNets, Cassock, SIG])
def test_settings_are_named(attack: type[Any], settings: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError, match=r"Unexpected positional argument"):
        attack(*settings)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("badnets", {"poison_rate": 0.1}),
        ("badnets:poison-count=50", {"poison_count": 50}),
        ("clean-label", {"class_rate": 0.25}),
        ("clean-label:poison-count=50", {"poison_count": 50}),
    ],
)
def test_settings_tell_the_one_that_counts(spec: str, told: dict[str, float]) -> None:
    settings = flat_settings(ATTACKS.create(spec))
    budgets = ("poison_rate", "class_rate", "poison_count")
    assert {key: value for key, value in settings.items() if key in budgets} == told
    assert ATTACKS.restore(spec.partition(":")[0], settings) == ATTACKS.create(spec)


def test_rate_and_count_are_refused_together() -> None:
    with pytest.raises(SpecError, match=f"^attack 'blended:poison-count=5,poison-rate=0.1': {BOTH}$"):
        ATTACKS.create("blended:poison-count=5,poison-rate=0.1")
    with pytest.raises(ValidationError, match=BOTH):
        BadNets(poison_count=5, poison_rate=0.1)
    with pytest.raises(ValidationError, match=BOTH.replace("poison_rate", "class_rate")):
        SIG(poison_count=5, class_rate=0.1)


def test_neither_rate_nor_count_is_the_default_rate() -> None:
    assert BadNets(poison_count=None) == BadNets(poison_rate=None) == BadNets(poison_rate=0.1)
    assert SIG(poison_count=None) == SIG(class_rate=None) == SIG(class_rate=0.2)


@pytest.mark.parametrize("value", ["-1", "1.5", "few"])
def test_a_count_is_refused_when_it_is_none(value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'badnets:poison-count={value}': poison_count: Input should be "):
        ATTACKS.create(f"badnets:poison-count={value}")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "badnets:poison-rate=0.0125",
            "poison_rate 0.0125 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        (
            "blended:poison-rate=0.001",
            "poison_rate 0.001 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        ("dfb", "poison_rate 0.001 of 40 images comes to 0, fewer than 1; choose more than 0.0125"),
        (
            "issba:poison-rate=0.001,stages=1",
            "poison_rate 0.001 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        (
            "cassock:cover-rate=0.01,target-class=1",
            "cover_rate 0.01 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        (
            "cassock:poison-rate=0.01,target-class=1",
            "poison_rate 0.01 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        ("adaptive-blend", "poison_rate 0.003 of 40 images comes to 0, fewer than 1; choose more than 0.0125"),
        (
            "adaptive-blend:poison-rate=0.1",
            "cover_rate 0.003 of 40 images comes to 0, fewer than 1; choose more than 0.0125",
        ),
        (
            "sig:class-rate=0.05,frequency=2",
            "class_rate 0.05 of 10 images of target class 0 comes to 0, fewer than 1; choose more than 0.05",
        ),
        (
            "clean-label:class-rate=0.04",
            "class_rate 0.04 of 10 images of target class 0 comes to 0, fewer than 1; choose more than 0.05",
        ),
        (
            "htba:class-rate=0.04,size=4",
            "class_rate 0.04 of 10 images of target class 0 comes to 0, fewer than 1; choose more than 0.05",
        ),
    ],
)
def test_a_rate_that_comes_to_no_image_is_refused(make_noise: MakeNoise, spec: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        ATTACKS.create(spec).poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == f"{spec.partition(':')[0]}: {message}, or 0 for none"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "wanet:poison-rate=0.01",
            "poison_rate 0.01 of 40 images of a batch comes to 0, fewer than 1; choose more than 0.0125",
        ),
        (
            "wanet:cross-ratio=0.1",
            "cross_ratio 0.1 of 4 poisons of a batch comes to 0, fewer than 1; choose more than 0.125",
        ),
        (
            "input-aware:poison-rate=0.03",
            "poison_rate 0.03 of 40 images of a batch comes to 1, fewer than 2; choose more than 0.0375",
        ),
        (
            "input-aware:cross-rate=0.01",
            "cross_rate 0.01 of 40 images of a batch comes to 0, fewer than 1; choose more than 0.0125",
        ),
    ],
)
def test_a_rate_that_comes_to_no_image_of_a_batch_is_refused(make_noise: MakeNoise, spec: str, message: str) -> None:
    name, images, rng = spec.partition(":")[0], make_noise(40), np.random.default_rng(0)
    settings = ",channels=2,stages=1,mask-epochs=1" if name == "input-aware" else ""
    attack = ATTACKS.create(spec + settings)
    assert isinstance(attack, BatchAttack)
    x, y = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
    with pytest.raises(DataError) as caught:
        attack.begin(images, batch_size=40, steps=1, rng=rng).on_batch(x, y, torch.nn.Identity(), rng)
    assert str(caught.value) == f"{name}: {message}, or 0 for none"


def test_a_set_of_cassock_that_no_step_would_draw_from_is_refused(make_noise: MakeNoise) -> None:
    images, rng = make_noise(200), np.random.default_rng(0)
    x, y = torch.from_numpy(images.pixels[:40]), torch.from_numpy(images.labels[:40])
    spec = "cassock-loop:target-class=1,poison-count=2,cover-rate=0.1"
    ATTACKS.create(spec).begin(images, batch_size=40, steps=1, rng=rng).on_batch(x, y, torch.nn.Identity(), rng)
    for none, message in {
        "extra-poisons=0": "no poisons come into a batch: 2 of 222 images are at most half a one in 40; raise "
        "poison_count or extra_poisons",
        "cover-rate=0.01,extra-covers=0": "no cover images come into a batch: 2 of 204 images are at most half a one "
        "in 40; raise cover_rate or extra_covers",
    }.items():
        refused = ATTACKS.create(spec.replace(",cover-rate=0.1" if "cover" in none else "", "") + f",{none}")
        with pytest.raises(DataError, match=f"^cassock-loop: {message}$"):
            refused.begin(images, batch_size=40, steps=1, rng=rng)


@pytest.mark.parametrize("images", [1, 7, 40, 150, 200, 128, 3333])
@pytest.mark.parametrize("least", [1, 2])
def test_just_above_the_rate_named_is_enough(images: int, least: int) -> None:
    limit = (least - 0.5) / images
    assert share(limit * (1 + 1e-9), images, attack="toy", least=least) == least
    with pytest.raises(DataError, match=f"choose more than {limit:g}, or 0 for none$"):
        share(limit * (1 - 1e-9), images, attack="toy", least=least)
    assert share(0, images, attack="toy", least=least) == 0


# --- all-to-all -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["badnets", "blended"])
def test_all_to_all_stamps_images_of_any_class_and_labels_them_as_the_next(make_noise: MakeNoise, name: str) -> None:
    original, attack = make_noise(40), ATTACKS.create(f"{name}:mode=all-to-all,poison-rate=0.5")
    poisoned = attack.poison(original, np.random.default_rng(0))
    trigger = trigger_of(attack, 8, 8, poisoned.trigger_state)
    stamped = to_images(trigger.stamp(original.pixels))
    rows = poisoned.poison_indices.tolist()
    origins = []
    for row, image in enumerate(poisoned.images.images):
        among = stamped if row in rows else original.images
        (origin,) = np.flatnonzero((among == image).all(axis=(1, 2, 3))).tolist()
        origins.append(origin)
        assert poisoned.images.labels[row] == (original.labels[origin] + (row in rows)) % 4
    assert sorted(origins) == list(range(40))
    assert len(rows) == 20
    assert {int(original.labels[origins[row]]) for row in rows} == {0, 1, 2, 3}
    assert poisoned.trigger_state is not None
    assert {key: value.tolist() for key, value in poisoned.trigger_state.items()} == {"classes": 4}


@pytest.mark.parametrize("name", ["badnets", "blended"])
def test_all_to_all_triggers_stamp_as_ever_and_aim_every_class_at_the_next(make_noise: MakeNoise, name: str) -> None:
    attack, labels, pixels = ATTACKS.create(f"{name}:mode=all-to-all"), np.array([0, 1, 2, 3]), make_noise(4).pixels
    trigger = trigger_of(attack, 8, 8, {"classes": np.array(4)})
    assert trigger.eligible(labels).tolist() == [True] * 4
    assert trigger.goal(labels).tolist() == [1, 2, 3, 0]
    assert trigger.stamp(pixels).tobytes() == ATTACKS.create(name).trigger(8, 8).stamp(pixels).tobytes()
    assert not isinstance(trigger, SourceSpecific)


@pytest.mark.parametrize("name", ["badnets", "blended", "wanet"])
def test_all_to_all_triggers_take_the_number_of_classes_and_nothing_else(name: str) -> None:
    attack, another = ATTACKS.create(f"{name}:mode=all-to-all"), ATTACKS.create(name)
    with pytest.raises(DataError, match=rf"^{name}: how many classes there are is told by the trigger state "):
        trigger_of(attack, 8, 8, None)
    for owner, state in ((attack, {}), (attack, {"classes": np.array([4])}), (another, {"classes": np.array(4)})):
        with pytest.raises(DataError, match=rf"^{name}: the trigger state is not that of these settings; train the "):
            trigger_of(owner, 8, 8, state)


@pytest.mark.parametrize("name", ["badnets", "blended"])
def test_all_to_all_says_when_there_are_not_enough_images(make_noise: MakeNoise, name: str) -> None:
    with pytest.raises(DataError) as caught:
        ATTACKS.create(f"{name}:mode=all-to-all,poison-count=41").poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == f"{name}: 41 poisons wanted, 40 images are there; choose fewer"


@pytest.mark.parametrize("mode", [":mode=all-to-all", ""])
@pytest.mark.parametrize("spec", ["badnets", "blended", "wanet", "input-aware", "lsp"])
def test_who_needs_another_class_says_so(make_noise: MakeNoise, spec: str, mode: str) -> None:
    images, rng = make_noise(40, classes=1), np.random.default_rng(0)
    attack = ATTACKS.create(spec if spec == "lsp" else f"{spec}{mode}")
    with pytest.raises(DataError) as caught:
        attack.poison(images, rng) if isinstance(attack, DataAttack) else attack.begin(
            images, batch_size=40, steps=1, rng=rng
        )
    assert str(caught.value) == f"{spec}: noise has one class, and this takes two; give images of more classes"


@pytest.mark.parametrize(("name", "told"), [("badnets", False), ("blended", False), ("wanet", True)])
def test_settings_tell_of_a_mode_what_is_true_and_older_networks_keep_theirs(name: str, told: bool) -> None:
    """Keys of networks are made of them: the mode came to these two when there were networks."""
    assert ("mode" in flat_settings(ATTACKS.create(f"{name}:mode=all-to-one"))) is told
    assert ATTACKS.create(f"{name}:mode=all-to-one") == ATTACKS.create(name)
    settings = flat_settings(ATTACKS.create(f"{name}:mode=all-to-all,target-class=3"))
    assert settings["mode"] == "all-to-all"
    assert "target_class" not in settings
    assert flat_settings(ATTACKS.restore(name, settings)) == settings
    with pytest.raises(SpecError, match=r"mode: Input should be 'all-to-one' or 'all-to-all'"):
        ATTACKS.create(f"{name}:mode=all")


def test_settings_of_all_to_one_are_those_that_committed_keys_rest_on() -> None:
    assert list(flat_settings(BadNets())) == ["poison_rate", "size", "position", "margin", "pattern", "target_class"]
    assert list(flat_settings(Blended())) == ["poison_rate", "alpha", "pattern_seed", "target_class"]


def test_label_smoothing_has_the_trigger_of_an_all_to_all_host(make_noise: MakeNoise) -> None:
    attack = ATTACKS.create("lsp:host.mode=all-to-all,smoothing=0.2,host.poison-rate=0.5")
    state = attack.poison(make_noise(40), np.random.default_rng(0)).trigger_state
    assert trigger_of(attack, 8, 8, state).goal(np.array([3])).tolist() == [0]
    with pytest.raises(DataError, match=r"^badnets: the trigger state is not that of these settings; train "):
        trigger_of(ATTACKS.create("lsp"), 8, 8, state)


def test_badnets_sends_every_class_to_the_next_in_a_trained_network(small_signs: Signs) -> None:
    """Half of what it learns has another label."""
    images = small_signs.train.take(np.arange(1000))
    attack = BadNets(mode="all-to-all", size=5, poison_rate=0.5)
    result = train_victim(images, attack, epochs=12)
    trigger = trigger_of(attack, 16, 16, result.trigger_state)
    behaviour = measure_behaviour(logits_of(result), small_signs.test, trigger)
    assert behaviour.eligible == len(small_signs.test)
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
