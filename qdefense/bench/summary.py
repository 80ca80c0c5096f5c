"""A folder of results in one model: where the records come from, every table of them, and what is missing."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdefense.bench.budgets import BudgetRow, budget_rows
from qdefense.bench.cohort import Cohort, Status, network_id, reason_of, status_of
from qdefense.bench.contrasts import ContrastRow, GapRow, contrast_rows, gap_rows, trials_apart, unpaired_trials
from qdefense.bench.figures import told_runtime
from qdefense.bench.matrix import read_matrix
from qdefense.bench.published import CRITERIA, Criterion, PublishedRow, published_rows
from qdefense.bench.records import (
    BehaviourRecord,
    ControlRecord,
    DataFacts,
    DefenseRecord,
    QuantizationRecord,
    Record,
    TrainingRecord,
)
from qdefense.bench.store import (
    LATENCY,
    MANIFEST,
    RECORDS,
    Store,
    StoreError,
    read_latencies,
    read_manifest,
    read_records,
)
from qdefense.bench.tables import (
    BehaviourRow,
    DatasetRow,
    FilterRow,
    RepairRow,
    Row,
    ScanRow,
    behaviour_rows,
    dataset_rows,
    filter_rows,
    repair_rows,
    scan_rows,
)
from qdefense.bench.timing_records import FileLatency
from qdefense.bench.timings import LatencyRow, latency_rows, outdated_timings

SCHEMA_VERSION = "1.7"
"""1.1: ``budgets``. 1.3: lowest and highest network of pooled rates, ``answers_lost``, AUROC of rows within a label.

1.4: ``refused`` repairs, ``before_bytes`` of memory, ``apart``, ``outdated_timings``. 1.5: ``without_line`` and
``weaknesses`` of filters, ``failed`` files of a poison budget. 1.6: ``control`` and ``uncontrolled`` of what files do.
1.7: their ``control_fpr``, ``control`` of repairs.
"""


class Missing(Row):
    """A work item of the matrix without a record."""

    stage: str
    title: str
    why: str


@dataclass(frozen=True, kw_only=True)
class Results:
    """What lies in a folder of results; ``missing`` is None where no matrix says what should be there."""

    name: str
    folder: str
    records: tuple[Record, ...]
    data: tuple[DataFacts, ...]
    digests: dict[str, str]
    latencies: tuple[FileLatency, ...] = ()
    missing: tuple[Missing, ...] | None = None
    matrix: str | None = None


class NetworksRow(Row):
    """The networks that rows are of."""

    data: str
    architecture: str
    attack: str
    seeds: tuple[int, ...]
    failed: int


class Unanswered(Row):
    """Trials without an answer, and the reason that they give."""

    stage: str
    defense: str
    access: str
    status: Status
    reason: str
    keys: tuple[str, ...]


class Environment(Row):
    """Where the records were made; each tuple holds every value that some record has."""

    versions: dict[str, tuple[str, ...]]
    runtimes: tuple[str, ...]
    sessions: tuple[str, ...]
    precisions: dict[str, str]
    """Label to full name, where they differ."""
    schema_versions: tuple[str, ...]


class Effort(Row):
    """What may differ between two equal runs."""

    hosts: tuple[str, ...]
    seconds: float
    first: str
    last: str


class BenchReport(Row):
    """Everything that the page, the Markdown and the JSON show."""

    schema_version: str = SCHEMA_VERSION
    name: str
    folder: str
    matrix: str | None
    records: int
    digests: dict[str, str]
    data: tuple[DataFacts, ...]
    environment: Environment
    networks: tuple[NetworksRow, ...]
    superseded: int
    unpaired: int
    """Trials of quantized files that were not made of the FP32 file beside them."""
    apart: int = 0
    """Trials of quantized files whose FP32 file was measured on another runtime only."""
    outdated_timings: int = 0
    """Latency records of files that newer code measured since."""
    missing: tuple[Missing, ...] | None
    unanswered: tuple[Unanswered, ...]
    behaviour: tuple[BehaviourRow, ...]
    scans: tuple[ScanRow, ...]
    dataset_scans: tuple[DatasetRow, ...]
    filters: tuple[FilterRow, ...]
    repairs: tuple[RepairRow, ...]
    budgets: tuple[BudgetRow, ...] = ()
    contrasts: tuple[ContrastRow, ...]
    gaps: tuple[GapRow, ...]
    criteria: tuple[Criterion, ...]
    published: tuple[PublishedRow, ...]
    latency: tuple[LatencyRow, ...]
    volatile: Effort


def read_results(folder: Path, matrix: Path | None = None) -> Results:
    """Read a folder that `bench` wrote; of several records of a key the last one.

    With a matrix, also what is missing of it.

    Raises:
        StoreError: there are no records, or a file is broken.
        MatrixError, SpecError: the matrix cannot be used.
        DataError: images of the matrix that the folder has never seen cannot be read.
        OSError: a file cannot be read.
    """
    records: dict[str, Record] = {}
    for record in read_records(folder / RECORDS):
        records.pop(record.key, None)  # the place of a record is that of its last line
        records[record.key] = record
    if not records:
        raise StoreError(
            f"{folder / RECORDS}: no records; `qdefense bench MATRIX.toml` writes them to results/ beside the matrix"
        )
    there = [path for path in (folder / RECORDS, folder / MANIFEST, folder / LATENCY) if path.exists()]
    return Results(
        name=_name_of(folder.resolve()) if matrix is None else read_matrix(matrix).bench.name,
        folder=folder.resolve().name,
        records=tuple(records.values()),
        data=read_manifest(folder / MANIFEST).data,
        latencies=tuple({one.key: one for one in read_latencies(folder / LATENCY)}.values()),
        missing=None if matrix is None else _missing(folder, matrix),
        matrix=None if matrix is None else matrix.name,
        digests={path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in there},
    )


def _name_of(folder: Path) -> str:
    """Without the matrix, which has a name: `bench` puts ``results`` beside the matrix, whose folder says more."""
    return folder.parent.name if folder.name == "results" else folder.name


def _missing(folder: Path, matrix: Path) -> tuple[Missing, ...]:
    from qdefense.bench.cells import plan_cells  # noqa: PLC0415 (plans look up attacks and defenses, which need torch)
    from qdefense.bench.running import evaluation_of, sources_of  # noqa: PLC0415
    from qdefense.bench.survey import survey  # noqa: PLC0415

    table, store = read_matrix(matrix), Store(folder)
    items = survey(plan_cells(table, sources_of(table, store, pin=False)), store, evaluation_of(table))
    return tuple(
        Missing(stage=item.stage, title=item.title, why=item.blocked or "not done yet")
        for item in items
        if item.state == "missing"
    )


def summarise(results: Results, cohort: Cohort) -> BenchReport:
    """Every table; ``cohort`` holds the records of ``results``."""
    return BenchReport(
        name=results.name,
        folder=results.folder,
        matrix=results.matrix,
        records=len(results.records),
        digests=results.digests,
        data=results.data,
        environment=_environment(results.records, cohort),
        networks=_networks(results.records, cohort),
        superseded=cohort.superseded,
        unpaired=unpaired_trials(cohort),
        apart=trials_apart(cohort),
        outdated_timings=outdated_timings(results.latencies, cohort),
        missing=results.missing,
        unanswered=_unanswered(results.records, cohort),
        behaviour=behaviour_rows(cohort),
        scans=scan_rows(cohort),
        dataset_scans=dataset_rows(cohort),
        filters=filter_rows(cohort),
        repairs=repair_rows(cohort),
        budgets=budget_rows(cohort, results.data),
        contrasts=contrast_rows(cohort),
        gaps=gap_rows(cohort),
        criteria=CRITERIA,
        published=published_rows(cohort),
        latency=latency_rows(results.latencies, cohort),
        volatile=_effort(results.records),
    )


def _networks(records: Sequence[Record], cohort: Cohort) -> tuple[NetworksRow, ...]:
    seeds: defaultdict[tuple[str, str, str], set[int]] = defaultdict(set)
    failed = Counter(_place(one, cohort) for one in _failed_makings(records) if isinstance(one, TrainingRecord))
    for record in records:
        seeds[_place(record, cohort)].add(record.network.seed)
    return tuple(
        NetworksRow(data=data, architecture=name, attack=attack, seeds=tuple(sorted(found)), failed=failed[place])
        for place, found in sorted(seeds.items())
        for data, name, attack in [place]
    )


def _place(record: Record, cohort: Cohort) -> tuple[str, str, str]:
    return record.network.data, cohort.architecture(record.network), cohort.attack(record.network)


def _failed_makings(records: Sequence[Record]) -> list[TrainingRecord | QuantizationRecord]:
    """Trainings and quantizations without a file, where no later try gave one."""
    makings = [one for one in records if isinstance(one, TrainingRecord | QuantizationRecord)]
    made = {_making(one) for one in makings if not one.failed}
    return [one for one in makings if one.failed and _making(one) not in made]


def _making(record: TrainingRecord | QuantizationRecord) -> tuple[str, ...]:
    name = network_id(record.network)
    if isinstance(record, TrainingRecord):
        return (name,)
    return name, record.precision, "" if record.calibration is None else record.calibration.model_dump_json()


def _unanswered(records: Sequence[Record], cohort: Cohort) -> tuple[Unanswered, ...]:
    groups: defaultdict[tuple[str, str, str, Status, str], list[str]] = defaultdict(list)
    for making in _failed_makings(records):
        groups[making.stage, "", "", "failed", making.reason].append(making.key)
    for behaviour in (one for group in cohort.behaviours.values() for one in group if one.failed):
        groups[behaviour.stage, "", "", "failed", behaviour.reason].append(behaviour.key)
    for control in cohort.failed_controls:
        groups[control.stage, "", "", "failed", control.reason].append(control.key)
    for trial in (one for group in cohort.defenses.values() for one in group):
        if status_of(trial) != "measured":
            where = (trial.stage, trial.defense, trial.access, status_of(trial), reason_of(trial))
            groups[where].append(trial.key)
    return tuple(
        Unanswered(stage=stage, defense=name, access=access, status=status, reason=reason, keys=tuple(sorted(keys)))
        for (stage, name, access, status, reason), keys in sorted(groups.items())
    )


def _environment(records: Sequence[Record], cohort: Cohort) -> Environment:
    trials = [one for one in records if isinstance(one, BehaviourRecord | ControlRecord | DefenseRecord)]
    versions: defaultdict[str, set[str]] = defaultdict(set)
    for record in records:
        for name, version in record.versions.items():
            versions[name].add(version)
    return Environment(
        versions={name: tuple(sorted(versions[name])) for name in sorted(versions)},
        runtimes=_distinct(told_runtime(one.runtime) for one in trials if one.runtime is not None),
        sessions=_distinct(
            f"optimization {one.profile.optimization}, {one.profile.arithmetic} arithmetic, "
            f"threads {one.profile.threads}, batch {one.profile.batch}"
            for one in trials
            if one.profile is not None
        ),
        precisions={label: full for full, label in sorted(cohort.precisions.items()) if label != full},
        schema_versions=_distinct(one.schema_version for one in records),
    )


def _distinct(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(values)))


def _effort(records: Sequence[Record]) -> Effort:
    times = sorted(record.volatile.at for record in records)
    return Effort(
        hosts=_distinct(record.volatile.host for record in records),
        seconds=round(sum(record.volatile.seconds for record in records), 1),
        first=times[0],
        last=times[-1],
    )
