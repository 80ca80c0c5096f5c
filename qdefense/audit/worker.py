"""The worker: the only process that parses, loads and runs a file. Reads a job from stdin, writes events to stdout."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from qdefense.artifact import Artifact
from qdefense.audit.candidates import gain, score_candidates
from qdefense.audit.events import (
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
from qdefense.audit.fit import fit_images, labelled_by, once_each, resize_for
from qdefense.audit.gate import INCOMPLETE, REFUSED, USAGE
from qdefense.audit.provenance import conditions_of, environment
from qdefense.calibration import (
    CalibrationError,
    Calibrations,
    file_identity,
    population_of,
    read_calibration,
    shipped_calibrations,
)
from qdefense.converters.contract import METADATA_KEY, ContractError, InputContract, StatedContract
from qdefense.converters.door import check_head
from qdefense.converters.exact_products import UnsupportedArithmeticError
from qdefense.converters.external_data import with_external_data
from qdefense.converters.reading import FileRefusedError, parse_model, read_file
from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.data.images import DataError, ImageSet, encodable
from qdefense.data.opening import open_data, training_split
from qdefense.evidence import Evidence, gather_evidence
from qdefense.files import reason_of
from qdefense.findings import Finding, Kind, Verdict
from qdefense.memory import ran_out_of_memory
from qdefense.rates import MIN_SKILL, skill
from qdefense.registry import SpecError
from qdefense.report.escaping import harmless_lines, internal_error, shortened
from qdefense.report.model import MISREAD_MARGIN, Accuracy, DataFacts, Environment, ReferenceFile, Subject
from qdefense.session import DeployedSession, Logits, SessionError, profile_for

if TYPE_CHECKING:
    from qdefense.defenses import DatasetScan, Defense, InputFilter, ModelScan, Repair

    Audited = ModelScan | DatasetScan | InputFilter

Emit = Callable[[Event], None]
_PROGRESS_INTERVAL = 0.1
_AUDITED_KINDS: frozenset[Kind] = frozenset({"scan", "dataset", "filter"})
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
    exit_code, message = _told(error)
    # A name from a disk need not be UTF-8, which the event must be.
    return Stopped(exit_code=exit_code, message=shortened(encodable(message)))


def _told(error: Exception) -> tuple[int, str]:
    if isinstance(error, OSError) and error.filename is not None:
        return USAGE, reason_of(error)
    if isinstance(error, (DataError, SpecError, ContractError, CalibrationError, UnsupportedArithmeticError)):
        return USAGE, str(error)
    if ran_out_of_memory(error):  # a good file is not refused for want of it
        what = f"not enough memory: {error}".removesuffix(": ")  # Python's own says no more
        return INCOMPLETE, f"{what}; raise --memory-limit, or read fewer images with --limit"
    if isinstance(error, (FileRefusedError, RuntimeGraphError, SessionError)):
        return REFUSED, str(error)
    if isinstance(error, (MisreadFileError, NoNumbersError)):
        return INCOMPLETE, str(error)
    return INCOMPLETE, internal_error(error)


def run(job: Job, emit: Emit) -> None:
    """Describe the file, certify its shadow, then run every defense of the job, each answer sent as it comes."""
    stages = _Stages()
    with stages.measure("load"):
        artifact = _open(job, emit)
        if job.data is None:
            # What was read off the file stays known even if loading it ends the runtime, or this process.
            emit(Opened(subject=_describe(job, artifact)))
            subject = _with_runtime_facts(job, artifact)
            emit(Described(subject=subject, environment=environment(memory_limited=_limited(job))))
            emit(Finished(seconds_per_stage={}))
            return
        loaded = _load(job, job.data, artifact, emit)
        clean = _answer(job, loaded, emit)
    if artifact.contract.head == "sigmoid":
        _pass_over(job, [*loaded.defenses, *loaded.repairs], emit)
        return
    with stages.measure("certificate"):
        evidence = gather_evidence(loaded.session, clean, seed=job.seed, threads=job.threads, progress=_throttled(emit))
        emit(Certified(certificate=evidence.certificate))
    evidence = replace(
        evidence,
        stated_accuracy=job.expected_accuracy,
        calibrations=loaded.calibrations,
        training_set=loaded.training_set,
        inputs=loaded.inputs,
        reference=loaded.reference,
    )
    for defense in loaded.defenses:
        with stages.measure(defense.name):
            emit(Found(finding=_ask(defense, evidence)))
    for repair in loaded.repairs:
        with stages.measure(repair.name):
            _repair(repair, evidence, emit)
    emit(Finished(seconds_per_stage=stages.seconds, peak_memory_bytes=_peak_memory()))


def _ask(defense: Audited, evidence: Evidence) -> Finding:
    """The answer of a defense, each kind by its own protocol."""
    match defense.kind:
        case "scan" | "dataset":
            return defense.scan(evidence)
        case "filter":
            from qdefense.defenses.filters.judging import judge_inputs  # noqa: PLC0415 (imports torch)

            return judge_inputs(defense, evidence)


def _repair(repair: Repair, evidence: Evidence, emit: Emit) -> None:
    made = repair.repair(evidence)
    if made.artifact is not None:
        emit(Rewritten(data=made.artifact.data))
    emit(Found(finding=made.finding))


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """File and images, found to fit, and what is to be done with them."""

    session: DeployedSession
    clean: ImageSet
    training_set: ImageSet | None
    inputs: ImageSet | None
    reference: DeployedSession | None
    defenses: list[Audited]
    repairs: list[Repair]
    calibrations: Calibrations


def _load(job: Job, data: str, artifact: Artifact, emit: Emit) -> _Loaded:
    """Everything that a user can get wrong, up to the point where the file is let in."""
    read = open_data(data, split=job.split, limit=job.limit, seed=job.seed, resize=resize_for(artifact.contract))
    clean = once_each(fit_images(artifact.contract, read))
    defenses = _create_defenses(job.defenses)
    repairs = [] if job.repair is None else [_create_repair(job.repair)]
    training_set = _training_set(job, artifact.contract, defenses)
    inputs = _inputs(job, artifact.contract, defenses)
    reference = _reference(job, artifact, defenses)
    session = DeployedSession(artifact, profile_for(artifact, arithmetic=job.arithmetic))
    surroundings = environment(session.profile, _limited(job))
    calibrations = _calibrations(job, artifact, read.digest, surroundings)
    _check_lines(defenses, calibrations)
    facts = {
        "data": _data_facts(read, clean),
        "training_data": None if training_set is None else _data_facts(training_set, training_set),
        "inputs": None if inputs is None else _data_facts(inputs, inputs),
        "reference": None if reference is None else _named(job, reference),
    }
    subject = _with_runtime_facts(job, artifact).model_copy(update=facts)
    emit(Described(subject=subject, environment=surroundings))
    return _Loaded(
        session=session,
        clean=clean,
        training_set=training_set,
        inputs=inputs,
        reference=reference,
        defenses=defenses,
        repairs=repairs,
        calibrations=calibrations,
    )


def _training_set(job: Job, contract: InputContract, defenses: list[Audited]) -> ImageSet | None:
    """The training set, where a defense reads one.

    Raises:
        DataError: it is missing, nothing reads it, or it does not fit the file.
    """
    readers = [defense.name for defense in defenses if defense.kind == "dataset"]
    if job.training_data is None:
        if readers:
            raise DataError(f"{readers[0]} judges the training data; name it with --training-data")
        return None
    if not readers:
        names = ", ".join(defense.name for defense in defenses)
        raise DataError(
            f"nothing reads --training-data: {names} judges the model alone; add --defense activation-clustering"
        )
    split = job.training_split or training_split(job.training_data)
    read = open_data(job.training_data, split=split, seed=job.seed, resize=resize_for(contract))
    return fit_images(contract, read)


def _inputs(job: Job, contract: InputContract, defenses: list[Audited]) -> ImageSet | None:
    """What the model was given, without labels, where a filter judges it.

    Raises:
        DataError: it is missing, nothing judges it, or it does not fit the file.
    """
    readers = [defense.name for defense in defenses if defense.kind == "filter"]
    if job.inputs is None:
        if readers:
            raise DataError(f"{readers[0]} judges inputs; name them with --inputs")
        return None
    if not readers:
        names = ", ".join(defense.name for defense in defenses)
        raise DataError(f"nothing reads --inputs: {names} is no filter; add --defense strip")
    read = open_data(job.inputs, split=job.inputs_split, seed=job.seed, resize=resize_for(contract))
    return fit_images(contract, read.without_labels())


def _reference(job: Job, artifact: Artifact, defenses: list[Audited]) -> DeployedSession | None:
    """The network that was trained without what a dataset scan flagged.

    Raises:
        DataError: nothing asks it, it cannot be run, is the audited file, or does not answer the same images with the
            same classes.
    """
    from qdefense.defenses.interfaces import AsksReference  # noqa: PLC0415 (imports torch)

    if job.reference is None:
        return None
    if not any(isinstance(defense, AsksReference) and defense.asks_reference for defense in defenses):
        raise DataError(
            "nothing asks the --reference; add --defense activation-clustering:rule=exclusionary-reclassification"
        )
    path = Path(job.reference)
    try:
        other = _read_reference(path, job.contract)
        session = DeployedSession(other, profile_for(other, arithmetic=job.arithmetic))
    except (FileRefusedError, RuntimeGraphError, SessionError, ContractError, UnsupportedArithmeticError) as error:
        raise DataError(f"--reference {path.name}: {error}") from error
    if other.sha256 == artifact.sha256:
        raise DataError(
            f"--reference {path.name} is the audited file; name one that was trained without the flagged rows"
        )
    mine, its = _asked(artifact.contract), _asked(other.contract)
    if its != mine:
        raise DataError(f"--reference {path.name} answers {its}, the audited file {mine}; both must do the same")
    if artifact.contract.named and other.contract.named and other.contract.class_names != artifact.contract.class_names:
        raise DataError(
            f"--reference {path.name} names other classes than the audited file, or in another order; both must answer "
            "with the same"
        )
    return session


def _read_reference(path: Path, stated: StatedContract | None) -> Artifact:
    """A file that does not say how it is driven is driven as was stated of the audited one."""
    data = read_file(path)
    whole, _ = with_external_data(data, path.parent)
    says = any(entry.key == METADATA_KEY for entry in parse_model(whole).metadata_props)
    return Artifact.from_bytes(data, None if says else stated, folder=path.parent)


def _asked(contract: InputContract) -> str:
    return f"images of {contract.height}x{contract.width} with {contract.classes} classes"


def _named(job: Job, reference: DeployedSession) -> ReferenceFile:
    return ReferenceFile(file=Path(job.reference or "").name, sha256=reference.artifact.sha256)


def _answer(job: Job, loaded: _Loaded, emit: Emit) -> ImageSet:
    """Let the file answer the clean images, check that it is read rightly, and give them with their labels."""
    contract = loaded.session.artifact.contract
    logits = loaded.session.logits_of(loaded.clean)
    check_head(logits, contract)
    _require_numbers(logits)
    clean = loaded.clean if loaded.clean.labelled else labelled_by(logits, loaded.clean, contract)
    if contract.head != "sigmoid":
        answered = _accuracy(job, loaded.session, clean, logits)
        emit(answered)
        _check_reading(job, answered, contract.classes)
    if loaded.reference is not None and loaded.clean.labelled:
        _check_reference(job, loaded.reference, loaded.clean)
    return clean


def _check_reference(job: Job, reference: DeployedSession, clean: ImageSet) -> None:
    """A reference that is driven otherwise than it was trained answers about flagged rows what it does not know."""
    if reference.artifact.contract.head == "sigmoid":
        return
    logits = reference.logits_of(clean)
    if not np.isfinite(logits).all():
        raise DataError(f"--reference {Path(job.reference or '').name} answers clean images with NaN or infinity")
    try:
        _check_reading(
            job.model_copy(update={"expected_accuracy": None}),
            _accuracy(job, reference, clean, logits),
            reference.artifact.contract.classes,
        )
    except MisreadFileError as error:
        raise DataError(f"--reference {Path(job.reference or '').name}: {error}") from error


def _limited(job: Job) -> bool:
    return job.memory_bytes is not None and _CAN_LIMIT


class NoNumbersError(ValueError):
    """The file has no answer to some clean images, so that neither its accuracy nor what it does there is known."""


def _require_numbers(logits: Logits) -> None:
    """A file without a single answer goes on: the certificate says which weights are to blame."""
    silent = np.flatnonzero(~np.isfinite(logits).all(axis=1))
    if 0 < len(silent) < len(logits):
        raise NoNumbersError(
            f"{len(silent)} of {len(logits)} clean images are answered with NaN or infinity, image {silent[0]} of "
            "those drawn first; look for damaged weights or scales (`qdefense inspect` shows the layers) and export "
            "again"
        )


class MisreadFileError(ValueError):
    """The file is driven otherwise than it was trained: what would be measured is not the model that ships."""


def _accuracy(job: Job, session: DeployedSession, clean: ImageSet, logits: Logits) -> Answered:
    if not clean.labelled or not np.isfinite(logits).all():
        stated = None if clean.labelled else job.expected_accuracy
        accuracy = None if stated is None else Accuracy(value=stated, images=len(clean), source="stated")
        return Answered(clean_accuracy=accuracy)
    accuracy = Accuracy(value=float(np.mean(logits.argmax(axis=1) == clean.labels)), images=len(clean))
    return Answered(clean_accuracy=accuracy, candidates=score_candidates(session, clean, logits, seed=job.seed))


def _check_reading(job: Job, answered: Answered, classes: int) -> None:
    accuracy = answered.clean_accuracy
    if accuracy is None or accuracy.source == "stated":
        return
    better = answered.candidates[0] if answered.candidates else None
    if better is not None and gain(better) > MISREAD_MARGIN:
        if skill(better.accuracy, 1 / classes) < MIN_SKILL:
            raise MisreadFileError(
                f"clean accuracy on {better.images} images is {better.own_accuracy:.1%}, and {better.accuracy:.1%} at "
                f"best as other files are driven, where guessing gives {1 / classes:.1%}; check the labels and how the "
                "file is driven (`qdefense inspect` shows the contract)"
            )
        raise MisreadFileError(
            f"clean accuracy on {better.images} images is {better.own_accuracy:.1%} as the file is driven now, but "
            f"{better.accuracy:.1%} with {better.description}; say how the model was trained"
        )
    if job.expected_accuracy is not None and accuracy.value < job.expected_accuracy - MISREAD_MARGIN:
        raise MisreadFileError(
            f"clean accuracy is {accuracy.value:.1%}, {job.expected_accuracy:.1%} was expected; check how the file is "
            "driven (`qdefense inspect` shows the contract) and the labels"
        )


def _pass_over(job: Job, defenses: Sequence[Defense], emit: Emit) -> None:
    reason = "the file answers with a sigmoid per class: a multi-label model has no single target class to look for"
    for defense in defenses:
        passed_over = Verdict.NOT_APPLICABLE
        finding = Finding(defense=defense.name, kind=defense.kind, verdict=passed_over, reason=reason, seed=job.seed)
        emit(Found(finding=finding))
    emit(Finished(seconds_per_stage={}))


def _peak_memory() -> int | None:
    if not _CAN_LIMIT:
        return None
    import resource  # noqa: PLC0415 (not on every platform)

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _create_defenses(specs: tuple[str, ...]) -> list[Audited]:
    import torch  # noqa: PLC0415 (seconds; what is wrong with file or data is told before)

    from qdefense.defenses import DEFENSES  # noqa: PLC0415

    torch.set_num_threads(1)  # work is spread over classes: sums, and so reports, do not depend on the thread count
    defenses = [DEFENSES.create(spec) for spec in specs]
    for defense in defenses:
        if defense.kind not in _AUDITED_KINDS:
            raise SpecError(f"{defense.name} is a {defense.kind}, which no audit runs; see `qdefense defenses`")
    return defenses


def _create_repair(spec: str) -> Repair:
    from qdefense.defenses import DEFENSES, Repair  # noqa: PLC0415 (imports torch)

    repair = DEFENSES.create(spec)
    if not isinstance(repair, Repair):
        raise SpecError(f"{repair.name} is a {repair.kind}, which makes no new file; see `qdefense defenses`")
    return repair


def _calibrations(job: Job, artifact: Artifact, digest: str, surroundings: Environment) -> Calibrations:
    return Calibrations(
        artifact=file_identity(artifact.sha256, dict(artifact.external_files)),
        population=population_of(artifact, digest),
        conditions=conditions_of(surroundings, job.seed),
        files=(*(read_calibration(Path(name)) for name in job.calibrations), *shipped_calibrations()),
        rate=job.false_alarm_rate,
    )


def _check_lines(defenses: list[Audited], calibrations: Calibrations) -> None:
    """A rate that no calibration can promise is told before anything is measured."""
    from qdefense.defenses.interfaces import Calibratable  # noqa: PLC0415 (imports torch)

    for defense in defenses:
        if isinstance(defense, Calibratable):
            defense.line(calibrations)


def _open(job: Job, emit: Emit) -> Artifact:
    path = Path(job.model)
    data = read_file(path)
    emit(Opened(subject=Subject(file=path.name, sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))))
    return Artifact.from_bytes(data, job.contract, folder=path.parent)


def _describe(job: Job, artifact: Artifact) -> Subject:
    return Subject(
        file=Path(job.model).name,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        external_files=dict(artifact.external_files),
        contract=artifact.contract,
        inspection=artifact.inspection,
    )


def _with_runtime_facts(job: Job, artifact: Artifact) -> Subject:
    return _describe(job, artifact).model_copy(update={"runtime_facts": artifact.runtime_facts})


def _data_facts(read: ImageSet, fitted: ImageSet) -> DataFacts:
    return DataFacts(
        source=read.source,
        sha256=read.digest,
        images=len(fitted),
        classes=len(read.class_names),
        detection=read.detection,
        labelled=read.labelled,
        notes=fitted.notes,
    )


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
