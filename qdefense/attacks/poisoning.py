"""Dirty-label poisoning towards one class: what the attacks that stamp and relabel single images share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qdefense.attacks.interfaces import PoisonedSet
from qdefense.data.images import DataError, ImageSet, Labels, Pixels, to_images


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


@dataclass(frozen=True, kw_only=True)
class AllToAll(ABC):
    """A trigger that sends every class to the next one, and the last to the first."""

    classes: int

    @abstractmethod
    def stamp(self, x: Pixels) -> Pixels:
        """Put the trigger on ``x: (N, 3, H, W) float32 in [0, 1]``; the result can be held by a uint8 image."""

    def eligible(self, y: Labels) -> NDArray[np.bool_]:
        """All images."""
        return np.ones(y.shape, dtype=np.bool_)

    def goal(self, y: Labels) -> Labels:
        """``(y + 1) mod K``."""
        following: Labels = (y + 1) % self.classes
        return following


def require_target(dataset: ImageSet, target_class: int, attack: str) -> None:
    """Refuse a target class that the set lacks.

    Raises:
        DataError: there is no such class; the message begins with ``attack``.
    """
    if target_class >= len(dataset.class_names):
        raise DataError(
            f"{attack}: target class {target_class}, but {dataset.source} has classes 0 to "
            f"{len(dataset.class_names) - 1}"
        )


def poison_to_one(
    dataset: ImageSet, rng: np.random.Generator, *, trigger: AllToOne, rate: float, attack: str
) -> PoisonedSet:
    """Stamp and relabel ``round(rate * N)`` images of other classes, then shuffle the whole set.

    Two draws, in this order, which truth files rest on: the poisoned rows, then the shuffle.

    Raises:
        DataError: no such target class, or not enough images outside it; the message begins with ``attack``.
    """
    require_target(dataset, trigger.target_class, attack)
    candidates = np.flatnonzero(trigger.eligible(dataset.labels))
    count = round(rate * len(dataset))
    if count > len(candidates):
        raise DataError(f"{attack}: {count} poisons wanted, {len(candidates)} images are outside the target class")
    chosen = rng.choice(candidates, size=count, replace=False)
    images, labels = dataset.images.copy(), dataset.labels.copy()
    if count:
        images[chosen] = to_images(trigger.stamp(dataset.take(chosen).pixels))
    labels[chosen] = trigger.target_class
    order = rng.permutation(len(dataset))
    poisoned = replace(dataset, images=images[order], labels=labels[order], groups=None)
    return PoisonedSet(images=poisoned, poison_indices=np.flatnonzero(np.isin(order, chosen)))
