"""Runs that a kill, another machine or a damaged file met: each ends with the records of an undisturbed one.

Networks are a few bytes here, so that every point at which a run can end is tried.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qdefense.bench import making, measuring, store
from qdefense.bench.cells import plan_cells
from qdefense.bench.datasets import MissingDataError
from qdefense.bench.matrix import read_matrix
from qdefense.bench.records import BehaviourRecord, Curve, DatasetMetrics, Rate, Replica
from qdefense.bench.running import Run, evaluation_of, sources_of
from qdefense.bench.store import Store, StoreError, read_manifest
from qdefense.bench.tasks import Clock, Outcome, QuantizeTask, Task, TrainTask, TrialTask
from qdefense.bench.worker import run_task
from qdefense.cli import run
from qdefense.profile import Runtime, runtime
from qdefense.session import SessionError
from qdefense.trial import Activity, Truth

from .conftest import TINY, Desk, Inline

NewDesk = Callable[..., Desk]
ONE = TINY.replace('defenses = ["neural-cleanse:budget=quick"]', "").replace('"none", ', "")
RECORDS = 1 + 1 + 2


def replica_of(model: bytes, versions: dict[str, str]) -> Replica:
    return Replica(artifact_sha256=hashlib.sha256(model).hexdigest(), size_bytes=len(model), batch=1, versions=versions)


def truth_of(task: TrainTask, model: bytes) -> bytes:
    network = task.network
    facts = network.model_dump(include={"attack", "attack_settings", "architecture", "width", "recipe", "seed", "data"})
    digests = {"data_sha256": network.train_sha256, "artifact_sha256": hashlib.sha256(model).hexdigest()}
    return Truth(**facts, **digests, poison_indices=(), versions={"onnx": "1"}).model_dump_json().encode()


class Machine:
    """Makes and measures at once; another machine's files have other bytes."""

    def __init__(self, name: str = "here") -> None:
        self.name = name

    def __call__(self, task: Task) -> Outcome:
        volatile = Clock().read()
        if isinstance(task, TrainTask):
            model, truth = f"network {self.name} {task.recipe_sha256}".encode(), None
            truth = truth_of(task, model)
        elif isinstance(task, QuantizeTask):
            model, truth = f"file {self.name} {task.recipe_sha256}".encode(), None
        else:
            facts = {"clean_accuracy": 0.5, "images": 60, "activity": Activity.CLEAN}
            return Outcome(task_id=task.id, record=task.behaviour(volatile, **facts))
        replica = replica_of(model, {"onnx": "1"})
        versions = {"versions": replica.versions} if isinstance(task, TrainTask) else {}
        record = task.record(replica.artifact_sha256, volatile, size_bytes=len(model), **versions)
        return Outcome(task_id=task.id, record=record, model=model, truth=truth, replica=replica)


@pytest.fixture(autouse=True)
def _few_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(making, "replica_of", replica_of)


@pytest.fixture(params=["small", "large"])
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "large":
        monkeypatch.setattr(store, "COMMITTED_BYTES", 1)
    return str(request.param)


class KilledError(BaseException):
    """The process is gone."""


class Switch:
    """Kills before the step of a number, after it, or when half of it is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.at, self.when = 0, -1, "before"
        self._write, self._append = store.write_atomically, store._append
        monkeypatch.setattr(store, "write_atomically", self.write)
        monkeypatch.setattr(store, "_append", self.append)

    def arm(self, at: int, when: str) -> None:
        self.steps, self.at, self.when = 0, at, when

    def _step(self, do: Callable[[], None], half: Callable[[], None]) -> None:
        mine, self.steps = self.steps == self.at, self.steps + 1
        if not mine or self.when == "after":
            do()
        elif self.when == "half":
            half()
        if mine:
            raise KilledError

    def write(self, target: Path, data: bytes) -> None:
        part = target.with_name(f".{target.name}.1.part")
        self._step(lambda: self._write(target, data), lambda: (None, part.write_bytes(data[:5]))[0])

    def append(self, path: Path, record: store.BaseModel) -> None:
        line = record.model_dump_json().encode()[:40]
        before = path.read_bytes() if path.exists() else b""
        self._step(lambda: self._append(path, record), lambda: (None, path.write_bytes(before + line))[0])


@pytest.mark.parametrize("when", ["before", "half", "after"])
def test_whatever_step_of_a_run_is_its_last_the_next_run_ends_with_the_records_of_one_go(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch, size: str, when: str
) -> None:
    whole, switch = new_desk(ONE, name="whole"), Switch(monkeypatch)
    whole.run(Inline(Machine()))
    steps = switch.steps
    assert whole.lines == RECORDS
    for at in range(steps):
        made = new_desk(ONE, name=f"killed{at}")
        switch.arm(at, when)
        with pytest.raises(KilledError):
            made.run(Inline(Machine()))
        switch.arm(-1, when)
        made.run(Inline(Machine()))
        assert made.lines == RECORDS, at  # nothing is lost and nothing twice
        assert made.stable == whole.stable, at
        assert read_manifest(made.results / "manifest.json") == read_manifest(whole.results / "manifest.json"), at
        idle = Inline(Machine())
        made.run(idle)
        assert idle.done == [], at


def test_a_file_whose_line_was_deleted_has_one_again(new_desk: NewDesk) -> None:
    whole, made = (new_desk(ONE, name=name) for name in ("whole", "deleted"))
    for desk in (whole, made):
        desk.run(Inline(Machine()))
    path = made.results / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"stage":"behaviour"' in line))
    engine = Inline(Machine())
    made.run(engine)
    assert engine.stages == ["QuantizeTask"]
    assert made.stable == whole.stable


def models(made: Desk) -> Path:
    return made.results / "models"


def file_of(made: Desk, stage: str) -> Path:
    """Where the file lies that a stage made."""
    digest = next(r.artifact_sha256 for r in made.records.values() if r.stage == stage)
    assert digest is not None
    return next(models(made).rglob(f"{digest[:16]}.onnx"))


def measured(made: Desk) -> set[tuple[str, int]]:
    return {(r.precision, r.replica) for r in made.records.values() if isinstance(r, BehaviourRecord)}


def without_behaviour(made: Desk) -> None:
    """As if cells were new: only how the files were made is known."""
    path = made.results / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"stage":"behaviour"' not in line))


def without_files(made: Desk) -> None:
    for path in models(made).rglob("*.onnx"):
        path.unlink()


def test_files_that_are_elsewhere_are_made_once_and_only_for_a_missing_cell(new_desk: NewDesk, size: str) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    before = made.stable
    without_files(made)
    idle = Inline(Machine())
    made.run(idle)
    assert idle.done == []
    without_behaviour(made)
    engine = Inline(Machine())
    made.run(engine)
    assert sorted(engine.stages) == ["QuantizeTask", "TrainTask", "TrialTask", "TrialTask"]
    assert made.stable == before


def test_two_machines_in_turn_each_train_once_and_measure_all(new_desk: NewDesk, size: str) -> None:
    """Each makes other bytes; the second time the first one's network is no longer the newest, and counts again."""
    made, numbers = new_desk(ONE), []
    for name in ("here", "there", "here"):
        engine = Inline(Machine(name))
        made.run(engine)
        assert sorted(engine.stages) == ["QuantizeTask", "TrainTask", "TrialTask", "TrialTask"]
        numbers.append(measured(made))
        idle = Inline(Machine(name))
        made.run(idle)
        assert idle.done == []
        without_files(made)
        without_behaviour(made)
    assert [{number for _, number in found} for found in numbers] == [{0}, {1}, {0}]


def test_an_older_network_at_hand_is_measured_instead_of_training(new_desk: NewDesk, size: str) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    kept = {path: path.read_bytes() for path in models(made).rglob("*.onnx")}
    without_files(made)
    without_behaviour(made)
    made.run(Inline(Machine("there")))
    without_files(made)
    for path, data in kept.items():
        path.write_bytes(data)
    without_behaviour(made)
    engine = Inline(Machine())
    made.run(engine)
    assert engine.stages == ["TrialTask", "TrialTask"]
    assert {number for _, number in measured(made)} == {0}


def test_a_quantized_file_that_comes_out_as_an_older_one_is_measured(new_desk: NewDesk) -> None:
    """The network is the same on both machines, the quantized file is not."""
    made = new_desk(ONE)
    for name in ("here", "there", "here"):
        quantizing, training = Machine(name), Machine()
        made.run(Inline(lambda task, q=quantizing, t=training: (t if isinstance(task, TrainTask) else q)(task)))
        assert len(measured(made)) == 2
        without_files(made)
        without_behaviour(made)


def test_training_again_that_fails_is_not_tried_every_time(new_desk: NewDesk) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    without_files(made)
    without_behaviour(made)

    def fail(task: Task) -> Outcome:
        return Outcome(task_id=task.id, record=task.failure("it diverged", Clock().read()))

    first, second, third = Inline(fail), Inline(fail), Inline(Machine())
    made.run(first)
    assert first.stages == ["TrainTask"]
    _, told = made.run(second)
    assert second.stages == []
    assert any("it diverged; --retry-failed tries it once more" in line for line in told)
    made.run(third, retry_failed=True)
    assert len(measured(made)) == 2


def no_quantization(task: Task) -> Outcome:
    if isinstance(task, QuantizeTask):
        return Outcome(task_id=task.id, record=task.failure("no such operator", Clock().read()))
    return Machine()(task)


def test_a_file_that_cannot_be_made_is_no_reason_to_train_again(new_desk: NewDesk) -> None:
    """On another machine, where the networks are not at hand."""
    made = new_desk(ONE)
    made.run(Inline(no_quantization))
    assert {precision for precision, _ in measured(made)} == {"fp32"}
    without_files(made)
    idle = Inline(Machine())
    made.run(idle)
    assert idle.done == []
    retried = Inline(Machine())
    made.run(retried, retry_failed=True)
    assert retried.stages == ["TrainTask", "QuantizeTask", "TrialTask"]
    assert len(measured(made)) == 2


def test_making_a_file_again_that_fails_is_told_and_trains_nothing(new_desk: NewDesk) -> None:
    """It was made once; here it cannot be."""
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    without_files(made)
    without_behaviour(made)
    made.run(Inline(no_quantization))
    without_files(made)
    idle = Inline(Machine())
    _, told = made.run(idle)
    assert idle.done == []
    assert any("could not be made again: no such operator; --retry-failed tries it once more" in line for line in told)


def test_looking_for_what_is_missing_writes_nothing(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which replica is measured is decided in one place, before anything is asked of it."""
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    without_files(made)
    without_behaviour(made)
    table = read_matrix(made.matrix)
    with Store.for_writing(made.results) as folder:
        (plan,) = plan_cells(table, sources_of(table, folder, pin=True))
        work = Run(
            (plan,),
            folder,
            evaluation_of(table),
            retry_failed=False,
            on_progress=lambda *_: None,
            on_notice=lambda _: None,
        )
        network = folder.measured(plan.recipe_sha256)
        assert network is not None
        monkeypatch.setattr(folder, "use_another", lambda _: pytest.fail("asked"))
        assert [work._waits(plan, file, network) for file in plan.files.values()] == [True, True]


@pytest.mark.parametrize("stage", ["train", "quantize"])
def test_a_file_with_other_bytes_is_named_and_made_again_once_it_is_deleted(new_desk: NewDesk, stage: str) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    before = made.stable
    without_behaviour(made)
    path = file_of(made, stage)
    path.write_bytes(b"swapped")
    _, told = made.run(Inline(Machine()))
    (line,) = told
    assert line.startswith("not done: signs/resnet8:width=4/badnets/seed 0: ")
    assert re.search(rf"{path}: damaged or another file: sha256 \w+, .*; delete it", line)
    path.unlink()
    made.run(Inline(Machine()))
    assert made.stable == before


@pytest.mark.parametrize("stage", ["train", "quantize"])
def test_a_damaged_file_costs_the_cells_that_need_it_and_no_others(new_desk: NewDesk, stage: str) -> None:
    made = new_desk(TINY.replace('defenses = ["neural-cleanse:budget=quick"]', ""))
    made.run(Inline(Machine()))
    without_behaviour(made)
    file_of(made, stage).write_bytes(b"swapped")
    for _ in range(2):
        _, told = made.run(Inline(Machine()))
        assert len(told) == 1
        assert len([one for one in made.records.values() if isinstance(one, BehaviourRecord)]) == 3


ELSEWHERE = Runtime(onnxruntime="1.31.0", machine="x86_64", isa=("avx512f", "avx512_vnni"), system="Linux")


def measured_elsewhere(made: Desk) -> None:
    """Run, and let the answers be of another CPU."""
    made.run(Inline(Machine()))
    path = made.results / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["stage"] == "behaviour":
            row["runtime"] = ELSEWHERE.model_dump(mode="json")
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_was_measured_elsewhere_counts_unless_it_is_to_be_from_here(new_desk: NewDesk) -> None:
    made = new_desk(ONE)
    measured_elsewhere(made)
    before = made.stable
    made.run(Inline(Machine()))
    assert made.lines == RECORDS, "on any machine a run goes on where it stopped"
    engine = Inline(Machine())
    made.run(engine, here=True)
    assert engine.stages == ["TrialTask"] * 2
    assert {key: made.stable[key] for key in before} == before, "both are kept"
    added = [record for key, record in made.records.items() if key not in before]
    assert [getattr(record, "runtime", None) for record in added] == [runtime()] * 2
    made.run(Inline(Machine()), here=True)
    assert made.lines == RECORDS + 2, "nothing twice"


def test_a_trial_here_has_the_key_that_it_always_had_where_no_other_machine_took_it(new_desk: NewDesk) -> None:
    anywhere, here = new_desk(ONE, name="anywhere"), new_desk(ONE, name="here")
    anywhere.run(Inline(Machine()))
    here.run(Inline(Machine()), here=True)
    assert set(here.stable) == set(anywhere.stable)


def test_bench_warns_of_trials_whose_file_was_measured_elsewhere(
    new_desk: NewDesk, capfd: pytest.CaptureFixture[str]
) -> None:
    made = new_desk(ONE)
    measured_elsewhere(made)
    made.matrix.write_text(ONE + 'defenses = ["neural-cleanse:budget=quick"]\n')
    assert run(["bench", str(made.matrix), "--dry-run"]) == 0
    told = capfd.readouterr()
    assert "2 trials to be done are of files whose behaviour was measured on another CPU" in told.err
    assert ", 2 to do" in told.out
    assert run(["bench", str(made.matrix), "--dry-run", "--here"]) == 0
    told = capfd.readouterr()
    assert "another CPU" not in told.err
    assert ", 4 to do" in told.out


def because(cause: Exception) -> SessionError:
    error = SessionError("the session broke")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "of_machine"),
    [
        (FileNotFoundError(2, "No such file", "/data/gtsrb"), True),
        (MissingDataError("no such file or folder"), True),
        (ImportError("libgomp.so.1: cannot open shared object file"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."), True),
        (because(RuntimeError("std::bad_alloc")), True),
        (because(ValueError("a bug")), False),
        (ZeroDivisionError("a bug"), False),
    ],
)
def test_what_the_machine_could_not_do_is_told_and_tried_by_the_next_run(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch, error: Exception, of_machine: bool
) -> None:
    def fail(task: object, clock: object) -> Outcome:
        raise error

    made = new_desk(ONE)
    with monkeypatch.context() as patch:
        patch.setattr(making, "train_network", fail)
        _, told = made.run(Inline(run_task))
    assert len(told) == 1
    assert told[0].startswith("not done: " if of_machine else "failed: ")
    assert made.lines == (0 if of_machine else 1)
    engine = Inline(Machine())
    made.run(engine)
    assert len(measured(made)) == (2 if of_machine else 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_is_none_fails_its_cell_and_no_later_run(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def answer(task: TrialTask, clock: Clock) -> Outcome:
        return Outcome(task_id=task.id, record=task.behaviour(clock.read(), clean_accuracy=value))

    made, here = new_desk(ONE), Machine()
    monkeypatch.setattr(measuring, "measure", answer)
    made.run(Inline(lambda task: run_task(task) if isinstance(task, TrialTask) else here(task)))
    reasons = {record.reason for record in made.records.values() if record.failed}
    assert reasons == {"clean_accuracy is not finite"}
    idle = Inline()
    made.run(idle)
    assert idle.done == []


def test_not_finite_names_the_place() -> None:
    model = DatasetMetrics(fpr=Rate(hits=0, n=1), curve=Curve(fpr=(0.0, 1.0), tpr=(0.0, float("nan"))))
    assert store.not_finite(model) == "curve.tpr.1"
    assert store.not_finite({"a": [1.0, {"b": float("-inf")}]}) == "a.1.b"
    assert store.not_finite({"a": [1.0, None, "nan"]}) is None


def test_the_store_itself_writes_no_such_line(new_desk: NewDesk) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    record = next(r for r in made.records.values() if isinstance(r, BehaviourRecord))
    before = made.lines
    with Store.for_writing(made.results) as folder, pytest.raises(StoreError, match="asr of a record is not finite"):
        folder.add(record.model_copy(update={"asr": float("nan")}))
    assert made.lines == before


def test_a_line_that_an_older_version_wrote_so_is_a_missing_cell(new_desk: NewDesk) -> None:
    made = new_desk(ONE)
    made.run(Inline(Machine()))
    before, path = made.stable, made.results / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(re.sub(rb'"seconds":[0-9.e-]+', b'"seconds":null', line) for line in lines[-1:]))
    assert made.records == {}
    path.write_bytes(b"".join([*lines[:-1], path.read_bytes()]))
    engine = Inline(Machine())
    made.run(engine)
    assert engine.stages == ["TrialTask"]
    assert made.stable == before
