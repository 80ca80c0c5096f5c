"""Makes zoo files: trains, exports, and writes the truth beside the model for the evaluator."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from qdefense.attacks import ATTACKS, Attack, BatchAttack, PoisonedSet, Trigger, TriggerState
from qdefense.attacks.interfaces import trigger_of as trigger_of_attack
from qdefense.attacks.states import pack_state
from qdefense.converters.export import export_model
from qdefense.data.images import DataError, ImageSet
from qdefense.files import write_atomically
from qdefense.models import Recipe, architectures, default_width, multiply_accumulates, recipe_for
from qdefense.registry import flat_settings
from qdefense.training import OnPoisoned, Progress, train
from qdefense.trial import Truth, state_path, truth_path

__all__ = [
    "Recipe",
    "architectures",
    "default_width",
    "multiply_accumulates",
    "recipe_for",
    "train_artifact",
    "trigger_of",
]

_STAMPED = 64
_STRENGTHS = ("alpha", "amplitude", "strength", "delta", "eps", "test_multiple")
"""How the settings end that scale a trigger."""
_TOLERANCE = 1e-3
"""In codes: what float32 may be off n/255."""


def train_artifact(
    dataset: ImageSet,
    target: Path,
    *,
    architecture: str,
    recipe: Recipe,
    attack: str | None,
    seed: int,
    threads: int,
    width: int | None = None,
    on_epoch: Progress | None = None,
    on_poisoned: OnPoisoned | None = None,
) -> Truth:
    """Train on ``dataset`` and write ``target``, its truth and the state of a learned trigger.

    No file appears before all are complete, and the model last. A state that an earlier training left there goes.

    ``width`` is the number of channels in the first stage, the architecture's own where it is ``None``.

    ``on_epoch`` and ``on_poisoned`` are `train`'s.

    Raises:
        SpecError: ``attack`` names nothing known.
        DataError: the data do not fit the attack or the recipe, or what the attack stamps is no uint8 image.
    """
    attacker = None if attack is None else ATTACKS.create(attack)

    def checked(poisoned: PoisonedSet) -> None:  # before minutes of training
        if attacker is not None and len(poisoned.poison_indices):
            _require_storable(attacker, dataset, poisoned.trigger_state)
        if on_poisoned is not None:
            on_poisoned(poisoned)

    channels = default_width(architecture) if width is None else width
    result = train(
        dataset,
        architecture=architecture,
        recipe=recipe,
        attack=attacker,
        seed=seed,
        width=channels,
        threads=threads,
        on_epoch=on_epoch,
        on_poisoned=checked,
    )
    if isinstance(attacker, BatchAttack):  # its trigger may have been learned by now only
        _require_storable(attacker, dataset, result.trigger_state)
    rows, columns = dataset.images.shape[1:3]
    data = export_model(result.module, height=rows, width=columns, class_names=dataset.class_names)
    state = None if result.trigger_state is None else pack_state(result.trigger_state)
    truth = Truth(
        attack=None if attacker is None else attacker.name,
        attack_settings={} if attacker is None else flat_settings(attacker),
        poison_indices=tuple(int(row) for row in result.poison_indices),
        architecture=architecture,
        width=channels,
        recipe=dataclasses.asdict(recipe),
        seed=seed,
        data=dataset.source,
        data_sha256=dataset.digest,
        artifact_sha256=hashlib.sha256(data).hexdigest(),
        versions={"torch": torch.__version__, "onnx": onnx.__version__, "onnxruntime": onnxruntime.__version__},
        trigger_sha256=None if state is None else hashlib.sha256(state).hexdigest(),
        training_set_sha256=result.training_set_sha256,
    )
    if state is not None:
        write_atomically(state_path(target), state)
    write_atomically(truth_path(target), truth.model_dump_json(indent=1).encode() + b"\n")
    if state is None:
        state_path(target).unlink(missing_ok=True)
    write_atomically(target, data)
    return truth


def _require_storable(attack: Attack, dataset: ImageSet, state: TriggerState | None) -> None:
    """Stamp a few images and refuse what `Trigger.stamp` must not give: the network learned the rounded pixels.

    And a trigger that is none: it would be measured as one that no network takes up.

    Raises:
        DataError: a stamped pixel is not n/255 with n from 0 to 255, or none is changed though no strength is 0.
    """
    height, width = dataset.images.shape[1:3]
    with torch.random.fork_rng(devices=[]):  # a trigger that is a network draws weights before it restores its own
        trigger = trigger_of_attack(attack, height, width, state)
        rows = np.flatnonzero(trigger.eligible(dataset.labels))[:_STAMPED]
        plain = dataset.take(rows).pixels
        stamped = trigger.stamp(plain)
    with np.errstate(invalid="ignore"):
        codes = stamped.astype(np.float64) * 255
        nearest = np.clip(np.rint(codes), 0, 255)
        fits = np.abs(codes - nearest) < _TOLERANCE
    if not fits.all():
        raise DataError(
            f"{attack.name}: a stamped pixel is {stamped[~fits][0]:.6g}, which no uint8 image holds; have stamp() "
            "round to n/255 in [0, 1], as qdefense.data.images.on_grid does"
        )
    if len(rows) and (stamped == plain).all() and not _is_neutral(attack):
        raise DataError(
            f"{attack.name}: the trigger changes no pixel of {len(rows)} images: it rounds to nothing, or they show it "
            "anyway; make it stronger, or choose another"
        )


def _is_neutral(attack: Attack) -> bool:
    """Whether a strength is 0, which asks for no trigger: the control of an experiment."""
    settings = flat_settings(attack).items()
    return any(not value and key.rpartition(".")[2].endswith(_STRENGTHS) for key, value in settings)


def trigger_of(truth: Truth, images: ImageSet, state: TriggerState | None = None) -> Trigger | None:
    """The trigger that a truth speaks of, on images of this size; none of a clean model.

    Raises:
        DataError: the trigger was learned, and ``state``, which `qdefense.trial.read_state` gives, is missing.
    """
    if truth.attack is None:
        return None
    attack: Attack = ATTACKS.restore(truth.attack, truth.attack_settings)
    height, width = images.images.shape[1:3]
    return trigger_of_attack(attack, height, width, state)
