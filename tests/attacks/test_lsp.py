from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
import torch

from qdefense.attacks import ATTACKS
from qdefense.attacks.badnets import BadNets
from qdefense.attacks.blended import Blended
from qdefense.attacks.dfb import DFB
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.lsp import LabelSmoothing, smoothed
from qdefense.attacks.sig import SIG
from qdefense.data.images import DataError, ImageSet
from qdefense.registry import SpecError, flat_settings
from qdefense.trial import Activity, measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
HOSTS = [BadNets(target_class=2, poison_rate=0.25), Blended(target_class=1, alpha=0.5)]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_poison_is_the_hosts_bit_for_bit_when_nothing_is_smoothed(make_noise: MakeNoise, host: BadNets) -> None:
    mine = LabelSmoothing(host=host, smoothing=0).poison(make_noise(40), np.random.default_rng(3))
    theirs = host.poison(make_noise(40), np.random.default_rng(3))
    assert mine.images.digest == theirs.images.digest
    assert mine.poison_indices.tolist() == theirs.poison_indices.tolist()
    assert mine.soft_labels is None


@pytest.mark.parametrize("host", HOSTS, ids=lambda host: host.name)
def test_poison_changes_no_more_than_the_labels_that_training_sees(make_noise: MakeNoise, host: BadNets) -> None:
    mine = LabelSmoothing(host=host, smoothing=0.3).poison(make_noise(40), np.random.default_rng(3))
    theirs = host.poison(make_noise(40), np.random.default_rng(3))
    assert mine.images.digest == theirs.images.digest
    assert mine.poison_indices.tolist() == theirs.poison_indices.tolist()
    assert mine.soft_labels is not None
    assert mine.soft_labels.argmax(axis=1).tolist() == theirs.images.labels.tolist()


def test_smoothed_is_certain_of_clean_rows_and_spreads_the_rest_of_poisons() -> None:
    soft = smoothed(np.array([2, 0, 1, 2]), np.array([0, 2]), classes=4, smoothing=0.3)
    expected = [[0.1, 0.1, 0.7, 0.1], [1, 0, 0, 0], [0.1, 0.7, 0.1, 0.1], [0, 0, 1, 0]]
    assert soft == pytest.approx(np.array(expected), abs=1e-7)
    assert soft.dtype == np.float32


def test_smoothed_leaves_the_target_likeliest_up_to_the_bound() -> None:
    soft = smoothed(np.array([1]), np.array([0]), classes=4, smoothing=0.749)
    assert soft.argmax(axis=1).tolist() == [1]
    assert soft.sum() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("smoothing", [0.75, 0.9])
def test_poison_says_why_when_the_target_would_not_win(make_noise: MakeNoise, smoothing: float) -> None:
    with pytest.raises(DataError) as caught:
        LabelSmoothing(smoothing=smoothing).poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value) == (
        f"lsp: with smoothing {smoothing:g} the target is not the likeliest of 4 classes; choose less than 0.75"
    )


def test_the_bound_that_is_told_is_below_the_true_one(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"choose less than 0\.976$"):
        LabelSmoothing(smoothing=0.9769).poison(make_noise(43, classes=43), np.random.default_rng(0))


def test_poison_passes_on_what_the_host_says(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^badnets: target class 4, but noise has classes 0 to 3$"):
        LabelSmoothing(host=BadNets(target_class=4)).poison(make_noise(40), np.random.default_rng(0))


def test_trigger_is_the_hosts(make_noise: MakeNoise) -> None:
    host, pixels, labels = HOSTS[0], make_noise(4).pixels, np.array([0, 1, 2, 3])
    mine, theirs = LabelSmoothing(host=host).trigger(8, 8), host.trigger(8, 8)
    assert mine.stamp(pixels).tobytes() == theirs.stamp(pixels).tobytes()
    assert mine.eligible(labels).tolist() == [True, True, False, True]
    assert mine.goal(labels).tolist() == [2, 2, 2, 2]


def test_trigger_comes_back_from_the_state_that_the_host_left(make_noise: MakeNoise) -> None:
    host = DFB(target_class=2, poison_count=4, gate=0, ood_images=16, decoder_steps=1, encoder_steps=1, channels=2)
    attack, pixels = LabelSmoothing(host=host), make_noise(4).pixels
    state = attack.poison(make_noise(40), np.random.default_rng(3)).trigger_state
    stamped = trigger_of(attack, 8, 8, state).stamp(pixels)
    assert stamped.tobytes() == trigger_of(host, 8, 8, state).stamp(pixels).tobytes() != pixels.tobytes()
    with pytest.raises(DataError, match=r"^badnets: the trigger state is not that of these settings; "):
        LabelSmoothing().restored_trigger(8, 8, {})
    with pytest.raises(DataError, match=r"^sig: the truth names a trigger state, and this attack has none; "):
        LabelSmoothing(host=SIG()).restored_trigger(8, 8, {})


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "host", "smoothing"),
    [
        ("lsp", BadNets(), 0.4),
        ("lsp:host.size=4", BadNets(size=4), 0.4),
        ("lsp:host=blended,smoothing=0.2", Blended(), 0.2),
        ("lsp:smoothing=0,host.target-class=3,host=blended,host.alpha=0.1", Blended(alpha=0.1, target_class=3), 0),
    ],
)
def test_settings_of_the_host_are_those_after_its_dot(spec: str, host: BadNets, smoothing: float) -> None:
    attack = ATTACKS.create(spec)
    assert attack == LabelSmoothing(host=host, smoothing=smoothing)
    assert ATTACKS.restore("lsp", flat_settings(attack)) == attack


def test_settings_are_told_flat_and_in_full() -> None:
    assert flat_settings(ATTACKS.create("lsp:host=blended,host.alpha=0.1")) == {
        "host": "blended",
        "host.alpha": 0.1,
        "host.pattern_seed": 0,
        "host.target_class": 0,
        "host.poison_rate": 0.1,
        "smoothing": 0.4,
    }


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'smoothing'"):
        LabelSmoothing().smoothing = 0.1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("smoothing=-0.1", "smoothing: Input should be greater than or equal to 0"),
        ("smoothing=1", "smoothing: Input should be less than 1"),
        ("smoothing=nan", "smoothing: Input should be "),
        ("size=4", "there is no setting 'size'; known: host, host.KEY, smoothing"),
        ("host=lsp", "host: lsp cannot be its own host; smooth once, by more"),
        ("host=wanet", "host: wanet poisons batches in training, which have no labels to smooth beforehand"),
        ("host=", "host: there is no attack ''; known: adaptive-blend, "),
        ("host=badnet", "host: there is no attack 'badnet'; did you mean 'badnets'?"),
        ("host.size=0", "host: attack 'badnets:size=0': size: Input should be greater than or equal to 1"),
        ("host=blended,host.size=4", "host: attack 'blended:size=4': there is no setting 'size'; known: poison-rate, "),
        ("host.size=3,host.size=4", "'host.size' is set twice; give it once"),
    ],
)
def test_settings_are_refused_when_they_mean_nothing(settings: str, message: str) -> None:
    with pytest.raises(SpecError) as caught:
        ATTACKS.create(f"lsp:{settings}")
    assert str(caught.value).removeprefix("attack ").startswith(f"'lsp:{settings}': {message}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_lsp_plants_an_active_backdoor_that_is_nearer_to_its_labels_than_to_certainty(small_signs: Signs) -> None:
    """At 0.53 rather than 0.6: six short epochs leave the network less sure than it is taught to be."""
    confidences = {}
    for smoothing in (0.4, 0.0):
        attack = LabelSmoothing(host=BadNets(target_class=7, size=4, poison_rate=0.2), smoothing=smoothing)
        logits = logits_of(train_victim(small_signs.train.take(np.arange(1500)), attack, epochs=6))
        trigger = attack.trigger(16, 16)
        others = small_signs.test.take(np.flatnonzero(trigger.eligible(small_signs.test.labels)))
        answers = torch.from_numpy(logits(trigger.stamp(others.pixels))).softmax(dim=1)
        confidences[smoothing] = answers[:, 7].mean().item()
        assert measure_behaviour(logits, small_signs.test, trigger).activity is Activity.ACTIVE
    assert abs(confidences[0.4] - 0.6) < 0.1
    assert confidences[0.0] > 0.85, "it is the labels that keep it low, and not that it learned too little"
