"""A run in this process: what is missing is done, what is there is not, whatever ended the last run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

import pytest

from qdefense.attacks.badnets import BadNets
from qdefense.attacks.wanet import WaNet
from qdefense.bench.records import BehaviourRecord, DefenseRecord, TrainingRecord
from qdefense.bench.revisions import SOURCES
from qdefense.bench.store import Store, StoreError, read_manifest
from qdefense.bench.survey import survey
from qdefense.bench.tasks import Clock, Evaluation, Outcome, QuantizeTask, Task, TrainTask, TrialTask
from qdefense.bench.worker import run_task
from qdefense.findings import Verdict

from .conftest import CELLS, RECORDS, TINY, Desk, Inline

NewDesk = Callable[..., Desk]


@pytest.fixture
def resumed(new_desk: NewDesk, finished: Desk) -> Desk:
    """A desk with the finished results on it."""
    made = new_desk(name="resumed")
    shutil.copytree(finished.results, made.results)
    return made


def broken(reason: str, *stages: type) -> Callable[[Task], Outcome]:
    """Work in which some stages fail."""

    def do(task: Task) -> Outcome:
        if isinstance(task, stages):
            return Outcome(task_id=task.id, record=task.failure(reason, Clock().read()))
        return run_task(task)

    return do


def test_nothing_is_done_twice(resumed: Desk) -> None:
    before = (resumed.results / "records.jsonl").read_bytes()
    engine = Inline()
    resumed.run(engine)
    assert engine.done == []
    assert (resumed.results / "records.jsonl").read_bytes() == before


def test_one_record_per_work_item_and_each_says_how_its_file_came_about(finished: Desk) -> None:
    records = list(finished.records.values())
    assert finished.lines == len(records) == RECORDS
    scans = [record for record in records if isinstance(record, DefenseRecord)]
    assert {(record.network.attack, record.scheme) for record in scans} == {
        (attack, scheme) for attack in (None, "badnets") for scheme in ("fp32", "int8-dynamic")
    }
    for record in scans:
        assert record.verdict is Verdict.NOT_MEASURED
        assert record.reason == "40 clean images; at least 200 are needed"
        assert record.profile is not None
        assert record.profile.batch == (1 if record.scheme == "int8-dynamic" else 64)
        assert record.runtime is not None


def test_a_torn_last_line_is_dropped_and_its_cell_done_again(resumed: Desk, finished: Desk) -> None:
    path = resumed.results / "records.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    engine = Inline()
    resumed.run(engine)
    assert len(engine.done) == 1
    assert resumed.stable == finished.stable
    assert resumed.lines == RECORDS


def test_a_line_that_is_no_record_is_told(resumed: Desk) -> None:
    path = resumed.results / "records.jsonl"
    path.write_bytes(b'{"stage": "train"}\n' + path.read_bytes())
    with pytest.raises(
        StoreError, match=r"records.jsonl, line 1: no record \(.*\); delete the line to measure its cell"
    ):
        Store(resumed.results)


def test_a_broken_manifest_is_told(resumed: Desk) -> None:
    (resumed.results / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(StoreError, match=r"manifest.json: no manifest \(.*\); restore it"):
        Store(resumed.results)


def test_records_alone_suffice_where_no_file_is_at_hand(resumed: Desk) -> None:
    """The files of large networks are not committed: what is measured already needs none of them."""
    for path in (resumed.results / "models").glob("*.onnx"):
        path.unlink()
    engine = Inline()
    resumed.run(engine)
    assert engine.done == []


def test_a_network_that_comes_out_otherwise_is_a_new_replica(resumed: Desk, finished: Desk) -> None:
    """The manifest speaks of another file than this machine trains: both stay, and only the new one is measured."""
    models, manifest = resumed.results / "models", resumed.results / "manifest.json"
    old = next(r for r in finished.records.values() if isinstance(r, TrainingRecord) and r.network.attack is None)
    assert old.artifact_sha256 is not None
    gone = "0" * 64
    manifest.write_text(manifest.read_text(encoding="utf-8").replace(old.artifact_sha256, gone), encoding="utf-8")
    for path in models.glob(f"{old.artifact_sha256[:16]}*"):
        path.unlink()
    (resumed.results / "records.jsonl").unlink()
    _, told = resumed.run(Inline())
    entries = [entry for entry in read_manifest(manifest).entries if len(entry.replicas) == 2]
    assert [replica.artifact_sha256 for replica in entries[0].replicas] == [gone, old.artifact_sha256]
    assert f"it came out as {old.artifact_sha256[:16]}, not as {gone[:16]}; a new replica" in " ".join(told)
    replicas = {
        r.replica for r in resumed.records.values() if isinstance(r, DefenseRecord) and r.network.attack is None
    }
    assert replicas == {1}
    assert (models / f"{old.artifact_sha256[:16]}.onnx").is_file()


def test_a_file_that_is_not_at_hand_is_made_again_for_a_new_cell(resumed: Desk, finished: Desk) -> None:
    """With the same digest it is no new replica, and leaves no second record of its training."""
    for path in (resumed.results / "models").glob("*.onnx"):
        path.unlink()
    text = TINY.replace("budget=quick", "budget=gate").replace('"none", ', "")
    resumed.matrix.write_text(text, encoding="utf-8")
    engine = Inline()
    resumed.run(engine)
    assert engine.stages == ["TrainTask", "QuantizeTask", "TrialTask", "TrialTask"]
    assert resumed.lines == RECORDS + 2
    manifests = [read_manifest(desk.results / "manifest.json").entries for desk in (resumed, finished)]
    assert [[r.artifact_sha256 for r in e.replicas] for e in manifests[0]] == [
        [r.artifact_sha256 for r in e.replicas] for e in manifests[1]
    ]


def as_adopted(made: Desk) -> dict[str, dict[str, Any]]:
    """Nobody knows of which code a network is that was not trained here."""
    found = made.stable
    for record in found.values():
        if record["stage"] == "train":
            record["versions"].pop(SOURCES, None)
    return found


def test_grids_are_worked_off_in_their_order(resumed: Desk) -> None:
    """A network that the first of two new grids lacks is trained and judged before the second one's cells."""
    grid = TINY[TINY.index("[[grid]]") :].replace(', "int8-dynamic"', "")
    first = grid.replace('"none", "badnets"', '"blended"')
    resumed.matrix.write_text(TINY + first + grid.replace("neural-cleanse:budget=quick", "strip"))
    engine = Inline()
    resumed.run(engine)
    asked = [
        task.trial.cell.defense.name if isinstance(task, TrialTask) and task.trial.cell.defense else type(task).__name__
        for task in engine.done
    ]
    assert asked == ["TrainTask", "TrialTask", "neural-cleanse", "strip", "strip"]


def test_a_network_that_lies_there_is_taken_instead_of_training(new_desk: NewDesk, finished: Desk) -> None:
    """Whatever it is called; another file beside its truth is not taken."""
    made = new_desk(name="adopting")
    models = made.results / "models"
    models.mkdir(parents=True)
    for number, truth in enumerate(sorted((finished.results / "models").glob("*.truth.json"))):
        shutil.copy(truth, models / f"given{number}.truth.json")
        network = truth.with_name(truth.name.replace(".truth.json", ".onnx")).read_bytes()
        (models / f"given{number}.onnx").write_bytes(network)
    engine = Inline()
    _, told = made.run(engine)
    assert "TrainTask" not in engine.stages
    assert as_adopted(made) == as_adopted(finished)
    assert len(told) == 2
    assert "was made by this recipe (onnx " in told[0]
    origins = {r.volatile.origin for r in made.records.values() if isinstance(r, TrainingRecord)}
    assert origins == {"adopted"}


@pytest.mark.parametrize(
    "change",
    [
        lambda truth: truth | {"seed": 1},
        lambda truth: truth | {"recipe": truth["recipe"] | {"epochs": 2}},
        lambda truth: truth | {"recipe": truth["recipe"] | {"of another version": 2}},
        lambda truth: truth | {"data_sha256": "0" * 64},
        lambda truth: truth | {"artifact_sha256": "0" * 64},
        lambda truth: truth | {"width": None},
        lambda truth: truth | {"attack": None, "attack_settings": {}},
        lambda truth: truth | {"attack_settings": truth["attack_settings"] | {"target_class": 6}},
        lambda truth: {"no": "truth"},
    ],
)
def test_a_network_of_another_recipe_is_not_taken(
    new_desk: NewDesk, finished: Desk, change: Callable[[dict[str, object]], dict[str, object]]
) -> None:
    made = new_desk(TINY.replace('"none", ', ""), name="not adopting")
    models = made.results / "models"
    models.mkdir(parents=True)
    for truth in (finished.results / "models").glob("*.truth.json"):
        body = json.loads(truth.read_bytes())
        if body["attack"] == "badnets":
            shutil.copy(truth.with_name(truth.name.replace(".truth.json", ".onnx")), models / "given.onnx")
            (models / "given.truth.json").write_text(json.dumps(change(body)), encoding="utf-8")
    assert (models / "given.onnx").is_file()
    engine = Inline(broken("no", TrainTask))
    made.run(engine)
    assert engine.stages == ["TrainTask"]


def test_a_network_of_an_older_attack_is_not_taken(
    new_desk: NewDesk, finished: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one of this one: no truth says which it is."""
    made = new_desk(TINY.replace('"none", ', ""), name="of an older attack")
    shutil.copytree(finished.results / "models", made.results / "models")
    monkeypatch.setattr(BadNets, "revision", 2)
    engine = Inline(broken("no", TrainTask))
    made.run(engine)
    assert engine.stages == ["TrainTask"]


def test_a_truth_older_than_the_optimizer_setting_is_understood(new_desk: NewDesk, finished: Desk) -> None:
    made = new_desk(TINY.replace('"none", ', ""), name="older")
    models = made.results / "models"
    shutil.copytree(finished.results / "models", models)
    for truth in models.glob("*.truth.json"):
        body = json.loads(truth.read_bytes())
        del body["recipe"]["optimizer"]
        truth.write_text(json.dumps(body), encoding="utf-8")
    engine = Inline()
    made.run(engine)
    assert "TrainTask" not in engine.stages


def test_what_failed_is_a_record_and_left_alone_until_it_is_retried(new_desk: NewDesk, finished: Desk) -> None:
    made = new_desk(name="failing")
    shutil.copytree(finished.results / "models", made.results / "models")
    engine = Inline(broken("the disk is on fire", TrialTask))
    plan, told = made.run(engine)
    failed = [record for record in made.records.values() if record.failed]
    assert len(failed) == CELLS
    assert {record.reason for record in failed} == {"the disk is on fire"}
    assert {r.verdict for r in failed if isinstance(r, DefenseRecord)} == {Verdict.NOT_MEASURED}
    assert any(line.startswith("failed: signs/resnet8:width=4/") for line in told)
    again = Inline()
    made.run(again)
    assert again.done == []
    made.run(again, retry_failed=True)
    assert len(again.done) == CELLS
    assert as_adopted(made) == as_adopted(finished)
    items = survey(plan, Store(made.results), Evaluation(seed=0, clean_images=40, held_out_images=10))
    assert {item.state for item in items} == {"measured", "not measured"}


@pytest.mark.parametrize(("stage", "left"), [(TrainTask, 0), (QuantizeTask, 2 * 2)])
def test_what_needs_a_failed_item_is_blocked_and_says_why(
    new_desk: NewDesk, finished: Desk, stage: type, left: int
) -> None:
    made = new_desk(name="blocked")
    if stage is QuantizeTask:
        shutil.copytree(finished.results / "models", made.results / "models")
    plan, _ = made.run(Inline(broken("no", stage)))
    rules = Evaluation(seed=0, clean_images=40, held_out_images=10)
    items = survey(plan, Store(made.results), rules)
    blocked = [item for item in items if item.cell is not None and item.blocked is not None]
    assert len(blocked) == CELLS - left
    assert all(item.blocked is not None and item.blocked.endswith(": no") for item in blocked)
    assert not any(item.pending for item in items)
    retried = survey(plan, Store(made.results), rules, again=lambda _key: True)
    assert (
        sum(item.pending for item in retried) == len([item for item in items if item.incomplete and item.blocked]) + 2
    )


def test_images_that_are_no_longer_the_same_are_refused(resumed: Desk) -> None:
    manifest = resumed.results / "manifest.json"
    body = json.loads(manifest.read_bytes())
    test = next(facts for facts in body["data"] if facts["role"] == "test")
    test["sha256"] = "0" * 64
    manifest.write_text(json.dumps(body), encoding="utf-8")
    before = resumed.lines
    _, told = resumed.run(Inline())
    assert resumed.lines == before  # nothing lasting: the images may be back the next time
    assert len(told) == CELLS
    assert "not done: signs/resnet8:width=4/" in told[0]
    assert "the manifest has 0000000000000000 for 'signs'; bring the images back" in told[0]


def test_two_processes_do_not_write_to_one_folder(resumed: Desk) -> None:
    second = Store.for_writing(resumed.results)
    with Store.for_writing(resumed.results), pytest.raises(StoreError, match="another `qdefense bench` writes here"):
        second.__enter__()


def test_what_a_killed_process_left_half_written_is_swept_away(resumed: Desk) -> None:
    left = resumed.results / "models" / ".0123.onnx.99999.part"
    left.write_bytes(b"half")
    with Store.for_writing(resumed.results):
        assert not left.exists()


def test_large_files_lie_where_git_does_not_look(resumed: Desk) -> None:
    with Store.for_writing(resumed.results) as store:
        store.add_model(bytes(400_001), "f" * 64)
        assert store.model_path("f" * 64) == resumed.results / "models" / "large" / f"{'f' * 16}.onnx"
    assert (resumed.results / "models" / "large" / ".gitignore").read_text(encoding="utf-8") == "*\n"


def test_a_bug_is_a_failed_record_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from qdefense.bench import measuring  # noqa: PLC0415 (imports torch)

    class BugTask:
        id = "bug"

        def failure(self, reason: str, volatile: object) -> str:
            return reason

    def crash(task: object, clock: object) -> None:
        raise ZeroDivisionError("by \x1b[31mzero")

    monkeypatch.setattr(measuring, "measure", crash)
    outcome = run_task(BugTask())  # type: ignore[arg-type]
    assert outcome.record == "internal error: ZeroDivisionError: by \\x1b[31mzero"
    assert not outcome.lost


STATEFUL = TINY.replace('"none", "badnets"', '"wanet:mode=all-to-all"')


def test_the_state_of_a_trigger_is_kept_beside_the_truth_and_carried_to_trials(new_desk: NewDesk) -> None:
    made = new_desk(STATEFUL, name="stateful")
    engine = Inline()
    made.run(engine)
    (state,), (truth,) = ((made.results / "models").glob(f"*.truth.{kind}") for kind in ("npz", "json"))
    assert state.stem == truth.stem
    carried = [task.trigger for task in engine.done if not isinstance(task, TrainTask)]
    assert carried == [state.read_bytes()] * 5
    behaviours = [record for record in made.records.values() if isinstance(record, BehaviourRecord)]
    assert [(record.failed, record.eligible) for record in behaviours] == [(False, 60)] * 2


@pytest.mark.parametrize("lost", [True, False])
def test_a_network_that_lies_there_is_taken_with_the_state_of_its_trigger_only(new_desk: NewDesk, lost: bool) -> None:
    first, second = new_desk(STATEFUL, name="first"), new_desk(STATEFUL, name="second")
    first.run(Inline())
    shutil.copytree(first.results / "models", second.results / "models")
    if lost:
        for state in (second.results / "models").glob("*.truth.npz"):
            state.unlink()
    engine = Inline()
    _, told = second.run(engine)
    assert ("TrainTask" in engine.stages) is lost
    assert any("is not taken: " in line for line in told) is lost
    assert len(list((second.results / "models").glob("*.truth.npz"))) == 1
    assert first.stable.keys() == second.stable.keys()


def test_a_lost_state_costs_its_cells_and_says_what_to_do(new_desk: NewDesk) -> None:
    made = new_desk(STATEFUL, name="losing")
    made.run(Inline())
    (state,) = (made.results / "models").glob("*.truth.npz")
    state.unlink()
    made.matrix.write_text(STATEFUL.replace("budget=quick", "budget=gate"), encoding="utf-8")
    engine = Inline()
    _, told = made.run(engine)
    assert engine.done == []
    (line,) = [line for line in told if "without it nobody knows the trigger" in line]
    assert "not there" in line
    assert "delete it" in line


@pytest.fixture
def telling(new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A measured network whose trigger, it says, shows a training image."""
    monkeypatch.setattr(WaNet, "trigger_shows_images", True, raising=False)
    made = new_desk(STATEFUL, name="telling")
    made.run(Inline())
    return made


def states(made: Desk) -> list[str]:
    return [str(path.relative_to(made.results / "models")) for path in made.results.glob("models/**/*.truth.npz")]


def with_more_cells(made: Desk) -> Desk:
    """Another machine, on which what git ignores is not, and a matrix with a cell more for each file."""
    for path in made.results.glob("models/large/*.*"):
        path.unlink()
    made.matrix.write_text(STATEFUL.replace("budget=quick", "budget=gate"), encoding="utf-8")
    return made


def test_the_state_of_a_trigger_that_shows_an_image_lies_where_git_does_not_look(telling: Desk) -> None:
    (state,) = states(telling)
    (truth,) = (telling.results / "models").glob("*.truth.json")
    assert state == f"large/{truth.stem}.npz"
    behaviours = [record for record in telling.records.values() if isinstance(record, BehaviourRecord)]
    assert [(record.failed, record.eligible) for record in behaviours] == [(False, 60)] * 2
    for path in telling.results.glob("models/large/*.npz"):
        path.unlink()
    engine = Inline()
    telling.run(engine)
    assert engine.done == []


def test_a_network_without_a_state_that_is_not_committed_is_trained_again_where_a_cell_needs_it(telling: Desk) -> None:
    before, made = states(telling), with_more_cells(telling)
    engine = Inline()
    made.run(engine)
    assert engine.stages == ["TrainTask", "TrialTask", "TrialTask"]
    assert states(made) == before
    assert [len(entry.replicas) for entry in read_manifest(made.results / "manifest.json").entries] == [1, 1]


def test_a_state_that_cannot_be_made_again_costs_its_cells_and_is_told(telling: Desk) -> None:
    made = with_more_cells(telling)
    engine = Inline(broken("no luck", TrainTask))
    _, first = made.run(engine)
    assert engine.stages == ["TrainTask"]
    assert [line for line in first if line.startswith("failed: ") and line.endswith(": no luck")]
    _, then = made.run(idle := Inline())
    (line,) = [line for line in then if "could not be trained again" in line]
    assert "the state of its trigger is not here, and it could not be trained again: no luck; --retry-failed" in line
    assert idle.done == []


def test_a_state_that_shows_an_image_is_moved_when_its_network_is_taken(telling: Desk, new_desk: NewDesk) -> None:
    second = new_desk(STATEFUL, name="taking")
    models = second.results / "models"
    shutil.copytree(telling.results / "models", models)
    (state,) = states(second)
    (models / state).rename(models / (models / state).name)
    engine = Inline()
    second.run(engine)
    assert "TrainTask" not in engine.stages
    assert states(second) == [state]
