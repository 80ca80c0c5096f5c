"""A real Dask cluster on this machine, one of whose workers is killed at work."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from qdefense.bench.cluster import DaskCluster
from qdefense.bench.engines import EngineError
from qdefense.cli import run

from .conftest import RECORDS, Desk

distributed = pytest.importorskip("distributed")
pytestmark = pytest.mark.filterwarnings("default")  # Dask's own are none of ours
NewDesk = Callable[..., Desk]


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
    assert "error: tcp://127.0.0.1:9: no Dask scheduler with workers answers" in capfd.readouterr().err


def test_machines_without_this_version_are_told_before_any_work(
    cluster: distributed.LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask would wait for ever for work that a worker cannot unpack."""
    monkeypatch.setattr("qdefense.bench.cluster._required", lambda: ("onnx", "0.1"))
    with pytest.raises(EngineError, match=r"the scheduler has onnx \S+, this is 0.1; install the same everywhere"):
        DaskCluster(cluster.scheduler_address)
    monkeypatch.setattr("qdefense.bench.cluster._required", lambda: ("no-such-package", "0.1"))
    with pytest.raises(EngineError, match=r"a machine has no no-such-package; install no-such-package 0.1 there"):
        DaskCluster(cluster.scheduler_address)
