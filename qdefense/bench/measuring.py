"""The last two stages of a cell: what a file does, and what a defense says of it.

Only here the truth about a network meets a defense: `Evidence` goes in, and what comes out is held against the trigger
and the poisoned rows that the defense never saw. Thresholds are the paper's or those of the defense's settings: a
calibrated line can be drawn through the stored scores afterwards, and depends on which clean files are at hand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS, Trigger
from qdefense.attacks.interfaces import PoisonedSet
from qdefense.audit.fit import fit_images
from qdefense.bench.cells import DefenseSpec
from qdefense.bench.making import found_by_attacks, trigger_for
from qdefense.bench.records import GRADIENTS_WITHHELD, FilterMetrics, Metrics, RepairMetrics, ScanMetrics
from qdefense.bench.scoring import dataset_metrics, filter_metrics
from qdefense.bench.shadow_session import ShadowSession
from qdefense.bench.tasks import Clock, Outcome, TrialTask
from qdefense.data.images import DataError, ImageSet, Pixels
from qdefense.data.selection import choose_rows
from qdefense.defenses import DEFENSES, FittedFilter
from qdefense.evidence import Evidence, gather_evidence
from qdefense.fidelity import uncertified
from qdefense.findings import DatasetResult, FilterResult, Finding, ScanResult, Verdict
from qdefense.session import DeployedSession, SessionError
from qdefense.training import poisoned_set
from qdefense.trial import Behaviour, measure_behaviour, measure_control

_ROWS_AT_ONCE = 250


@dataclass(frozen=True, kw_only=True)
class Bench:
    """A file on the evaluator's desk: ``seen`` are the clean test images that a defense gets, ``unseen`` the others."""

    task: TrialTask
    session: DeployedSession
    seen: ImageSet
    unseen: ImageSet
    trigger: Trigger | None

    @property
    def seed(self) -> int:
        """Of the evaluation's draws and of the defense."""
        return self.task.trial.evaluation.seed


@dataclass(frozen=True, kw_only=True)
class _Judged:
    verdict: Verdict | None
    reason: str
    finding: Finding | None
    metrics: Metrics | None = None
    scores_sha256: str | None = None


def measure(task: TrialTask, clock: Clock) -> Outcome:
    """One cell.

    Raises:
        FileRefusedError, SessionError: the file cannot be run.
        DataError: the images are not there, or do not fit the file.
    """
    session, test = open_trial(task)
    if task.trial.cell.defense is None:
        trigger = _trigger(task, test)
        if task.trial.cell.attacker is not None and trigger is not None:
            found = measure_control(session.logits, test, trigger)
            return Outcome(task_id=task.id, record=task.control(clock.read(), **found.model_dump()))
        seen = measure_behaviour(session.logits, test, trigger)
        facts = {**seen.model_dump(), "activity": seen.activity}
        return Outcome(task_id=task.id, record=task.behaviour(clock.read(), **facts))
    bench = lay_out(task, session, test)
    judged = _JUDGES[task.trial.cell.defense.kind](bench)
    record = task.defense(
        clock.read(),
        verdict=judged.verdict,
        reason=judged.reason,
        finding=judged.finding,
        metrics=judged.metrics,
        scores_sha256=judged.scores_sha256,
    )
    return Outcome(task_id=task.id, record=record)


def open_trial(task: TrialTask) -> tuple[DeployedSession, ImageSet]:
    """The file as the trial runs it, and the test images as it expects them.

    Raises:
        FileRefusedError, SessionError: the file cannot be run.
        DataError: the images are not there, or do not fit the file.
    """
    session = DeployedSession(Artifact.from_bytes(task.model), task.trial.profile)
    return session, fit_images(session.artifact.contract, task.test.read())


def lay_out(task: TrialTask, session: DeployedSession, test: ImageSet) -> Bench:
    """What a defense's trial works on."""
    rules = task.trial.evaluation
    rows = choose_rows(len(test), limit=rules.clean_images, seed=rules.seed)
    others = np.setdiff1d(np.arange(len(test)), rows)
    return Bench(
        task=task, session=session, seen=test.take(rows), unseen=test.take(others), trigger=_trigger(task, test)
    )


def _trigger(task: TrialTask, images: ImageSet) -> Trigger | None:
    if task.attack is None:
        return None
    return trigger_for(task.attack, images.images.shape[1:3], task.trigger)


def _evidence(bench: Bench) -> tuple[Any, Evidence]:
    """The defense, and what it may see under the cell's access; a shadow is built only for who needs one."""
    cell = bench.task.trial.cell
    assert cell.defense is not None  # noqa: S101 (a behaviour has no evidence)
    defense = DEFENSES.create(cell.defense.text)
    if cell.access == "shadow" or (cell.access == "session" and cell.defense.needs_gradients):
        evidence = gather_evidence(bench.session, bench.seen, seed=bench.seed)
    else:
        unneeded = f"no shadow was built: {defense.name} needs no gradients"
        blind = bench.session.artifact.inspection.gradient_blind_nodes
        evidence = Evidence(
            session=bench.session,
            shadow=None,
            certificate=uncertified(GRADIENTS_WITHHELD if cell.defense.needs_gradients else unneeded),
            clean=bench.seen,
            seed=bench.seed,
            gradient_blind_nodes=tuple(node.name for node in blind),
        )
    return defense, _on_the_shadow(evidence, cell.defense) if cell.access == "shadow" else evidence


def _on_the_shadow(evidence: Evidence, defense: DefenseSpec) -> Evidence:
    """The shadow as its own session, which adds nothing, saturation neither: what a defense replays there agrees.

    A defense that needs gradients looks at the certificate itself; for one that does not it is looked at here.

    Raises:
        SessionError: there is none, or none that is known to answer as the file does.
    """
    certificate = evidence.certificate
    if evidence.shadow is None or not (certificate.certified or defense.needs_gradients):
        raise SessionError(f"there is no certified shadow to answer for the file: {certificate.reason}")
    return replace(
        evidence,
        session=ShadowSession(evidence.session, evidence.shadow),
        certificate=certificate.model_copy(update={"saturation_emulated": False}),
    )


def _judge_scan(bench: Bench) -> _Judged:
    defense, evidence = _evidence(bench)
    finding: Finding = defense.scan(evidence)
    result = finding.result if isinstance(finding.result, ScanResult) else None
    metrics = _scan_metrics(result, bench) if result is not None else None
    return _Judged(verdict=finding.verdict, reason=finding.reason, finding=_without_images(finding), metrics=metrics)


def _scan_metrics(result: ScanResult, bench: Bench) -> ScanMetrics:
    """Of several targets the best placed one counts; where every class is one, none has a rank or can be missed."""
    targets = _targets(bench)
    suspects = tuple(suspect.target_class for suspect in result.suspects)
    sought = () if len(targets) == len(bench.seen.class_names) else targets
    mine = sorted((entry for entry in result.classes if entry.target_class in sought), key=lambda entry: entry.rank)
    best = mine[0] if mine else None
    return ScanMetrics(
        score=result.score,
        suspects=suspects,
        targets=targets,
        target_rank=best.rank if best else None,
        target_index=best.index if best else None,
        target_norm=best.norm if best else None,
        target_found=any(target in suspects for target in sought) if sought else None,
        classes=len(result.classes) or None,
        censored=sum(entry.norm is None for entry in result.classes) if result.classes else None,
    )


def _targets(bench: Bench) -> tuple[int, ...]:
    if bench.trigger is None:
        return ()
    labels = np.arange(len(bench.seen.class_names), dtype=np.int64)
    goals = bench.trigger.goal(labels[bench.trigger.eligible(labels)])
    return tuple(int(goal) for goal in np.unique(goals))


def _without_images(finding: Finding) -> Finding:
    """Committed records show no image of a data set: an inverted trigger is nobody's picture, an example is."""
    if not isinstance(finding.result, ScanResult):
        return finding
    bare = {"example_png": "", "stamped_png": ""}
    pictures = tuple(picture.model_copy(update=bare) for picture in finding.result.pictures)
    return finding.model_copy(update={"result": finding.result.model_copy(update={"pictures": pictures})})


def _judge_dataset(bench: Bench) -> _Judged:
    """The training set as the network saw it: poisoned and shuffled by the seed of its recipe.

    An attack in the training loop leaves the set as it is: there is no poisoned row to be found.
    """
    task = bench.task
    network = task.trial.plan.network
    attack = None if task.attack is None else ATTACKS.create(task.attack)
    with found_by_attacks(task.attack_data):
        poisoned = poisoned_set(task.train.read(), attack, network.seed)
    _require_the_set_it_learned(task, poisoned)
    # Groups are lost where rows are poisoned, so those of a set without poisons would tell a scan that it is clean. Its
    # order tells that, too: poisoned sets are shuffled, others keep theirs, on which answers rest that are measured.
    training = replace(fit_images(bench.session.artifact.contract, poisoned.images), groups=None)
    defense, evidence = _evidence(bench)
    finding: Finding = defense.scan(replace(evidence, training_set=training))
    result = finding.result
    if not isinstance(result, DatasetResult) or not result.sample_scores:
        return _Judged(verdict=finding.verdict, reason=finding.reason, finding=finding)
    scores = _as_array(result.sample_scores)
    metrics = dataset_metrics(scores, result.flagged, poisoned.poison_indices, training.labels)
    short = result.model_copy(update={"sample_scores": (), "flagged": ()})
    return _Judged(
        verdict=finding.verdict,
        reason=finding.reason,
        finding=finding.model_copy(update={"result": short}),
        metrics=metrics,
        scores_sha256=hashlib.sha256(scores.tobytes()).hexdigest(),
    )


def _require_the_set_it_learned(task: TrialTask, poisoned: PoisonedSet) -> None:
    """Not only the same rows: a learned trigger comes out otherwise under another torch, or with other images beside.

    Raises:
        DataError: it is another set than the network saw.
    """
    change, what = "train the network again into another --output-dir", "the training set that the recipe gives now has"
    if tuple(poisoned.poison_indices.tolist()) != task.poison_indices:
        raise DataError(f"{task.trial.plan.network.title}: {what} other poisons than the truth file names; {change}")
    if task.training_set_sha256 not in (None, poisoned.images.digest):
        raise DataError(
            f"{task.trial.plan.network.title}: {what} other images or labels than the truth file's digest tells of; "
            f"{change}"
        )


def _judge_filter(bench: Bench) -> _Judged:
    """Fitted on the images a defense sees; decides on others, as they are and, of eligible ones, with the trigger.

    What the attacker gets is told by the session that the filter was fitted to: of the shadow, what the shadow answers.
    """
    defense, evidence = _evidence(bench)
    fitted: FittedFilter | Finding = defense.fit(evidence)
    if isinstance(fitted, Finding):
        return _Judged(verdict=fitted.verdict, reason=fitted.reason, finding=fitted)
    held_out = _held_out(bench)
    clean = _decide(fitted, held_out.pixels)
    stamped, asr = FilterResult(decisions=(), scores=()), None
    if bench.trigger is not None:
        eligible = held_out.take(np.flatnonzero(bench.trigger.eligible(held_out.labels)))
        pixels = bench.trigger.stamp(eligible.pixels)
        stamped = _decide(fitted, pixels)
        answers = evidence.session.logits(pixels).argmax(axis=1)
        let_in = _are(stamped, "accept")
        succeeded = let_in & (answers == bench.trigger.goal(eligible.labels))
        asr = {"hits": int(succeeded.sum()), "n": len(succeeded)}
    metrics = filter_metrics(
        _as_array(clean.scores), _are(clean, "reject"), _as_array(stamped.scores), _are(stamped, "reject")
    )
    facts = {"asr_after": asr, "boundary": _boundary(fitted)}
    scores = _as_array((*clean.scores, *stamped.scores))
    return _Judged(
        verdict=None,
        reason=f"decided on {len(clean.scores)} clean and {len(stamped.scores)} stamped images",
        finding=None,
        metrics=FilterMetrics.model_validate({**metrics.model_dump(), **facts}),
        scores_sha256=hashlib.sha256(scores.tobytes()).hexdigest(),
    )


def fit_filter(bench: Bench) -> FittedFilter | Finding:
    """The filter of the cell, fitted on the images that a defense sees; a finding where that cannot be done."""
    defense, evidence = _evidence(bench)
    fitted: FittedFilter | Finding = defense.fit(evidence)
    return fitted


def _require_unseen(bench: Bench, who: str) -> None:
    if not len(bench.unseen):
        raise DataError(f"{bench.unseen.source}: clean_images takes all test images, and {who} on others; lower it")


def _held_out(bench: Bench) -> ImageSet:
    _require_unseen(bench, "a filter must decide")
    rules = bench.task.trial.evaluation
    return bench.unseen.take(choose_rows(len(bench.unseen), limit=rules.held_out_images, seed=rules.seed))


def _decide(fitted: FittedFilter, pixels: Pixels) -> FilterResult:
    """A part at a time: a filter may lay a hundred images over each."""
    parts = [fitted.decide(pixels[start : start + _ROWS_AT_ONCE]) for start in range(0, len(pixels), _ROWS_AT_ONCE)]
    return FilterResult(
        decisions=tuple(decision for part in parts for decision in part.decisions),
        scores=tuple(score for part in parts for score in part.scores),
    )


def _as_array(scores: Sequence[float | None]) -> NDArray[np.float64]:
    """``(N,) float64``, little-endian for their digest; NaN where there is no score."""
    return np.array([np.nan if score is None else score for score in scores], dtype="<f8")


def _are(result: FilterResult, decision: str) -> NDArray[np.bool_]:
    return np.array([found == decision for found in result.decisions], dtype=np.bool_)


def _boundary(fitted: FittedFilter) -> dict[str, Any]:
    facts: dict[str, Any] = fitted.boundary.model_dump(mode="json", exclude={"held_out_scores"})
    return facts


def _judge_repair(bench: Bench) -> _Judged:
    """Both files on the test images that the repair did not see: it may have been fitted to the others."""
    defense, evidence = _evidence(bench)
    before = _behaviour(bench, bench.session)
    answer = defense.repair(evidence)
    repaired, finding = answer.artifact, answer.finding
    base = RepairMetrics(accuracy_before=before.clean_accuracy, asr_before=before.asr, activity_before=before.activity)
    if repaired is None:
        return _Judged(verdict=finding.verdict, reason=finding.reason, finding=finding, metrics=base)
    after = _behaviour(bench, DeployedSession(repaired, bench.task.trial.profile))
    update = {
        "new_sha256": repaired.sha256,
        "accuracy_after": after.clean_accuracy,
        "asr_after": after.asr,
        "activity_after": after.activity,
    }
    return _Judged(
        verdict=finding.verdict, reason=finding.reason, finding=finding, metrics=base.model_copy(update=update)
    )


def _behaviour(bench: Bench, session: DeployedSession) -> Behaviour:
    _require_unseen(bench, "a repair must be measured")
    return measure_behaviour(session.logits, bench.unseen, bench.trigger)


_JUDGES = {"scan": _judge_scan, "dataset": _judge_dataset, "filter": _judge_filter, "repair": _judge_repair}
