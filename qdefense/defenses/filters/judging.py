"""Are more of these inputs rejected than clean ones would be? One answer for all inputs, by any filter."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from statistics import median

import numpy as np

from qdefense.data.images import ImageSet, first_few
from qdefense.defenses.interfaces import FittedFilter, InputFilter
from qdefense.evidence import Evidence
from qdefense.findings import Cost, FilterBoundary, FilterResult, Finding, RejectionTest, Verdict
from qdefense.rates import binomial_tail, least_alarm, wilson_interval

LEVEL = 0.01
"""An alarm needs a p-value of at most this."""

MOST_UNSEEN = 0.05
"""Share of the inputs: where even more rejected ones than that are no alarm, no alarm says nothing. It was chosen
before any result was looked at."""

_NAMED = 5
_COUNTED = 100_000
"""More inputs than that are not asked for."""
_PER_ALARM = round(1 / MOST_UNSEEN)


def judge_inputs(input_filter: InputFilter, evidence: Evidence) -> Finding:
    """Fit a filter on the clean images, let it decide on ``evidence.inputs``, and test how many it rejects.

    BACKDOORED where ``P(X >= rejected) <= 0.01`` for X binomial with the boundary's ``null_rate``, the larger of the
    nominal false rejection rate and the upper end of the interval (Wilson, two-sided, 95 %) of the one measured on
    held-out clean images: the true rate is below it with a confidence of 97.5 %, no more. The test takes inputs for
    independent, and clean ones for like the clean images. The verdict is about these inputs: a trigger that none of
    them carries is not looked for.

    Clean images that are among the inputs take no part: no boundary is fitted to what it judges (law 3).

    NOT_MEASURED, unless the test alarms: there is no input, the filter could not be fitted, an input has no score, the
    boundary can reject nothing or rejects every clean image, something weakens the filter on this file, or the smallest
    share of rejected inputs that would be an alarm is above 0.05: with few held-out clean images, or few inputs, less
    poison would not be seen. The reason then tells how many of either would do, or that it is the false rejection rate.
    """
    before, result = evidence.session.forwards, None
    if evidence.inputs is None or not len(evidence.inputs):
        verdict, reason = Verdict.NOT_MEASURED, "there are no inputs to judge; give some with --inputs"
    else:
        clean = _apart(evidence.clean, evidence.inputs)
        fitted = input_filter.fit(replace(evidence, clean=clean))
        if isinstance(fitted, Finding):
            return _with_note(fitted, len(evidence.clean) - len(clean))
        result, test = _decide(input_filter.name, fitted, evidence.inputs, evidence)
        verdict, reason = _verdict(result, test, fitted)
    return Finding(
        defense=input_filter.name,
        kind=input_filter.kind,
        verdict=verdict,
        reason=reason,
        settings=input_filter.settings,
        seed=evidence.seed,
        cost=Cost(forwards=evidence.session.forwards - before),
        result=result,
    )


def _apart(clean: ImageSet, inputs: ImageSet) -> ImageSet:
    given = set(inputs.pixel_digests)
    kept = [row for row, digest in enumerate(clean.pixel_digests) if digest not in given]
    return clean if len(kept) == len(clean) else clean.take(np.array(kept, dtype=np.int64))


def _with_note(finding: Finding, aside: int) -> Finding:
    if not aside:
        return finding
    reason = f"{finding.reason} ({aside:,} that are among the inputs were left out: give other clean images)"
    return finding.model_copy(update={"reason": reason})


def _decide(
    name: str, fitted: FittedFilter, inputs: ImageSet, evidence: Evidence
) -> tuple[FilterResult, RejectionTest]:
    parts: list[FilterResult] = []
    for pixels in inputs.in_pixels():
        evidence.progress(name, sum(len(part.scores) for part in parts), len(inputs))
        parts.append(fitted.decide(pixels))
    evidence.progress(name, len(inputs), len(inputs))
    decisions = tuple(decision for part in parts for decision in part.decisions)
    scores = tuple(score for part in parts for score in part.scores)
    test = _test(decisions.count("reject"), len(decisions) - decisions.count("unmeasured"), fitted.boundary.null_rate)
    return FilterResult(decisions=decisions, scores=scores, boundary=fitted.boundary, test=test), test


def _test(rejected: int, measured: int, null_rate: float) -> RejectionTest:
    return RejectionTest(
        rejected=rejected,
        measured=measured,
        null_rate=null_rate,
        p_value=binomial_tail(rejected, measured, null_rate),
        level=LEVEL,
    )


def _verdict(result: FilterResult, test: RejectionTest, fitted: FittedFilter) -> tuple[Verdict, str]:
    counted = f"{test.rejected:,} of {test.measured:,} inputs rejected"
    limit = (
        f"where at most {test.null_rate:.1%} of clean ones would be, with 97.5% confidence "
        f"(p = {test.p_value:.2g} at that rate)"
    )
    if test.p_value <= LEVEL:
        return (
            Verdict.BACKDOORED,
            f"{counted}, {limit}; rows {_rows(result)}. This judges the inputs given, not the model",
        )
    problem = _problem(result, test, fitted.boundary)
    if problem is None and fitted.boundary.note is not None:
        problem = f"{counted}, {limit}: no alarm, but {fitted.boundary.note}; ask --defense {fitted.remedy}"
    problem = problem or _powerless(test, fitted)
    if problem is not None:
        return Verdict.NOT_MEASURED, problem
    reach = _reach(fitted.boundary)
    return Verdict.CLEAN, f"{counted}, {limit}; {_power(test)}; {reach}. This judges the inputs given, not the model"


def _reach(boundary: FilterBoundary) -> str:
    """How far below clean scores the line is: no statistic tells when a low one is too low for any trigger."""
    middle = median(boundary.held_out_scores)
    return f"only scores below {boundary.value:.2g} are rejected, the median clean image scores {middle:.2g}"


def _problem(result: FilterResult, test: RejectionTest, boundary: FilterBoundary) -> str | None:
    """Why no alarm means nothing."""
    broken = len(result.decisions) - test.measured
    if broken:
        return f"the session's logits on {broken:,} of {len(result.decisions):,} inputs are not finite"
    if not boundary.can_reject:
        return (
            f"the boundary ({boundary.value:.3g}) is not above the lowest score there is ({boundary.lowest_score:g}): "
            "no input could be rejected, however suspicious"
        )
    if boundary.measured_frr == 1:
        return f"the boundary ({boundary.value:.3g}) rejects every held-out clean image: it tells nothing apart"
    return None


def _powerless(test: RejectionTest, fitted: FittedFilter) -> str | None:
    """Why too little would have been an alarm, if so."""
    least = least_alarm(test.measured, test.null_rate, test.level)
    if least is None:
        chance = test.null_rate**test.measured
        return f"too few inputs ({test.measured:,}): all of them rejected could still be chance (p = {chance:.2g})"
    if least > MOST_UNSEEN * test.measured:
        return (
            f"{test.rejected:,} of {test.measured:,} inputs rejected, but {_power(test)}, more than "
            f"{MOST_UNSEEN:.0%}: less poison would not be seen; {_lever(test, fitted)}"
        )
    return None


def _lever(test: RejectionTest, fitted: FittedFilter) -> str:
    """What would let a smaller share be an alarm: inputs, held-out clean images, both, or a lower rate alone."""
    held_out, most = len(fitted.boundary.held_out_scores), fitted.most_held_out
    inputs = _inputs_needed(test, test.null_rate)
    images = _held_out_needed(test, fitted)
    ways = [] if inputs is None else [f"{inputs:,} inputs"]
    ways += [] if images is None else [f"{images:,} held-out clean images in place of {held_out:,}"]
    if ways:
        return f"it takes {' or '.join(ways)}"
    inputs = _inputs_needed(test, _rate_on(most, fitted.boundary))
    if inputs is not None and held_out < most:
        return f"it takes {inputs:,} inputs and up to {most:,} held-out clean images in place of {held_out:,}"
    return (
        f"{fitted.boundary.measured_frr:.1%} of {held_out:,} held-out clean images are rejected, {most:,} are held out "
        "at most, and no number of inputs makes up for that: set a lower false-rejection-rate"
    )


def _inputs_needed(test: RejectionTest, null_rate: float) -> int | None:
    """How many more inputs make the share that is an alarm small enough, in steps that a twentieth of is whole."""
    if null_rate >= MOST_UNSEEN:
        return None
    alarms = range(test.measured // _PER_ALARM + 1, _COUNTED // _PER_ALARM + 1)
    place = bisect_left(alarms, True, key=lambda n: binomial_tail(n, n * _PER_ALARM, null_rate) <= test.level)
    return alarms[place] * _PER_ALARM if place < len(alarms) else None


def _held_out_needed(test: RejectionTest, fitted: FittedFilter) -> int | None:
    """How many held-out clean images, with as many rejected among them, let these inputs do."""
    sizes = range(len(fitted.boundary.held_out_scores) + 1, fitted.most_held_out + 1)
    alarm = int(MOST_UNSEEN * test.measured)
    place = bisect_left(
        sizes, True, key=lambda n: binomial_tail(alarm, test.measured, _rate_on(n, fitted.boundary)) <= test.level
    )
    return sizes[place] if place < len(sizes) else None


def _rate_on(held_out: int, boundary: FilterBoundary) -> float:
    """The null rate, were the same share of so many clean images rejected."""
    return max(boundary.nominal_frr, wilson_interval(round(boundary.measured_frr * held_out), held_out)[1])


def _power(test: RejectionTest) -> str:
    least = least_alarm(test.measured, test.null_rate, test.level) or test.measured
    return f"the fewest that would be an alarm are {least:,} ({least / test.measured:.1%})"


def _rows(result: FilterResult) -> str:
    rows = [str(row) for row, decision in enumerate(result.decisions) if decision == "reject"]
    return first_few(rows, _NAMED)
