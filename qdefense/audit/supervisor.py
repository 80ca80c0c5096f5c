"""The supervisor: starts the worker, gathers its events, decides and is the only one to write."""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import psutil
from pydantic import ValidationError

from qdefense.audit import gate
from qdefense.audit.events import (
    EVENTS,
    Advanced,
    Answered,
    Certified,
    Described,
    Event,
    Finished,
    Found,
    Job,
    Opened,
    Rewritten,
    Stopped,
)
from qdefense.audit.provenance import environment
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import Finding
from qdefense.memory import REUSED
from qdefense.report.model import Environment, Gate, Report, Subject, Volatile

ProgressBar = Callable[[str, int, int], None]
Judge = Callable[[Sequence[Finding], Sequence[str]], Gate]
"""The gate of findings, and of what interrupted the work."""
OnDescribed = Callable[[Subject], None]
"""Hears what the file is before the long work begins; what it raises ends the worker."""
ENDING_SECONDS = 5.0
"""How long a worker that said its last word has to say how it ended."""

_WHY_KILLED = "was there too little memory (--memory-limit), or does the file end its reader? -v shows its last words"


class UsageProblemError(ValueError):
    """The worker found that data, options and model do not fit together: exit code 2."""


@dataclass
class _Gathered:
    """What has come from the worker so far."""

    opened: Opened | None = None
    described: Described | None = None
    answered: Answered | None = None
    certificate: FidelityCertificate | None = None
    findings: list[Finding] = field(default_factory=list)
    rewritten: Rewritten | None = None
    stopped: Stopped | None = None
    finished: Finished | None = None
    ending: str = ""

    def take(self, event: Event) -> None:
        match event:
            case Opened():
                self.opened = event
            case Described():
                self.described = event
            case Answered():
                self.answered = event
            case Certified():
                self.certificate = event.certificate
            case Found():
                self.findings.append(event.finding)
            case Rewritten():
                self.rewritten = event
            case Stopped():
                self.stopped = event
            case Finished():
                self.finished = event

    @property
    def stop_code(self) -> int | None:
        """What a stop means: once the file was let in and the data fit, every stop leaves something unmeasured."""
        if self.stopped is None:
            return None
        return self.stopped.exit_code if self.described is None else gate.INCOMPLETE


def run_audit(
    job: Job,
    *,
    required: tuple[str, ...],
    on_progress: ProgressBar,
    on_described: OnDescribed = lambda _: None,
    command: tuple[str, ...] = (),
    verbose: bool = False,
) -> Report:
    """Run a job in a worker of its own and judge what came back; ``verbose`` lets the worker's stderr through.

    Raises:
        UsageProblemError: data, options and model do not fit; there is nothing to report.
        KeyboardInterrupt: passed on after the worker was stopped.
    """

    def judge(findings: Sequence[Finding], interruptions: Sequence[str]) -> Gate:
        return gate.decide(findings, required, interruptions)

    report, _ = run_job(
        job,
        judge,
        required=required,
        on_progress=on_progress,
        on_described=on_described,
        command=command,
        verbose=verbose,
    )
    return report


def run_job(
    job: Job,
    judge: Judge,
    *,
    required: tuple[str, ...],
    on_progress: ProgressBar,
    on_described: OnDescribed = lambda _: None,
    command: tuple[str, ...] = (),
    verbose: bool = False,
) -> tuple[Report, bytes | None]:
    """The same with another judge of findings and interruptions; also the file that a repair made.

    Raises:
        UsageProblemError: data, options and model do not fit; there is nothing to report.
        KeyboardInterrupt: passed on after the worker was stopped.
    """
    began, started = time.perf_counter(), datetime.now(UTC)
    gathered = _Gathered()
    with _worker(job, verbose=verbose) as process:
        for event in _events(process, gathered):
            if isinstance(event, Advanced):
                on_progress(event.stage, event.done, event.total)
            if isinstance(event, Described):
                on_described(event.subject)
            gathered.take(event)
        if gathered.finished is None and gathered.stopped is None:
            gathered.ending = gathered.ending or _ending(process)
    if gathered.stopped is not None and gathered.stop_code == gate.USAGE:
        raise UsageProblemError(gathered.stopped.message)
    volatile = Volatile(
        started=started.isoformat(timespec="seconds"),
        seconds=round(time.perf_counter() - began, 3),
        seconds_per_stage={} if gathered.finished is None else gathered.finished.seconds_per_stage,
        peak_memory_bytes=None if gathered.finished is None else gathered.finished.peak_memory_bytes,
        host=platform.node(),
        load=tuple(round(value, 2) for value in psutil.getloadavg()),
        command=command,
    )
    report = _report(job, gathered, judge, required, volatile)
    return report, None if gathered.rewritten is None else gathered.rewritten.data


def default_memory_limit() -> int:
    """What is free now: a file that asks for more gets an error of its own, before the kernel picks what to kill."""
    return int(psutil.virtual_memory().available)


@contextlib.contextmanager
def _worker(job: Job, *, verbose: bool) -> Iterator[subprocess.Popen[bytes]]:
    # -P: the current folder may hold anything, and is no place to import from. A session of its own: Ctrl-C goes to
    # the supervisor alone, which then ends the worker.
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "qdefense.audit.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=None if verbose else subprocess.DEVNULL,
        env={"OMP_WAIT_POLICY": "passive", **REUSED} | os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        _send(process, job)
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()


def _send(process: subprocess.Popen[bytes], job: Job) -> None:
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(job.model_dump_json().encode() + b"\n")
            process.stdin.flush()


def _events(process: subprocess.Popen[bytes], gathered: _Gathered) -> Iterator[Event]:
    for line in process.stdout or ():
        try:
            event = EVENTS.validate_json(line)
        except ValidationError:
            gathered.ending = "the worker sent something that is no event"
            return
        yield event
        if isinstance(event, (Finished, Stopped)):
            return


def _ending(process: subprocess.Popen[bytes]) -> str:
    """How a worker that neither finished nor stopped came to its end."""
    try:
        code = process.wait(timeout=ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        return ""
    if code >= 0:
        return "" if code == 0 else f"the worker ended with status {code}"
    name = f"signal {-code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
    return f"the worker was killed by {name}; {_WHY_KILLED}"


def _report(job: Job, gathered: _Gathered, judge: Judge, required: tuple[str, ...], volatile: Volatile) -> Report:
    interruptions = []
    if gathered.stopped is not None:
        interruptions.append(gathered.stopped.message)
    elif gathered.finished is None:
        interruptions.append(gathered.ending or "the worker ended before its work was done")
    if gathered.stop_code == gate.REFUSED:
        judged = gate.refuse(interruptions[0], required)
    else:
        judged = judge(gathered.findings, interruptions)
    return Report(
        subject=_subject(job, gathered),
        environment=_environment(gathered),
        certificate=gathered.certificate,
        findings=tuple(gathered.findings),
        gate=judged,
        volatile=volatile,
    )


def _subject(job: Job, gathered: _Gathered) -> Subject:
    known = gathered.described or gathered.opened
    subject = known.subject if known else Subject(file=Path(job.model).name)
    if gathered.answered is None:
        return subject
    return subject.model_copy(
        update={"clean_accuracy": gathered.answered.clean_accuracy, "candidates": gathered.answered.candidates}
    )


def _environment(gathered: _Gathered) -> Environment:
    return gathered.described.environment if gathered.described else environment()
