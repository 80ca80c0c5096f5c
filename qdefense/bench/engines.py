"""Who does the work: child processes of this machine, of which one that dies costs the cell it was at and no more."""

from __future__ import annotations

import heapq
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from multiprocessing.process import BaseProcess
from typing import Protocol

from qdefense.bench.tasks import Clock, Outcome, QuantizeTask, Task, TrainTask
from qdefense.bench.worker import serve
from qdefense.memory import REUSED

ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "passive",
}
"""Work is spread over processes: sums, and so records, do not depend on the number of threads."""

_GRACE_SECONDS = 5.0
_OF_MACHINE = (-signal.SIGKILL, -signal.SIGTERM, None)
"""Endings that somebody else, or want of memory, put to a worker (None: unknown); any other is the cell's own crash."""


class EngineError(RuntimeError):
    """The machines are gone or cannot do this work; what was finished is kept."""


class Engine(Protocol):
    """Takes work items and gives their outcomes in the order in which they end."""

    def submit(self, task: Task) -> None:
        """Queue a work item."""
        ...

    def completed(self) -> Outcome:
        """Wait for the next outcome.

        Raises:
            EngineError: the machines are gone.
        """
        ...

    def close(self) -> None:
        """End all work; what has not ended is lost."""
        ...


class TaskQueue:
    """Work items: what files are and do first, then grid by grid its defenses, and last the networks that it lacks.

    So an unfinished run has answered its first grids as far as it could, and few files wait for readers.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int, int], int, Task]] = []
        self._pushed = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, task: Task) -> None:
        """Add one."""
        heapq.heappush(self._heap, (_urgency(task), self._pushed, task))
        self._pushed += 1

    def pop(self) -> Task:
        """Take the most urgent one; among equals the oldest."""
        return heapq.heappop(self._heap)[2]


def _urgency(task: Task) -> tuple[int, int, int]:
    if isinstance(task, TrainTask):
        return 1, task.grid, 1
    if isinstance(task, QuantizeTask):
        return 0, 0, 0
    cell = task.trial.cell
    return (0, 0, 1) if cell.defense is None else (1, cell.grid, 0)


@dataclass
class _Child:
    process: BaseProcess
    connection: Connection
    task: Task | None = None
    sent: bool = True
    clock: Clock = field(default_factory=Clock)


class LocalPool:
    """``workers`` processes, spawned when there is work for them and replaced when they die."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._children: list[_Child] = []
        self._queue = TaskQueue()

    def submit(self, task: Task) -> None:
        """Queue a work item."""
        self._queue.push(task)

    def completed(self) -> Outcome:
        """Wait for the next outcome; one whose child was killed is lost to this run, one that crashed it has failed."""
        self._dispatch()
        busy = {child.connection: child for child in self._children if child.task is not None}
        ready = wait(list(busy))
        child = next(child for connection, child in busy.items() if connection in ready)
        task = child.task
        assert task is not None  # noqa: S101 (busy)
        child.task = None
        try:
            outcome: Outcome = child.connection.recv()
        except (EOFError, OSError):
            return self._bury(child, task)
        return outcome

    def close(self) -> None:
        """Kill the children."""
        for child in self._children:
            child.process.kill()
            child.process.join(_GRACE_SECONDS)
            child.connection.close()
        self._children.clear()

    def _dispatch(self) -> None:
        while self._queue and (child := self._idle()) is not None:
            task = self._queue.pop()
            child.task, child.clock = task, Clock()
            try:
                child.connection.send(task)
            except OSError:  # it died before it had anything to do; the task is told as lost where it is waited for
                child.sent = False

    def _idle(self) -> _Child | None:
        for dead in [child for child in self._children if child.task is None and not child.process.is_alive()]:
            dead.connection.close()  # or the next task would be blamed
            self._children.remove(dead)
        found = next((child for child in self._children if child.task is None), None)
        if found is None and len(self._children) < self._workers:
            found = _spawn()
            self._children.append(found)
        return found

    def _bury(self, child: _Child, task: Task) -> Outcome:
        child.process.join(_GRACE_SECONDS)
        child.connection.close()
        self._children.remove(child)
        code = child.process.exitcode
        reason = f"the worker process ended with {_ending(code)} at this cell"
        lost = code in _OF_MACHINE or not child.sent
        return Outcome(task_id=task.id, record=task.failure(reason, child.clock.read()), lost=lost)


def _ending(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"exit code {exitcode}"
    try:
        return signal.Signals(-exitcode).name
    except ValueError:
        return f"signal {-exitcode}"


def _spawn() -> _Child:
    """A fresh interpreter, not a fork: ONNX Runtime and torch have threads, which no fork survives."""
    ours, theirs = Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_live, args=(theirs,), daemon=True)
    with _environment({**REUSED, **os.environ, **ONE_THREAD}):
        process.start()
    theirs.close()
    return _Child(process=process, connection=ours)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _live(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C reaches every process; the parent decides
    os.dup2(2, 1)  # stdout is the parent's
    threading.Thread(target=_die_with_parent, daemon=True).start()
    serve(connection)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
