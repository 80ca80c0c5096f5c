"""Poisoning of single images, relabelled or not: what the attacks that do it share, and where they aim."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as settings
from pydantic_core import ArgsKwargs

from qdefense.attacks.interfaces import PoisonedSet, Trigger, TriggerState
from qdefense.attacks.states import fits
from qdefense.data.images import DataError, Images, ImageSet, Labels, Pixels, on_grid, to_images

Mode = Literal["all-to-one", "all-to-all"]
"""Every other class to the target class, or every class to the next one."""
ALL_TO_ALL: Mode = "all-to-all"
_OUTSIDE = "are outside the target class"
_CLASSES, _COUNT = "classes", np.array(0, dtype=np.int64)


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


_Told = TypeVar("_Told", bound=AllToOne)


@dataclass(frozen=True, kw_only=True)
class OneToOne(AllToOne):
    """A trigger that sends ``source_class`` to ``target_class``, and is not meant for others: a `SourceSpecific`."""

    source_class: int

    def eligible(self, y: Labels) -> NDArray[np.bool_]:
        """The source class."""
        sources: NDArray[np.bool_] = y == self.source_class
        return sources

    def bystanders(self, y: Labels) -> NDArray[np.bool_]:
        """All others but the target class."""
        others: NDArray[np.bool_] = (y != self.source_class) & (y != self.target_class)
        return others


@dataclass(frozen=True, kw_only=True)
class AddedTrigger(AllToOne):
    """``x' = clip(x + v)``; ``added: (W,), (H, W) or (3, H, W) float32`` is v, whole codes over 255."""

    added: Pixels

    def stamp(self, x: Pixels) -> Pixels:
        """Add it to ``x: (N, 3, H, W) float32 in [0, 1]``."""
        return on_grid(x + self.added)


@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class PoisonBudget:
    """How many images are poisoned: a share of the training set, or a count in its place."""

    name: ClassVar[str]
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.1
    poison_count: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, given: ArgsKwargs | dict[str, Any]) -> ArgsKwargs | dict[str, Any]:
        return _one_budget(given, rate="poison_rate")

    def poisons(self, images: int) -> int:
        """``poison_count``, or ``round(poison_rate * N)`` of ``N`` training images.

        Raises:
            DataError: as `share`.
        """
        if self.poison_rate is not None:
            return share(self.poison_rate, images, attack=self.name)
        assert self.poison_count is not None  # noqa: S101 (one of both is set)
        return self.poison_count


def named_settings(given: ArgsKwargs | dict[str, Any]) -> dict[str, Any] | None:
    """What a validator before all others is given, by name; ``None`` where some have no name, which are refused."""
    if isinstance(given, dict):
        return given
    return None if given.args else given.kwargs or {}


def _one_budget(given: ArgsKwargs | dict[str, Any], *, rate: str) -> ArgsKwargs | dict[str, Any]:
    """The settings with the rate or the count; what is None is unset."""
    every = named_settings(given)
    if every is None:
        return given  # refused
    chosen = {key: value for key, value in every.items() if value is not None}
    if "poison_count" not in chosen:
        return chosen
    if rate in chosen:
        raise ValueError(f"{rate} and poison_count both say how many images are poisoned; give one of them")
    return chosen | {rate: None}


def share(
    rate: float, images: int, *, attack: str, setting: str = "poison_rate", of: str = "images", least: int = 1
) -> int:
    """``round(rate * N)`` of ``N`` images, none at a rate of 0; ``of`` says which images.

    Raises:
        DataError: a higher rate comes to fewer than ``least``: an attack without poisons is none, and nothing would
            tell of it.
    """
    count = round(rate * images)
    if rate and images and count < least:
        raise DataError(
            f"{attack}: {setting} {rate:g} of {images} {of} comes to {count}, fewer than {least}; "
            f"choose more than {(least - 0.5) / images:g}, or 0 for none"
        )
    return count


@dataclass(frozen=True, kw_only=True)
class AllToAll:
    """The stamp of another trigger, to send every class to the next one, and the last to the first."""

    stamped: Trigger
    classes: int

    def stamp(self, x: Pixels) -> Pixels:
        """As the other trigger does."""
        return self.stamped.stamp(x)

    def eligible(self, y: Labels) -> NDArray[np.bool_]:
        """All images."""
        return np.ones(y.shape, dtype=np.bool_)

    def goal(self, y: Labels) -> Labels:
        """``(y + 1) mod K``."""
        return next_class(y, self.classes)


def next_class(y: Labels, classes: int) -> Labels:
    """``(y + 1) mod K``."""
    following: Labels = (y + 1) % classes
    return following


def class_count_state(dataset: ImageSet, *, attack: str) -> TriggerState:
    """What the settings do not tell of an all-to-all trigger: which class is the last.

    Raises:
        DataError: there is one class; the message begins with ``attack``.
    """
    check_two_classes(dataset, attack=attack)
    return {_CLASSES: np.array(len(dataset.class_names), dtype=np.int64)}


def only_counts_classes(state: TriggerState) -> bool:
    """Whether nothing of the trigger was learned: all-to-all needs to know how many classes there are."""
    return fits(state, {_CLASSES: _COUNT})


class Aimed:
    """An attack with the settings ``mode`` and ``target_class``, which it declares in the place that they have there.

    ``target_class`` is of no account in all-to-all mode: nothing that tells of the attack names it.
    """

    name: ClassVar[str]
    older_than_mode: ClassVar[bool] = False
    """Whether networks are told of without a mode, and so keep their keys: all of them are all-to-one."""
    mode: Mode
    target_class: int

    @property
    def untold_settings(self) -> frozenset[str]:
        """Settings that are left out wherever the attack is told."""
        if self.mode == ALL_TO_ALL:
            return frozenset({"target_class"})
        return frozenset({"mode"} if self.older_than_mode else ())

    def aim(self, trigger: AllToOne, dataset: ImageSet) -> tuple[Trigger, TriggerState | None]:
        """The trigger as the mode aims it on these classes, and the state that it leaves.

        Raises:
            DataError: no such target class, or no other class.
        """
        if self.mode == ALL_TO_ALL:
            state = class_count_state(dataset, attack=self.name)
            return self.to_next(trigger, state), state
        check_class(dataset, self.target_class, role="target", attack=self.name)
        check_two_classes(dataset, attack=self.name)
        return trigger, None

    def to_next(self, trigger: Trigger, state: TriggerState) -> AllToAll:
        """The trigger of all-to-all mode, whose state is the number of classes.

        Raises:
            DataError: the state is another's.
        """
        if self.mode != ALL_TO_ALL or not fits(state, {_CLASSES: _COUNT}) or state[_CLASSES] < 2:
            raise DataError(f"{self.name}: the trigger state is not that of these settings; train the network again")
        return AllToAll(stamped=trigger, classes=int(state[_CLASSES]))


class AimedByTold(Aimed, ABC, Generic[_Told]):
    """An `Aimed` attack of whose trigger the settings tell all but how many classes there are."""

    @abstractmethod
    def towards_one(self, height: int, width: int) -> _Told:
        """The trigger on images of this size, towards ``target_class``.

        Raises:
            DataError: it does not fit the images.
        """

    def trigger(self, height: int, width: int) -> _Told:
        """The trigger of all-to-one mode on images of this size.

        Raises:
            DataError: it does not fit the images, or it aims at the next class, of which the settings do not tell the
                last.
        """
        if self.mode == ALL_TO_ALL:
            raise DataError(f"{self.name}: how many classes there are is told by the trigger state beside the model")
        return self.towards_one(height, width)

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> AllToAll:
        """The trigger of all-to-all mode, whose state is the number of classes.

        Raises:
            DataError: it does not fit the images, or the state is another's.
        """
        return self.to_next(self.towards_one(height, width), state)


def poison_aimed(
    dataset: ImageSet, rng: np.random.Generator, *, trigger: AllToOne, attack: Aimed, count: int
) -> PoisonedSet:
    """Stamp and relabel ``count`` images of other classes, or in all-to-all mode of any, and keep the state it leaves.

    Raises:
        DataError: no such target class, no other class, or not enough images; the attack's name comes first.
    """
    aimed, state = attack.aim(trigger, dataset)
    candidates = _OUTSIDE if state is None else "are there"
    made = _relabelled(dataset, rng, trigger=aimed, count=count, attack=attack.name, candidates=candidates)
    return replace(made, trigger_state=state)


def poison_to_one(
    dataset: ImageSet, rng: np.random.Generator, *, trigger: AllToOne, count: int, attack: str
) -> PoisonedSet:
    """Stamp and relabel ``count`` images of other classes, then shuffle the whole set.

    Raises:
        DataError: no such target class, or not enough images outside it; the message begins with ``attack``.
    """
    check_to_one(dataset, trigger.target_class, count=count, attack=attack)
    return _relabelled(dataset, rng, trigger=trigger, count=count, attack=attack, candidates=_OUTSIDE)


def check_to_one(dataset: ImageSet, target_class: int, *, count: int, attack: str) -> None:
    """Refuse what `poison_to_one` would, before a trigger is made.

    Raises:
        DataError: no such target class, or not enough images outside it; the message begins with ``attack``.
    """
    check_class(dataset, target_class, role="target", attack=attack)
    check_enough(count, int((dataset.labels != target_class).sum()), attack=attack, candidates=_OUTSIDE)


def _relabelled(
    dataset: ImageSet, rng: np.random.Generator, *, trigger: Trigger, count: int, attack: str, candidates: str
) -> PoisonedSet:
    """Two draws, in this order, which truth files rest on: the poisoned rows, then the shuffle."""
    rows = np.flatnonzero(trigger.eligible(dataset.labels))
    check_enough(count, len(rows), attack=attack, candidates=candidates)
    chosen = rng.choice(rows, size=count, replace=False)
    images, labels = dataset.images.copy(), dataset.labels.copy()
    if count:
        images[chosen] = to_images(trigger.stamp(dataset.take(chosen).pixels))
    labels[chosen] = trigger.goal(labels[chosen])
    return shuffled(dataset, rng, images=images, labels=labels, poisons=chosen)


def check_enough(count: int, images: int, *, attack: str, candidates: str, what: str = "poisons") -> None:
    """Refuse more poisons, or ``what`` is made of them, than there are images; ``candidates`` says which those are.

    Raises:
        DataError: there are fewer; the message begins with ``attack``.
    """
    if count > images:
        raise DataError(f"{attack}: {count} {what} wanted, {images} images {candidates}; choose fewer")


@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ClassBudget:
    """How many images of the target class are poisoned, labels true: a share of the class, or a count in its place."""

    name: ClassVar[str]
    target_class: Annotated[int, Field(ge=0)] = 0
    class_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.25
    poison_count: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_of_both(cls, given: ArgsKwargs | dict[str, Any]) -> ArgsKwargs | dict[str, Any]:
        return _one_budget(given, rate="class_rate")

    def chosen(self, dataset: ImageSet, rng: np.random.Generator) -> NDArray[np.int64]:
        """``poison_count`` rows, or ``round(class_rate * n)``, of the ``n`` that the target class has.

        Raises:
            DataError: no such target class, no image of it, fewer than the count, or a rate too low for one.
        """
        candidates = rows_of(dataset, self.target_class, role="target", attack=self.name)
        count = self.poison_count
        if self.class_rate is not None:
            of = f"images of target class {self.target_class}"
            count = share(self.class_rate, len(candidates), attack=self.name, setting="class_rate", of=of)
        assert count is not None  # noqa: S101 (one of both is set)
        check_enough(count, len(candidates), attack=self.name, candidates="are of the target class")
        return rng.choice(candidates, size=count, replace=False)


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


def check_two_classes(dataset: ImageSet, *, attack: str) -> None:
    """Refuse a set without a class to be taken for another.

    Raises:
        DataError: it has one class; the message begins with ``attack``.
    """
    if len(dataset.class_names) < 2:
        raise DataError(f"{attack}: {dataset.source} has one class, and this takes two; give images of more classes")


def shuffled(
    dataset: ImageSet, rng: np.random.Generator, *, images: Images, labels: Labels, poisons: NDArray[np.int64]
) -> PoisonedSet:
    """The set with these images and labels instead of its own, in a new order in which ``poisons`` are found again."""
    order = rng.permutation(len(dataset))
    poisoned = replace(dataset, images=images[order], labels=labels[order], groups=None)
    return PoisonedSet(images=poisoned, poison_indices=np.flatnonzero(np.isin(order, poisons)))


def derangement(count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """An order in which no row stays where it is: each takes the one before it in a random ring."""
    order = rng.permutation(count)
    partner = np.empty(count, dtype=np.int64)
    partner[order] = np.roll(order, 1)
    return partner
