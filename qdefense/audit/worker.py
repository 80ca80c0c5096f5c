"""The worker: the only process that parses, loads and runs a file. Reads a job from stdin, writes events to stdout."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdefense.artifact import Artifact
from qdefense.audit.events import Advanced, Answered, Certified, Described, Event, Finished, Found, Job, Opened, Stopped
from qdefense.audit.gate import INCOMPLETE, REFUSED, USAGE
from qdefense.audit.provenance import environment
from qdefense.converters.contract import ContractError
from qdefense.converters.reading import FileRefusedError
from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.data.images import DataError, ImageSet
from qdefense.data.opening import open_data
from qdefense.evidence import gather_evidence
from qdefense.files import reason_of
from qdefense.registry import SpecError
from qdefense.report.escaping import harmless_lines, internal_error, shortened
from qdefense.report.model import Accuracy, DataFacts, Subject
from qdefense.session import DeployedSession, Logits, SessionError, profile_for

if TYPE_CHECKING:
    from qdefense.defenses import ModelScan

Emit = Callable[[Event], None]
_PROGRESS_INTERVAL = 0.1
_CAN_LIMIT = sys.platform == "linux"


class _Stages:
    """Seconds per stage, which the report keeps among the volatile figures."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.seconds[name] = round(self.seconds.get(name, 0.0) + time.perf_counter() - began, 3)


def main() -> None:
    """Do the job on stdin; every outcome is an event, and the exit status says nothing."""
    events = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a stray print of some library must not look like an event
    job = Job.model_validate_json(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_supervisor, daemon=True).start()
    _limit_resources(job.memory_bytes)

    def emit(event: Event) -> None:
        events.write(event.model_dump_json().encode() + b"\n")
        events.flush()

    try:
        run(job, emit)
    except Exception as error:  # noqa: BLE001 (the process boundary: a bug must become exit code 3, not a pass)
        sys.stderr.write(harmless_lines(traceback.format_exc()))
        emit(_stopped(error))


def _stopped(error: Exception) -> Stopped:
    if isinstance(error, OSError) and error.filename is not None:
        return Stopped(exit_code=USAGE, message=shortened(reason_of(error)))
    if isinstance(error, (DataError, SpecError, ContractError)):
        return Stopped(exit_code=USAGE, message=shortened(str(error)))
    if isinstance(error, (FileRefusedError, RuntimeGraphError, SessionError)):
        return Stopped(exit_code=REFUSED, message=shortened(str(error)))
    return Stopped(exit_code=INCOMPLETE, message=internal_error(error))


def run(job: Job, emit: Emit) -> None:
    """Describe the file, certify its shadow, then run every defense of the job, each answer sent as it comes."""
    stages = _Stages()
    with stages.measure("load"):
        artifact = _open(job, emit)
        clean = open_data(job.data, split=job.split, limit=job.limit, seed=job.seed)
        _check_fit(artifact, clean)
        scans = _create_scans(job.defenses)
        session = DeployedSession(artifact, profile_for(artifact))
        limited = job.memory_bytes is not None and _CAN_LIMIT
        emit(Described(subject=_describe(job, artifact, clean), environment=environment(session.profile, limited)))
        emit(Answered(clean_accuracy=_accuracy(session.logits(clean.pixels), clean)))
    with stages.measure("certificate"):
        evidence = gather_evidence(session, clean, seed=job.seed, threads=job.threads, progress=_throttled(emit))
        emit(Certified(certificate=evidence.certificate))
    for scan in scans:
        with stages.measure(scan.name):
            emit(Found(finding=scan.scan(evidence)))
    emit(Finished(seconds_per_stage=stages.seconds))


def _create_scans(specs: tuple[str, ...]) -> list[ModelScan]:
    import torch  # noqa: PLC0415 (seconds; what is wrong with file or data is told before)

    from qdefense.defenses import DEFENSES  # noqa: PLC0415

    torch.set_num_threads(1)  # work is spread over classes: sums, and so reports, do not depend on the thread count
    return [DEFENSES.create(spec) for spec in specs]


def _open(job: Job, emit: Emit) -> Artifact:
    path = Path(job.model)
    data = path.read_bytes()
    emit(Opened(subject=Subject(file=path.name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))))
    return Artifact.from_bytes(data)


def _check_fit(artifact: Artifact, clean: ImageSet) -> None:
    contract = artifact.contract
    if clean.images.shape[1:3] != (contract.height, contract.width):
        height, width = clean.images.shape[1:3]
        raise DataError(
            f"{clean.source}: images are {height}x{width}, the model takes {contract.height}x{contract.width}; "
            "give data of that size"
        )
    if len(clean.class_names) != contract.classes:
        raise DataError(
            f"{clean.source} has {len(clean.class_names)} classes, the model answers with {contract.classes}; "
            "give the data set that the model was made for"
        )
    if clean.class_names != contract.class_names and sorted(clean.class_names) == sorted(contract.class_names):
        raise DataError(
            f"{clean.source} has the model's classes in another order: class 0 is {clean.class_names[0]!r} there and "
            f"{contract.class_names[0]!r} in the model; number the labels as the model does"
        )


def _describe(job: Job, artifact: Artifact, clean: ImageSet) -> Subject:
    return Subject(
        file=Path(job.model).name,
        sha256=artifact.sha256,
        size_bytes=len(artifact.data),
        contract=artifact.contract,
        inspection=artifact.inspection,
        data=DataFacts(source=clean.source, sha256=clean.digest, images=len(clean), classes=len(clean.class_names)),
    )


def _accuracy(logits: Logits, clean: ImageSet) -> Accuracy | None:
    # Argmax would take a NaN for an answer.
    if not np.isfinite(logits).all():
        return None
    return Accuracy(value=float(np.mean(logits.argmax(axis=1) == clean.labels)), images=len(clean))


def _throttled(emit: Emit) -> Callable[[str, int, int], None]:
    last = 0.0

    def progress(stage: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last > _PROGRESS_INTERVAL:
            last = now
            emit(Advanced(stage=stage, done=done, total=total))

    return progress


def _die_with_supervisor() -> None:
    # The supervisor holds stdin open; end of file means that it is gone, however it went.
    while os.read(0, 1024):
        pass
    os._exit(INCOMPLETE)


def _limit_resources(memory_bytes: int | None) -> None:
    if not _CAN_LIMIT:
        return
    import resource  # noqa: PLC0415 (not on every platform)

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory_bytes is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        limit = memory_bytes if hard == resource.RLIM_INFINITY else min(memory_bytes, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


if __name__ == "__main__":
    main()
