"""Are more of these inputs rejected than clean ones would be? One answer for all inputs, by any filter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from qdefense.defenses.interfaces import FittedFilter, InputFilter
from qdefense.evidence import Evidence
from qdefense.findings import Cost, FilterBoundary, FilterResult, Finding, RejectionTest, Verdict
from qdefense.rates import binomial_tail

LEVEL = 0.01
"""An alarm needs a p-value of at most this."""

_NAMED = 5


def judge_inputs(input_filter: InputFilter, evidence: Evidence) -> Finding:
    """Fit a filter on the clean images, let it decide on ``evidence.inputs``, and test how many it rejects.

    Under the null hypothesis each input is rejected with the boundary's ``null_rate``, the larger of the nominal false
    rejection rate and the upper bound (Wilson, 95 %) of the one measured on held-out clean images. BACKDOORED where a
    one-sided exact binomial test gives ``P(X >= rejected) <= 0.01``. The test takes inputs for independent, and holds
    where clean inputs are like the clean images. The verdict is about these inputs: a trigger that none of them carries
    is not looked for.
    """
    before = evidence.session.forwards
    inputs = evidence.inputs
    if inputs is None or not len(inputs):
        return _finding(input_filter, evidence, before, Verdict.NOT_MEASURED, "there are no inputs to judge", None)
    fitted = input_filter.fit(evidence)
    if isinstance(fitted, Finding):
        return fitted
    result = _decide(input_filter.name, fitted, evidence)
    verdict, reason = _judge(result, fitted.boundary)
    return _finding(input_filter, evidence, before, verdict, reason, result)


def _decide(name: str, fitted: FittedFilter, evidence: Evidence) -> FilterResult:
    assert evidence.inputs is not None  # noqa: S101 (the caller looked)
    parts: list[FilterResult] = []
    done = 0
    for pixels in evidence.inputs.in_pixels():
        evidence.progress(name, done, len(evidence.inputs))
        parts.append(fitted.decide(pixels))
        done += len(pixels)
    evidence.progress(name, done, done)
    decisions = tuple(decision for part in parts for decision in part.decisions)
    rejected, measured = decisions.count("reject"), len(decisions) - decisions.count("unmeasured")
    rate = fitted.boundary.null_rate
    return FilterResult(
        decisions=decisions,
        scores=tuple(score for part in parts for score in part.scores),
        boundary=fitted.boundary,
        test=RejectionTest(
            rejected=rejected,
            measured=measured,
            null_rate=rate,
            p_value=binomial_tail(rejected, measured, rate),
            level=LEVEL,
        ),
    )


def _judge(result: FilterResult, boundary: FilterBoundary) -> tuple[Verdict, str]:
    test = result.test
    assert test is not None  # noqa: S101 (made by the caller)
    broken = result.decisions.count("unmeasured")
    counted = f"{test.rejected:,} of {test.measured:,} inputs rejected"
    limits = f"clean ones at most {test.null_rate:.1%}, p = {test.p_value:.2g}"
    if test.p_value <= LEVEL:
        return Verdict.BACKDOORED, f"{counted}, more than of clean inputs ({limits}); this judges these inputs: {_rows(result)}"
    if broken:
        return Verdict.NOT_MEASURED, f"the session's logits on {broken:,} of {len(result.decisions):,} inputs are not finite"
    if not boundary.can_reject:
        return Verdict.NOT_MEASURED, (
            f"the boundary, {boundary.value:.3g}, is not above {boundary.lowest_score:g}, the lowest score there is: "
            "no input, however suspicious, could be rejected"
        )
    if test.null_rate**test.measured > LEVEL:
        return Verdict.NOT_MEASURED, (
            f"{test.measured:,} inputs are too few: even if all were rejected, that could be chance "
            f"(p = {test.null_rate**test.measured:.2g})"
        )
    return Verdict.CLEAN, f"{counted}, no more than of clean inputs ({limits}); this judges these inputs, not the model"


def _rows(result: FilterResult) -> str:
    rows = [row for row, decision in enumerate(result.decisions) if decision == "reject"]
    more = f" and {len(rows) - _NAMED:,} more" if len(rows) > _NAMED else ""
    return f"rows {', '.join(map(str, rows[:_NAMED]))}{more}"
