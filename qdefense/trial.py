"""Trial: what only the evaluator may hold, namely the truth about a file, and the metrics made from it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from qdefense.attacks.interfaces import SourceSpecific, Trigger, TriggerState
from qdefense.attacks.states import unpack_state
from qdefense.data.images import DataError, ImageSet, Pixels

Logits = Callable[[Pixels], NDArray[np.float32]]
ACTIVE_ASR = 0.9
DORMANT_MARGIN = 0.05
_LEAST_CEILING = 0.5
_ROUNDING = 1e-9  # 8/20 - 7/20 is a bit more than 0.05 in floating point


class Activity(StrEnum):
    """What the backdoor does on one exact file."""

    CLEAN = "clean"
    ACTIVE = "active"
    ATTENUATED = "attenuated"
    DORMANT = "dormant"


class Truth(BaseModel):
    """How a zoo model was made; written beside the model, never opened by an audit."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    attack: str | None
    attack_settings: dict[str, Any]
    poison_indices: tuple[int, ...]
    architecture: str
    width: int | None = Field(
        default=None, description="channels of the first stage; null in truths older than it, made at the default"
    )
    recipe: dict[str, Any]
    seed: int
    data: str
    data_sha256: str
    artifact_sha256: str
    versions: dict[str, str]
    trigger_sha256: str | None = Field(
        default=None, description="of the file beside this one with what the settings do not tell of the trigger"
    )
    training_set_sha256: str | None = Field(
        default=None, description="of the set that it learned from, poisons among it; null in truths older than it"
    )


def truth_path(model: Path) -> Path:
    """``model.onnx`` has its truth in ``model.truth.json``; ``model.seed0``, in ``model.seed0.truth.json``."""
    return _beside(model, ".truth.json")


def state_path(model: Path) -> Path:
    """``model.onnx`` has the state of its trigger, where that has one, in ``model.truth.npz``."""
    return _beside(model, ".truth.npz")


def _beside(model: Path, ending: str) -> Path:
    stem = model.stem if model.suffix.lower() == ".onnx" else model.name
    return model.with_name(f"{stem}{ending}")


def read_state_bytes(path: Path, truth: Truth) -> bytes | None:
    """The packed state that a truth names, read from ``path``; ``None`` where it names none.

    Raises:
        DataError: the file is not there, or is another.
    """
    if truth.trigger_sha256 is None:
        return None
    if not path.is_file():
        raise DataError(f"{path}: not there, and without it nobody knows the trigger; train the network again")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != truth.trigger_sha256:
        raise DataError(f"{path}: not the trigger state that the truth names; train the network again")
    return data


def read_state(model: Path, truth: Truth) -> TriggerState | None:
    """The state of the trigger of a model's truth; ``None`` where the settings tell the trigger.

    Raises:
        DataError: it is not there, or is another's.
    """
    data = read_state_bytes(state_path(model), truth)
    return None if data is None else unpack_state(data)


class Behaviour(BaseModel):
    """What one file does on one labelled set, with and without the trigger; rates in [0, 1]."""

    model_config = ConfigDict(frozen=True)

    clean_accuracy: float
    images: int
    asr: float | None = None
    base_confusion: float | None = None
    eligible: int = 0
    fpr: float | None = None
    bystanders: int = 0
    several_targets: bool = Field(default=False, exclude=True)

    @property
    def activity(self) -> Activity:
        """What the backdoor does, as far as the file alone tells it."""
        return activity_of(self.asr, self.base_confusion, self.clean_accuracy if self.several_targets else 1.0)


class Control(BaseModel):
    """What a trigger does to a network that never learned it: shares of ``eligible`` images and ``bystanders``."""

    model_config = ConfigDict(frozen=True)

    asr: float
    eligible: int
    fpr: float | None = None
    bystanders: int = 0


def activity_of(asr: float | None, base_confusion: float | None, ceiling: float = 1.0) -> Activity:
    """Dormant at most 0.05 above the confusion without a trigger, whatever the ASR; active at 0.9 of the ``ceiling``.

    The ceiling is the ASR of a perfect backdoor: the clean accuracy where an attacker wants another class of each class
    (all-to-all), since who takes an image for another class misses what is wanted of its own. Of a network that is
    wrong on half of the images or more no backdoor is called active by it.

    Raises:
        ValueError: an ASR without the confusion, which tells neither that it is a backdoor's nor that there is none.
    """
    if asr is None:
        return Activity.CLEAN
    if base_confusion is None:
        raise ValueError("the ASR was measured and the confusion was not; measure both on the same images")
    if asr - base_confusion <= DORMANT_MARGIN + _ROUNDING:
        return Activity.DORMANT
    reachable = ceiling if ceiling > _LEAST_CEILING else 1.0
    return Activity.ACTIVE if asr >= ACTIVE_ASR * reachable - _ROUNDING else Activity.ATTENUATED


def held_against(control: float | None, activity: Activity, asr: float | None) -> Activity:
    """The activity, and dormant whatever the ASR where that is at most 0.05 above its ``control``.

    What the same trigger does to the clean twin it does to this file without a backdoor.
    """
    if control is None or asr is None or asr - control > DORMANT_MARGIN + _ROUNDING:
        return activity
    return Activity.DORMANT


def measure_behaviour(logits: Logits, images: ImageSet, trigger: Trigger | None) -> Behaviour:
    """Clean accuracy, and ASR and base confusion on eligible images only, all by forward passes of ``logits``.

    ``ASR = share of eligible images x with argmax f(stamp(x)) = goal(y)``; the base confusion is the same share
    without the stamp: what the ASR would be if the trigger did nothing. Of a trigger with `bystanders`, the FPR is the
    share of them that answer with a target once they are stamped and do not before, as the paper has it: what a network
    confuses anyway is not the trigger's doing. None where the set has no bystander.

    Raises:
        DataError: there are no images, or none that is eligible: a rate of nothing is not zero.
        ValueError: a logit is NaN, which argmax would take for the winner.
    """
    if not len(images):
        raise DataError(f"{images.source}: no images to measure on; give labelled test images")
    clean = _classes(logits(images.pixels))
    accuracy = float(np.mean(clean == images.labels))
    if trigger is None:
        return Behaviour(clean_accuracy=accuracy, images=len(images))
    rows = _eligible(images, trigger)
    chosen = images.take(rows)
    goal = trigger.goal(chosen.labels)
    fpr, bystanders = _misled(logits, images, clean, trigger, goal)
    return Behaviour(
        clean_accuracy=accuracy,
        images=len(images),
        asr=_success(logits, chosen, trigger),
        base_confusion=float(np.mean(clean[rows] == goal)),
        eligible=len(rows),
        fpr=fpr,
        bystanders=bystanders,
        several_targets=len(np.unique(trigger.goal(np.arange(len(images.class_names))))) > 1,
    )


def measure_control(logits: Logits, images: ImageSet, trigger: Trigger) -> Control:
    """The ASR, and FPR where it has one, of a trigger on a file that never learned it: ``logits`` of the clean twin.

    Raises:
        DataError: there are no images, or none that is eligible.
        ValueError: a logit is NaN.
    """
    chosen = images.take(_eligible(images, trigger))
    asr = _success(logits, chosen, trigger)
    if not isinstance(trigger, SourceSpecific):
        return Control(asr=asr, eligible=len(chosen))
    clean, goal = _classes(logits(images.pixels)), trigger.goal(chosen.labels)
    fpr, bystanders = _misled(logits, images, clean, trigger, goal)
    return Control(asr=asr, eligible=len(chosen), fpr=fpr, bystanders=bystanders)


def _eligible(images: ImageSet, trigger: Trigger) -> NDArray[np.int64]:
    rows: NDArray[np.int64] = np.flatnonzero(trigger.eligible(images.labels))
    if not len(rows):
        raise DataError(f"{images.source}: no image is eligible for the trigger; give images of other classes")
    return rows


def _success(logits: Logits, eligible: ImageSet, trigger: Trigger) -> float:
    stamped = _classes(logits(trigger.stamp(eligible.pixels)))
    return float(np.mean(stamped == trigger.goal(eligible.labels)))


def _misled(
    logits: Logits, images: ImageSet, clean: NDArray[np.int64], trigger: Trigger, targets: NDArray[np.int64]
) -> tuple[float | None, int]:
    """The share of bystanders that answer with a target once they are stamped, and not before; how many there are."""
    if not isinstance(trigger, SourceSpecific):
        return None, 0
    rows = np.flatnonzero(trigger.bystanders(images.labels))
    if not len(rows):
        return None, 0
    stamped = _classes(logits(trigger.stamp(images.take(rows).pixels)))
    misled = np.isin(stamped, targets) & ~np.isin(clean[rows], targets)
    return float(misled.mean()), len(rows)


def _classes(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    broken = int(np.isnan(logits).any(axis=1).sum())
    if broken:
        raise ValueError(f"the model answers NaN for {broken} of {len(logits)} images; check its weights")
    winners: NDArray[np.int64] = logits.argmax(axis=1)
    return winners
