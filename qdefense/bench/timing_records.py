"""What timing a file gives, and the line of ``latency.jsonl`` that it becomes, without what measures it.

``latency.jsonl`` lies beside ``records.jsonl``, one line per file, arithmetic, set of filters and runtime. Unlike there
the CPU is part of the ``key``: a latency is that of the machine it was taken on.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from qdefense.bench.records import SCHEMA_VERSION, Volatile
from qdefense.findings import Verdict
from qdefense.profile import Runtime, SessionProfile

PLAIN = "session"
"""The variant that the others are set against: the deployed file alone."""


class _Record(BaseModel):
    # Readers ignore unknown fields: a newer minor version may add some.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Interval(_Record):
    """A median and its 95 % bootstrap interval."""

    value: float
    low: float
    high: float


class VariantTiming(_Record):
    """One variant's calls, in milliseconds of wall clock."""

    name: str
    median_ms: Interval
    p50_ms: float
    p90_ms: float
    p99_ms: float
    cpu_ms: float = Field(description="median CPU time of a call, of all threads")
    rows_per_second: Interval = Field(description="rows of a call over its median time")


class AddedLatency(_Record):
    """What a variant takes beyond the first one, from the medians of the same rounds."""

    name: str
    over: str
    difference_ms: Interval
    ratio: Interval


class Scenario(_Record):
    """Variants that took turns in every round, on the same rows."""

    rows: int = Field(description="images per call; 1 is single-stream")
    rounds: int
    warm_up: int = Field(description="rounds before, which do not count")
    variants: tuple[VariantTiming, ...]
    added: tuple[AddedLatency, ...]


class PeakMemory(_Record):
    """Largest resident size of a fresh process that did nothing else (VmHWM, Linux only)."""

    name: str
    peak_bytes: int
    before_bytes: int = Field(description="the same before the model was opened: Python and its libraries")


class Machine(_Record):
    """Where it was measured, and how busy that was."""

    runtime: Runtime
    cpus: int = Field(description="CPUs that this process may use")
    load_before: tuple[float, ...]
    load_after: tuple[float, ...]


class LatencyRecord(_Record):
    """The latency of one file, plain and with defenses that run per input."""

    artifact_sha256: str
    profile: SessionProfile
    threads: int = Field(description="calls into the session that a filter may have side by side")
    seed: int
    single_stream: Scenario
    offline: Scenario
    machine: Machine
    yardstick_ms: Interval | None = Field(
        default=None,
        description="work that is alike for every file, timed in turns with the calls of one image: the machine's pace",
    )
    memory: tuple[PeakMemory, ...] = ()


class TimedFilter(_Record):
    """An `InputFilter` that the matrix names for the file, and the variant behind it, or why there is none."""

    text: str = Field(description="as the matrix writes it")
    name: str
    settings: dict[str, Any] = Field(description="every default filled in")
    variant: str | None = Field(description="null where the filter could not be fitted")
    verdict: Verdict | None = Field(default=None, description="NOT_MEASURED or NOT_APPLICABLE where it was not fitted")
    reason: str = ""


class FileLatency(LatencyRecord):
    """A line of ``latency.jsonl``; a later one of the same key replaces an earlier one."""

    schema_version: str = SCHEMA_VERSION
    key: str = Field(description="sha256 of artifact, profile, filters, images, seed, rounds, runtime and revisions")
    data_sha256: str = Field(
        description="digest of the test images, and of how many of them the filters were fitted on"
    )
    evaluation_revision: int = Field(
        default=1,
        description="of the evaluator's code (`EVALUATION_REVISION`); lines older than the field are of the first",
    )
    filters: tuple[TimedFilter, ...] = ()
    volatile: Volatile

    @property
    def unmeasured(self) -> tuple[TimedFilter, ...]:
        """The filters that should have been timed, and were not."""
        return tuple(one for one in self.filters if one.verdict is Verdict.NOT_MEASURED)


class Rounds(_Record):
    """How often to measure."""

    single_stream: int = Field(default=200, ge=1)
    offline: int = Field(default=15, ge=1)
    warm_up: int = Field(default=3, ge=0)
