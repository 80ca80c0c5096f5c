"""Poisoning towards one class: what the attacks that change single images share, relabelled or not."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdefense.attacks.interfaces import PoisonedSet
from qdefense.data.images import DataError, Images, ImageSet, Labels, Pixels, to_images


@dataclass(frozen=True, kw_only=True)
class AllToOne(ABC):
    """A trigger that sends every other class to ``target_class``."""

    target_class: int

    @abstractmethod
    def stamp(self, x: Pixels) -> Pixels:
        """Put the trigger on ``x: (N, 3, H, W) float32 in [0, 1]``; the result can be held by a uint8 image."""

    def eligible(self, y: Labels) -> NDArray[np.bool_]:
        """All images but those of the target class."""
        others: NDArray[np.bool_] = y != self.target_class
        return others

    def goal(self, y: Labels) -> Labels:
        """All to one."""
        return np.full_like(y, self.target_class)


def poison_to_one(
    dataset: ImageSet, rng: np.random.Generator, *, trigger: AllToOne, rate: float, attack: str
) -> PoisonedSet:
    """Stamp and relabel ``round(rate * N)`` images of other classes, then shuffle the whole set.

    Two draws, in this order, which truth files rest on: the poisoned rows, then the shuffle.

    Raises:
        DataError: no such target class, or not enough images outside it; the message begins with ``attack``.
    """
    check_class(dataset, trigger.target_class, role="target", attack=attack)
    candidates = np.flatnonzero(trigger.eligible(dataset.labels))
    count = round(rate * len(dataset))
    if count > len(candidates):
        raise DataError(f"{attack}: {count} poisons wanted, {len(candidates)} images are outside the target class")
    chosen = rng.choice(candidates, size=count, replace=False)
    images, labels = dataset.images.copy(), dataset.labels.copy()
    if count:
        images[chosen] = to_images(trigger.stamp(dataset.take(chosen).pixels))
    labels[chosen] = trigger.target_class
    return shuffled(dataset, rng, images=images, labels=labels, poisons=chosen)


def choose_in_class(
    dataset: ImageSet, rng: np.random.Generator, *, target_class: int, rate: float, attack: str
) -> NDArray[np.int64]:
    """``round(rate * n)`` rows of the ``n`` that the target class has: what a clean-label attack may change.

    Raises:
        DataError: no such target class, or no image of it; the message begins with ``attack``.
    """
    candidates = rows_of(dataset, target_class, role="target", attack=attack)
    return rng.choice(candidates, size=round(rate * len(candidates)), replace=False)


def rows_of(dataset: ImageSet, label: int, *, role: str, attack: str) -> NDArray[np.int64]:
    """The rows of one class, whose ``role`` in the attack the message names.

    Raises:
        DataError: no such class, or no image of it.
    """
    check_class(dataset, label, role=role, attack=attack)
    rows = np.flatnonzero(dataset.labels == label)
    if not len(rows):
        raise DataError(f"{attack}: {dataset.source} has no image of {role} class {label}; choose another class")
    return rows


def check_class(dataset: ImageSet, label: int, *, role: str, attack: str) -> None:
    """Refuse a class that the set does not have.

    Raises:
        DataError: no such class.
    """
    if label >= len(dataset.class_names):
        raise DataError(
            f"{attack}: {role} class {label}, but {dataset.source} has classes 0 to {len(dataset.class_names) - 1}"
        )


def shuffled(
    dataset: ImageSet, rng: np.random.Generator, *, images: Images, labels: Labels, poisons: NDArray[np.int64]
) -> PoisonedSet:
    """The set with these images and labels instead of its own, in a new order in which ``poisons`` are found again."""
    order = rng.permutation(len(dataset))
    poisoned = replace(dataset, images=images[order], labels=labels[order], groups=None)
    return PoisonedSet(images=poisoned, poison_indices=np.flatnonzero(np.isin(order, poisons)))
