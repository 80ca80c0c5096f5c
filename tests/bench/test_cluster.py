"""A real Dask cluster on this machine, one of whose workers is killed at work."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import threadpoolctl
import torch

from qdefense.bench.cluster import DaskCluster
from qdefense.bench.engines import EngineError
from qdefense.bench.revisions import SOURCES, source_digest
from qdefense.bench.tasks import Clock, Outcome
from qdefense.bench.worker import run_task
from qdefense.cli import run

from . import sample_records as samples
from .conftest import RECORDS, Desk

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("default")  # Dask's own are none of ours
NewDesk = Callable[..., Desk]


@dataclass
class _Endless:
    id: str = "endless"


@pytest.fixture(scope="module")
def cluster() -> Iterator[distributed.LocalCluster]:
    """Two workers, each a process with a nanny that replaces it."""
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=False
    ) as made:
        yield made


def kill_a_busy_worker(cluster: distributed.LocalCluster, made: Desk, over: threading.Event, killed: list[int]) -> None:
    """As soon as the first record is there, SIGKILL a worker that computes."""
    with distributed.Client(cluster, set_as_default=False) as client:
        pids = client.run(os.getpid)
        while not killed and not over.wait(0.1):
            busy = [pids[address] for address, tasks in client.processing().items() if tasks]
            if made.lines and busy:
                killed.append(busy[0])
                os.kill(busy[0], signal.SIGKILL)


def test_a_worker_killed_at_work_loses_nothing_and_nothing_is_done_twice(
    cluster: distributed.LocalCluster, new_desk: NewDesk, finished: Desk
) -> None:
    made, killed, over = new_desk(name="cluster"), list[int](), threading.Event()
    killer = threading.Thread(target=kill_a_busy_worker, args=(cluster, made, over, killed))
    killer.start()
    code = run(["bench", str(made.matrix), "--scheduler", cluster.scheduler_address])
    over.set()
    killer.join()
    assert len(killed) == 1
    assert code == 3  # as in one go: too few images to scan on
    assert made.lines == RECORDS
    assert made.stable == finished.stable


def test_no_scheduler(new_desk: NewDesk, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdefense.bench.cluster._SECONDS_TO_CONNECT", 1)
    assert run(["bench", str(new_desk().matrix), "--scheduler", "tcp://127.0.0.1:9"]) == 3
    assert "error: tcp://127.0.0.1:9: no Dask scheduler answers" in capfd.readouterr().err


def test_machines_without_this_version_are_told_before_any_work(
    cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask would wait for ever for work that a worker cannot unpack."""
    monkeypatch.setattr("qdefense.bench.cluster._required", lambda: ("onnx", "0.1"))
    with pytest.raises(EngineError, match=r"the scheduler has onnx \S+, this is 0.1; install the same everywhere"):
        DaskCluster(cluster.scheduler_address, print)
    monkeypatch.setattr("qdefense.bench.cluster._required", lambda: ("no-such-package", "0.1"))
    with pytest.raises(EngineError, match=r"a machine has no no-such-package; install no-such-package 0.1 there"):
        DaskCluster(cluster.scheduler_address, print)


def test_machines_with_other_code_of_this_version_are_told(
    cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qdefense.bench.cluster.source_digest", os.getpid)  # another of each process
    with pytest.raises(EngineError, match="a worker has other code of this version; install the same everywhere"):
        DaskCluster(cluster.scheduler_address, print)


class Fetched:
    """Stands for a future; ``answer`` is what its result is, or what asking for it raises."""

    def __init__(self, status: str, answer: object = None) -> None:
        self.status, self.answer = status, answer

    def exception(self) -> object:
        return self.answer

    def result(self, timeout: float) -> object:
        assert timeout > 0
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Failing(_Endless):
    def failure(self, reason: str, volatile: object) -> str:
        return reason


KILLED = distributed.KilledWorker("bench-0", None, 3)


@pytest.mark.parametrize(
    ("future", "outcome"),
    [
        (Fetched("lost"), None),
        (Fetched("pending"), None),
        (Fetched("finished", KILLED), "Dask worker after worker died at this cell"),
        (Fetched("error", KILLED), "Dask worker after worker died at this cell"),
    ],
    ids=["died with its result", "begun again", "killed while it was fetched", "killed"],
)
def test_a_result_whose_worker_dies_is_waited_for_or_lost_and_never_ends_the_run(
    future: Fetched, outcome: str | None
) -> None:
    engine = DaskCluster.__new__(DaskCluster)
    engine._dask, engine._address = distributed, "tcp://here"
    found = engine._outcome(future, Failing(), Clock())  # type: ignore[arg-type]
    assert (None if found is None else (found.record, found.lost)) == (None if outcome is None else (outcome, True))


def test_a_result_that_does_not_come_is_waited_for_only_where_it_is_made_again() -> None:
    engine = DaskCluster.__new__(DaskCluster)
    engine._dask, engine._address = distributed, "tcp://here"
    slow = Fetched("finished", TimeoutError())
    with pytest.raises(EngineError, match=r"^tcp://here: a worker did not hand over its result in 600 s; run this aga"):
        engine._outcome(slow, Failing(), Clock())  # type: ignore[arg-type]

    class Recomputed(Fetched):
        def result(self, timeout: float) -> object:
            self.status = "pending"
            return super().result(timeout)

    assert engine._outcome(Recomputed("finished", TimeoutError()), Failing(), Clock()) is None  # type: ignore[arg-type]


def test_an_outcome_of_other_code_ends_the_run() -> None:
    engine = DaskCluster.__new__(DaskCluster)
    engine._dask, engine._address = distributed, "tcp://here"
    record = samples.behaviour(samples.network())  # of a code that its versions do not name
    outcome = Outcome(task_id="x", record=record)
    with pytest.raises(EngineError, match="a worker has other code of this version; install the same everywhere"):
        engine._outcome(Fetched("finished", outcome), Failing(), Clock())  # type: ignore[arg-type]
    mine = record.model_copy(update={"versions": {SOURCES: source_digest()}})
    found = Outcome(task_id="x", record=mine)
    assert engine._outcome(Fetched("finished", found), Failing(), Clock()) is found  # type: ignore[arg-type]


def test_work_that_no_worker_can_run_ends_the_run() -> None:
    engine = DaskCluster.__new__(DaskCluster)
    engine._dask, engine._address = distributed, "tcp://here"
    with pytest.raises(EngineError, match=r"^tcp://here: a worker cannot run this work \(ValueError: no such thing\)$"):
        engine._outcome(Fetched("error", ValueError("no such thing")), Failing(), Clock())  # type: ignore[arg-type]


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"BETWEEN_LOOKS": 0.2, "WITHOUT_WORKERS": 1, "TO_CONNECT": 1}.items():
        monkeypatch.setattr(f"qdefense.bench.cluster._SECONDS_{name}", seconds)


@pytest.mark.usefixtures("short")
def test_no_worker_is_told_and_ends_with_what_to_do(new_desk: NewDesk, capfd: pytest.CaptureFixture[str]) -> None:
    with distributed.LocalCluster(n_workers=0, processes=False, dashboard_address=None) as empty:
        address = empty.scheduler_address
        assert run(["bench", str(new_desk().matrix), "--scheduler", address]) == 3
    told = capfd.readouterr().err
    assert f"{address}: the Dask scheduler has no worker; waiting, 0 of 1 s" in told
    assert f"error: {address}: for 1 s the Dask scheduler had no worker; start some with `dask worker {address}" in told


@pytest.mark.usefixtures("short")
def test_workers_that_leave_are_told_and_missed_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("qdefense.bench.engines._urgency", lambda task: 0)
    with distributed.LocalCluster(n_workers=1, threads_per_worker=1, processes=False, dashboard_address=None) as made:
        monkeypatch.setattr("qdefense.bench.cluster._SECONDS_TO_CONNECT", 30)
        engine = DaskCluster(made.scheduler_address, told.append)
        made.scale(0)
        with distributed.Client(made, set_as_default=False) as client:
            while client.nthreads():
                time.sleep(0.05)
        engine.submit(_Endless())  # type: ignore[arg-type]
        with pytest.raises(EngineError, match="for 1 s the Dask scheduler had no worker"):
            engine.completed()
        engine.close()
    assert "the Dask scheduler has no worker; waiting, 0 of 1 s" in told[0]


def test_a_work_item_has_one_thread_of_every_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the worker says."""
    seen: list[int] = []

    def look(task: object, clock: object) -> Outcome:
        import scipy.linalg  # noqa: F401, PLC0415 (as a defense does, at work)

        seen.extend(pool["num_threads"] for pool in threadpoolctl.threadpool_info())
        seen.append(torch.get_num_threads())
        return Outcome(task_id="look", record=None)  # type: ignore[arg-type]

    monkeypatch.setattr("qdefense.bench.measuring.measure", look)
    before = torch.get_num_threads()
    with threadpoolctl.threadpool_limits(2):
        run_task(_Endless())  # type: ignore[arg-type]
    torch.set_num_threads(before)
    assert len(seen) > 1
    assert set(seen) == {1}
