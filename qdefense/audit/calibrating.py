"""Calibrating: every clean model is audited in a worker of its own, its report kept, and entries made of the scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdefense.artifact import Artifact
from qdefense.audit.events import Job
from qdefense.audit.fit import resize_for
from qdefense.audit.provenance import conditions_of
from qdefense.audit.supervisor import ProgressBar, UsageProblemError, run_audit
from qdefense.calibration import (
    CalibrationEntry,
    CalibrationError,
    Conditions,
    Population,
    driven,
    file_identity,
    population_of,
)
from qdefense.converters.contract import ContractError
from qdefense.converters.reading import FileRefusedError
from qdefense.data.opening import open_data
from qdefense.files import write_atomically
from qdefense.findings import Finding, ScanResult
from qdefense.report.model import Environment, Report
from qdefense.report.reading import ReportError, read_report

MAX_NOT_MEASURED = 0.1
"""Largest share of a population's models that the scan may leave without a score: who is left out is no chance."""


_TRUTH = ".truth.json"
"""Of files that only evaluators open (law 3)."""


@dataclass(frozen=True, kw_only=True)
class CleanModel:
    """A file to calibrate on, and the job that audits it."""

    job: Job
    identity: str
    population: Population
    external_files: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What people call it."""
        return Path(self.job.model).name


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What is asked of every model."""

    spec: str
    defense: str
    settings: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A model and the report about it."""

    model: CleanModel
    report: Report
    finding: Finding | None

    @property
    def score(self) -> float | None:
        """The scan's score, whatever its verdict."""
        result = None if self.finding is None else self.finding.result
        return result.score if isinstance(result, ScanResult) else None

    @property
    def reason(self) -> str:
        """Why there is no score."""
        return self.finding.reason if self.finding is not None else "; ".join(self.report.gate.reasons)


def scan_of(spec: str) -> Scan:
    """The scan that a ``NAME:key=value,...`` text names.

    Raises:
        SpecError: it names nothing known.
        CalibrationError: it has no score that clean models could calibrate, or the text sets its threshold.
    """
    from qdefense.defenses import DEFENSES  # noqa: PLC0415 (imports torch)
    from qdefense.defenses.interfaces import Calibratable  # noqa: PLC0415

    scan = DEFENSES.create(spec)
    if not isinstance(scan, Calibratable):
        raise CalibrationError(f"{spec!r} gives a model no score to calibrate; name a model scan")
    if scan.line(None).threshold.source == "user":
        raise CalibrationError(f"{spec!r} sets the threshold, which calibration is to find; leave it out")
    return Scan(spec=spec, defense=spec.partition(":")[0], settings=scan.calibrated_settings)


def read_models(jobs: Sequence[Job]) -> list[CleanModel]:
    """Read every file before the first of them is audited.

    Raises:
        OSError: a file cannot be read.
        FileRefusedError, ContractError: one is nothing that could be audited.
        DataError: the images cannot be used.
        CalibrationError: the same file is named twice.
    """
    models: dict[str, CleanModel] = {}
    digests: dict[str, str] = {}
    for job in jobs:
        model = _read_model(job, digests)
        twin = models.setdefault(model.identity, model)
        if twin is not model:
            raise CalibrationError(
                f"{twin.job.model} and {job.model} are the same file, which counts for one model; name it once"
            )
    return list(models.values())


def _read_model(job: Job, digests: dict[str, str]) -> CleanModel:
    try:
        artifact = Artifact.read(Path(job.model), job.contract)
    except (FileRefusedError, ContractError) as error:
        raise type(error)(f"{Path(job.model).name}: {error}") from error
    if job.data is None:
        raise CalibrationError("there are no images to scan the models on; name the data")
    resize = resize_for(artifact.contract)
    if repr(resize) not in digests:
        images = open_data(job.data, split=job.split, limit=job.limit, seed=job.seed, resize=resize)
        digests[repr(resize)] = images.digest
    return CleanModel(
        job=job,
        identity=file_identity(artifact.sha256, dict(artifact.external_files)),
        population=population_of(artifact, digests[repr(resize)]),
        external_files=tuple(name for name, _ in artifact.external_files),
    )


class ReportFolder:
    """Reports of earlier audits, found by what they are about and never by their names.

    Attributes:
        unreadable: the files of the folder that hold no report, each with the reason.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._reports: dict[str, list[Report]] = {}
        self.unreadable: list[str] = []
        for path in sorted(folder.glob("*.json")):
            if path.name.endswith(_TRUTH):
                continue
            try:
                report = read_report(path.read_bytes())
            except ReportError as error:
                self.unreadable.append(f"{path.name}: {error}")
            else:
                self._reports.setdefault(_identity_of(report), []).append(report)

    def find(self, model: CleanModel, scan: Scan, surroundings: Environment | None = None) -> Measured | None:
        """The report on such a scan of this model: same file, contract, images, settings and seed.

        With ``surroundings`` only one that was made with the same versions on the same kind of machine.
        """
        for report in self._reports.get(model.identity, []):
            made = report.environment
            if surroundings and (made.versions, made.runtime) != (surroundings.versions, surroundings.runtime):
                continue
            found = _finding(report, model, scan)
            if found is not None:
                return Measured(model=model, report=report, finding=found)
        return None

    def keep(self, model: CleanModel, scan: Scan, report: Report) -> Measured:
        """Write a report to the folder.

        Raises:
            CalibrationError: file or images are no longer those that were read at first.
            OSError: it cannot be written.
        """
        data = report.subject.data
        if report.subject.contract is None:  # refused, or ended, before it was known: the gate says why
            return Measured(model=model, report=report, finding=None)
        if _identity_of(report) != model.identity or (data and data.sha256 != model.population.data_sha256):
            raise CalibrationError(f"{model.name} or its images changed while it was audited; start again")
        about = json.dumps([model.population.model_dump(mode="json"), scan.settings, model.job.seed], sort_keys=True)
        name = f"{model.identity[:16]}-{hashlib.sha256(about.encode()).hexdigest()[:8]}.json"
        write_atomically(self._folder / name, f"{report.model_dump_json(indent=2)}\n".encode())
        self._reports.setdefault(model.identity, []).append(report)
        return Measured(model=model, report=report, finding=_finding(report, model, scan))


def _identity_of(report: Report) -> str:
    return file_identity(report.subject.sha256 or "", report.subject.external_files)


def _finding(report: Report, model: CleanModel, scan: Scan) -> Finding | None:
    contract, data = report.subject.contract, report.subject.data
    if contract is None or driven(contract) != model.population.contract:
        return None
    if data is None or data.sha256 != model.population.data_sha256:
        return None
    for finding in report.findings:
        settings = {name: value for name, value in finding.settings.items() if name != "threshold"}
        if (finding.defense, settings, finding.seed) == (scan.defense, scan.settings, model.job.seed):
            return finding
    return None


def measure_models(
    models: Sequence[CleanModel],
    scan: Scan,
    folder: ReportFolder,
    surroundings: Environment,
    *,
    on_progress: ProgressBar,
    on_measured: Callable[[Measured, bool], None],
    verbose: bool = False,
) -> list[Measured]:
    """Audit what no report is kept of, one model after the other; ``on_measured`` hears of each whether it was kept.

    Raises:
        UsageProblemError: data, options and a model do not fit.
    """
    measured = []
    for done, model in enumerate(models):
        on_progress("models", done, len(models))
        kept = folder.find(model, scan, surroundings)
        found = kept or folder.keep(model, scan, _audit(model, scan, on_progress, verbose=verbose))
        on_measured(found, kept is not None)
        measured.append(found)
    on_progress("models", len(models), len(models))
    return measured


def _audit(model: CleanModel, scan: Scan, on_progress: ProgressBar, *, verbose: bool) -> Report:
    job = model.job.model_copy(update={"defenses": (scan.spec,)})
    try:
        return run_audit(job, required=(scan.defense,), on_progress=on_progress, verbose=verbose)
    except UsageProblemError as error:
        raise UsageProblemError(f"{model.name}: {error}") from error


def make_entries(measured: Sequence[Measured], scan: Scan) -> tuple[tuple[CalibrationEntry, ...], tuple[str, ...]]:
    """One entry for each population, and what kept a population from getting one.

    Raises:
        CalibrationError: models of one population were audited under different conditions.
    """
    groups: dict[str, list[Measured]] = {}
    for entry in measured:
        groups.setdefault(entry.model.population.model_dump_json(), []).append(entry)
    entries, problems = [], []
    for _, group in sorted(groups.items()):
        missing = [entry for entry in group if entry.score is None]
        if len(missing) > MAX_NOT_MEASURED * len(group):
            problems.append(_problem(group, missing))
        else:
            entries.append(_entry(group, scan))
    return tuple(entries), tuple(problems)


def _problem(group: list[Measured], missing: list[Measured]) -> str:
    named = "; ".join(f"{entry.model.name}: {entry.reason}" for entry in missing[:3])
    more = f"; and {len(missing) - 3} more" if len(missing) > 3 else ""
    return (
        f"{len(missing)} of {len(group)} {group[0].model.population.scheme} models have no score, more than "
        f"{MAX_NOT_MEASURED:.0%}: {named}{more}"
    )


def _entry(group: list[Measured], scan: Scan) -> CalibrationEntry:
    scored = [entry for entry in group if entry.score is not None]
    return CalibrationEntry(
        defense=scan.defense,
        settings=scan.settings,
        population=group[0].model.population,
        conditions=_conditions(scored),
        scores=tuple(sorted(entry.score for entry in scored if entry.score is not None)),
        artifacts=tuple(sorted(entry.model.identity for entry in scored)),
        not_measured=len(group) - len(scored),
    )


def _conditions(scored: list[Measured]) -> Conditions:
    first, *others = [conditions_of(entry.report.environment, entry.model.job.seed) for entry in scored]
    for entry, other in zip(scored[1:], others, strict=True):
        if other != first:
            different = ", ".join(other.differences(first, f"{scored[0].model.name}:"))
            raise CalibrationError(
                f"{entry.model.name} and {scored[0].model.name} were audited under different conditions: {different}; "
                "audit all of them on one machine, with the same versions"
            )
    return first
