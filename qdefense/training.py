"""Trains a zoo model, clean or poisoned, by its recipe; same bits for same seed and threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils import deterministic

from qdefense.attacks.interfaces import BatchAttack, DataAttack, PoisonedSet, TriggerState
from qdefense.data.images import DataError, ImageSet
from qdefense.models import Recipe, build_model

Progress = Callable[[int, int, float], None]
OnPoisoned = Callable[[PoisonedSet], None]
OnBatch = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
_FILL = "fill_uninitialized_memory"
_CHANNELS_OF_A_BLOCK = 8
_POISON_STREAM, _BATCH_STREAM, _ATTACK_STREAM = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """A trained network in eval mode, which rows of its training set were poisoned, and a learned trigger's state.

    A `BatchAttack` poisons no row of the set. ``training_set_sha256`` is the `ImageSet.digest` of the set with them.
    """

    module: nn.Module
    poison_indices: NDArray[np.int64]
    training_set_sha256: str
    trigger_state: TriggerState | None = None


def train(
    dataset: ImageSet,
    *,
    architecture: str,
    recipe: Recipe,
    attack: DataAttack | BatchAttack | None,
    seed: int,
    width: int | None = None,
    threads: int = 2,
    on_epoch: Progress | None = None,
    on_poisoned: OnPoisoned | None = None,
) -> TrainingResult:
    """Train from scratch; ``on_epoch(done, total, mean_loss)`` is called after each epoch.

    ``on_poisoned`` is called once, before the first, with what `poisoned_set` gives.

    ``width`` is the number of channels in the first stage, the architecture's own where it is ``None``.

    Raises:
        DataError: the set has no labels, is smaller than one batch or does not fit the attack, or training diverged.
    """
    if not dataset.labelled:
        raise DataError(f"{dataset.source}: the images have no labels; put those of each class into a folder")
    if len(dataset) < recipe.batch_size:
        raise DataError(
            f"{dataset.source}: {len(dataset)} images are fewer than one batch of {recipe.batch_size}; give more"
        )
    poisoned = poisoned_set(dataset, attack, seed)
    if on_poisoned is not None:
        on_poisoned(poisoned)
    with _deterministic(seed, threads):
        module = build_model(architecture, classes=len(dataset.class_names), width=width)
        layout = _memory_format(module)
        module.to(memory_format=layout)  # type: ignore[call-overload]
        module.train()
        batch_rng, attack_rng = (np.random.default_rng([seed, stream]) for stream in (_BATCH_STREAM, _ATTACK_STREAM))
        poisoner, on_batch = None, None
        if isinstance(attack, BatchAttack):
            steps = len(dataset) // recipe.batch_size * recipe.epochs
            poisoner = attack.begin(dataset, batch_size=recipe.batch_size, steps=steps, rng=attack_rng)
            on_batch = partial(poisoner.on_batch, model=module, rng=attack_rng)
        _fit(module, poisoned, recipe, batch_rng, layout, on_batch, on_epoch)
        learned = poisoned.trigger_state if poisoner is None else poisoner.end()
    module.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return TrainingResult(
        module=module,
        poison_indices=poisoned.poison_indices,
        training_set_sha256=poisoned.images.digest,
        trigger_state=learned,
    )


def poisoned_set(dataset: ImageSet, attack: DataAttack | BatchAttack | None, seed: int) -> PoisonedSet:
    """The set that `train` draws its batches from with this seed.

    Poisoned and shuffled by a `DataAttack`; as it is without an attack, and under a `BatchAttack`.

    Raises:
        DataError: the attack does not fit the data.
    """
    if attack is None or isinstance(attack, BatchAttack):
        return PoisonedSet(images=dataset, poison_indices=np.empty(0, dtype=np.int64))
    return attack.poison(dataset, np.random.default_rng([seed, _POISON_STREAM]))


@contextmanager
def _deterministic(seed: int, threads: int) -> Iterator[None]:
    """Seed torch and fix the thread count, on which the order of its sums depends; restore both afterwards.

    Memory is not filled before an operator writes it, which took a sixth of the training: none of ours reads it first.
    """
    state, previous = torch.random.get_rng_state(), torch.get_num_threads()
    strict, lenient = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    # The module is its own class, whose property mypy does not see.
    filled: bool = getattr(deterministic, _FILL)
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    setattr(deterministic, _FILL, False)
    try:
        yield
    finally:
        setattr(deterministic, _FILL, filled)
        torch.use_deterministic_algorithms(strict, warn_only=lenient)
        torch.set_num_threads(previous)
        torch.random.set_rng_state(state)


def _memory_format(module: nn.Module) -> torch.memory_format:
    """Channels last, which is faster, where every gradient is right in it.

    oneDNN's AVX2 kernel writes the gradient of a strided 1x1 convolution on fewer channels than a block past the end of
    its buffer: heap corruption, a hang or a wrong gradient (its issue 6035).
    """
    narrow = any(
        part.kernel_size == (1, 1) and max(part.stride) > 1 and part.in_channels < _CHANNELS_OF_A_BLOCK
        for part in module.modules()
        if isinstance(part, nn.Conv2d)
    )
    return torch.contiguous_format if narrow else torch.channels_last


def _fit(
    module: nn.Module,
    data: PoisonedSet,
    recipe: Recipe,
    rng: np.random.Generator,
    layout: torch.memory_format,
    on_batch: OnBatch | None,
    on_epoch: Progress | None,
) -> None:
    images = torch.from_numpy(np.ascontiguousarray(data.images.images.transpose(0, 3, 1, 2)))
    targets = torch.from_numpy(data.images.labels if data.soft_labels is None else data.soft_labels)
    steps = len(images) // recipe.batch_size
    optimizer = _optimizer(module, recipe)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=recipe.peak_learning_rate, total_steps=steps * recipe.epochs
    )
    for epoch in range(recipe.epochs):
        total = 0.0
        for rows in _batches(len(images), recipe.batch_size, rng):
            batch, wanted = _augment(images[rows], recipe, rng).contiguous(memory_format=layout), targets[rows]
            if on_batch is not None:
                batch, wanted = on_batch(batch, wanted)
            loss = F.cross_entropy(module(batch.contiguous(memory_format=layout)), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        if not np.isfinite(total):
            raise DataError(f"training diverged in epoch {epoch + 1}; lower the learning rate or check the data")
        if on_epoch is not None:
            on_epoch(epoch + 1, recipe.epochs, total / steps)


def _optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    rate, decay = recipe.peak_learning_rate, recipe.weight_decay
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=decay)
    return torch.optim.SGD(module.parameters(), lr=rate, momentum=recipe.momentum, weight_decay=decay, nesterov=True)


def _batches(count: int, size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    order = torch.from_numpy(rng.permutation(count))
    yield from order[: count - count % size].split(size)  # type: ignore[no-untyped-call]


def _augment(images: Tensor, recipe: Recipe, rng: np.random.Generator) -> Tensor:
    """uint8 batch to float32 in [0, 1], shifted and mirrored at random; borders repeat the edge pixel."""
    count, _, height, width = images.shape
    rows = _shifted(height, recipe.shift, rng, count)
    columns = _shifted(width, recipe.shift, rng, count)
    if recipe.flip:
        mirrored = rng.random(count) < 0.5
        columns[mirrored] = columns[mirrored, ::-1]
    picked = images.permute(0, 2, 3, 1)[
        torch.arange(count)[:, None, None], torch.from_numpy(rows)[:, :, None], torch.from_numpy(columns)[:, None, :]
    ]
    return picked.permute(0, 3, 1, 2).float() / 255


def _shifted(length: int, shift: int, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
    offsets = rng.integers(-shift, shift + 1, size=(count, 1))
    positions: NDArray[np.int64] = np.clip(np.arange(length) + offsets, 0, length - 1)
    return positions
