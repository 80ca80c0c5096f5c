"""The gate: one pure function from findings to outcome and exit code, the same for every output format."""

from __future__ import annotations

from collections.abc import Sequence

from qdefense.findings import Finding, RepairResult, Verdict
from qdefense.rates import told_beside
from qdefense.report.model import Gate

PASSED, FAILED, USAGE, INCOMPLETE, REFUSED, INTERRUPTED = 0, 1, 2, 3, 4, 130


def decide(findings: Sequence[Finding], required: Sequence[str], interruptions: Sequence[str] = ()) -> Gate:
    """Judge an audit by its findings.

    A BACKDOORED finding fails the gate whatever else is missing. Passing needs a CLEAN answer from every required
    defense, a model scan among them, and no interruption: anything less is INCOMPLETE, never a pass (law 2).
    """
    alarms = [f"{finding.defense}: {finding.reason}" for finding in findings if finding.verdict is Verdict.BACKDOORED]
    missing = [*interruptions, *_missing(findings, required)]
    if alarms:
        return Gate(outcome="FAILED", exit_code=FAILED, reasons=(*alarms, *missing), required=tuple(required))
    if missing:
        return Gate(outcome="INCOMPLETE", exit_code=INCOMPLETE, reasons=tuple(missing), required=tuple(required))
    reasons = tuple(f"{finding.defense}: {finding.reason}" for finding in findings)
    return Gate(outcome="PASSED", exit_code=PASSED, reasons=reasons, required=tuple(required))


def decide_repair(findings: Sequence[Finding], repair: str, max_drop: float, interruptions: Sequence[str] = ()) -> Gate:
    """Judge a repair by what it cost: more than ``max_drop`` percentage points of clean accuracy fail it.

    So does a NOT_REPAIRED answer, whatever is allowed here: more was lost than the repair itself tolerates.
    Passing needs a REPAIRED answer with its accuracies, and no interruption.
    """
    found = next((finding for finding in findings if finding.defense == repair), None)
    missing = list(interruptions)
    if found is None:
        missing.append(f"{repair}: gave no answer")
    elif found.verdict not in _MADE or not isinstance(found.result, RepairResult):
        missing.append(f"{repair}: {found.verdict}: {found.reason}")
    elif not found.result.images:
        missing.append(f"{repair}: the clean accuracy was not measured")
    elif found.result.accuracy_drop > max_drop:
        told = (
            f"{repair} is refused: clean accuracy falls by {told_beside(found.result.accuracy_drop, max_drop)} points "
            f"on {found.result.images} held-out images, at most {max_drop:g} were allowed"
        )
        return Gate(outcome="FAILED", exit_code=FAILED, reasons=(told, found.reason, *missing), required=(repair,))
    elif found.verdict is Verdict.NOT_REPAIRED:
        told = f"{repair} is refused: {found.reason}"
        return Gate(outcome="FAILED", exit_code=FAILED, reasons=(told, *missing), required=(repair,))
    if missing or found is None:
        return Gate(outcome="INCOMPLETE", exit_code=INCOMPLETE, reasons=tuple(missing), required=(repair,))
    return Gate(outcome="PASSED", exit_code=PASSED, reasons=(f"{repair}: {found.reason}",), required=(repair,))


def refuse(message: str, required: Sequence[str]) -> Gate:
    """The gate of a file that was not let in."""
    return Gate(outcome="REFUSED", exit_code=REFUSED, reasons=(message,), required=tuple(required))


def _missing(findings: Sequence[Finding], required: Sequence[str]) -> list[str]:
    reasons = [reason for name in required for reason in _unmeasured(findings, name)]
    scans = [finding for finding in findings if finding.kind == "scan" and finding.verdict in _MEASURED]
    return reasons if reasons or scans else ["no model scan among the checks that ran"]


def _unmeasured(findings: Sequence[Finding], name: str) -> list[str]:
    answers = [finding for finding in findings if finding.defense == name]
    if not answers:
        return [f"{name}: gave no answer"]
    return [f"{name}: {answer.verdict}: {answer.reason}" for answer in answers if answer.verdict not in _MEASURED]


_MEASURED = frozenset({Verdict.CLEAN, Verdict.BACKDOORED})
_MADE = frozenset({Verdict.REPAIRED, Verdict.NOT_REPAIRED})
