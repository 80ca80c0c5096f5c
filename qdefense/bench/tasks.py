"""A work item as it travels to a worker, and what comes back. Neither torch nor ONNX Runtime is needed to hold one."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from qdefense.bench.cells import Cell, FilePlan, NetworkPlan
from qdefense.bench.datasets import PinnedData
from qdefense.bench.records import (
    BehaviourRecord,
    Calibration,
    ControlRecord,
    DefenseRecord,
    EvaluationRules,
    Network,
    QuantizationRecord,
    Record,
    Replica,
    TrainingRecord,
    Volatile,
    digest_of,
)
from qdefense.bench.revisions import EVALUATION_REVISION, versions
from qdefense.findings import Verdict
from qdefense.profile import Runtime, SessionProfile, runtime


class Clock:
    """From its making to `read`."""

    def __init__(self) -> None:
        self._began, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Volatile:
        """What the work has taken so far, and where."""
        return Volatile(
            seconds=round(time.perf_counter() - self._began, 3),
            cpu_seconds=round(time.process_time() - self._cpu, 3),
            host=platform.node(),
            load=tuple(round(value, 2) for value in os.getloadavg()) if hasattr(os, "getloadavg") else (),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a work item gave: its record, and of the first two stages the file.

    ``lost``: the machine could not do it (no images, memory or worker); it is told, not kept, and tried again later.
    """

    task_id: str
    record: Record
    model: bytes | None = field(default=None, repr=False)
    truth: bytes | None = field(default=None, repr=False)
    trigger: bytes | None = field(default=None, repr=False)
    replica: Replica | None = None
    lost: bool = False


@dataclass(frozen=True, kw_only=True)
class TrainTask:
    """Train one network."""

    recipe_sha256: str
    network: Network
    attack: str | None
    train: PinnedData
    attack_data: tuple[PinnedData, ...] = ()
    grid: int = 0

    @property
    def id(self) -> str:
        """The key of the record if it fails."""
        return training_key(self.recipe_sha256, None)

    def record(self, artifact_sha256: str | None, volatile: Volatile, **facts: Any) -> TrainingRecord:
        """The record of the training."""
        return TrainingRecord(
            key=training_key(self.recipe_sha256, artifact_sha256),
            network=self.network,
            artifact_sha256=artifact_sha256,
            epochs=self.network.recipe["epochs"],
            volatile=volatile,
            **{"versions": versions(), **facts},
        )

    def failure(self, reason: str, volatile: Volatile) -> Record:
        """The record of a training that gave no file."""
        return self.record(None, volatile, failed=True, reason=reason)


@dataclass(frozen=True, kw_only=True)
class QuantizeTask:
    """Quantize one network. ``calibration_data`` is named wherever ranges are read off images."""

    recipe_sha256: str
    network_sha256: str
    plan: FilePlan
    attack: str | None
    model: bytes = field(repr=False)
    trigger: bytes | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        """The key of the record if it fails."""
        return quantization_key(self.recipe_sha256, None)

    @property
    def calibration(self) -> Calibration | None:
        """The images, as records name them."""
        return self.plan.calibration

    def record(self, artifact_sha256: str | None, volatile: Volatile, **facts: Any) -> QuantizationRecord:
        """The record of the quantization."""
        return QuantizationRecord(
            key=quantization_key(self.recipe_sha256, artifact_sha256),
            network=self.plan.network,
            precision=self.plan.precision,
            scheme=self.plan.scheme,
            calibration=self.plan.calibration,
            network_sha256=self.network_sha256,
            artifact_sha256=artifact_sha256,
            versions=versions(),
            volatile=volatile,
            **facts,
        )

    def failure(self, reason: str, volatile: Volatile) -> Record:
        """The record of a quantization that gave no file."""
        return self.record(None, volatile, failed=True, reason=reason)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What holds for every trial of a matrix: the seed of its draws, and how many images.

    With ``here`` only what was measured on that runtime and CPU counts as measured.
    """

    seed: int
    clean_images: int
    held_out_images: int
    here: Runtime | None = None


@dataclass(frozen=True, kw_only=True)
class TrialKey:
    """What the answer of one cell depends on, and so what its record is called."""

    plan: FilePlan
    cell: Cell
    artifact_sha256: str
    batch: int
    train_sha256: str
    test_sha256: str
    evaluation: Evaluation
    attacker_sha256: str | None = None
    """Digest of the FP32 file of the cell's attacker."""
    runtime: Runtime | None = None
    """Where the key without it is that of an answer from another one."""

    @property
    def profile(self) -> SessionProfile:
        """How the file is run: on one thread, on which no sum depends then."""
        return SessionProfile(threads=1, batch=self.batch, arithmetic=self.cell.arithmetic)

    @property
    def rules(self) -> EvaluationRules | None:
        """What of the evaluation the answer depends on: nothing of what a file does, or a trigger to it."""
        if self.cell.defense is None:
            return None
        rules = self.evaluation
        return EvaluationRules(
            seed=rules.seed,
            clean_images=rules.clean_images,
            held_out_images=rules.held_out_images if self.cell.defense.kind == "filter" else None,
        )

    @property
    def data_sha256(self) -> str:
        """Digest of the images that this kind of trial looks at, and of how they are chosen."""
        rules = self.evaluation
        if self.cell.defense is None:
            return self.test_sha256
        parts: dict[str, Any] = {"test": self.test_sha256, "clean_images": rules.clean_images}
        if self.cell.defense.kind == "dataset":
            parts["train"] = self.train_sha256
        if self.cell.defense.kind == "filter":
            parts["held_out_images"] = rules.held_out_images
        return digest_of(**parts)

    @property
    def key(self) -> str:
        """The key of the record: artifact, what it says of that, settings, data, session profile, seed and revisions.

        Two recipes may give equal bytes; each has a record of its own, which names it.
        """
        defense, recipe = self.cell.defense, self.plan.recipe("")
        attacker = self.cell.attacker
        network = self.plan.network if attacker is None else attacker.network
        truth = {"attack": network.attack, "settings": network.attack_settings, "seed": network.seed}
        if network.attack_revisions:
            truth["revisions"] = network.attack_revisions
        if self.attacker_sha256 is not None:
            truth["control"] = self.attacker_sha256
        if attacker is not None and attacker.source_specific:  # older controls of these have no FPR
            truth["measures"] = "asr, fpr"
        asked = None
        if defense is not None:
            asked = {"name": defense.name, "settings": defense.settings, "revision": defense.revision}
        trial = digest_of(
            artifact=self.artifact_sha256,
            file=digest_of(
                data=network.data,
                precision=self.plan.precision,
                calibration=recipe["calibration"],
                calibration_sha256=recipe["calibration_sha256"],
            ),
            settings=digest_of(defense=asked, access=self.cell.access, truth=truth),
            data=self.data_sha256,
            profile=digest_of(**self.profile.model_dump(mode="json")),
            seed=None if defense is None else self.evaluation.seed,
            evaluation_revision=EVALUATION_REVISION,
        )
        return trial if self.runtime is None else digest_of(trial=trial, runtime=self.runtime.facts)


@dataclass(frozen=True, kw_only=True)
class TrialTask:
    """Measure one cell.

    ``poison_indices``, ``training_set_sha256`` and ``trigger``, a packed trigger state, are of the truth; only the
    evaluator's side of a trial reads them. Older truths do not have the second.
    """

    trial: TrialKey
    attack: str | None
    replica: int
    train: PinnedData
    test: PinnedData
    model: bytes = field(repr=False)
    attack_data: tuple[PinnedData, ...] = ()
    poison_indices: tuple[int, ...] = field(default=(), repr=False)
    training_set_sha256: str | None = None
    trigger: bytes | None = field(default=None, repr=False)

    @property
    def id(self) -> str:
        """The key of the record."""
        return self.trial.key

    def behaviour(self, volatile: Volatile, **facts: Any) -> BehaviourRecord:
        """The record of what the file does."""
        return BehaviourRecord(**self._common(volatile), **facts)

    def control(self, volatile: Volatile, **facts: Any) -> ControlRecord:
        """The record of what a trigger does to the file."""
        attacker = self.trial.cell.attacker
        assert attacker is not None  # noqa: S101 (the caller knows)
        assert self.trial.attacker_sha256 is not None  # noqa: S101 (a trigger is known once its network is)
        return ControlRecord(
            **self._common(volatile),
            attacked=attacker.network,
            attacked_sha256=self.trial.attacker_sha256,
            **facts,
        )

    def defense(self, volatile: Volatile, **facts: Any) -> DefenseRecord:
        """The record of what a defense says."""
        cell = self.trial.cell
        assert cell.defense is not None  # noqa: S101 (the caller knows)
        return DefenseRecord(
            **self._common(volatile),
            defense=cell.defense.name,
            settings=cell.defense.settings,
            revision=cell.defense.revision,
            kind=cell.defense.kind,
            access=cell.access,
            seed=self.trial.evaluation.seed,
            **facts,
        )

    def failure(self, reason: str, volatile: Volatile) -> Record:
        """The record of a trial that gave no answer."""
        match self.trial.cell.stage:
            case "behaviour":
                return self.behaviour(volatile, failed=True, reason=reason)
            case "control":
                return self.control(volatile, failed=True, reason=reason)
            case "defense":
                return self.defense(volatile, failed=True, reason=reason, verdict=Verdict.NOT_MEASURED)

    def _common(self, volatile: Volatile) -> dict[str, Any]:
        trial, plan = self.trial, self.trial.plan
        return {
            "key": trial.key,
            "network": plan.network,
            "precision": plan.precision,
            "scheme": plan.scheme,
            "calibration": plan.calibration,
            "artifact_sha256": trial.artifact_sha256,
            "arithmetic": trial.cell.arithmetic,
            "data_sha256": trial.data_sha256,
            "test_sha256": trial.test_sha256,
            "evaluation": trial.rules,
            "evaluation_revision": EVALUATION_REVISION,
            "profile": trial.profile,
            "runtime": runtime(),
            "replica": self.replica,
            "versions": versions(),
            "volatile": volatile,
        }


Task = TrainTask | QuantizeTask | TrialTask


def training_key(recipe_sha256: str, artifact_sha256: str | None) -> str:
    """The key of a training's record; without an artifact, of its failure."""
    return digest_of(stage="train", recipe=recipe_sha256, artifact=artifact_sha256)


def quantization_key(recipe_sha256: str, artifact_sha256: str | None) -> str:
    """The key of a quantization's record; without an artifact, of its failure."""
    return digest_of(stage="quantize", recipe=recipe_sha256, artifact=artifact_sha256)


def train_task(plan: NetworkPlan) -> TrainTask:
    """The training of a planned network."""
    return TrainTask(
        recipe_sha256=plan.recipe_sha256,
        network=plan.network,
        attack=plan.attack,
        train=plan.train,
        attack_data=plan.attack_data,
        grid=plan.grid,
    )
