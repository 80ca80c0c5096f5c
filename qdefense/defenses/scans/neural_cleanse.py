"""Neural Cleanse (Wang et al. 2019, IEEE S&P): a class that a much smaller trigger reaches than the others is suspect.

For every class t a trigger is inverted through the shadow, ``min CE(f(x'), t) + cost * ||m||_1`` (section IV-B), then
replayed on the deployed session. The anomaly index of a norm is its distance from the median in scaled median absolute
deviations, ``(median - norm) / (1.4826 * MAD)``, on the low side only; above 2 the class is a suspect (section IV-C).
The 2 is a rule of thumb with no known false-alarm rate; the scores of clean models (`qdefense calibrate`) replace it.

Deviations from the paper and its code:
- The budget counts gradient steps per class (one mini-batch of 32 each), and the cost schedule's patience counts the
  same steps, where the code counts passes over 1,000 samples; the success it looks at is a pass's average, as there.
- The clean images are shuffled by the seed (files are often sorted by class) and cut in two halves of at most 256:
  one for the inversion, one for the held-out ASR. Images of the target class take no part: they are there already.
- The convergence criterion (ASR >= 0.99) is judged on the deployed session with the stamped images rounded to the uint8
  grid, and a norm counts only if the trigger also reaches an ASR of 0.75 there on held-out images.
- A class without such a trigger is right-censored: it is replayed with what its inversion ended at, and
  enters the statistic by its rank above all others, not by a norm.
- Where median / MAD is not above the threshold no trigger, however small, could be a suspect: NOT_MEASURED.
- `restarts` starts each class several times, and its smallest norm counts; the paper starts once. What the statistic
  says of each start alone is reported beside it.
- `scheduler=screened` starts every class once and only the lowest ones again, for a third of the steps. The statistic
  stays that of the first starts, which all classes have (`scheduling.py`, docs/decisions/0016). It needs 4 restarts, 5
  of fewer than 9 classes: with fewer each start would be shorter than the budget says.
- `multiplier=1` holds the cost at `initial_cost` once it is reached: inversion under a fixed cost, to which the authors
  of label smoothing (arXiv 2404.12852) address theirs.
- Where half of the norms are no smaller than half of that of the random masks that the inversion starts from, the cost
  had no say (a long patience, a tiny cost): no alarm is NOT_MEASURED then.
- MAD = 0, too few images or converged classes, or missing gradients give NOT_MEASURED, never "clean".
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic.dataclasses import dataclass as settings

from qdefense.calibration import Calibrations, Line, draw_line
from qdefense.data.images import ImageSet, Pixels, first_few
from qdefense.data.selection import disjoint_parts
from qdefense.defenses.admission import NOT_FINITE, answers_near_chance
from qdefense.defenses.interfaces import Need
from qdefense.defenses.inversion import MaskedPattern, NoGradientError, Schedule, invert_trigger
from qdefense.defenses.outliers import low_side_indices, scaled_mad
from qdefense.defenses.pictures import picture_trigger
from qdefense.defenses.registered import DEFENSES
from qdefense.defenses.scheduling import LEAST_RESTARTS, Plan, exhaustive_plan, least_restarts, lowest, screened_plan
from qdefense.evidence import Evidence
from qdefense.fidelity import LogitComparison, compare_logits, finite_or_none, shadow_logits
from qdefense.findings import Cost, Finding, InvertedTrigger, Restart, ScanResult, Suspect, TriggerPicture, Verdict
from qdefense.rates import told_beside
from qdefense.session import DeployedSession

Budget = Literal["quick", "gate", "exhaustive"]
Scheduler = Literal["exhaustive", "screened"]
BUDGETS: dict[Budget, tuple[int, int]] = {"quick": (60, 1), "gate": (200, 1), "exhaustive": (400, 3)}
"""Gradient steps per class and restarts."""

PAPER_THRESHOLD = 2.0
MIN_IMAGES = 200
MIN_CLASSES = 6
MAX_CENSORED = 0.25
MIN_ARTIFACT_ASR = 0.75
MIN_OTHERS = 50
"""Images outside each class that either half must hold."""

_REPLAYED_IMAGES = 256
_NAMED = 3
_NORM_STRIDE = 1.05


@dataclass(frozen=True, kw_only=True)
class _Replay:
    """One restart of one class, judged on the session; a censored class keeps the last trigger that was tried."""

    trigger: MaskedPattern
    optimised_asr: float
    artifact_asr: float
    cross_entropy: float | None
    censored: str | None

    @property
    def norm(self) -> float | None:
        return None if self.censored else self.trigger.norm


@dataclass(frozen=True, kw_only=True)
class _Halves:
    """Clean images for the inversion and, apart from them, for the held-out ASR."""

    optimised: ImageSet
    held_out: ImageSet


@DEFENSES.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class NeuralCleanse:
    """Trigger inversion per class and the MAD anomaly index; defaults are the paper's but for the budget."""

    name: ClassVar[str] = "neural-cleanse"
    kind: ClassVar[Literal["scan"]] = "scan"
    paper: ClassVar[str] = "Wang et al. 2019, IEEE S&P"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.LOGITS, Need.GRADIENTS, Need.CLEAN_SET})
    revision: ClassVar[int] = 1

    budget: Budget = "gate"
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    batch_size: Annotated[int, Field(ge=1)] = 32
    initial_cost: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-3
    multiplier: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 2.0
    patience: Annotated[int, Field(ge=1)] = 5
    attack_success: Annotated[float, Field(gt=0, le=1)] = 0.99
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    restarts: Annotated[int, Field(ge=1)] | None = None
    scheduler: Scheduler = "exhaustive"

    @field_validator("scheduler")
    @classmethod
    def _has_restarts(cls, scheduler: Scheduler, info: ValidationInfo) -> Scheduler:
        restarts = info.data.get("restarts") or BUDGETS[info.data.get("budget", "gate")][1]
        if scheduler == "screened" and restarts < LEAST_RESTARTS:
            raise ValueError(
                f"screened needs starts of full length, {restarts} are too few; add restarts={LEAST_RESTARTS}"
            )
        return scheduler

    def scan(self, evidence: Evidence) -> Finding:
        """Judge the model from at least 200 clean images; the reason of anything but a verdict is in the finding."""
        before = evidence.session.forwards
        refusal = self._refuse(evidence)
        if refusal is not None:
            return self._finding(evidence, refusal[0], refusal[1], before, steps=0)
        plan = self._plan(len(evidence.clean.class_names))
        halves = _halve(evidence.clean, evidence.seed)
        problem = self._refuse_plan(plan, len(evidence.clean.class_names)) or _refuse_halves(evidence, halves)
        if problem is not None:
            return self._finding(evidence, Verdict.NOT_MEASURED, problem, before, steps=0)
        try:
            outcomes = self._invert_all(evidence, halves, plan)
        except NoGradientError as error:
            return self._finding(evidence, Verdict.NOT_MEASURED, f"no gradient: {error}", before, steps=0)
        comparison = _compare_replays(evidence, halves, outcomes)
        classes = rank_classes(outcomes, evidence.clean.class_names, compared=plan.compared)
        limit = self.line(evidence.calibrations).threshold.value
        verdict, reason, result = self._judge(classes, comparison, evidence.gradient_blind_nodes, limit)
        height, width = halves.optimised.images.shape[1:3]
        if verdict is Verdict.CLEAN and (unweighed := _unweighed(result, height * width / 2)) is not None:
            verdict, reason = Verdict.NOT_MEASURED, unweighed
        pictures = _pictures(result, [_best(starts[: plan.compared]) for starts in outcomes], halves.held_out)
        result = result.model_copy(update={"pictures": pictures, "restarts": _each_start(outcomes)})
        steps = plan.steps * sum(map(len, outcomes))
        return self._finding(evidence, verdict, reason, before, steps=steps, result=result)

    @property
    def calibrated_settings(self) -> dict[str, Any]:
        """What the score depends on."""
        steps, restarts = self._work
        # Calibrations from before there was a scheduler do not name it: what they hold is the exhaustive one's.
        unsaid = {"threshold", "restarts"} | ({"scheduler"} if self.scheduler == "exhaustive" else set())
        chosen = {name: value for name, value in asdict(self).items() if name not in unsaid}
        return {**chosen, "gradient_steps_per_class": steps, "restarts": restarts}

    @property
    def _work(self) -> tuple[int, int]:
        """Steps and starts of each class where none is spared any."""
        steps, restarts = BUDGETS[self.budget]
        return steps, restarts if self.restarts is None else self.restarts

    def _plan(self, classes: int) -> Plan:
        return screened_plan(classes, *self._work) if self.scheduler == "screened" else exhaustive_plan(*self._work)

    def _refuse_plan(self, plan: Plan, classes: int) -> str | None:
        steps = self._work[0]
        if plan.steps < steps:
            return (
                f"of {classes} classes the screened scheduler leaves each start {plan.steps} of {steps} gradient "
                f"steps; ask for restarts >= {least_restarts(classes)}"
            )
        return None

    def line(self, calibrations: Calibrations | None) -> Line:
        """The anomaly index above which a class is a suspect: the user's, a fitting calibration's, or the paper's."""
        return draw_line(calibrations, self.name, self.calibrated_settings, user=self.threshold, paper=PAPER_THRESHOLD)

    def _refuse(self, evidence: Evidence) -> tuple[Verdict, str] | None:
        classes = len(evidence.clean.class_names)
        if classes < MIN_CLASSES:
            return Verdict.NOT_APPLICABLE, f"{classes} classes; an outlier among norms needs at least {MIN_CLASSES}"
        if len(evidence.clean) < MIN_IMAGES:
            return Verdict.NOT_MEASURED, f"{len(evidence.clean)} clean images; at least {MIN_IMAGES} are needed"
        if not evidence.clean.labelled and evidence.stated_accuracy is None:
            return (
                Verdict.NOT_MEASURED,
                "the images have no labels, so the clean accuracy was not measured; give labelled images, or vouch for "
                "it with --expected-accuracy",
            )
        answers = evidence.session.artifact.contract.classes
        if answers != classes:
            return Verdict.NOT_MEASURED, f"the clean images have {classes} classes, the model answers with {answers}"
        if evidence.shadow is None or not evidence.certificate.certified:
            return Verdict.NOT_MEASURED, f"the shadow is not certified: {evidence.certificate.reason}"
        return None

    def _schedule(self, steps: int) -> Schedule:
        return Schedule(
            steps=steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            initial_cost=self.initial_cost,
            multiplier=self.multiplier,
            patience=self.patience,
            attack_success=self.attack_success,
        )

    def _invert_all(self, evidence: Evidence, halves: _Halves, plan: Plan) -> list[list[_Replay]]:
        """What every class is compared by, then the further starts of the lowest ones."""
        every = range(len(evidence.clean.class_names))
        outcomes = self._start(evidence, halves, plan, every, range(plan.compared))
        norms = np.array([_norm(_best(found)) for found in outcomes])
        promising = lowest(norms, plan.promising)
        if promising:
            numbers = range(plan.compared, plan.compared + plan.further)
            for target, found in zip(promising, self._start(evidence, halves, plan, promising, numbers), strict=True):
                outcomes[target] += found
        return outcomes

    def _start(
        self, evidence: Evidence, halves: _Halves, plan: Plan, targets: Sequence[int], numbers: range
    ) -> list[list[_Replay]]:
        """Classes side by side, each start with its own generator: the answer does not depend on the thread count.

        Nor does the work done: a class without gradients stops no other.
        """
        count = len(evidence.clean.class_names)
        before, total = (count if numbers.start else 0), count + plan.promising
        outcomes: list[list[_Replay]] = []
        failures: list[NoGradientError] = []

        def starts(target: int) -> list[_Replay]:
            return [self._invert(evidence, halves, plan, target, number) for number in numbers]

        evidence.progress(self.name, before, total)
        with ThreadPoolExecutor(max_workers=evidence.threads) as pool:
            pending = [pool.submit(starts, target) for target in targets]
            try:
                for done, future in enumerate(pending):
                    try:
                        outcomes.append(future.result())
                    except NoGradientError as error:
                        failures.append(error)
                    evidence.progress(self.name, before + done + 1, total)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        if failures:
            raise failures[0]
        return outcomes

    def _invert(self, evidence: Evidence, halves: _Halves, plan: Plan, target: int, start: int) -> _Replay:
        assert evidence.shadow is not None  # noqa: S101 (refused before)
        rng = np.random.default_rng([evidence.seed, target, start])
        optimised = _others(halves.optimised, target)
        found = invert_trigger(evidence.shadow, optimised, target, self._schedule(plan.steps), rng)
        held_out = _others(halves.held_out, target)
        if found.candidates:
            return self._replay(evidence.session, found.candidates, optimised, held_out, target)
        # Its trigger counts for nothing, but the session answers for it all the same: law 1 wants every class replayed.
        replay = self._replay(evidence.session, [found.last], optimised, held_out, target)
        reason = f"no trigger reached an ASR of {self.attack_success} on the shadow within the budget"
        return replace(replay, censored=reason)

    def _replay(
        self,
        session: DeployedSession,
        candidates: list[MaskedPattern],
        optimised: Pixels,
        held_out: Pixels,
        target: int,
    ) -> _Replay:
        """The smallest candidate that counts on the session; where none does, the last one, which is always tried.

        Candidates within 5 % of a failed one are skipped: what they answer differs little.
        """
        *earlier, last = candidates
        norm = 0.0
        for trigger in earlier:
            if trigger.norm < norm * _NORM_STRIDE:
                continue
            norm, answers = trigger.norm, answers_on_artifact(session, trigger, optimised, target)
            if answers.asr >= self.attack_success:
                found = self._held_out(session, trigger, answers, held_out, target)
                if found.censored is None:
                    return found
        return self._held_out(session, last, answers_on_artifact(session, last, optimised, target), held_out, target)

    def _held_out(
        self, session: DeployedSession, trigger: MaskedPattern, answers: ArtifactAnswers, images: Pixels, target: int
    ) -> _Replay:
        held = answers_on_artifact(session, trigger, images, target).asr
        return _Replay(
            trigger=trigger,
            optimised_asr=answers.asr,
            artifact_asr=held,
            cross_entropy=answers.cross_entropy,
            censored=self._why_censored(answers.asr, held),
        )

    def _why_censored(self, success: float, held: float) -> str | None:
        if success < self.attack_success:
            return f"no trigger reached an ASR of {self.attack_success} on the session within the budget"
        if held < MIN_ARTIFACT_ASR:
            return f"held-out artifact ASR {held:.2f} is below {MIN_ARTIFACT_ASR}"
        return None

    def _judge(
        self,
        classes: tuple[InvertedTrigger, ...],
        comparison: LogitComparison,
        blind: tuple[str, ...],
        limit: float,
    ) -> tuple[Verdict, str, ScanResult]:
        norms = np.array([np.inf if entry.norm is None else entry.norm for entry in classes])
        base = ScanResult(
            score=None,
            classes=classes,
            replay_agreement=comparison.top1_agreement,
            replay_relative_rms=finite_or_none(comparison.relative_rms),
        )
        problem = _refuse_norms(norms)
        if problem is not None:
            return Verdict.NOT_MEASURED, problem, base
        median, mad = scaled_mad(norms)
        if mad == 0:
            reason = f"the norms of all classes are the same ({median:.3f}): MAD = 0, so no index is defined"
            return Verdict.NOT_MEASURED, reason, base.model_copy(update={"median_norm": median, "mad": mad})
        indices = low_side_indices(norms)
        result = base.model_copy(
            update={
                "score": float(indices.max()),
                "median_norm": median,
                "mad": mad,
                "classes": tuple(_with_index(entry, index) for entry, index in zip(classes, indices, strict=True)),
                "suspects": tuple(
                    _suspect(entry, index) for entry, index in zip(classes, indices, strict=True) if index > limit
                ),
            }
        )
        return *self._verdict(result, comparison, blind, limit), result

    def _verdict(
        self, result: ScanResult, comparison: LogitComparison, blind: tuple[str, ...], limit: float
    ) -> tuple[Verdict, str]:
        if result.suspects:
            named = ", ".join(
                f"{s.target_class} ({s.class_name!r}, index {told_beside(s.score, limit)})" for s in result.suspects
            )
            return Verdict.BACKDOORED, f"trigger norm far below the other classes': class {named}"
        if not comparison.passes:
            how = comparison.summary
            return Verdict.NOT_MEASURED, f"shadow and session disagree on the stamped images: {how}"
        if blind:
            return (
                Verdict.NOT_MEASURED,
                f"no gradient can look through {', '.join(map(repr, blind[:3]))} ({len(blind)} such nodes)",
            )
        if result.median_norm is not None and result.mad is not None and result.median_norm <= limit * result.mad:
            return (
                Verdict.NOT_MEASURED,
                f"the norms scatter so widely (median {result.median_norm:.1f}, scaled MAD {result.mad:.1f}) that no "
                f"class could reach an index of {limit:g}, however small its trigger",
            )
        assert result.score is not None  # noqa: S101 (judged from indices; none must never read as a low one)
        highest = f"no class has an anomaly index above {limit:g}; highest {told_beside(result.score, limit)}"
        return Verdict.CLEAN, f"{highest}{_reach(result, limit)}{_left_out(result)}"

    def _finding(
        self,
        evidence: Evidence,
        verdict: Verdict,
        reason: str,
        forwards_before: int,
        *,
        steps: int,
        result: ScanResult | None = None,
    ) -> Finding:
        return Finding(
            defense=self.name,
            kind="scan",
            verdict=verdict,
            reason=reason,
            settings={**self.calibrated_settings, "threshold": self.threshold},
            threshold=self.line(evidence.calibrations).judged(None if result is None else result.score),
            seed=evidence.seed,
            cost=Cost(forwards=evidence.session.forwards - forwards_before, gradient_steps=steps),
            result=result,
        )


class ArtifactAnswers(NamedTuple):
    """What the session says of stamped images: the ASR, and the mean cross-entropy in the target class, in nats."""

    asr: float
    cross_entropy: float | None


def answers_on_artifact(
    session: DeployedSession, trigger: MaskedPattern, images: Pixels, target: int
) -> ArtifactAnswers:
    """Share of ``images: (N, 3, H, W)`` that the session assigns to ``target`` once stamped on the uint8 grid.

    ``E[log sum_k exp z_k - z_t]`` stands beside it, ``None`` where a logit is not finite. A row whose logits are not
    finite is assigned to no class: argmax would take NaN for the winner.
    """
    logits = session.logits(trigger.stamp(images)).astype(np.float64)
    finite = np.isfinite(logits).all(axis=1)
    asr = float(np.mean((logits.argmax(axis=1) == target) & finite))
    if not finite.all():
        return ArtifactAnswers(asr, None)
    wanted = torch.full((len(logits),), target)
    return ArtifactAnswers(asr, float(F.cross_entropy(torch.from_numpy(logits), wanted)))


def rank_classes(
    outcomes: list[list[_Replay]], names: tuple[str, ...], *, compared: int
) -> tuple[InvertedTrigger, ...]:
    """The best of the starts that every class has, smallest norm first; censored classes come last, in class order."""
    best = [_best(starts[:compared]) for starts in outcomes]
    order = sorted(range(len(best)), key=lambda t: (best[t].norm is None, best[t].norm or 0.0, t))
    return tuple(
        InvertedTrigger(
            target_class=target,
            class_name=names[target],
            rank=place + 1,
            norm=best[target].norm,
            index=None,
            optimised_asr=best[target].optimised_asr,
            artifact_asr=best[target].artifact_asr,
            restart_norms=tuple(replay.norm for replay in outcomes[target]),
            censored=best[target].censored,
            trigger_id=best[target].trigger.trigger_id,
            cross_entropy=best[target].cross_entropy,
        )
        for place, target in enumerate(order)
    )


def _best(restarts: list[_Replay]) -> _Replay:
    return min(restarts, key=_norm)


def _norm(replay: _Replay) -> float:
    return np.inf if replay.norm is None else replay.norm


def _each_start(outcomes: list[list[_Replay]]) -> tuple[Restart, ...]:
    """What the statistic would be if a start were the only one; nothing to tell where there was only one.

    Norms of a start that not all classes have stand against median and MAD of the first: they took as many steps.
    """
    starts = max(map(len, outcomes))
    first = np.array([_norm(row[0]) for row in outcomes])
    norms = [np.array([_norm(row[number]) for row in outcomes if number < len(row)]) for number in range(starts)]
    having = [[target for target, row in enumerate(outcomes) if number < len(row)] for number in range(starts)]
    whole = [mine if len(mine) == len(outcomes) else first for mine in norms]
    return tuple(map(_restart, norms, whole, having)) if starts > 1 else ()


def _restart(norms: NDArray[np.float64], population: NDArray[np.float64], targets: list[int]) -> Restart:
    at = int(norms.argmin())
    lowest_class = targets[at] if np.isfinite(norms[at]) else None
    if _refuse_norms(population) is not None:
        return Restart(score=None, lowest_class=lowest_class)
    median, mad = scaled_mad(population)
    score = max((median - float(norms[at])) / mad, 0.0) if mad else None
    return Restart(score=score, median_norm=median, mad=mad, lowest_class=lowest_class)


def _pictures(result: ScanResult, shown: list[_Replay], held_out: ImageSet) -> tuple[TriggerPicture, ...]:
    """Of every suspect, or else of the class with the smallest norm, on a held-out image of another class."""
    smallest = [entry.target_class for entry in result.classes[:1] if entry.norm is not None]
    drawn = []
    for target in [suspect.target_class for suspect in result.suspects] or smallest:
        example = held_out.take(np.flatnonzero(held_out.labels != target)[:1])
        drawn.append(picture_trigger(shown[target].trigger, target, example.pixels[0]))
    return tuple(drawn)


def _refuse_norms(norms: NDArray[np.float64]) -> str | None:
    censored = int(np.isinf(norms).sum())
    if np.isnan(norms).any():
        return "a trigger norm is NaN"
    if censored > MAX_CENSORED * len(norms):
        return f"{censored} of {len(norms)} classes are censored, more than {MAX_CENSORED:.0%}"
    if len(norms) - censored < MIN_CLASSES:
        return f"{len(norms) - censored} classes converged; at least {MIN_CLASSES} are needed"
    return None


def _unweighed(result: ScanResult, start: float) -> str | None:
    """Why no index says anything: masks start uniform, half of all pixels, and only the cost makes them smaller.

    Where half of the classes keep more than half of that, the norms tell how fast masks shrink, not how small they can
    be: a planted trigger of 4 pixels is one norm of 20 among others.
    """
    if result.median_norm is None or result.median_norm < start / 2:
        return None
    return (
        f"half of the triggers cover {result.median_norm:.1f} px or more, and the random masks that they start from "
        f"{start:g}: the cost of the norm made few of them small; lower patience, or raise initial-cost or the budget"
    )


def _reach(result: ScanResult, limit: float) -> str:
    """How small a trigger would have had to be: among norms that scatter, a small one is no outlier."""
    if result.median_norm is None or result.mad is None:
        return ""
    return f"; a trigger stands out below {result.median_norm - limit * result.mad:.1f} px"


def _left_out(result: ScanResult) -> str:
    """A censored class may be the target: too few of them to stop the scan, but none of them was judged."""
    named = [repr(entry.class_name) for entry in result.classes if entry.norm is None]
    if not named:
        return ""
    return f"; {len(named)} of {len(result.classes)} classes have none ({first_few(named, _NAMED)})"


def _refuse_halves(evidence: Evidence, halves: _Halves) -> str | None:
    for part in (halves.optimised, halves.held_out):
        others = len(part) - int(np.bincount(part.labels).max(initial=0))
        if others < MIN_OTHERS:
            return (
                f"{others} of {len(part)} images are outside the most frequent class; at least {MIN_OTHERS} are needed"
            )
    return _refuse_accuracy(evidence.session, halves, evidence.stated_accuracy)


def _refuse_accuracy(session: DeployedSession, halves: _Halves, stated: float | None) -> str | None:
    """``stated`` counts where the labels are the session's own answers, whose accuracy would be 1."""
    parts = (halves.optimised, halves.held_out)
    logits = np.concatenate([session.logits(part.pixels) for part in parts])
    if not np.isfinite(logits).all():
        return NOT_FINITE
    labels = np.concatenate([part.labels for part in parts])
    return answers_near_chance(logits, labels, stated=None if halves.optimised.labelled else stated)


def _halve(clean: ImageSet, seed: int) -> _Halves:
    """Frames of one track are the same scene: what was optimised on one is not held out on the next.

    Without groups the rows are those that measured answers rest on, which `disjoint_parts` would draw otherwise.
    """
    half = min(len(clean) // 2, _REPLAYED_IMAGES)
    if clean.groups is not None:
        parts = disjoint_parts(len(clean), (half, half), seed=seed, groups=clean.groups)
    else:
        rows = np.random.default_rng(seed).permutation(len(clean))
        parts = (rows[:half], rows[half : 2 * half])
    return _Halves(optimised=clean.take(parts[0]), held_out=clean.take(parts[1]))


def _others(images: ImageSet, target: int) -> Pixels:
    return images.take(np.flatnonzero(images.labels != target)).pixels


def _compare_replays(evidence: Evidence, halves: _Halves, outcomes: list[list[_Replay]]) -> LogitComparison:
    """Shadow against session on the optimised images, stamped with every trigger that was replayed (law 1)."""
    assert evidence.shadow is not None  # noqa: S101 (refused before)
    emulated = evidence.certificate.saturation_emulated
    expected, measured = [], []
    for target, restarts in enumerate(outcomes):
        for replay in restarts:
            stamped = replay.trigger.stamp(_others(halves.optimised, target))
            measured.append(evidence.session.logits(stamped))
            expected.append(shadow_logits(evidence.shadow, stamped, saturate=emulated))
    return compare_logits(np.concatenate(measured), np.concatenate(expected))


def _with_index(entry: InvertedTrigger, index: float) -> InvertedTrigger:
    return entry if entry.norm is None else entry.model_copy(update={"index": float(index)})


def _suspect(entry: InvertedTrigger, index: float) -> Suspect:
    return Suspect(
        target_class=entry.target_class,
        class_name=entry.class_name,
        score=float(index),
        artifact_asr=entry.artifact_asr or 0.0,
        trigger_id=entry.trigger_id or "",
    )
