"""Where a work item is done: one at a time in a process, and whatever goes wrong becomes an outcome."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from qdefense.bench.datasets import MissingDataError
from qdefense.bench.revisions import source_digest
from qdefense.bench.store import not_finite
from qdefense.bench.tasks import Clock, Outcome, QuantizeTask, Task, TrainTask
from qdefense.files import reason_of
from qdefense.memory import ran_out_of_memory
from qdefense.report.escaping import harmless, internal_error, shortened

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

_ONE_AT_A_TIME = threading.Lock()
"""Torch's seed and its switch for deterministic algorithms belong to the process; a Dask worker may have threads."""


def run_task(task: Task) -> Outcome:
    """Do the work; an exception is an outcome, too, so that it costs one cell and no more."""
    with _ONE_AT_A_TIME:
        source_digest()  # read now: while the work goes on, other code may be installed
        clock = Clock()
        try:
            outcome = _perform(task, clock)
        except Exception as error:  # noqa: BLE001 (the process boundary: a cell that fails is a record, never a loss)
            return Outcome(task_id=task.id, record=task.failure(_told(error), clock.read()), lost=_is_of_machine(error))
        place = not_finite(outcome.record)
        if place is None:
            return outcome
        return Outcome(task_id=task.id, record=task.failure(f"{place} is not finite", clock.read()))


def _perform(task: Task, clock: Clock) -> Outcome:
    import sklearn.decomposition  # noqa: F401, PLC0415 (defenses load it, and SciPy's BLAS with it: pinned only if loaded)
    import torch  # noqa: PLC0415 (seconds; the parent process never needs it)
    from threadpoolctl import threadpool_limits  # noqa: PLC0415 (sees the libraries that are loaded)

    from qdefense.bench import making, measuring  # noqa: PLC0415

    torch.set_num_threads(1)  # sums depend on the number of threads
    with threadpool_limits(1):  # those of BLAS, too, which a Dask worker's environment need not have pinned
        if isinstance(task, TrainTask):
            return making.train_network(task, clock)
        if isinstance(task, QuantizeTask):
            return making.quantize_network(task, clock)
        return measuring.measure(task, clock)


def _told(error: Exception) -> str:
    """One harmless line; what this project raises on purpose explains itself, all else is a bug."""
    if isinstance(error, OSError):
        return harmless(shortened(reason_of(error)))
    if isinstance(error, MemoryError):
        return harmless(shortened(f"out of memory {error}".strip()))
    ours = type(error).__module__.startswith("qdefense.")
    return harmless(shortened(str(error)) if ours else internal_error(error))


def _is_of_machine(error: BaseException | None) -> bool:
    """Whether another machine, or this one at another time, may do the same: files, images, memory, libraries lack.

    A module of this package that is not there is a bug, wherever it runs.
    """
    if ran_out_of_memory(error):
        return True
    while error is not None:
        if isinstance(error, ImportError) and not (error.name or "").startswith("qdefense"):
            return True
        if isinstance(error, OSError | MissingDataError):
            return True
        error = error.__cause__
    return False


def serve(connection: Connection) -> None:
    """Do what comes through the pipe until it closes; the life of a pool's child process."""
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        connection.send(run_task(task))
