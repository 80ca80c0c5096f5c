from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.input_aware import (
    GeneratedTrigger,
    GeneratorPoisoner,
    InputAware,
    _adam,
    diversity_loss,
    sharpened,
)
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.poisoning import derangement
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.data.images import DataError, ImageSet, on_grid
from qdefense.models import Recipe
from qdefense.registry import SpecError
from qdefense.training import TrainingResult, train
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


SMALL: dict[str, Any] = {"channels": 2, "stages": 2, "mask_epochs": 1}
MODEL = torch.nn.Identity()


def _begin(images: ImageSet, seed: int = 0, **settings: Any) -> GeneratorPoisoner:
    return InputAware(**SMALL, **settings).begin(images, batch_size=40, steps=4, rng=np.random.default_rng(seed))


def _call(poisoner: GeneratorPoisoner, images: ImageSet, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.from_numpy(images.pixels), torch.from_numpy(images.labels)
    return poisoner.on_batch(x, y, MODEL, np.random.default_rng(seed))


def _bytes(state: Any) -> bytes:
    return pack_state(state)


# --- the losses -------------------------------------------------------------------------------------------------------


def test_diversity_loss_is_the_ratio_of_root_mean_square_distances() -> None:
    """Images 0.4 and 0.2 apart, their patterns 0.2 and 0.4: the ratios are 2 and 1/2."""
    x, patterns = torch.zeros(2, 3, 4, 4), torch.zeros(2, 1, 4, 4)
    others = torch.tensor([0.4, 0.2])[:, None, None, None].expand_as(x)
    made = torch.tensor([0.2, 0.4])[:, None, None, None].expand_as(patterns)
    assert diversity_loss(x, others, patterns, made).item() == pytest.approx(1.25, rel=1e-5)


def test_diversity_loss_has_a_finite_gradient_when_patterns_are_equal() -> None:
    patterns = torch.full((2, 3, 4, 4), 0.5, requires_grad=True)
    x = torch.zeros(2, 3, 4, 4)
    diversity_loss(x, x + 1, patterns, patterns.detach()).backward()  # type: ignore[no-untyped-call]
    assert patterns.grad is not None
    assert torch.isfinite(patterns.grad).all()


def test_sharpened_pushes_masks_apart_and_keeps_the_middle() -> None:
    assert torch.allclose(sharpened(torch.tensor([0.2, 0.5, 0.8])), torch.tensor([0.0, 0.5, 1.0]), atol=1e-4)


def test_a_generators_last_convolution_is_normalized_too() -> None:
    """As the authors' is. Without it one step of Adam takes most masks where `sharpened` has no slope."""
    last = list(InputAware()._generator(1))[-2:]
    assert [type(layer) for layer in last] == [torch.nn.Conv2d, torch.nn.BatchNorm2d]


@pytest.mark.parametrize(("masks", "expected"), [((0.5, 0.3), 3 * 2 + 100 * 0.15), ((0.2, 0.0), 3 * 2)])
def test_masks_pay_for_likeness_and_for_what_they_cover_beyond_the_density(
    masks: tuple[float, float], expected: float
) -> None:
    """Images 0.4 apart and masks 0.2: a ratio of 2 at weight 3; beyond a density of 0.25 are 0.25 and 0.05, or none."""
    x = torch.tensor([0.0, 0.4])[:, None, None, None].expand(2, 3, 4, 4)
    made = torch.tensor(masks)[:, None, None, None].expand(2, 1, 4, 4)
    loss = InputAware(mask_diversity_weight=3, mask_density=0.25)._mask_loss(x, made)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "cross", "poisons", "crossed"), [(0.0, 0.1, 0, 0), (0.1, 0.1, 4, 4), (0.2, 0.0, 8, 0)]
)
def test_on_batch_stamps_and_relabels_exactly_its_share(
    make_noise: MakeNoise, rate: float, cross: float, poisons: int, crossed: int
) -> None:
    images = make_noise(40)
    changed, labels = _call(_begin(images, poison_rate=rate, cross_rate=cross, target_class=2), images)
    x, pixels = torch.from_numpy(images.pixels), changed.detach()
    assert [row for row in range(40) if not torch.equal(x[row], pixels[row])] == list(range(poisons + crossed))
    assert labels.tolist() == [2] * poisons + images.labels[poisons:].tolist()
    assert np.allclose(on_grid(pixels.numpy()), pixels.numpy(), atol=1e-6)
    assert x.numpy().tobytes() == images.pixels.tobytes()


def test_on_batch_lays_an_images_own_trigger_or_anothers_over_it(make_noise: MakeNoise) -> None:
    """Attack mode in the first four rows, cross-trigger mode in the next four; normalization looks at all patterns."""
    images = make_noise(40)
    poisoner = _begin(images, mask_density=0.5)
    x = torch.from_numpy(images.pixels)
    changed = _call(poisoner, images)[0].detach()
    others = x[torch.from_numpy(derangement(40, np.random.default_rng(1)))]
    with torch.no_grad():
        patterns = poisoner._pattern(torch.cat([x[:4], others[:8]]))
        masks = sharpened(poisoner._mask(torch.cat([x[:4], others[4:8]])))
        laid = torch.cat([patterns[:4], patterns[8:]])
        expected = (1 - masks) * x[:8] + masks * laid
    assert (changed[:8] - expected).abs().max() < 0.5 / 255 + 1e-5
    assert not any(torch.equal(x[row], others[row]) for row in range(40))


def test_the_pattern_generator_steps_once_per_batch_after_the_networks_loss(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner, alone = _begin(images), _begin(images)
    before = poisoner._pattern[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    changed, _ = _call(poisoner, images)
    assert torch.equal(poisoner._pattern[0].weight, before)  # type: ignore[arg-type]
    changed.square().sum().backward()  # type: ignore[no-untyped-call]
    _call(alone, images)
    assert torch.isfinite(poisoner._pattern[0].weight.grad).all()  # type: ignore[arg-type, union-attr]
    assert not torch.equal(poisoner._pattern[0].weight.grad, alone._pattern[0].weight.grad)  # type: ignore
    state, again = poisoner.end(), poisoner.end()
    assert not np.array_equal(state["pattern.0.weight"], before.numpy())
    assert _bytes(state) == _bytes(again), "no step is made twice"


def test_the_pattern_generator_gets_the_weighted_gradient_of_diversity_without_the_networks_loss(
    make_noise: MakeNoise,
) -> None:
    """A copy of the generator, given the same images, has that gradient from the loss alone."""
    images = make_noise(40)
    poisoner = _begin(images, diversity_weight=3)
    pattern = copy.deepcopy(poisoner._pattern)
    _call(poisoner, images)
    x = torch.from_numpy(images.pixels)
    others = x[torch.from_numpy(derangement(40, np.random.default_rng(1)))]
    patterns = pattern(torch.cat([x[:4], others[:8]]))
    (3 * diversity_loss(x[:4], others[:4], patterns[:4], patterns[4:8])).backward()  # type: ignore[no-untyped-call]
    assert poisoner._pattern[-1].weight.grad.abs().max() > 0.01  # type: ignore[union-attr, operator]
    for found, expected in zip(poisoner._pattern.parameters(), pattern.parameters()):
        assert torch.allclose(found.grad, expected.grad, rtol=1e-3, atol=1e-5)  # type: ignore[arg-type]


def test_masks_learn_to_cover_as_much_as_the_density_and_not_all_the_same(small_signs: Signs) -> None:
    """Untrained ones are at about a half. What is sharpened lies near 0 or 1, so that few pixels are beyond it."""
    images = small_signs.train.take(np.arange(256))
    attack = InputAware(channels=4, stages=2, mask_epochs=100, mask_density=0.1)
    poisoner = attack.begin(images, batch_size=64, steps=4, rng=np.random.default_rng(0))
    with torch.no_grad():
        masks = sharpened(poisoner._mask(torch.from_numpy(images.pixels)))
    assert 0.01 < masks.mean() < 0.2
    assert masks.std(dim=0).max() > 0.1


def test_masks_that_came_out_empty_are_refused(make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network would learn wrong labels from them, and no trigger."""

    def empty(_self: InputAware, mask: torch.nn.Sequential, *_: object) -> None:
        torch.nn.init.zeros_(mask[-1].weight)  # type: ignore[arg-type]
        torch.nn.init.constant_(mask[-1].bias, -9)  # type: ignore[arg-type]

    monkeypatch.setattr(InputAware, "_train_mask", empty)
    with pytest.raises(DataError) as caught:
        _begin(make_noise(40))
    assert str(caught.value) == (
        "input-aware: the trigger that was learned is nothing, or next to it, in 40 of 40 images; raise mask_epochs or "
        "mask_diversity_weight"
    )
    _begin(make_noise(40), poison_rate=0)  # which plants nothing, as it was asked to


def test_masks_stay_as_they_are_once_they_are_learned(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner = _begin(images)
    before = {name: value.clone() for name, value in poisoner._mask.state_dict().items()}
    _call(poisoner, images)[0].sum().backward()  # type: ignore[no-untyped-call]
    poisoner.end()
    assert all(torch.equal(value, before[name]) for name, value in poisoner._mask.state_dict().items())


# --- the trigger and its state ----------------------------------------------------------------------------------------


def _trained(images: ImageSet, seed: int = 0, **settings: Any) -> tuple[InputAware, TrainingResult]:
    attack = InputAware(**SMALL, **settings)
    recipe = Recipe(epochs=1, batch_size=20)
    return attack, train(images, architecture="resnet8", recipe=recipe, attack=attack, seed=seed, threads=1, width=4)


def test_train_gives_the_same_network_and_trigger_when_the_seed_is_the_same(make_noise: MakeNoise) -> None:
    (_, first), (_, same), (_, other) = (_trained(make_noise(40), seed=seed) for seed in (3, 3, 4))
    assert _bytes(first.trigger_state) == _bytes(same.trigger_state) != _bytes(other.trigger_state)
    parts = zip(first.module.state_dict().values(), same.module.state_dict().values())
    assert all(torch.equal(one, two) for one, two in parts)


def test_the_trigger_comes_back_from_its_packed_state(make_noise: MakeNoise) -> None:
    attack, result = _trained(make_noise(40), target_class=2, mask_density=0.5)
    assert result.trigger_state is not None
    first = trigger_of(attack, 8, 8, result.trigger_state)
    second = trigger_of(attack, 8, 8, unpack_state(pack_state(result.trigger_state)))
    pixels, labels = make_noise(8, seed=9).pixels, np.array([0, 1, 2, 3])
    stamped = first.stamp(pixels)
    assert stamped.tobytes() == second.stamp(pixels).tobytes() == on_grid(stamped).tobytes()
    assert pixels.tobytes() == make_noise(8, seed=9).pixels.tobytes()
    assert (stamped - pixels)[0].tobytes() != (stamped - pixels)[1].tobytes()
    assert first.stamp(pixels[:0]).shape == (0, 3, 8, 8)
    assert (first.eligible(labels).tolist(), first.goal(labels).tolist()) == ([True, True, False, True], [2] * 4)


def test_an_image_can_get_the_trigger_of_another_one(make_noise: MakeNoise) -> None:
    """Where the other's mask is 1 stands the other's pattern; with its own trigger it is stamped."""
    attack, result = _trained(make_noise(40), mask_density=0.5)
    trigger = trigger_of(attack, 8, 8, result.trigger_state)
    assert isinstance(trigger, GeneratedTrigger)
    x, others = make_noise(6, seed=9).pixels, make_noise(6, seed=8).pixels
    found = trigger.crossed(x, others)
    with torch.no_grad():
        pattern, mask = (network(torch.from_numpy(others)) for network in (trigger.pattern, trigger.mask))
    expected = x + (pattern.numpy() - x) * sharpened(mask).numpy()
    assert np.abs(found - expected).max() < 0.5 / 255 + 1e-5
    assert trigger.crossed(x, x).tobytes() == trigger.stamp(x).tobytes() != found.tobytes()


def test_every_class_goes_to_the_next_one_in_all_to_all_mode(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner = _begin(images, mode="all-to-all")
    assert _call(poisoner, images)[1].tolist() == [1, 2, 3, 0, *images.labels[4:].tolist()]
    trigger = InputAware(**SMALL, mode="all-to-all").restored_trigger(8, 8, poisoner.end())
    assert trigger.goal(np.array([0, 3])).tolist() == [1, 0]
    assert trigger.eligible(np.array([0, 3])).all()


def test_trigger_says_that_it_is_learned() -> None:
    with pytest.raises(DataError, match=r"^input-aware: the trigger is learned; its state is beside the model "):
        InputAware().trigger(8, 8)


@pytest.mark.parametrize(
    ("settings", "drop"), [({"channels": 3}, None), ({"stages": 1}, None), ({}, "classes"), ({}, "mask.0.weight")]
)
def test_restored_trigger_refuses_a_state_of_other_settings(
    make_noise: MakeNoise, settings: dict[str, int], drop: str | None
) -> None:
    state: dict[str, NDArray[Any]] = {name: v for name, v in _begin(make_noise(40)).end().items() if name != drop}
    with pytest.raises(DataError, match=r"^input-aware: the trigger state is not that of these settings; train the "):
        InputAware(**(SMALL | settings)).restored_trigger(8, 8, state)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "size", "message"),
    [
        ({"target_class": 4}, 8, "target class 4, but noise has classes 0 to 3"),
        ({}, 10, "a 10x10 image does not halve 2 times; lower the stages, or resize the images"),
        (
            {"poison_rate": 0.7, "cross_rate": 0.5},
            8,
            "poison rate 0.7 and cross rate 0.5 stamp more images than there are; lower one of them",
        ),
    ],
)
def test_begin_says_why_when_the_set_does_not_fit(
    make_noise: MakeNoise, settings: dict[str, Any], size: int, message: str
) -> None:
    with pytest.raises(DataError) as caught:
        _begin(make_noise(40, size=size), **settings)
    assert str(caught.value) == f"input-aware: {message}"


@pytest.mark.parametrize(("steps", "rates"), [(1, [1]), (2, [1, 0.01]), (10, [1] * 4 + [0.1] * 4 + [0.01] * 2)])
def test_the_rate_falls_at_four_and_at_eight_tenths_of_the_steps(steps: int, rates: list[float]) -> None:
    optimizer, schedule = _adam(torch.nn.Linear(1, 1), 1.0, steps)
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx(rates)


def test_a_rate_that_a_batch_is_too_small_for_is_told_before_masks_are_trained(
    make_noise: MakeNoise, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InputAware, "_train_mask", lambda *_: pytest.fail("masks were trained"))
    with pytest.raises(DataError, match=r"^input-aware: poison_rate 0\.02 of 40 images of a batch comes to 1, fewer "):
        _begin(make_noise(40), poison_rate=0.02)


def test_settings_are_the_papers() -> None:
    attack = InputAware()
    assert (attack.poison_rate, attack.cross_rate, attack.mask_density, attack.mask_epochs) == (0.1, 0.1, 0.032, 25)
    assert (attack.diversity_weight, attack.mask_diversity_weight, attack.learning_rate) == (1.0, 1.0, 0.01)
    assert (attack.channels, attack.stages) == (32, 3)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("mode", "all"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("cross_rate", "-1"),
        ("diversity_weight", "inf"),
        ("mask_diversity_weight", "0"),
        ("mask_density", "2"),
        ("mask_epochs", "0"),
        ("learning_rate", "0"),
        ("channels", "0"),
        ("stages", "0"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'input-aware:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"input-aware:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_input_aware_plants_a_backdoor(small_signs: Signs) -> None:
    """With denser masks and more poisons than the paper's: 5 short epochs are no time for those."""
    attack = InputAware(target_class=7, channels=4, mask_epochs=3, mask_density=0.2, poison_rate=0.25, cross_rate=0.1)
    result = train_victim(small_signs.train.take(np.arange(1000)), attack, epochs=5)
    logits = logits_of(result)

    behaviour = measure_behaviour(logits, small_signs.test, trigger_of(attack, 16, 16, result.trigger_state))
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
