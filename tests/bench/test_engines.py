"""Child processes: one that dies costs its cell, and none outlives its parent."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from qdefense.bench.cells import plan_cells
from qdefense.bench.engines import ONE_THREAD, LocalPool, TaskQueue
from qdefense.bench.matrix import read_matrix
from qdefense.bench.records import TrainingRecord
from qdefense.bench.running import sources_of
from qdefense.bench.store import Store
from qdefense.bench.tasks import TrainTask, train_task
from qdefense.memory import REUSED

from .conftest import Desk

NewDesk = Callable[..., Desk]


@pytest.fixture
def failing_task(new_desk: NewDesk) -> TrainTask:
    """A training that ends at once: its recipe does not fit its images."""
    table = read_matrix(new_desk().matrix)
    plan = plan_cells(table, sources_of(table, Store(new_desk().results), pin=False))
    task = train_task(plan[0])
    recipe = task.network.recipe | {"batch_size": 1000}
    return replace(task, network=task.network.model_copy(update={"recipe": recipe}))


@pytest.fixture
def pool() -> Iterator[LocalPool]:
    made = LocalPool(1)
    yield made
    made.close()


def test_a_child_that_dies_costs_its_cell_and_is_replaced(pool: LocalPool, failing_task: TrainTask) -> None:
    second = replace(failing_task, recipe_sha256="another")
    pool.submit(failing_task)
    pool.submit(second)
    pool._dispatch()
    (first_child,) = pool._children
    first_child.process.kill()
    lost = pool.completed()
    assert lost.task_id == failing_task.id
    assert lost.lost  # the next run may fare better
    assert lost.record.reason == "the worker process ended with SIGKILL at this cell"
    assert isinstance(lost.record, TrainingRecord)
    assert lost.record.key == failing_task.id
    done = pool.completed()
    assert not done.lost
    assert done.task_id == second.id
    assert "128 images are fewer than one batch of 1000" in done.record.reason
    assert pool._children[0].process.pid != first_child.process.pid


@pytest.mark.parametrize(
    ("number", "lost"),
    [(signal.SIGSEGV, False), (signal.SIGABRT, False), (signal.SIGTERM, True), (signal.SIGKILL, True)],
)
def test_a_cell_that_crashes_its_child_has_failed_and_one_whose_child_is_killed_is_lost(
    pool: LocalPool, failing_task: TrainTask, number: signal.Signals, lost: bool
) -> None:
    pool.submit(failing_task)
    pool._dispatch()
    pid = pool._children[0].process.pid
    assert pid is not None
    os.kill(pid, number)
    outcome = pool.completed()
    assert (outcome.lost, outcome.record.failed) == (lost, True)
    assert outcome.record.reason == f"the worker process ended with {number.name} at this cell"


def test_a_child_that_died_idle_costs_no_cell(pool: LocalPool, failing_task: TrainTask) -> None:
    pool.submit(failing_task)
    assert "fewer than one batch" in pool.completed().record.reason
    pid = pool._children[0].process.pid
    assert pid is not None
    os.kill(pid, signal.SIGSEGV)
    pool._children[0].process.join()
    pool.submit(failing_task)
    assert "fewer than one batch" in pool.completed().record.reason


def test_the_environment_of_children_is_pinned_and_ours_left_alone(
    pool: LocalPool, failing_task: TrainTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = REUSED
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv(theirs, "4096")
    monkeypatch.delenv(ours, raising=False)
    pool.submit(failing_task)
    pool.completed()
    assert (os.environ["OMP_NUM_THREADS"], ours in os.environ) == ("7", False)
    pid = pool._children[0].process.pid
    child = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    wanted = ONE_THREAD | {theirs: "4096", ours: REUSED[ours]}
    assert {f"{name}={value}".encode() for name, value in wanted.items()} <= set(child)


def test_closing_kills_the_children(pool: LocalPool, failing_task: TrainTask) -> None:
    pool.submit(failing_task)
    pool._dispatch()
    process = pool._children[0].process
    pool.close()
    assert process.exitcode == -signal.SIGKILL


@dataclass
class _Task:
    name: str
    urgency: tuple[int, int, int]


_WORK = (("train", (1, 0, 1)), ("scan a", (1, 0, 0)), ("scan b", (1, 0, 0)), ("quantize", (0, 0, 0)))


def test_work_near_the_end_of_a_cell_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdefense.bench.engines._urgency", lambda task: task.urgency)
    queue = TaskQueue()
    for name, urgency in _WORK:
        queue.push(_Task(name, urgency))  # type: ignore[arg-type]
    assert [queue.pop().name for _ in range(len(queue))] == ["quantize", "scan a", "scan b", "train"]  # type: ignore[union-attr]
