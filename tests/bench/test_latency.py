from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from qdefense.artifact import Artifact
from qdefense.bench.latency import deployed_variants, measure_latency, peak_memory, time_in_turns, yardstick
from qdefense.bench.timing_records import PLAIN, LatencyRecord, Rounds
from qdefense.findings import FilterBoundary, FilterResult
from qdefense.session import DeployedSession, profile_for

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

X = np.random.default_rng(0).random((12, 3, 16, 16), dtype=np.float32)


class Clock:
    """Time passes only when somebody works."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("qdefense.bench.latency.time.perf_counter", lambda: self.now)
        monkeypatch.setattr("qdefense.bench.latency.time.process_time", lambda: self.now / 2)

    def worker(self, seconds: float, calls: list[Any] | None = None, name: str = "") -> Callable[[Any], None]:
        def work(x: Any) -> None:
            self.now += seconds * len(x)
            if calls is not None:
                calls.append((name, x[:, 0, 0, 0].tolist()))

        return work


@pytest.fixture(name="clock")
def _clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.fixture(scope="module", name="session")
def _session(toy: Toy) -> DeployedSession:
    artifact = Artifact.read(toy.clean)
    return DeployedSession(artifact, profile_for(artifact))


def rows(*starts: int, count: int) -> list[list[float]]:
    return [X[start : start + count, 0, 0, 0].tolist() for start in starts]


def test_time_in_turns_calls_every_variant_each_round_on_the_same_rows(clock: Clock) -> None:
    calls: list[Any] = []
    variants = {name: clock.worker(0.001, calls, name) for name in ("a", "b")}
    time_in_turns(variants, X, rows=5, rounds=3, warm_up=1)
    assert [name for name, _ in calls] == ["a", "b"] * 4
    assert [seen for name, seen in calls if name == "a"] == [seen for name, seen in calls if name == "b"]
    assert [seen for name, seen in calls if name == "a"] == rows(0, 5, 2, 7, count=5)


def test_time_in_turns_leaves_the_warm_up_out(clock: Clock) -> None:
    first = [1.0]

    def slow_at_first(x: Any) -> None:
        clock.now += first.pop() if first else 0.002

    spent = time_in_turns({"a": slow_at_first}, X, rows=1, rounds=4, warm_up=1)
    assert spent["a"].wall == pytest.approx([2.0] * 4)
    assert spent["a"].cpu == pytest.approx([1.0] * 4)


def test_measure_latency_gives_every_figure_of_both_scenarios(clock: Clock, session: DeployedSession) -> None:
    variants = {PLAIN: clock.worker(0.001), "slower": clock.worker(0.004)}
    record = measure_latency(session, variants, X, batch=4, rounds=Rounds(single_stream=10, offline=5), threads=2)
    single, offline = record.single_stream, record.offline
    assert (single.rows, single.rounds, single.warm_up, offline.rows, offline.rounds) == (1, 10, 3, 4, 5)
    plain, slower = single.variants
    assert (plain.name, slower.name) == (PLAIN, "slower")
    assert (plain.p50_ms, plain.p90_ms, plain.p99_ms, plain.cpu_ms) == pytest.approx((1, 1, 1, 0.5))
    assert plain.rows_per_second.value == pytest.approx(1000)
    assert [timing.median_ms.value for timing in offline.variants] == pytest.approx([4, 16])
    assert [timing.rows_per_second.value for timing in offline.variants] == pytest.approx([1000, 250])
    (added,) = offline.added
    assert (added.name, added.over) == ("slower", PLAIN)
    assert (added.difference_ms.value, added.ratio.value) == pytest.approx((12, 4))
    assert added.ratio.low <= added.ratio.value <= added.ratio.high
    assert (record.artifact_sha256, record.profile) == (session.artifact.sha256, session.profile)
    assert record.threads == 2


def test_measure_latency_times_a_yardstick_in_turns_with_the_calls_of_one_image(
    clock: Clock, session: DeployedSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr("qdefense.bench.latency.yardstick", lambda: clock.worker(0.0005, calls, "yardstick"))
    variants = {PLAIN: clock.worker(0.001, calls, PLAIN)}
    record = measure_latency(session, variants, X, batch=4, rounds=Rounds(single_stream=2, offline=1, warm_up=0))
    assert [name for name, _ in calls] == [PLAIN, "yardstick", PLAIN, "yardstick", PLAIN]
    assert record.yardstick_ms is not None
    assert record.yardstick_ms.value == pytest.approx(0.5)
    assert [one.name for one in record.single_stream.variants] == [PLAIN]
    assert record.single_stream.added == ()


def test_the_yardstick_takes_time_of_its_own() -> None:
    spent = time_in_turns({"yardstick": yardstick(), "nothing": len}, X, rows=1, rounds=9, warm_up=1)
    assert min(spent["yardstick"].wall) > max(np.median(spent["nothing"].wall), 0.01)


def test_measure_latency_records_the_machine_and_its_load(session: DeployedSession) -> None:
    record = measure_latency(session, {PLAIN: session.logits}, X, batch=2, rounds=Rounds(single_stream=2, offline=1))
    assert len(record.machine.load_before) == len(record.machine.load_after) == 3
    assert record.machine.cpus >= 1
    assert record.machine.runtime.onnxruntime
    assert record.single_stream.variants[0].p50_ms > 0


def test_a_record_is_the_same_after_a_way_through_json(clock: Clock, session: DeployedSession) -> None:
    record = measure_latency(session, {PLAIN: clock.worker(0.001)}, X, batch=3, rounds=Rounds(single_stream=2))
    assert LatencyRecord.model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize(("variants", "batch"), [({}, 1), ({PLAIN: len}, 13), ({PLAIN: len}, 0)])
def test_measure_latency_raises_when_there_is_nothing_to_measure(
    session: DeployedSession, variants: Any, batch: int
) -> None:
    message = f"{len(variants)} variants, batches of {batch} from 12 images; give at least one of each"
    with pytest.raises(ValueError, match=message):
        measure_latency(session, variants, X, batch=batch)


def test_deployed_variants_run_the_filter_and_then_the_session(session: DeployedSession) -> None:
    seen: list[int] = []

    class Watching:
        boundary: FilterBoundary

        def decide(self, x: Any) -> FilterResult:
            seen.append(len(x))
            return FilterResult(decisions=(), scores=())

    variants = deployed_variants(session, {"watching": Watching()})
    assert list(variants) == [PLAIN, "session + watching"]
    before = session.forwards
    variants["session + watching"](X[:2])
    assert (seen, session.forwards - before) == ([2], 2)
    variants[PLAIN](X[:3])
    assert (seen, session.forwards - before) == ([2], 5)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak")
def test_peak_memory_is_that_of_a_fresh_process() -> None:
    here = np.ones(10**9 // 4, np.uint8)  # what this process holds must not count
    found = peak_memory("holder", functools.partial(functools.partial, np.ones, 150_000_000, np.uint8))
    assert found is not None
    assert found.name == "holder"
    assert 140_000_000 < found.peak_bytes - found.before_bytes < 200_000_000
    assert found.before_bytes < len(here)


def test_peak_memory_is_none_when_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setattr("qdefense.bench.latency._STATUS", tmp_path / "none")
    assert peak_memory("holder", functools.partial(functools.partial, np.ones, 1)) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process's own peak")
def test_peak_memory_passes_on_what_went_wrong() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-model"):
        peak_memory("failing", functools.partial(Path("/no-such-model").read_bytes))
