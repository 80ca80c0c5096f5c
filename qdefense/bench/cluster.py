"""Many machines: a Dask cluster that others started; its workers return records and files, and only this end writes."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import CancelledError
from contextlib import suppress
from importlib.metadata import version
from itertools import count
from typing import Any

from qdefense.bench.engines import EngineError, TaskQueue
from qdefense.bench.revisions import SOURCES, source_digest
from qdefense.bench.tasks import Clock, Outcome, Task
from qdefense.bench.worker import run_task

_SECONDS_TO_CONNECT = 30
_SECONDS_BETWEEN_LOOKS = 10
_SECONDS_WITHOUT_WORKERS = 600
"""Queues of a cluster may take a while to start a worker anew; without an end, a run would wait for ever."""
_SECONDS_TO_FETCH = 600
"""Of a result, which lies with the worker that made it; where that died meanwhile, the work is done again."""
_AHEAD = 2
"""Work items sent per worker thread: enough to keep them busy, few enough that files do not pile up on the way."""


class DaskCluster:
    """The workers of a scheduler. Start them with one thread each; a work item is done in one process at a time.

    A worker that dies loses its work item to another one, by Dask's own doing; one at which worker after worker died is
    lost to this run: Dask tells neither how they died nor whether it was that item or one beside it.

    Raises:
        EngineError: Dask is not installed, there is no scheduler or no worker, or one of them lacks this version.
    """

    def __init__(self, address: str, on_notice: Callable[[str], None]) -> None:
        try:
            import distributed  # noqa: PLC0415 (an extra)
        except ImportError as error:
            raise EngineError("Dask is not installed; pip install 'qdefense[cluster]'") from error
        self._dask: Any = distributed  # its functions are untyped
        self._address, self._on_notice = address, on_notice
        try:
            self._client = self._dask.Client(address, timeout=_SECONDS_TO_CONNECT, set_as_default=False)
        except (OSError, ValueError) as error:
            raise EngineError(f"{address}: no Dask scheduler answers ({_line(error)})") from error
        try:
            self._wait_for_workers(_SECONDS_TO_CONNECT)
        except (OSError, CancelledError) as error:
            raise EngineError(f"{address}: the Dask scheduler is gone ({_line(error)})") from error
        self._check_versions()
        self._queue = TaskQueue()
        self._running: dict[Any, tuple[Task, Clock]] = {}
        self._numbers = count()

    def _check_versions(self) -> None:
        """Dask never answers for work that one of its machines cannot unpack."""
        name, ours = _required()
        try:
            found = {"the scheduler": self._client.run_on_scheduler(version, name)} | self._client.run(version, name)
            codes = self._client.run(source_digest)
        except (OSError, ImportError, AttributeError) as error:
            self._client.close()
            raise EngineError(f"{self._address}: a machine has no {name}; install {name} {ours} there") from error
        other = next((place for place, theirs in found.items() if theirs != ours), None)
        if other is not None:
            self._client.close()
            raise EngineError(
                f"{self._address}: {other} has {name} {found[other]}, this is {ours}; install the same everywhere"
            )
        if any(code != source_digest() for code in codes.values()):
            self._client.close()
            raise EngineError(self._other_code())

    def _other_code(self) -> str:
        """Two states of one version would mix their answers in one table."""
        return f"{self._address}: a worker has other code of this version; install the same everywhere"

    def submit(self, task: Task) -> None:
        """Queue a work item."""
        self._queue.push(task)

    def completed(self) -> Outcome:
        """Wait for the next outcome.

        Raises:
            EngineError: the scheduler or all workers are gone, or workers cannot run this version's work.
        """
        try:
            self._send()
            while True:
                for future in self._done():
                    outcome = self._outcome(future, *self._running[future])
                    if outcome is not None:
                        del self._running[future]
                        return outcome
                self._wait_for_workers(_SECONDS_WITHOUT_WORKERS)
        except (OSError, CancelledError) as error:
            raise EngineError(f"{self._address}: the Dask scheduler is gone ({_line(error)})") from error

    def _done(self) -> set[Any]:
        """What ends within a few seconds."""
        try:
            with self._client.as_current():  # the function looks for a client by itself
                found = self._dask.wait(
                    list(self._running), timeout=_SECONDS_BETWEEN_LOOKS, return_when="FIRST_COMPLETED"
                )
        except TimeoutError:
            return set()
        done: set[Any] = found.done
        return done

    def _wait_for_workers(self, patience: float) -> None:
        began = time.monotonic()
        while not self._client.nthreads():
            waited = time.monotonic() - began
            if waited > patience:
                self._client.close()
                raise EngineError(
                    f"{self._address}: for {patience} s the Dask scheduler had no worker; start some with "
                    f"`dask worker {self._address} --nthreads 1` and run this again"
                )
            self._on_notice(f"{self._address}: the Dask scheduler has no worker; waiting, {waited:.0f} of {patience} s")
            time.sleep(min(_SECONDS_BETWEEN_LOOKS, patience))

    def close(self) -> None:
        """Take back what is under way, and leave the cluster as it was."""
        with suppress(OSError, CancelledError):  # a scheduler that is gone has nothing to take back
            if self._client.status == "running":
                self._client.cancel(list(self._running))
        self._client.close()

    def _send(self) -> None:
        threads = sum(self._client.nthreads().values())
        while self._queue and len(self._running) < max(1, _AHEAD * threads):
            task = self._queue.pop()
            future = self._client.submit(run_task, task, key=f"bench-{next(self._numbers)}-{task.id}", pure=False)
            self._running[future] = (task, Clock())

    def _outcome(self, future: Any, task: Task, clock: Clock) -> Outcome | None:
        """``None`` where the worker died with its result: Dask does the work again, by its own doing."""
        if future.status in ("lost", "pending"):
            return None
        problem = future.exception() if future.status == "error" else None
        if problem is not None and not isinstance(problem, self._dask.KilledWorker):
            raise EngineError(f"{self._address}: a worker cannot run this work ({_line(problem)})")
        try:
            outcome: Outcome = future.result(timeout=_SECONDS_TO_FETCH)
        except self._dask.KilledWorker:
            reason = "Dask worker after worker died at this cell"
            return Outcome(task_id=task.id, record=task.failure(reason, clock.read()), lost=True)
        except TimeoutError as error:
            if future.status != "finished":
                return None
            told = f"a worker did not hand over its result in {_SECONDS_TO_FETCH} s; run this again"
            raise EngineError(f"{self._address}: {told}") from error
        if outcome.record.versions.get(SOURCES) != source_digest():  # of a worker that came later
            raise EngineError(self._other_code())
        return outcome


def _required() -> tuple[str, str]:
    return "qdefense", version("qdefense")


def _line(problem: object) -> str:
    return f"{type(problem).__name__}: {problem}".splitlines()[0][:200]
