"""What a defense adds to a deployed file's latency: single-stream and offline, variants taking turns, and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil
from pydantic import BaseModel, ConfigDict, Field

from qdefense.bench.timing_statistics import (
    Estimate,
    difference_estimate,
    median_estimate,
    percentile,
    ratio_estimate,
)
from qdefense.data.images import Pixels
from qdefense.defenses import FittedFilter
from qdefense.session import DeployedSession, Runtime, SessionProfile, runtime

Variant = Callable[[Pixels], object]
PLAIN = "session"
"""The variant that the others are set against: the deployed file alone."""

_STATUS = Path("/proc/self/status")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


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
    memory: tuple[PeakMemory, ...] = ()


class Rounds(_Record):
    """How often to measure."""

    single_stream: int = Field(default=200, ge=1)
    offline: int = Field(default=15, ge=1)
    warm_up: int = Field(default=3, ge=0)


def deployed_variants(session: DeployedSession, filters: Mapping[str, FittedFilter]) -> dict[str, Variant]:
    """The session alone, then the session behind each filter: ``decide``, then the logits."""

    def behind(fitted: FittedFilter) -> Variant:
        return lambda x: (fitted.decide(x), session.logits(x))

    return {PLAIN: session.logits, **{f"{PLAIN} + {name}": behind(fitted) for name, fitted in filters.items()}}


def measure_latency(
    session: DeployedSession,
    variants: Mapping[str, Variant],
    x: Pixels,
    *,
    batch: int,
    rounds: Rounds | None = None,
    seed: int = 0,
    threads: int = 1,
) -> LatencyRecord:
    """Time variants on ``x: (N, 3, H, W) float32 in [0, 1]``: one row a call, then ``batch`` rows a call.

    Each round calls every variant once on the same rows, the next ones of ``x`` each round; the first variant is the
    base of what the others add. ``profile.batch`` of the session says how many rows the runtime gets at once.

    Raises:
        ValueError: there is no variant, or ``x`` has fewer than ``batch`` rows.
    """
    chosen = rounds or Rounds()
    if not variants or not 1 <= batch <= len(x):
        raise ValueError(
            f"{len(variants)} variants, batches of {batch} from {len(x)} images; give at least one of each"
        )
    before = psutil.getloadavg()
    single = _scenario(variants, x, rows=1, rounds=chosen.single_stream, warm_up=chosen.warm_up, seed=seed)
    offline = _scenario(variants, x, rows=batch, rounds=chosen.offline, warm_up=chosen.warm_up, seed=seed)
    return LatencyRecord(
        artifact_sha256=session.artifact.sha256,
        profile=session.profile,
        threads=threads,
        seed=seed,
        single_stream=single,
        offline=offline,
        machine=Machine(runtime=runtime(), cpus=_cpus(), load_before=before, load_after=psutil.getloadavg()),
    )


class Timings(NamedTuple):
    """Milliseconds of each round: wall clock, and CPU of the whole process."""

    wall: list[float]
    cpu: list[float]


def time_in_turns(
    variants: Mapping[str, Variant], x: Pixels, *, rows: int, rounds: int, warm_up: int = 0
) -> dict[str, Timings]:
    """Wall and CPU time of every variant in every round, so that a busy machine slows all alike."""
    spent = {name: Timings([], []) for name in variants}
    for turn in range(-warm_up, rounds):
        start = (turn + warm_up) * rows % (len(x) - rows + 1)
        for name, variant in variants.items():
            wall, cpu = time.perf_counter(), time.process_time()
            variant(x[start : start + rows])
            if turn >= 0:
                spent[name].wall.append(1e3 * (time.perf_counter() - wall))
                spent[name].cpu.append(1e3 * (time.process_time() - cpu))
    return spent


def peak_memory(name: str, build: Callable[[], Callable[[], object]]) -> PeakMemory | None:
    """Run what ``build`` gives in a fresh process, and read off its peak; None where the system does not tell.

    ``build`` is sent to the process, and must be picklable: a function of a module, or a `functools.partial` of one.
    """
    if not _STATUS.exists():
        return None
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        before, peak = pool.submit(_build_and_run, build).result()
    return PeakMemory(name=name, peak_bytes=peak, before_bytes=before)


def _build_and_run(build: Callable[[], Callable[[], object]]) -> tuple[int, int]:
    before = _peak_bytes()
    build()()
    return before, _peak_bytes()


def _peak_bytes() -> int:
    # Not ru_maxrss: a process inherits that of the one which started it.
    lines = _STATUS.read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _scenario(
    variants: Mapping[str, Variant], x: Pixels, *, rows: int, rounds: int, warm_up: int, seed: int
) -> Scenario:
    spent = time_in_turns(variants, x, rows=rows, rounds=rounds, warm_up=warm_up)
    base, *others = spent
    return Scenario(
        rows=rows,
        rounds=rounds,
        warm_up=warm_up,
        variants=tuple(_timing(name, timings, rows, seed) for name, timings in spent.items()),
        added=tuple(
            AddedLatency(
                name=name,
                over=base,
                difference_ms=_interval(difference_estimate(spent[name].wall, spent[base].wall, seed=seed)),
                ratio=_interval(ratio_estimate(spent[name].wall, spent[base].wall, seed=seed)),
            )
            for name in others
        ),
    )


def _timing(name: str, timings: Timings, rows: int, seed: int) -> VariantTiming:
    median = median_estimate(timings.wall, seed=seed)
    return VariantTiming(
        name=name,
        median_ms=_interval(median),
        p50_ms=percentile(timings.wall, 0.5),
        p90_ms=percentile(timings.wall, 0.9),
        p99_ms=percentile(timings.wall, 0.99),
        cpu_ms=median_estimate(timings.cpu, seed=seed).value,
        rows_per_second=Interval(
            value=1e3 * rows / median.value, low=1e3 * rows / median.high, high=1e3 * rows / median.low
        ),
    )


def _interval(estimate: Estimate) -> Interval:
    return Interval(**estimate._asdict())


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
