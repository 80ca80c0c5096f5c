"""The part of latency records that tables and charts show, joined to the files that the bench measured.

``latency.jsonl`` lies beside ``records.jsonl`` and need not be there: one line per file, as `qdefense.bench.latency`
makes them. Reading them here needs none of what measuring does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from qdefense.bench.cohort import Cohort, Setting, rank_of
from qdefense.bench.store import StoreError
from qdefense.bench.tables import Row
from qdefense.converters.runtime_graph import Arithmetic

LATENCY = "latency.jsonl"


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Interval(_Part):
    """A median and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class Timing(_Part):
    """One variant of how the file is called, in milliseconds."""

    name: str
    p50_ms: float
    p90_ms: float
    p99_ms: float
    rows_per_second: Interval


class Added(_Part):
    """What a variant takes beyond the file alone."""

    name: str
    difference_ms: Interval


class Scenario(_Part):
    """Variants that took turns on the same rows."""

    rows: int
    variants: tuple[Timing, ...]
    added: tuple[Added, ...] = ()


class Peak(_Part):
    """Largest resident size of a process that did nothing else."""

    name: str
    peak_bytes: int


class Profile(_Part):
    """Of a session profile the part that names the file's arithmetic."""

    arithmetic: Arithmetic = "as-run"


class FileLatency(_Part):
    """The latency of one file, plain and with filters: batch 1, and as many rows as the offline scenario gives."""

    artifact_sha256: str
    profile: Profile = Profile()
    single_stream: Scenario
    offline: Scenario
    memory: tuple[Peak, ...] = ()


class LatencyRow(Row):
    """One variant of one file."""

    setting: Setting
    seed: int
    variant: str
    defense: str | None
    """The filter that stands before the file; null for the file alone."""
    p50_ms: float
    p90_ms: float
    p99_ms: float
    added_ms: Interval | None
    rows_per_second: Interval | None
    offline_rows: int
    peak_bytes: int | None


def read_latencies(path: Path) -> tuple[FileLatency, ...]:
    """The lines of a latency file; none where there is no file.

    Raises:
        StoreError: a line is no latency record.
    """
    if not path.exists():
        return ()
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            found.append(FileLatency.model_validate_json(line))
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise StoreError(
                f"{path}, line {number}: no latency record ({where}: {problem['msg']}); delete the line"
            ) from error
    return tuple(found)


def latency_rows(latencies: Iterable[FileLatency], cohort: Cohort) -> tuple[LatencyRow, ...]:
    """One row per file and variant, of the files that have a record of what they do."""
    files = {(one.artifact_sha256, one.arithmetic): one for group in cohort.behaviours.values() for one in group}
    rows: list[LatencyRow] = []
    for latency in latencies:
        record = files.get((latency.artifact_sha256, latency.profile.arithmetic))
        if record is not None:
            rows += _rows_of(latency, cohort.setting(record), record.network.seed)
    return tuple(sorted(rows, key=lambda row: (rank_of(row.setting), row.seed)))


def _rows_of(latency: FileLatency, setting: Setting, seed: int) -> Sequence[LatencyRow]:
    added = {one.name: one.difference_ms for one in latency.single_stream.added}
    offline = {one.name: one.rows_per_second for one in latency.offline.variants}
    peaks = {one.name: one.peak_bytes for one in latency.memory}
    return [
        LatencyRow(
            setting=setting,
            seed=seed,
            variant=timing.name,
            defense=timing.name.partition(" + ")[2] or None,
            p50_ms=timing.p50_ms,
            p90_ms=timing.p90_ms,
            p99_ms=timing.p99_ms,
            added_ms=added.get(timing.name),
            rows_per_second=offline.get(timing.name),
            offline_rows=latency.offline.rows,
            peak_bytes=peaks.get(timing.name),
        )
        for timing in latency.single_stream.variants
    ]
