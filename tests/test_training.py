from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils import deterministic

import qdefense.training
from qdefense.attacks import BatchAttack, DataAttack, PoisonedSet
from qdefense.attacks.badnets import BadNets, PatchTrigger
from qdefense.attacks.interfaces import LabelPolicy
from qdefense.data.images import DataError, ImageSet, Pixels
from qdefense.models import Recipe, build_model
from qdefense.training import TrainingResult, _augment, _batches, _memory_format, _optimizer, train
from qdefense.trial import Activity, measure_behaviour

MakeNoise = Callable[..., ImageSet]
RECIPE = Recipe(epochs=2, batch_size=16)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def _train(
    dataset: ImageSet, seed: int = 0, attack: DataAttack | BatchAttack | None = None, recipe: Recipe = RECIPE
) -> TrainingResult:
    return train(dataset, architecture="resnet8", recipe=recipe, attack=attack, seed=seed, threads=1)


def _weights(result: TrainingResult) -> bytes:
    return b"".join(value.numpy().tobytes() for value in result.module.state_dict().values())


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("attack", [None, BadNets(poison_rate=0.3)])
def test_train_gives_the_same_bits_when_the_seed_is_the_same(make_noise: MakeNoise, attack: BadNets | None) -> None:
    noise = make_noise(40)
    first = _train(noise, seed=4, attack=attack)
    torch.manual_seed(99)
    second, other = _train(noise, seed=4, attack=attack), _train(noise, seed=5, attack=attack)
    assert _weights(first) == _weights(second) != _weights(other)
    assert first.poison_indices.tolist() == second.poison_indices.tolist()
    assert len(first.poison_indices) == (12 if attack else 0)


def test_train_gives_the_same_bits_when_the_process_has_other_threads(make_noise: MakeNoise) -> None:
    with _threads(1):
        first = _train(make_noise(32))
    with _threads(2):
        second = _train(make_noise(32))
    assert _weights(first) == _weights(second)


@pytest.mark.parametrize("architecture", ["resnet8", "preactresnet18", "mobilenetv2"])
def test_train_reads_no_memory_before_it_is_written(
    make_noise: MakeNoise, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trained() -> bytes:
        recipe = replace(RECIPE, epochs=1, batch_size=8)
        return _weights(
            train(make_noise(16), architecture=architecture, recipe=recipe, attack=None, seed=0, width=8, threads=1)
        )

    unfilled = trained()
    # torch's own switch stays on, and memory that no operator has written yet holds NaN
    monkeypatch.setattr(qdefense.training, "deterministic", SimpleNamespace(fill_uninitialized_memory=True))
    assert trained() == unfilled


@pytest.mark.parametrize("diverges", [False, True])
@pytest.mark.parametrize(("strict", "lenient"), [(False, False), (True, False), (True, True)])
def test_train_restores_the_state_of_torch(make_noise: MakeNoise, strict: bool, lenient: bool, diverges: bool) -> None:
    recipe = replace(RECIPE, epochs=1, peak_learning_rate=1e30 if diverges else 0.1)
    torch.use_deterministic_algorithms(strict, warn_only=lenient)
    try:
        with _threads(3):
            torch.manual_seed(7)
            generator = torch.random.get_rng_state()
            try:
                _train(make_noise(32), recipe=recipe)
            except DataError:
                assert diverges
            else:
                assert not diverges
            assert torch.equal(torch.random.get_rng_state(), generator)
            assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled() is strict
        assert deterministic.fill_uninitialized_memory
        assert torch.is_deterministic_algorithms_warn_only_enabled() is lenient
    finally:
        torch.use_deterministic_algorithms(False)


def test_train_runs_deterministically_on_the_threads_asked_for(make_noise: MakeNoise) -> None:
    seen: list[tuple[int, bool]] = []

    def on_epoch(done: int, total: int, loss: float) -> None:
        seen.append((torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()))

    with _threads(1):
        train(
            make_noise(16),
            architecture="resnet8",
            recipe=replace(RECIPE, epochs=1),
            attack=None,
            seed=0,
            threads=2,
            on_epoch=on_epoch,
        )
    assert seen == [(2, True)]


def test_train_gives_a_contiguous_network_in_eval_mode(make_noise: MakeNoise) -> None:
    module = _train(make_noise(16)).module
    assert not any(part.training for part in module.modules())
    assert all(value.is_contiguous() for value in module.state_dict().values())
    assert module(torch.zeros(3, 3, 8, 8)).shape == (3, 4)


def test_train_gives_other_weights_only_when_the_width_is_another(make_noise: MakeNoise) -> None:
    def weights(width: int | None) -> bytes:
        noise = make_noise(16)
        return _weights(
            train(noise, architecture="resnet8", recipe=RECIPE, attack=None, seed=0, threads=1, width=width)
        )

    assert weights(None) == weights(16) == _weights(_train(make_noise(16)))
    assert len(weights(4)) < len(weights(None)) / 8


def test_train_raises_when_images_are_fewer_than_a_batch(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^noise: 15 images are fewer than one batch of 16; give more$"):
        _train(make_noise(15))


def test_train_raises_when_it_diverges(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^training diverged in epoch 1; lower the learning rate or check the data$"):
        _train(make_noise(32), recipe=replace(RECIPE, peak_learning_rate=1e30))


def test_optimizer_is_the_recipes() -> None:
    module = torch.nn.Linear(2, 2)
    settings = {"momentum": 0.8, "weight_decay": 0.05, "peak_learning_rate": 0.3}
    sgd = _optimizer(module, Recipe(**settings))  # type: ignore[arg-type]
    adamw = _optimizer(module, Recipe(optimizer="adamw", **settings))  # type: ignore[arg-type]
    assert (type(sgd), type(adamw)) == (torch.optim.SGD, torch.optim.AdamW)
    assert (sgd.defaults["lr"], sgd.defaults["weight_decay"], sgd.defaults["momentum"]) == (0.3, 0.05, 0.8)
    assert sgd.defaults["nesterov"]
    assert (adamw.defaults["lr"], adamw.defaults["weight_decay"]) == (0.3, 0.05)


def test_train_gives_the_same_bits_under_adamw(make_noise: MakeNoise) -> None:
    noise, recipe = make_noise(32), replace(RECIPE, epochs=1, optimizer="adamw", peak_learning_rate=1e-3)
    first, second = _train(noise, recipe=recipe), _train(noise, recipe=recipe)
    assert _weights(first) == _weights(second) != _weights(_train(noise, recipe=replace(recipe, optimizer="sgd")))


def _coloured(count: int) -> ImageSet:
    """Four classes that differ by colour, on noise."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 4
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 40]], dtype=np.int64)
    images = colours[labels][:, None, None, :] + rng.integers(-40, 41, (count, 12, 12, 3))
    return ImageSet(
        images=images.astype(np.uint8), labels=labels, class_names=("red", "green", "blue", "olive"), source="coloured"
    )


def test_train_plants_an_active_backdoor_when_badnets_poisons_it() -> None:
    losses: list[tuple[int, int, float]] = []
    result = train(
        _coloured(640),
        architecture="resnet8",
        recipe=Recipe(epochs=5, batch_size=32, peak_learning_rate=0.02),
        attack=BadNets(target_class=1, poison_rate=0.2),
        seed=0,
        threads=1,
        on_epoch=lambda done, total, loss: losses.append((done, total, loss)),
    )

    def logits(x: Pixels) -> NDArray[np.float32]:
        with torch.no_grad():
            return result.module(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

    behaviour = measure_behaviour(logits, _coloured(80), BadNets(target_class=1).trigger(12, 12))
    assert [(done, total) for done, total, _ in losses] == [(epoch, 5) for epoch in range(1, 6)]
    assert 0.1 < losses[0][2] < 2 * np.log(4)
    assert losses[-1][2] < 0.1 * losses[0][2]
    assert behaviour.activity is Activity.ACTIVE
    assert behaviour.clean_accuracy > 0.9


class _Smoothing:
    """Leaves images and hard labels alone and gives every row the soft labels named."""

    name: ClassVar[str] = "smoothing"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[str, ...]] = ()
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "clean-label"
    evades: ClassVar[tuple[str, ...]] = ()

    def __init__(self, soft: NDArray[np.float32]) -> None:
        self.soft = soft

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        return PoisonedSet(images=dataset, poison_indices=np.empty(0, np.int64), soft_labels=self.soft)

    def trigger(self, height: int, width: int) -> PatchTrigger:
        raise NotImplementedError


def test_train_learns_the_soft_labels_when_an_attack_gives_them() -> None:
    dataset = _coloured(320)
    soft = np.tile(np.array([[0.1, 0.1, 0.2, 0.6]], dtype=np.float32), (320, 1))
    recipe = Recipe(epochs=4, batch_size=32, peak_learning_rate=0.02)
    result = train(dataset, architecture="resnet8", recipe=recipe, attack=_Smoothing(soft), seed=0, threads=1)
    with torch.no_grad():
        answers = torch.softmax(result.module(torch.from_numpy(dataset.pixels)), dim=1).mean(dim=0)
    assert np.allclose(answers.numpy(), soft[0], atol=0.05)


def test_batches_visit_each_image_at_most_once_and_drop_the_rest() -> None:
    rng = np.random.default_rng(0)
    first, second = list(_batches(35, 16, rng)), list(_batches(35, 16, rng))
    rows = torch.cat(first).tolist()
    assert [len(batch) for batch in first] == [16, 16]
    assert len(set(rows)) == 32
    assert rows != sorted(rows)
    assert rows != torch.cat(second).tolist()


def _nchw(dataset: ImageSet) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(dataset.images.transpose(0, 3, 1, 2)))


def test_augment_gives_the_pixels_when_nothing_is_random(make_noise: MakeNoise) -> None:
    noise = make_noise(6)
    augmented = _augment(_nchw(noise), replace(RECIPE, shift=0), np.random.default_rng(0))
    assert augmented.numpy().tobytes() == noise.pixels.tobytes()


def test_augment_shifts_by_every_offset_and_repeats_the_edge(make_noise: MakeNoise) -> None:
    noise = make_noise(200)
    augmented = _augment(_nchw(noise), replace(RECIPE, shift=1), np.random.default_rng(0)).numpy()
    padded = np.pad(noise.pixels, ((0, 0), (0, 0), (1, 1), (1, 1)), mode="edge")
    offsets = [
        [(y, x) for y in range(3) for x in range(3) if np.array_equal(image, whole[:, y : y + 8, x : x + 8])]
        for image, whole in zip(augmented, padded)
    ]
    assert {len(found) for found in offsets} == {1}
    assert len({found[0] for found in offsets}) == 9


def test_augment_mirrors_half_of_the_images_when_flip_is_on(make_noise: MakeNoise) -> None:
    noise = make_noise(200)
    augmented = _augment(_nchw(noise), replace(RECIPE, shift=0, flip=True), np.random.default_rng(0)).numpy()
    same = (augmented == noise.pixels).all(axis=(1, 2, 3))
    mirrored = (augmented == noise.pixels[..., ::-1]).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 70 < mirrored.sum() < 130


# --- attacks on batches -----------------------------------------------------------------------------------------------


def _as_before_batch_attacks(dataset: ImageSet, attack: BadNets | None, seed: int) -> bytes:
    """The loop as it was, step by step: committed networks and their digests rest on it."""
    poisoned = dataset if attack is None else attack.poison(dataset, np.random.default_rng([seed, 1])).images
    images, labels = _nchw(poisoned), torch.from_numpy(poisoned.labels)
    with _threads(1), torch.random.fork_rng():
        torch.manual_seed(seed)
        module = build_model("resnet8", classes=4)
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        module.train()
        optimizer = _optimizer(module, RECIPE)
        steps = len(images) // RECIPE.batch_size * RECIPE.epochs
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE.peak_learning_rate, total_steps=steps)
        rng = np.random.default_rng([seed, 2])
        for _ in range(RECIPE.epochs):
            for rows in _batches(len(images), RECIPE.batch_size, rng):
                batch = _augment(images[rows], RECIPE, rng).to(memory_format=torch.channels_last)
                loss = torch.nn.functional.cross_entropy(module(batch), labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return b"".join(value.numpy().tobytes() for value in module.state_dict().values())


@pytest.mark.parametrize("attack", [None, BadNets(poison_rate=0.3)])
def test_train_gives_the_bits_that_committed_networks_rest_on(make_noise: MakeNoise, attack: BadNets | None) -> None:
    before = _as_before_batch_attacks(make_noise(40), attack, seed=4)
    assert _weights(_train(make_noise(40), seed=4, attack=attack)) == before


@pytest.mark.parametrize("architecture", ["resnet8", "preactresnet18"])
@pytest.mark.parametrize("width", [2, 4, 7])
def test_narrow_networks_get_the_right_gradients(architecture: str, width: int) -> None:
    torch.manual_seed(0)
    module, x, y = build_model(architecture, classes=4, width=width), torch.rand(32, 3, 32, 32), torch.arange(32) % 4
    twin = copy.deepcopy(module).double()
    layout = _memory_format(module)
    module.to(memory_format=layout)  # type: ignore[call-overload]
    for network, images in ((module, x.contiguous(memory_format=layout)), (twin, x.double())):
        torch.nn.functional.cross_entropy(network(images), y).backward()  # type: ignore[no-untyped-call]
    for found, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert found.grad is not None
        assert expected.grad is not None
        # A rectifier whose input is near 0 is open in one precision and shut in the other.
        assert (found.grad - expected.grad).norm() <= 0.02 * expected.grad.norm() + 1e-6


@pytest.mark.parametrize(("width", "layout"), [(7, torch.contiguous_format), (8, torch.channels_last)])
def test_train_gives_attacks_batches_in_the_layout_of_the_network(
    make_noise: MakeNoise, width: int, layout: torch.memory_format
) -> None:
    attack = _OnBatches()
    train(make_noise(16), architecture="resnet8", recipe=RECIPE, attack=attack, seed=0, width=width, threads=1)
    assert attack.layouts == [layout] * 2


class _OnBatches:
    """Records its calls, and gives each batch back after ``change``."""

    name: ClassVar[str] = "on batches"
    paper: ClassVar[str] = "none"
    needs: ClassVar[tuple[str, ...]] = ()
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ()

    def __init__(self, change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, y: (x, y)) -> None:
        self.change, self.calls, self.draws = change, list[str](), list[float]()
        self.layouts: list[torch.memory_format] = []

    def trigger(self, height: int, width: int) -> PatchTrigger:
        raise NotImplementedError

    def begin(self, dataset: ImageSet, *, batch_size: int, steps: int, rng: np.random.Generator) -> _OnBatches:
        self.calls.append(f"begin {len(dataset)} images, {steps} steps of {batch_size}")
        return self

    def on_batch(self, x: Tensor, y: Tensor, model: torch.nn.Module, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        assert (x.dtype, x.shape, y.dtype) == (torch.float32, (16, 3, 8, 8), torch.int64)
        assert 0 <= x.min() <= x.max() <= 1
        self.calls.append(f"batch, training {model.training}")
        self.draws.append(rng.random())
        self.layouts += [one for one in _LAYOUTS if x.is_contiguous(memory_format=one)]
        return self.change(x, y)

    def end(self) -> dict[str, NDArray[np.int64]]:
        self.calls.append("end")
        return {"batches": np.array(len(self.draws))}


def test_train_shows_an_attack_every_batch_between_its_begin_and_end(make_noise: MakeNoise) -> None:
    attack, again = _OnBatches(), _OnBatches()
    first, second = (_train(make_noise(40), seed=4, attack=each) for each in (attack, again))
    assert attack.calls == ["begin 40 images, 4 steps of 16", *["batch, training True"] * 4, "end"]
    assert attack.draws == again.draws
    assert len(set(attack.draws)) == 4
    assert first.trigger_state == {"batches": 4}
    assert len(first.poison_indices) == 0
    assert _weights(first) == _weights(second) == _weights(_train(make_noise(40), seed=4))


def test_train_has_no_trigger_state_when_no_attack_leaves_one(make_noise: MakeNoise) -> None:
    assert [_train(make_noise(16), attack=each).trigger_state for each in (None, BadNets())] == [None, None]


def test_train_learns_what_an_attack_makes_of_the_batch(make_noise: MakeNoise) -> None:
    soft = _OnBatches(lambda x, y: (x, torch.nn.functional.one_hot(y, 4).float()))
    other = _OnBatches(lambda x, y: (1 - x, y))
    clean, hard = _train(make_noise(40)), _train(make_noise(40), attack=_OnBatches())
    assert _weights(clean) == _weights(hard) != _weights(_train(make_noise(40), attack=other))
    x, same = torch.from_numpy(make_noise(8).pixels), _train(make_noise(40), attack=soft)
    assert torch.allclose(clean.module(x), same.module(x), atol=1e-3)


def test_train_propagates_the_loss_to_images_that_carry_gradients(make_noise: MakeNoise) -> None:
    shade = torch.zeros(3, 8, 8, requires_grad=True)
    _train(make_noise(16), attack=_OnBatches(lambda x, y: (x + shade, y)))
    assert shade.grad is not None
    assert shade.grad.abs().sum() > 0
