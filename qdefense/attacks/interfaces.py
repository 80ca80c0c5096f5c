"""The protocols of an attack: what is stamped at inference, and how the backdoor gets in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import ImageSet, Labels, Pixels

LabelPolicy = Literal["dirty-label", "clean-label"]


class Trigger(Protocol):
    """What the attacker does at inference, in pixel space; `eligible` and `goal` define the ASR."""

    def stamp(self, x: Pixels) -> Pixels:
        """Put the trigger on ``x: (N, 3, H, W) float32 in [0, 1]``; the result can be held by a uint8 image."""
        ...

    def eligible(self, y: Labels) -> NDArray[np.bool_]:
        """Which true labels ``y: (N,)`` count in the ASR."""
        ...

    def goal(self, y: Labels) -> Labels:
        """The label that the attacker wants for each true label."""
        ...


@runtime_checkable
class SourceSpecific(Trigger, Protocol):
    """A trigger that shall work on some classes only; on `bystanders` it shall not, and the FPR says how often it does.

    FPR: of bystanders with the trigger, the share that answers with a target (Wang et al. 2023, arXiv 2206.00145).
    """

    def bystanders(self, y: Labels) -> NDArray[np.bool_]:
        """Which true labels ``y: (N,)`` are neither a source nor a target."""
        ...


@dataclass(frozen=True, kw_only=True)
class PoisonedSet:
    """A training set after the attack, shuffled; ``poison_indices`` point at the poisoned rows in the new order.

    ``soft_labels: (N, K) float32`` replaces the hard labels in the loss where an attack smooths them.
    """

    images: ImageSet
    poison_indices: NDArray[np.int64]
    soft_labels: NDArray[np.float32] | None = None


class DataAttack(Protocol):
    """An attack that needs nothing but the training data.

    ``needs`` names what the attacker must have, ``evades`` the defenses and inspections that its paper, or a published
    benchmark that the class's docstring names, reports as evaded: claims to be measured, not results of ours.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    label_policy: ClassVar[LabelPolicy]
    evades: ClassVar[tuple[str, ...]]

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Poison and shuffle a training set."""
        ...

    def trigger(self, height: int, width: int) -> Trigger:
        """The trigger on images of this size."""
        ...
