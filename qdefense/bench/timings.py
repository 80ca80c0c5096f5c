"""Latency records as rows of a table, joined to the files that the bench measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from qdefense.bench.cohort import Cohort, Setting, rank_of
from qdefense.bench.figures import told_runtime
from qdefense.bench.records import BehaviourRecord, digest_of
from qdefense.bench.tables import Row
from qdefense.bench.timing_records import PLAIN, FileLatency, Interval, Machine


class LatencyRow(Row):
    """One variant of one file."""

    setting: Setting
    seed: int
    variant: str
    defense: str | None
    """The filter that stands before the file, as the rows of filters name it; null for the file alone."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    added_ms: Interval | None
    rows_per_second: Interval | None
    offline_rows: int
    peak_bytes: int | None
    before_bytes: int | None = None
    """The peak before the file was opened: Python and the libraries of whoever measures, torch among them."""
    load: tuple[float, float] | None
    """Processes that wanted a CPU in the minute before, and in the last one."""
    runtime: str
    yardstick_ms: float | None
    """The machine's pace meanwhile: what the same fixed work took; null of older records."""


def latency_rows(latencies: Iterable[FileLatency], cohort: Cohort) -> tuple[LatencyRow, ...]:
    """One row per file and variant, of the files that have a record of what they do.

    Of a file that was timed twice with the same filters on the same runtime, the last time counts; a time by older code
    than its file was measured by since, as `Cohort` leaves out such answers, does not.
    """
    rows: list[LatencyRow] = []
    for latency, record in _joined(latencies, cohort):
        if not _is_outdated(latency, record):
            filters = {
                one.variant: cohort.defense(one.name, one.settings)
                for one in latency.filters
                if one.variant is not None
            }
            here = {"runtime": cohort.runtime_at(record.network, latency.machine.runtime)}
            rows += _rows_of(latency, cohort.setting(record).model_copy(update=here), record.network.seed, filters)
    return tuple(sorted(rows, key=lambda row: (rank_of(row.setting), row.seed)))


def outdated_timings(latencies: Iterable[FileLatency], cohort: Cohort) -> int:
    """How many files were timed by older code than they were measured by since."""
    return sum(_is_outdated(latency, record) for latency, record in _joined(latencies, cohort))


def _is_outdated(latency: FileLatency, record: BehaviourRecord) -> bool:
    return latency.evaluation_revision < (record.evaluation_revision or 0)


def _joined(latencies: Iterable[FileLatency], cohort: Cohort) -> Iterator[tuple[FileLatency, BehaviourRecord]]:
    """The last time of each file, filters and runtime, with what the file does; none of a file that is in no table."""
    files = {(one.artifact_sha256, one.arithmetic): one for group in cohort.behaviours.values() for one in group}
    for latency in {_asked(one): one for one in latencies}.values():
        record = files.get((latency.artifact_sha256, latency.profile.arithmetic))
        if record is not None:
            yield latency, record


def _rows_of(latency: FileLatency, setting: Setting, seed: int, filters: Mapping[str, str]) -> Sequence[LatencyRow]:
    added = {one.name: one.difference_ms for one in latency.single_stream.added}
    offline = {one.name: one.rows_per_second for one in latency.offline.variants}
    memory = {one.name: {"peak_bytes": one.peak_bytes, "before_bytes": one.before_bytes} for one in latency.memory}
    return [
        LatencyRow(
            setting=setting,
            seed=seed,
            variant=timing.name,
            defense=None if timing.name == PLAIN else filters.get(timing.name, timing.name),
            p50_ms=timing.p50_ms,
            p90_ms=timing.p90_ms,
            p99_ms=timing.p99_ms,
            added_ms=added.get(timing.name),
            rows_per_second=offline.get(timing.name),
            offline_rows=latency.offline.rows,
            **memory.get(timing.name, {"peak_bytes": None}),
            load=_load(latency.machine),
            runtime=told_runtime(latency.machine.runtime),
            yardstick_ms=None if latency.yardstick_ms is None else latency.yardstick_ms.value,
        )
        for timing in latency.single_stream.variants
    ]


def _load(machine: Machine) -> tuple[float, float] | None:
    before, after = machine.load_before, machine.load_after
    return (before[0], after[0]) if before and after else None


def _asked(latency: FileLatency) -> str:
    filters = sorted(digest_of(name=one.name, settings=one.settings) for one in latency.filters)
    profile, runtime = (one.model_dump(mode="json") for one in (latency.profile, latency.machine.runtime))
    return digest_of(artifact=latency.artifact_sha256, profile=profile, filters=filters, runtime=runtime)
