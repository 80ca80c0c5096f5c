"""Fine-Pruning (Liu, Dolan-Gavitt and Garg 2018, RAID, arXiv 1805.12185): prune what sleeps, then fine-tune.

A backdoor may live in units that clean images never wake. The channels of the last convolution's feature map are pruned
from the lowest mean activation on clean images to the highest, one after another, until the clean accuracy has fallen
by the tolerance (section 3.1); then the network is fine-tuned on clean images (sections 3.2 and 3.3).

All of it happens to the file that ships: activations are tapped from its session; each step of the pruning is written
into the file, and its accuracy measured on a session of that very file; the fine-tuning goes through the shadow of the
graph as shipped, which rounds to the file's own grid, and is written back into the same graph. The accuracy before and
after is measured on sessions too, on images that neither step has seen; a file that lost more than the tolerance there
is NOT_REPAIRED. Whether a backdoor is gone only somebody with the trigger can measure.

Deviations from the paper and its code:
- The clean images are shuffled by the seed and cut in halves, images that show the same thing (`ImageSet.groups`)
  staying together: one half for pruning and fine-tuning, the other for the accuracies reported.
- A step that costs the tolerance is taken back, so that with a tolerance of 0 nothing is pruned. The 4 points are taken
  from what others say of the paper (its code has the number of channels for one network in it); BackdoorBench allows a
  tenth of the accuracy.
- A channel of a residual sum is silent where all its summands are: their convolutions are pruned together, with an
  identity shortcut up to the one that it starts from. Where a normalization ends the map, that is pruned.
- Pruned channels stay pruned in fine-tuning. The schedule is BackdoorBench's (100 epochs of SGD on a cosine, momentum
  0.9, weight decay 5e-4, batches of 256), without augmentation, but for its rate of 0.01: that is made for networks
  that normalize each batch, and runs away where normalization is folded or keeps its statistics, as in every deployed
  file. The paper gives no number, only "smaller" than in training; 0.001 is used (docs/decisions/0018).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fractions import Fraction
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from qdefense.artifact import Artifact
from qdefense.converters.channels import ChannelError, FeatureMap, last_feature_map
from qdefense.converters.reading import safe_text
from qdefense.converters.rescaling import WriteBackError
from qdefense.converters.shadow import Shadow, ShadowError, build_shadow
from qdefense.converters.writeback import Scales, write_back
from qdefense.data.images import ImageSet
from qdefense.data.selection import disjoint_parts
from qdefense.defenses.admission import NOT_FINITE, near_chance
from qdefense.defenses.channel_activations import ActivationError, ChannelActivations, mean_activations
from qdefense.defenses.dormancy import Pruning, dormancy_order, prune_while_tolerated
from qdefense.defenses.fine_tuning import Tuning, TuningSchedule, fine_tune, silence
from qdefense.defenses.interfaces import Need, Repaired
from qdefense.defenses.inversion import NoGradientError
from qdefense.defenses.registered import DEFENSES
from qdefense.evidence import Evidence
from qdefense.fidelity import shadow_logits
from qdefense.findings import Cost, Finding, PrunedChannels, RepairResult, Verdict
from qdefense.rates import told_beside
from qdefense.session import DeployedSession

MIN_PART = 100
"""Clean images that either half must hold: one of them is a point of accuracy."""


class _CannotRepairError(Exception):
    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


@dataclass(kw_only=True)
class _Patient:
    """The file as its shadow to be trained, the images to treat it by and, apart from them, to judge it on."""

    evidence: Evidence
    feature_map: FeatureMap
    student: Shadow
    tuned: ImageSet
    held_out: ImageSet
    scales: Scales
    forwards: int = 0
    tuning: Tuning = field(default_factory=Tuning)

    def written(self) -> Artifact:
        """The file that the student is now."""
        old = self.evidence.session.artifact
        try:
            return old.rewritten(write_back(old.data, self.student, scales=self.scales).data)
        except WriteBackError as error:
            raise _CannotRepairError(Verdict.NOT_MEASURED, f"the weights can't be written back: {error}") from error

    def count_right(self, images: ImageSet) -> int:
        """How many images that very file answers rightly, on a session of its own."""
        session = DeployedSession(self.written(), self.evidence.session.profile)
        right = _count_right(session, images)
        self.forwards += session.forwards
        return right

    def silence(self, channels: tuple[int, ...]) -> None:
        """Zero channels of the student's last feature map."""
        silence(self.student, self.feature_map.parameters, channels)


@DEFENSES.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class FinePruning:
    """Prunes the last feature map's sleeping channels, then fine-tunes, at a tenth of BackdoorBench's rate."""

    name: ClassVar[str] = "fine-pruning"
    kind: ClassVar[Literal["repair"]] = "repair"
    paper: ClassVar[str] = "Liu et al. 2018, RAID"
    needs: ClassVar[frozenset[Need]] = frozenset(
        {Need.LOGITS, Need.ACTIVATIONS, Need.GRADIENTS, Need.WEIGHTS, Need.CLEAN_SET}
    )
    revision: ClassVar[int] = 1

    tolerance: Annotated[float, Field(ge=0, le=1)] = 0.04
    channels_per_step: Annotated[int, Field(ge=1)] = 1
    epochs: Annotated[int, Field(ge=0)] = 100
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.001
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 5e-4
    batch_size: Annotated[int, Field(ge=1)] = 256
    scales: Scales = "keep"

    def repair(self, evidence: Evidence) -> Repaired:
        """Make the new file from at least 256 labelled clean images; where there is none, the finding says why."""
        before = evidence.session.forwards
        try:
            patient = self._admit(evidence)
        except _CannotRepairError as error:
            return Repaired(artifact=None, finding=self._finding(evidence, error.verdict, str(error)))
        artifact, result = None, None
        try:
            artifact, result = self._treat(patient)
        except _CannotRepairError as error:
            verdict, reason = error.verdict, str(error)
        else:
            verdict, reason = self._judgement(result, patient.tuning)
        forwards = patient.forwards + evidence.session.forwards - before
        cost = Cost(forwards=forwards, gradient_steps=patient.tuning.steps)
        return Repaired(artifact=artifact, finding=self._finding(evidence, verdict, reason, cost, result))

    def _finding(
        self,
        evidence: Evidence,
        verdict: Verdict,
        reason: str,
        cost: Cost | None = None,
        result: RepairResult | None = None,
    ) -> Finding:
        return Finding(
            defense=self.name,
            kind=self.kind,
            verdict=verdict,
            reason=reason,
            settings=asdict(self),
            seed=evidence.seed,
            cost=cost or Cost(),
            result=result,
        )

    def _admit(self, evidence: Evidence) -> _Patient:
        """What the file or the evidence can't give is told here, before any work."""
        feature_map, student = _find_map(evidence.session.artifact)
        tuned, held_out = _halve(evidence)
        return _Patient(
            evidence=evidence,
            feature_map=feature_map,
            student=student,
            tuned=tuned,
            held_out=held_out,
            scales=self.scales,
        )

    def _treat(self, patient: _Patient) -> tuple[Artifact, RepairResult]:
        old, count = patient.evidence.session, len(patient.held_out)
        right_before = _refuse_accuracy(patient)
        try:
            activations = mean_activations(patient.evidence, patient.feature_map, patient.tuned)
            order = dormancy_order(activations.means)
        except (ActivationError, ValueError) as error:
            raise _CannotRepairError(Verdict.NOT_MEASURED, str(error)) from error
        pruning = self._prune(patient, order)
        self._tune(patient, pruning.pruned)
        artifact = patient.written()
        if artifact.data == old.artifact.data:
            raise _CannotRepairError(
                Verdict.NOT_MEASURED,
                "nothing changed: no channel could be pruned within the tolerance, and fine-tuning moved no weight of "
                "the file; allow a larger tolerance, or more epochs",
            )
        right_after, agreement = _judge(artifact, patient)
        return artifact, RepairResult(
            new_digest=artifact.sha256,
            before={"clean_accuracy": right_before / count},
            after={"clean_accuracy": right_after / count},
            images=count,
            training_agreement=agreement,
            pruning=_told(patient, activations, pruning),
        )

    def _prune(self, patient: _Patient, order: NDArray[np.int64]) -> Pruning:
        """Prune the student; every step is judged by the file that it writes."""
        progress, last = patient.evidence.progress, patient.feature_map.channels - 1
        start = {name: value.clone() for name, value in patient.student.state_dict().items()}

        def count_right(channels: tuple[int, ...]) -> int:
            patient.silence(channels)
            return patient.count_right(patient.tuned)

        progress(f"{self.name}: prune", 0, last)
        pruning = prune_while_tolerated(
            order,
            count_right,
            images=len(patient.tuned),
            tolerance=self.tolerance,
            step=self.channels_per_step,
            on_step=lambda pruned: progress(f"{self.name}: prune", pruned, last),
        )
        progress(f"{self.name}: prune", last, last)
        patient.student.load_state_dict(start)
        patient.silence(pruning.pruned)
        return pruning

    def _tune(self, patient: _Patient, pruned: tuple[int, ...]) -> None:
        progress, seed = patient.evidence.progress, patient.evidence.seed
        schedule = TuningSchedule(
            epochs=self.epochs,
            learning_rate=self.learning_rate,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            batch_size=self.batch_size,
        )
        try:
            patient.tuning = fine_tune(
                patient.student,
                patient.tuned,
                schedule,
                np.random.default_rng(seed),
                silent=patient.feature_map.parameters,
                channels=pruned,
                on_epoch=lambda done: progress(f"{self.name}: tune", done, self.epochs),
            )
        except NoGradientError as error:
            raise _CannotRepairError(Verdict.NOT_MEASURED, f"no gradient: {error}") from error
        except ShadowError as error:
            raise _CannotRepairError(Verdict.NOT_MEASURED, f"the shadow can't be trained: {error}") from error

    def _judgement(self, result: RepairResult, tuning: Tuning) -> tuple[Verdict, str]:
        """A file that lost more than the tolerance is no repair, whichever step cost it."""
        # The decimal number that it is written as, as in pruning: 100 * 0.07 is a little more than 7.
        tolerated = float(100 * Fraction(repr(float(self.tolerance))))
        if result.accuracy_drop <= tolerated:
            return Verdict.REPAIRED, self._reason(result)
        fell = told_beside(result.accuracy_drop, tolerated)
        told = f"clean accuracy fell by {fell} points, where {tolerated:g} are tolerated"
        if tuning.ran_away:
            first, last = tuning.losses[0], tuning.losses[-1]
            told += f" (the training loss rose from {first:.3g} to {last:.3g}: lower `learning_rate`)"
        return Verdict.NOT_REPAIRED, f"{told}: {self._reason(result)}"

    def _reason(self, result: RepairResult) -> str:
        assert result.pruning is not None  # noqa: S101 (made with it)
        return (
            f"{len(result.pruning.pruned)} of {result.pruning.channels} channels pruned, {self.epochs} epochs of "
            f"fine-tuning; clean accuracy {result.before['clean_accuracy']:.2%} before, "
            f"{result.after['clean_accuracy']:.2%} after, on {result.images} held-out images; what it did to a "
            "backdoor only the trigger can tell"
        )


def _find_map(artifact: Artifact) -> tuple[FeatureMap, Shadow]:
    """The channels that can be pruned, and the shadow to be trained."""
    try:
        feature_map = last_feature_map(artifact.data, artifact.contract.output_name)
        student = build_shadow(artifact.data, source="shipped", contract=artifact.contract, trainable=True)
    except (ChannelError, ShadowError) as error:
        raise _CannotRepairError(Verdict.NOT_APPLICABLE, str(error)) from error
    names = [parameter.initializer for parameter in feature_map.parameters]
    held = [name for name in names if name not in student.parameters_by_initializer]
    if held:
        reason = student.frozen.get(held[0], "it is no weight that a shadow trains")
        raise _CannotRepairError(
            Verdict.NOT_APPLICABLE, f"initializer '{safe_text(held[0])}' can't be changed: {safe_text(reason)}"
        )
    if not any(weight.requires_grad for weight in student.parameters()):
        raise _CannotRepairError(Verdict.NOT_APPLICABLE, "no weight of the file can be trained")
    if feature_map.channels < 2:
        raise _CannotRepairError(Verdict.NOT_APPLICABLE, "the last feature map has one channel, which can't be spared")
    return feature_map, student


def _halve(evidence: Evidence) -> tuple[ImageSet, ImageSet]:
    clean, answers = evidence.clean, evidence.session.artifact.contract.classes
    if not clean.labelled:
        problem = "the images have no labels, and fine-tuning needs them; give labelled clean images"
    elif len(clean.class_names) != answers:
        problem = f"the clean images have {len(clean.class_names)} classes, the model answers with {answers}"
    elif not evidence.certificate.certified:
        problem = f"the shadow is not certified: {evidence.certificate.reason}"
    else:
        half = len(clean) // 2
        rows = disjoint_parts(len(clean), (half, half), seed=evidence.seed, groups=clean.groups)
        tuned, held_out = (clean.take(found) for found in rows)
        if min(len(tuned), len(held_out)) >= MIN_PART:
            return tuned, held_out
        problem = (
            f"{len(tuned)} images to prune and tune by and {len(held_out)} to measure on, where {MIN_PART} of each are "
            "needed: images that show the same thing stay together, so give more clean images"
        )
    raise _CannotRepairError(Verdict.NOT_MEASURED, problem)


def _refuse_accuracy(patient: _Patient) -> int:
    """How many held-out images the file as it is answers rightly, unless that says nothing."""
    session = patient.evidence.session
    tuned, held_out = (_count_right(session, part) for part in (patient.tuned, patient.held_out))
    accuracy = (tuned + held_out) / (len(patient.tuned) + len(patient.held_out))
    labels = np.concatenate([patient.tuned.labels, patient.held_out.labels])
    problem = near_chance(accuracy, session.artifact.contract.classes, labels)
    if problem is not None:
        raise _CannotRepairError(Verdict.NOT_MEASURED, problem)
    return held_out


def _count_right(session: DeployedSession, images: ImageSet) -> int:
    return int((_answers(session, images) == images.labels).sum())


def _answers(session: DeployedSession, images: ImageSet) -> NDArray[np.int64]:
    logits = session.logits_of(images)
    if not np.isfinite(logits).all():
        raise _CannotRepairError(Verdict.NOT_MEASURED, NOT_FINITE)
    answers: NDArray[np.int64] = logits.argmax(axis=1)
    return answers


def _judge(artifact: Artifact, patient: _Patient) -> tuple[int, float]:
    """How many held-out images the new file answers rightly, and how often the trained shadow agrees with it."""
    session, images = DeployedSession(artifact, patient.evidence.session.profile), patient.held_out
    answers = _answers(session, images)
    patient.forwards += session.forwards
    trained = [shadow_logits(patient.student, pixels).argmax(axis=1) for pixels in images.in_pixels()]
    return int((answers == images.labels).sum()), float(np.mean(answers == np.concatenate(trained)))


def _told(patient: _Patient, activations: ChannelActivations, pruning: Pruning) -> PrunedChannels:
    return PrunedChannels(
        tensor=activations.tensor,
        measured_on=activations.measured_on,
        channels=patient.feature_map.channels,
        pruned=pruning.pruned,
        accuracies=tuple(right / len(patient.tuned) for right in pruning.rights),
        initializers=tuple(parameter.initializer for parameter in patient.feature_map.parameters),
    )
