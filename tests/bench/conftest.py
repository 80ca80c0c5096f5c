"""A matrix that is measured in seconds: two tiny networks on a few signs, with their two files each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qdefense.bench.cells import NetworkPlan, plan_cells
from qdefense.bench.engines import TaskQueue
from qdefense.bench.matrix import read_matrix
from qdefense.bench.records import Record, stable
from qdefense.bench.running import Run, evaluation_of, sources_of
from qdefense.bench.store import Store, read_records
from qdefense.bench.tasks import Outcome, Task
from qdefense.cli import run
from qdefense.profile import runtime

TINY = """\
[bench]
name = "tiny"
clean_images = 40
held_out_images = 10

[data.signs]
path = "signs"
train_limit = 128
test_limit = 60
epochs = 1
target_class = 7

[calibrations.few]
images = 16

[[grid]]
data = ["signs"]
architectures = ["resnet8:width=4"]
attacks = ["none", "badnets"]
precisions = ["fp32", "int8-dynamic"]
defenses = ["neural-cleanse:budget=quick"]
controls = false
"""
CELLS = 8
"""Two networks, two files each, what each does and what the scan says: that 40 images are too few."""
RECORDS = 2 + 2 + CELLS


class Inline:
    """An engine in the test's own process."""

    def __init__(self, do: Callable[[Task], Outcome] | None = None) -> None:
        from qdefense.bench.worker import run_task  # noqa: PLC0415 (tests of the matrix file need none of it)

        self.queue, self.done, self._do = TaskQueue(), list[Task](), do or run_task

    def submit(self, task: Task) -> None:
        self.queue.push(task)

    def completed(self) -> Outcome:
        self.done.append(self.queue.pop())
        return self._do(self.done[-1])

    def close(self) -> None:
        pass

    @property
    def stages(self) -> list[str]:
        return [type(task).__name__ for task in self.done]


@dataclass(frozen=True, kw_only=True)
class Desk:
    """A matrix file in a folder of its own."""

    folder: Path

    @property
    def matrix(self) -> Path:
        return self.folder / "matrix.toml"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    @property
    def records(self) -> dict[str, Record]:
        return {record.key: record for record in read_records(self.results / "records.jsonl")}

    @property
    def stable(self) -> dict[str, dict[str, Any]]:
        return {key: stable(record) for key, record in self.records.items()}

    @property
    def lines(self) -> int:
        path = self.results / "records.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def run(
        self, engine: Inline, *, retry_failed: bool = False, here: bool = False
    ) -> tuple[tuple[NetworkPlan, ...], list[str]]:
        """What `qdefense bench` does, in this process; the plan, and what was told."""
        table, told = read_matrix(self.matrix), list[str]()
        with Store.for_writing(self.results) as store:
            plan = plan_cells(table, sources_of(table, store, pin=True))
            work = Run(
                plan,
                store,
                evaluation_of(table, here=runtime() if here else None),
                retry_failed=retry_failed,
                on_progress=lambda *_: None,
                on_notice=told.append,
            )
            work.complete(engine)
        return plan, told


def desk(folder: Path, text: str = TINY) -> Desk:
    """A new one."""
    folder.mkdir(parents=True, exist_ok=True)
    made = Desk(folder=folder)
    made.matrix.write_text(text, encoding="utf-8")
    return made


@pytest.fixture
def new_desk(tmp_path: Path) -> Callable[..., Desk]:
    """``new_desk(text=TINY, name="desk")``."""
    return lambda text=TINY, name="desk": desk(tmp_path / name, text)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """The tiny matrix, measured by the command in one go; do not change it."""
    made = desk(tmp_path_factory.mktemp("finished"))
    assert run(["bench", str(made.matrix)]) == 3  # the scan could not be measured on so few images
    return made
