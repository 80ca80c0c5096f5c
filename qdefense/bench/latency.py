"""What a defense adds to a deployed file's latency: single-stream and offline, variants taking turns, and memory."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import psutil

from qdefense.bench.timing_records import (
    PLAIN,
    AddedLatency,
    Interval,
    LatencyRecord,
    Machine,
    PeakMemory,
    Rounds,
    Scenario,
    VariantTiming,
)
from qdefense.bench.timing_statistics import (
    Estimate,
    difference_estimate,
    median_estimate,
    percentile,
    ratio_estimate,
)
from qdefense.data.images import Pixels
from qdefense.defenses import FittedFilter
from qdefense.session import DeployedSession, runtime

Variant = Callable[[Pixels], object]
_YARDSTICK = "yardstick"
_YARDSTICK_SIDE = 256
_STATUS = Path("/proc/self/status")


def behind(name: str) -> str:
    """What the variant is called that runs behind a filter."""
    return f"{PLAIN} + {name}"


def deployed_variants(session: DeployedSession, filters: Mapping[str, FittedFilter]) -> dict[str, Variant]:
    """The session alone, then the session behind each filter: ``decide``, then the logits."""

    def guarded(fitted: FittedFilter) -> Variant:
        return lambda x: (fitted.decide(x), session.logits(x))

    return {PLAIN: session.logits, **{behind(name): guarded(fitted) for name, fitted in filters.items()}}


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
    base of what the others add. ``profile.batch`` of the session says how many rows the runtime gets at once. Calls of
    one row take turns with the `yardstick`, too.

    Raises:
        ValueError: there is no variant, or ``x`` has fewer than ``batch`` rows.
    """
    chosen = rounds or Rounds()
    if not variants or not 1 <= batch <= len(x):
        raise ValueError(
            f"{len(variants)} variants, batches of {batch} from {len(x)} images; give at least one of each"
        )
    before = psutil.getloadavg()
    measured = {**variants, _YARDSTICK: yardstick()}
    one_by_one = time_in_turns(measured, x, rows=1, rounds=chosen.single_stream, warm_up=chosen.warm_up)
    pace = median_estimate(one_by_one.pop(_YARDSTICK).wall, seed=seed)
    many = time_in_turns(variants, x, rows=batch, rounds=chosen.offline, warm_up=chosen.warm_up)
    return LatencyRecord(
        artifact_sha256=session.artifact.sha256,
        profile=session.profile,
        threads=threads,
        seed=seed,
        single_stream=_scenario(one_by_one, rows=1, warm_up=chosen.warm_up, seed=seed),
        offline=_scenario(many, rows=batch, warm_up=chosen.warm_up, seed=seed),
        machine=Machine(runtime=runtime(), cpus=_cpus(), load_before=before, load_after=psutil.getloadavg()),
        yardstick_ms=_interval(pace),
    )


def yardstick() -> Variant:
    """Work that is alike for every file: a product of two square float32 matrices, on the threads that torch may use.

    What it took tells files apart from the hours in which they were timed: a shared machine's pace changes by more than
    most files differ.
    """
    import torch  # noqa: PLC0415 (a process that measures its memory must not hold it)

    ones = torch.ones(_YARDSTICK_SIDE, _YARDSTICK_SIDE)
    return lambda _x: ones @ ones


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
    # Of a Ctrl-C, which reaches both processes, only this one has to tell.
    quiet = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=quiet) as pool:
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


def _scenario(spent: Mapping[str, Timings], *, rows: int, warm_up: int, seed: int) -> Scenario:
    base, *others = spent
    return Scenario(
        rows=rows,
        rounds=len(spent[base].wall),
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
