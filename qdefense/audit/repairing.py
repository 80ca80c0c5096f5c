"""Repairing: one job in a worker of its own, judged by what it cost; whoever asked for it writes the file."""

from __future__ import annotations

import hashlib

from qdefense.audit.events import Job
from qdefense.audit.gate import INCOMPLETE, PASSED, decide_repair
from qdefense.audit.supervisor import OnDescribed, ProgressBar, run_job
from qdefense.findings import RepairResult
from qdefense.report.model import Gate, Report


def run_repair(
    job: Job,
    *,
    max_drop: float,
    on_progress: ProgressBar,
    on_described: OnDescribed = lambda _: None,
    command: tuple[str, ...] = (),
    verbose: bool = False,
) -> tuple[Report, bytes | None]:
    """Carry out ``job.repair``; the new file is there only where the gate passed.

    Args:
        job: with data and a repair.
        max_drop: percentage points of clean accuracy that it may cost.
        on_progress: hears of each stage.
        on_described: hears what the file is before the long work begins; what it raises ends the worker.
        command: for the report.
        verbose: lets the worker's stderr through.

    Raises:
        ValueError: the job has no repair.
        UsageProblemError: data, options and model do not fit; there is nothing to report.
        KeyboardInterrupt: passed on after the worker was stopped.
    """
    if job.repair is None:
        raise ValueError("the job has no repair")
    name = job.repair.partition(":")[0]
    report, data = run_job(
        job,
        lambda findings, interruptions: decide_repair(findings, name, max_drop, interruptions),
        required=(name,),
        on_progress=on_progress,
        on_described=on_described,
        command=command,
        verbose=verbose,
    )
    if report.gate.exit_code != PASSED:
        return report, None
    if data is None or hashlib.sha256(data).hexdigest() not in _digests(report):
        reason = f"{name}: the file that came back is not the one that its finding is about"
        gate = Gate(outcome="INCOMPLETE", exit_code=INCOMPLETE, reasons=(reason,), required=(name,))
        return report.model_copy(update={"gate": gate}), None
    return report, data


def _digests(report: Report) -> list[str]:
    results = [finding.result for finding in report.findings]
    return [result.new_digest for result in results if isinstance(result, RepairResult)]
