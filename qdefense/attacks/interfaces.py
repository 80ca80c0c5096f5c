"""The protocols of an attack: what is stamped at inference, and how the backdoor gets in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import DataError, ImageSet, Labels, Pixels

if TYPE_CHECKING:
    from torch import Tensor, nn

LabelPolicy = Literal["dirty-label", "clean-label"]
TriggerState = Mapping[str, NDArray[Any]]
"""What of a trigger the attack's settings do not tell: numbers by name, such as the weights of a generator."""


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

    FPR: of all bystanders x, the share that the trigger misleads, ``argmax f(stamp(x))`` a target and ``argmax f(x)``
    none (Wang et al. 2023, arXiv 2206.00145).
    """

    def bystanders(self, y: Labels) -> NDArray[np.bool_]:
        """Which true labels ``y: (N,)`` are neither a source nor a target."""
        ...


@dataclass(frozen=True, kw_only=True)
class PoisonedSet:
    """A training set after the attack, shuffled; ``poison_indices`` point at the poisoned rows in the new order.

    ``soft_labels: (N, K) float32`` replaces the hard labels in the loss where an attack smooths them.
    ``trigger_state`` is there where the trigger is more than the settings tell.
    """

    images: ImageSet
    poison_indices: NDArray[np.int64]
    soft_labels: NDArray[np.float32] | None = None
    trigger_state: TriggerState | None = None


@runtime_checkable
class Attack(Protocol):
    """What every attack says of itself.

    ``needs`` names what the attacker must have, ``evades`` the defenses and inspections that its paper, or a published
    benchmark that the class's docstring names, reports as evaded: claims to be measured, not results of ours.
    ``revision`` is 1 at first, and raised by one in each change after which the same settings, images and seed may give
    other poisons, another trigger or another training, be the change in the attack's own code or in what it computes
    with; `qdefense bench` trains the networks of an older one anew.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]]
    revision: ClassVar[int]
    label_policy: ClassVar[LabelPolicy]
    evades: ClassVar[tuple[str, ...]]

    def trigger(self, height: int, width: int) -> Trigger:
        """The trigger on images of this size.

        Raises:
            DataError: the settings alone do not tell it: it takes a state, see `LearnsTrigger`.
        """
        ...


@runtime_checkable
class DataAttack(Attack, Protocol):
    """An attack that needs nothing but the training data."""

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Poison and shuffle a training set."""
        ...


class BatchPoisoner(Protocol):
    """A `BatchAttack` at work in one training; what it learns along the way is its own."""

    def on_batch(self, x: Tensor, y: Tensor, model: nn.Module, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """What to learn from instead of an augmented batch, which is left as it is.

        ``x: (B, 3, H, W) float32 in [0, 1]``, ``y: (B,) int64``. Targets come back as ``(B,) int64`` or, soft, as
        ``(B, K) float32``. Images may carry gradients to weights of the attack's own: the loss is propagated to them
        before the next call, or `end`, whose part it is to make a step of them. ``model`` is in training mode, and
        is left so.
        """
        ...

    def end(self) -> TriggerState | None:
        """Called once, after the last batch: the state of the trigger; ``None`` where the settings tell it."""
        ...


@runtime_checkable
class BatchAttack(Attack, Protocol):
    """An attack that has a hand in the training loop; the training set stays as it is."""

    def begin(self, dataset: ImageSet, *, batch_size: int, steps: int, rng: np.random.Generator) -> BatchPoisoner:
        """Start a training of ``steps`` batches of ``batch_size``, all from ``dataset``.

        Raises:
            DataError: the settings do not fit the data.
        """
        ...


@runtime_checkable
class LearnsTrigger(Protocol):
    """An attack whose trigger is not, or not always, told by its settings."""

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> Trigger:
        """The trigger that left this state.

        Raises:
            DataError: the state is of other settings, or of no such attack.
        """
        ...


@runtime_checkable
class TellsOfImages(Protocol):
    """An attack that says whether its trigger shows training images; one that says nothing has none that does.

    Patches, patterns, warps and the weights of a generator or an encoder show none.
    """

    @property
    def trigger_shows_images(self) -> bool:
        """Whether one can be recognised in what is stamped, and so in the trigger's state: neither is for others."""
        ...


def trigger_shows_images(attack: Attack) -> bool:
    """Whether pixels of training images are the trigger, or a training image can be recognised in it."""
    return isinstance(attack, TellsOfImages) and attack.trigger_shows_images


@runtime_checkable
class NamesSource(Protocol):
    """An attack that says whether its trigger is a `SourceSpecific` one, before there is one; others' is none."""

    source_specific: ClassVar[bool]


def is_source_specific(attack: object) -> bool:
    """Whether the trigger of an attack, or of one in its settings, has bystanders."""
    return any(isinstance(one, NamesSource) and one.source_specific for one in with_inner(attack))


@runtime_checkable
class ReadsData(Protocol):
    """An attack that reads more than the training set."""

    def data_read(self) -> tuple[str, ...]:
        """The paths of it, if these settings name any."""
        ...


def data_read_by(attack: object) -> tuple[str, ...]:
    """The paths that an attack reads besides the training set, and those of every attack in its settings."""
    readers = (one for one in with_inner(attack) if isinstance(one, ReadsData))
    return tuple(path for one in readers for path in one.data_read())


def revisions_of(attack: Attack) -> dict[str, int]:
    """Those of an attack and of every attack in its settings, by name, where they are above 1."""
    attacks = (one for one in with_inner(attack) if isinstance(one, Attack))
    return {one.name: one.revision for one in attacks if one.revision > 1}


def with_inner(attack: object) -> Iterator[object]:
    """An attack, then whatever is in its settings, such as the host of another."""
    yield attack
    inner = (getattr(attack, field.name) for field in fields(attack)) if is_dataclass(attack) else ()
    yield from (found for value in inner for found in with_inner(value))


def trigger_of(attack: Attack, height: int, width: int, state: TriggerState | None) -> Trigger:
    """The trigger on images of this size, from the state that the attack left behind where it left one.

    Raises:
        DataError: a state is missing, or there is one and the attack knows none.
    """
    if state is None:
        return attack.trigger(height, width)
    if not isinstance(attack, LearnsTrigger):
        raise DataError(f"{attack.name}: the truth names a trigger state, and this attack has none; train it again")
    return attack.restored_trigger(height, width, state)
