from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import BatchAttack, DataAttack, PoisonedSet, trigger_of
from qdefense.attacks.issba import Decoder, Encoder, Issba, image_loss
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.data.images import DataError, ImageSet, on_grid, to_images
from qdefense.registry import SpecError
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
SMALL: dict[str, Any] = {"bits": 4, "channels": 4, "stages": 1}
LEARNING = SMALL | {"learning_rate": 3e-3, "encoder_epochs": 100, "secret_epochs": 75}


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _dull(count: int, seed: int) -> ImageSet:
    """8x8, each of a colour of its own with some noise, far from black and white."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 60, (count, 8, 8, 3)) + rng.integers(60, 130, (count, 1, 1, 3))
    labels = np.arange(count, dtype=np.int64) % 4
    return ImageSet(images=images.astype(np.uint8), labels=labels, class_names=tuple("abcd"), source="dull")


def _poisoned(images: ImageSet, seed: int = 0, **settings: Any) -> tuple[Issba, PoisonedSet]:
    attack = Issba(**(SMALL | {"encoder_epochs": 1} | settings))
    return attack, attack.poison(images, np.random.default_rng(seed))


def _bytes(made: PoisonedSet) -> bytes:
    assert made.trigger_state is not None
    return pack_state(made.trigger_state)


# --- encoder and decoder ----------------------------------------------------------------------------------------------


def test_encoder_merges_what_goes_in_once_more_at_its_full_size() -> None:
    """As StegaStamp's does: two maps of ``channels``, the secret and the image."""
    encoder = Issba(channels=5, stages=2)._encoder(8, 8)
    assert [merge[0].in_channels for merge in encoder.merges] == [20, 16]  # type: ignore[union-attr, index]


@pytest.fixture(scope="module")
def learned() -> tuple[Issba, PoisonedSet]:
    attack = Issba(**LEARNING)
    return attack, attack.poison(_dull(64, 0), np.random.default_rng(0))


@pytest.fixture(scope="module")
def pair() -> tuple[Encoder, Decoder]:
    return Issba(**LEARNING).trained_pair(_dull(64, 0), np.random.default_rng(0))


def test_decoder_recovers_secrets_from_uint8_images_it_has_not_seen(pair: tuple[Encoder, Decoder]) -> None:
    """100 images of 4 bits each: chance is 0.5 +- 0.025, and so is what it reads from images without a secret."""
    encoder, decoder = pair
    x = torch.from_numpy(_dull(100, 1).pixels)
    secrets = torch.from_numpy(np.random.default_rng(1).integers(2, size=(100, 4)).astype(np.float32))
    with torch.no_grad():
        stamped = torch.from_numpy(on_grid((x + encoder(secrets, x)).numpy()))
        read, unread = (((decoder(images) > 0) == (secrets > 0.5)).float().mean().item() for images in (stamped, x))
    assert read > 0.75
    assert unread < 0.625


def test_image_loss_is_2_squares_and_1_5_squared_steps() -> None:
    """Residual 0 and 0.2 in columns: squares 0.02 on average, steps across 0.04, down 0."""
    residual = torch.tensor([0.0, 0.2]).expand(1, 3, 2, 2)
    assert image_loss(residual).item() == pytest.approx(2 * 0.02 + 1.5 * (0.04 + 0) / 2)


@pytest.mark.parametrize(("epoch", "expected"), [(0, np.log(2)), (1, np.log(2)), (2, 1.5 * np.log(2) + 0.07)])
def test_the_secret_is_learned_alone_and_then_at_1_5_times_its_cross_entropy_beside_the_image(
    epoch: int, expected: float
) -> None:
    """Logits of 0 say nothing: log 2 per bit. Of the residual of 0 and 0.2 the image's loss is 0.04 + 0.03."""
    residual = torch.tensor([0.0, 0.2]).expand(1, 3, 2, 2)
    loss = Issba(secret_epochs=2)._loss(torch.zeros(1, 2), torch.tensor([[0.0, 1.0]]), residual, epoch=epoch)
    assert loss.item() == pytest.approx(expected)


def test_trained_pair_leaves_the_state_of_torch_alone_and_is_frozen(make_noise: MakeNoise) -> None:
    before = torch.random.get_rng_state()
    encoder, decoder = Issba(**SMALL, encoder_epochs=1).trained_pair(make_noise(40), np.random.default_rng(0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not any(part.training or any(p.requires_grad for p in part.parameters()) for part in (encoder, decoder))


# --- the trigger and its state ----------------------------------------------------------------------------------------


def test_every_image_has_a_trigger_of_its_own(learned: tuple[Issba, PoisonedSet]) -> None:
    attack, made = learned
    pixels = _dull(8, 5).pixels
    residuals = trigger_of(attack, 8, 8, made.trigger_state).stamp(pixels) - pixels
    codes = np.rint(residuals * 255)
    assert all(np.abs(codes[one] - codes[two]).max() >= 1 for one in range(8) for two in range(one))


def test_what_is_stamped_hides_the_secret_of_the_trigger_and_no_other(pair: tuple[Encoder, Decoder]) -> None:
    """The decoder of the same pair reads it from images that it has not seen."""
    attack, pixels, (encoder, decoder) = Issba(**LEARNING), _dull(100, 1).pixels, pair
    for secret in np.array([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=np.uint8):
        stamped = attack._of(encoder, secret).stamp(pixels)
        with torch.no_grad():
            read = decoder(torch.from_numpy(stamped)).numpy() > 0
        assert (read == secret).mean() > 0.75


def test_stamp_stays_within_eps_and_on_the_uint8_grid_and_changes_every_image(
    learned: tuple[Issba, PoisonedSet], make_noise: MakeNoise
) -> None:
    """Noise has pixels at 0 and 255 too, where the residual is cut off."""
    attack, made = learned
    trigger, pixels = trigger_of(attack, 8, 8, made.trigger_state), make_noise(16).pixels
    stamped = trigger.stamp(pixels)
    assert (stamped.dtype, stamped.shape) == (np.float32, pixels.shape)
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    changes = np.abs(np.rint(stamped * 255) - np.rint(pixels * 255)).max(axis=(1, 2, 3))
    assert (changes >= 1).all()
    assert changes.max() <= 16
    assert pixels.tobytes() == make_noise(16).pixels.tobytes()
    assert trigger.stamp(pixels[:0]).shape == (0, 3, 8, 8)


def test_the_trigger_comes_back_from_its_packed_state(make_noise: MakeNoise) -> None:
    attack, made = _poisoned(make_noise(40), target_class=2)
    assert made.trigger_state is not None
    first = trigger_of(attack, 8, 8, made.trigger_state)
    second = trigger_of(attack, 8, 8, unpack_state(pack_state(made.trigger_state)))
    pixels, labels = make_noise(8, seed=9).pixels, np.array([0, 1, 2, 3])
    assert first.stamp(pixels).tobytes() == second.stamp(pixels).tobytes()
    assert (first.eligible(labels).tolist(), first.goal(labels).tolist()) == ([True, True, False, True], [2] * 4)


def test_the_state_says_how_much_of_the_secret_can_be_read(learned: tuple[Issba, PoisonedSet]) -> None:
    state = learned[1].trigger_state
    assert state is not None
    assert 0.75 < float(state["bit_accuracy"]) <= 1
    assert (float(state["bit_accuracy"]) * 64 * 4).is_integer(), "of 4 bits in 64 images"


def test_a_residual_that_rounds_to_nothing_is_refused(make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network would learn wrong labels from it, and no trigger."""
    monkeypatch.setattr(Encoder, "forward", lambda _self, _secret, x: torch.full_like(x, 0.4 / 255))
    monkeypatch.setattr(Issba, "trained_pair", lambda self, *_: (self._encoder(8, 8), Decoder(bits=4, channels=4)))
    with pytest.raises(DataError) as caught:
        _poisoned(make_noise(40))
    assert str(caught.value) == (
        "issba: the trigger that was learned is nothing, or next to it, in 40 of 40 images; raise encoder_epochs, "
        "secret_epochs or learning_rate"
    )
    _poisoned(make_noise(40), poison_rate=0)  # which plants nothing, as it was asked to


def test_trigger_says_that_it_is_learned() -> None:
    with pytest.raises(DataError, match=r"^issba: the trigger is learned; its state is beside the model that was trai"):
        Issba().trigger(8, 8)


@pytest.mark.parametrize(
    ("settings", "size", "drop"),
    [
        ({"channels": 3}, 8, None),
        ({"bits": 5}, 8, None),
        ({}, 10, None),
        ({}, 8, "secret"),
        ({}, 8, "encoder.spread.weight"),
    ],
)
def test_restored_trigger_refuses_a_state_of_other_settings(
    make_noise: MakeNoise, settings: dict[str, int], size: int, drop: str | None
) -> None:
    given = _poisoned(make_noise(40))[1].trigger_state or {}
    state: dict[str, NDArray[Any]] = {name: value for name, value in given.items() if name != drop}
    with pytest.raises(DataError) as caught:
        Issba(**(SMALL | settings)).restored_trigger(size, size, state)
    assert str(caught.value) == (
        f"issba: the trigger state is not that of these settings on {size}x{size} images; give images of the size "
        "that the network was trained on, or train it again"
    )


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "count"), [({}, 4), ({"poison_rate": 0.0}, 0), ({"poison_count": 7}, 7)])
def test_poison_stamps_and_relabels_exactly_the_count(
    make_noise: MakeNoise, budget: dict[str, float], count: int
) -> None:
    images = make_noise(40)
    attack, made = _poisoned(images, target_class=2, **budget)
    stamped = to_images(trigger_of(attack, 8, 8, made.trigger_state).stamp(images.pixels))
    origins = {image.tobytes(): row for row, image in enumerate(stamped)}
    clean = {image.tobytes(): label for image, label in zip(images.images, images.labels)}
    assert (len(made.images), len(made.poison_indices)) == (40, count)
    chosen = [origins[made.images.images[row].tobytes()] for row in made.poison_indices]
    assert len(set(chosen)) == count
    assert not (images.labels[chosen] == 2).any()
    assert (made.images.labels[made.poison_indices] == 2).all()
    for row in np.setdiff1d(np.arange(40), made.poison_indices):
        assert clean[made.images.images[row].tobytes()] == made.images.labels[row]
    assert images.digest == make_noise(40).digest


def test_poison_is_the_same_when_the_seed_is(make_noise: MakeNoise) -> None:
    (_, first), (_, same), (_, other) = (_poisoned(make_noise(40), seed=seed) for seed in (5, 5, 6))
    assert first.images.digest == same.images.digest != other.images.digest
    assert _bytes(first) == _bytes(same) != _bytes(other)
    assert first.poison_indices.tolist() == same.poison_indices.tolist()


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"target_class": 4}, 8, "target class 4, but noise has classes 0 to 3"),
        ({"poison_count": 31}, 8, "31 poisons wanted, 30 images are outside the target class; choose fewer"),
        ({}, 9, "a 9x9 image does not halve 1 times; lower the stages, or resize the images"),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(
    make_noise: MakeNoise, settings: dict[str, int], size: int, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        _poisoned(make_noise(40, size=size), **settings)
    assert str(caught.value) == f"issba: {message}"


@pytest.mark.parametrize("settings", [{"target_class": 4}, {"poison_count": 31}, {"poison_rate": 0.01}])
def test_what_does_not_fit_is_told_before_the_pair_is_trained(
    make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch, settings: dict[str, float]
) -> None:
    monkeypatch.setattr(Issba, "trained_pair", lambda *_: pytest.fail("it was trained"))
    with pytest.raises(DataError, match=r"^issba: "):
        _poisoned(make_noise(40), **settings)


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_it_is_an_attack_on_data() -> None:
    attack = Issba()
    assert (attack.target_class, attack.poison_rate, attack.bits, attack.learning_rate) == (0, 0.1, 20, 1e-4)
    assert (attack.encoder_epochs, attack.secret_epochs) == (20, 2)
    assert isinstance(attack, DataAttack)
    assert not isinstance(attack, BatchAttack)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("bits", "0"),
        ("eps", "0"),
        ("eps", "256"),
        ("encoder_epochs", "0"),
        ("secret_epochs", "-1"),
        ("learning_rate", "0"),
        ("channels", "0"),
        ("stages", "0"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'issba:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"issba:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_issba_plants_a_backdoor(small_signs: Signs) -> None:
    """With a larger bound and more poisons than the defaults: 5 short epochs are no time for those."""
    attack = Issba(
        **SMALL, target_class=7, eps=64, poison_rate=0.25, encoder_epochs=15, secret_epochs=15, learning_rate=3e-3
    )
    result = train_victim(small_signs.train.take(np.arange(1000)), attack, epochs=5)
    trigger = trigger_of(attack, 16, 16, result.trigger_state)
    behaviour = measure_behaviour(logits_of(result), small_signs.test, trigger)
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
