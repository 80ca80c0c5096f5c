"""The control of an ASR: what a trigger does to the clean twin, planned, measured, and held against what files do."""

from __future__ import annotations

import html
import json
import shutil
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.wanet import WaNet
from qdefense.bench.cells import NetworkPlan, chosen, plan_cells
from qdefense.bench.cohort import Cohort
from qdefense.bench.facts import omissions
from qdefense.bench.matrix import read_matrix
from qdefense.bench.page import render_bench
from qdefense.bench.records import BehaviourRecord, ControlRecord, Network, Record, RepairMetrics, TrainingRecord
from qdefense.bench.running import evaluation_of, sources_of
from qdefense.bench.store import Store, read_model
from qdefense.bench.summary import BenchReport, Results, summarise
from qdefense.bench.survey import Item, survey
from qdefense.bench.tables import behaviour_rows, repair_rows, scan_rows
from qdefense.bench.tasks import Clock, Outcome, Task, TrainTask, TrialTask
from qdefense.bench.timing_plan import rounds_of, survey_timings
from qdefense.bench.worker import run_task
from qdefense.cli import run
from qdefense.data.opening import open_data
from qdefense.findings import Verdict
from qdefense.session import DeployedSession, profile_for
from qdefense.trial import Activity

from . import sample_records as samples
from .conftest import TINY, Desk, Inline, desk

NewDesk = Callable[..., Desk]
Capture = pytest.CaptureFixture[str]
PLAIN = TINY.replace("controls = false\n", "").replace('defenses = ["neural-cleanse:budget=quick"]\n', "")
"""Two networks at two precisions, and what the trigger of the one does to the other."""
SOURCED = PLAIN.replace('"badnets"', '"cassock:source-class=1"').replace('"fp32", "int8-dynamic"', '"fp32"')
"""With a trigger that is meant for one class."""
LEARNED = PLAIN.replace('"badnets"', '"wanet:mode=all-to-all"').replace('"fp32", "int8-dynamic"', '"fp32"')
"""The same with a trigger that no setting tells."""


def plan_of(desk: Desk) -> tuple[NetworkPlan, ...]:
    table = read_matrix(desk.matrix)
    return plan_cells(table, sources_of(table, Store(desk.results), pin=False))


def controls_of(plan: Sequence[NetworkPlan]) -> list[str]:
    return [cell.title for network in plan for _, cell in network.cells if cell.stage == "control"]


def items_of(desk: Desk, plan: Sequence[NetworkPlan]) -> list[Item]:
    return survey(plan, Store(desk.results), evaluation_of(read_matrix(desk.matrix)))


def measured_in(desk: Desk) -> list[ControlRecord]:
    return [record for record in desk.records.values() if isinstance(record, ControlRecord)]


@pytest.fixture(scope="module")
def controlled(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    """The matrix, measured; do not change it."""
    made = desk(tmp_path_factory.mktemp("controlled"), PLAIN)
    made.run(Inline())
    return made


@pytest.fixture
def plain(new_desk: NewDesk, controlled: Desk) -> Desk:
    """A desk of its own with the measured matrix on it."""
    made = new_desk(PLAIN, name="plain")
    shutil.copytree(controlled.results, made.results)
    return made


def without_controls(made: Desk) -> Desk:
    path = made.results / "records.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(line for line in lines if b'"stage":"control"' not in line))
    return made


def report_of(records: Sequence[Record]) -> BenchReport:
    results = Results(name="made up", folder="results", records=tuple(records), data=(), digests={})
    return summarise(results, Cohort(records))


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_clean_twin_is_shown_each_trigger_at_each_precision_that_both_have(new_desk: NewDesk) -> None:
    text = PLAIN.replace('"badnets"', '"badnets", "blended"')
    more = PLAIN[PLAIN.index("[[grid]]") :].replace('"none", "badnets"', '"badnets"').replace('"fp32"', '"int4"')
    place = "signs/resnet8:width=4/none/seed 0"
    assert controls_of(plan_of(new_desk(text + more))) == [
        f"{place}/{precision}/as-run/control of {attack}:target_class=7"
        for precision in ("fp32", "int8-dynamic")
        for attack in ("badnets", "blended")
    ]


def test_a_matrix_without_the_clean_twin_or_the_wish_has_no_controls(new_desk: NewDesk) -> None:
    assert controls_of(plan_of(new_desk(PLAIN.replace('"none", ', "")))) == []
    assert controls_of(plan_of(new_desk(TINY))) == []
    other_seed = PLAIN.replace('"none", "badnets"', '"badnets"') + PLAIN[PLAIN.index("[[grid]]") :].replace(
        '"none", "badnets"', '"none"'
    )
    assert controls_of(plan_of(new_desk(f"{other_seed}seeds = [1]\n"))) == []


def test_a_file_calibrated_with_the_trigger_has_the_clean_one_calibrated_without_for_its_control(
    new_desk: NewDesk,
) -> None:
    text = PLAIN.replace('"fp32", "int8-dynamic"', '"int8-static"')
    text = text.replace("images = 16\n", "images = 16\n[calibrations.hot]\nimages = 16\ntriggered = 0.5\n")
    (title,) = controls_of(plan_of(new_desk(f'{text}calibrations = ["few", "hot"]\n')))
    assert "/int8-static/few/as-run/control of badnets" in title
    alone = PLAIN.replace('"fp32", "int8-dynamic"', '"int8-static"') + 'calibrations = ["few"]\n'
    assert len(controls_of(plan_of(new_desk(alone)))) == 1


def test_a_limit_counts_the_cells_that_can_be_done(plain: Desk) -> None:
    plan = plan_of(plain)

    def part(limit: int, *, at_hand: bool) -> list[str]:
        found = chosen(plan, only=None, limit=limit, at_hand=lambda _: at_hand)
        return [cell.stage for network in found for _, cell in network.cells]

    assert part(3, at_hand=True) == ["behaviour", "control", "behaviour"]
    assert part(6, at_hand=False) == ["behaviour", "control", "behaviour", "control", "behaviour", "behaviour"]
    found = chosen(plan, only="/none/", limit=2, at_hand=lambda _: False)
    assert [cell.stage for network in found for _, cell in network.cells] == ["behaviour", "behaviour"]


def test_controls_alone_are_no_file_to_be_timed(plain: Desk) -> None:
    table, plan = read_matrix(plain.matrix), plan_of(plain)
    controls = chosen(plan, only="control of", limit=None, at_hand=lambda _: True)
    assert len(controls_of(controls)) == 2
    assert survey_timings(controls, Store(plain.results), evaluation_of(table), rounds_of(table)) == []


# --- the run ----------------------------------------------------------------------------------------------------------


def test_a_control_is_the_share_of_stamped_images_that_the_clean_file_gives_to_the_target(controlled: Desk) -> None:
    found = {record.scheme: record for record in measured_in(controlled)}
    assert set(found) == {"fp32", "int8-dynamic"}
    images = open_data("signs", split="test", limit=60, seed=0)
    trigger = trigger_of(ATTACKS.create("badnets:target-class=7"), *images.images.shape[1:3], None)
    eligible = images.take(np.flatnonzero(trigger.eligible(images.labels)))
    store = Store(controlled.results)
    trained = {
        r.network.attack: r.artifact_sha256 for r in controlled.records.values() if isinstance(r, TrainingRecord)
    }
    for record in found.values():
        path = store.model_path(record.artifact_sha256)
        assert path is not None
        artifact = Artifact.from_bytes(read_model(path, record.artifact_sha256))
        answers = DeployedSession(artifact, profile_for(artifact)).logits(trigger.stamp(eligible.pixels))
        assert record.asr == pytest.approx(float(np.mean(answers.argmax(axis=1) == 7)))
        assert record.eligible == len(eligible)
        assert (record.network.attack, record.attacked.attack) == (None, "badnets")
        assert record.attacked_sha256 == trained["badnets"]
    assert found["fp32"].artifact_sha256 == trained[None]


def test_the_control_of_a_source_specific_trigger_has_an_fpr_and_older_ones_are_measured_again(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_desk(SOURCED)
    with monkeypatch.context() as before:
        before.setattr("qdefense.bench.cells.NetworkPlan.source_specific", False)
        before.setattr("qdefense.trial.Control.model_dump", lambda one: {"asr": one.asr, "eligible": one.eligible})
        made.run(Inline())
    (old,) = measured_in(made)
    assert (old.fpr, old.bystanders) == (None, None)
    made.run(again := Inline())
    assert again.stages == ["TrialTask"]
    (kept, new) = measured_in(made)
    assert kept.key == old.key != new.key
    images = open_data("signs", split="test", limit=60, seed=0)
    assert new.bystanders == int((~np.isin(images.labels, [1, 7])).sum())
    assert new.fpr is not None
    (row,) = (row for row in behaviour_rows(Cohort([*made.records.values()])) if row.setting.attack == "cassock")
    assert row.control_fpr is not None
    assert (row.control_fpr.mean, row.uncontrolled) == (new.fpr, 0)
    (lacking,) = (
        one
        for one in behaviour_rows(Cohort([r for r in made.records.values() if r != new]))
        if one.setting.attack == "cassock"
    )
    assert (lacking.control_fpr, lacking.uncontrolled) == (None, 1)


def test_controls_come_whichever_network_is_trained_last(controlled: Desk, new_desk: NewDesk) -> None:
    other = new_desk(PLAIN.replace('"none", "badnets"', '"badnets", "none"'), name="other")
    other.run(Inline())
    assert {record.key for record in measured_in(other)} == {record.key for record in measured_in(controlled)}
    assert len(measured_in(controlled)) == 2
    for made in (controlled, other):
        assert not [item for item in items_of(made, plan_of(made)) if item.state != "measured"]


def test_no_control_is_measured_twice(plain: Desk) -> None:
    plain.run(again := Inline())
    assert again.done == []
    without_controls(plain).run(once := Inline())
    assert once.stages == ["TrialTask"] * 2


def test_controls_of_an_attacked_network_that_is_found_after_its_twin_are_measured(
    controlled: Desk, new_desk: NewDesk
) -> None:
    made = new_desk(PLAIN)
    shutil.copytree(controlled.results / "models", made.results / "models")
    lines = (controlled.results / "records.jsonl").read_bytes().splitlines(keepends=True)
    (made.results / "records.jsonl").write_bytes(b"".join(line for line in lines if b'"control"' not in line))
    manifest = json.loads((controlled.results / "manifest.json").read_bytes())
    kept = [entry for entry in manifest["entries"] if entry["recipe"].get("attack") is None]
    (made.results / "manifest.json").write_text(json.dumps({**manifest, "entries": kept}), encoding="utf-8")
    made.run(engine := Inline())
    assert "TrainTask" not in engine.stages
    assert len(measured_in(made)) == 2


def test_a_learned_trigger_is_carried_to_the_clean_file(new_desk: NewDesk) -> None:
    made, engine = new_desk(LEARNED), Inline()
    made.run(engine)
    (state,) = (made.results / "models").glob("*.truth.npz")
    (task,) = (task for task in engine.done if isinstance(task, TrialTask) and task.trial.cell.stage == "control")
    assert task.trigger == state.read_bytes()
    assert [record.failed for record in measured_in(made)] == [False]


def test_a_lost_trigger_that_is_not_committed_is_learned_again_for_its_control(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaNet, "trigger_shows_images", True, raising=False)
    made = new_desk(f"{LEARNED}controls = false\n")
    made.run(Inline())
    for path in made.results.glob("models/large/*.npz"):
        path.unlink()
    made.matrix.write_text(LEARNED, encoding="utf-8")
    engine = Inline()
    _, told = made.run(engine)
    assert engine.stages == ["TrainTask", "TrialTask"]
    assert told == []
    assert [record.failed for record in measured_in(made)] == [False]


def test_a_clean_network_that_is_trained_last_has_lost_triggers_learned_again(
    new_desk: NewDesk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WaNet, "trigger_shows_images", True, raising=False)
    made = new_desk(LEARNED.replace('"none", ', ""))
    made.run(Inline())
    for path in made.results.glob("models/large/*.npz"):
        path.unlink()
    made.matrix.write_text(LEARNED, encoding="utf-8")
    made.run(engine := Inline())
    assert engine.stages == ["TrainTask", "TrialTask", "TrainTask", "TrialTask"]
    assert [record.failed for record in measured_in(made)] == [False]


def without_luck(task: Task) -> Outcome:
    if isinstance(task, TrainTask) and task.attack is not None:
        return Outcome(task_id=task.id, record=task.failure("no luck", Clock().read()))
    return run_task(task)


def test_without_the_attacked_network_its_control_is_blocked_and_says_why(new_desk: NewDesk) -> None:
    made = new_desk(PLAIN)
    made.run(Inline(without_luck))
    blocked = [item for item in items_of(made, plan_of(made)) if item.stage == "control"]
    assert {item.blocked for item in blocked} == {"the network with the trigger could not be trained: no luck"}
    assert not any(item.pending for item in blocked)


def test_a_control_that_fails_is_a_record_and_is_listed(plain: Desk) -> None:
    def broken(task: Task) -> Outcome:
        if isinstance(task, TrialTask) and task.trial.cell.stage == "control":
            return Outcome(task_id=task.id, record=task.failure("out of luck", Clock().read()))
        return run_task(task)

    without_controls(plain).run(Inline(broken))
    report = report_of(tuple(plain.records.values()))
    (told,) = report.unanswered
    assert (told.stage, told.status, told.reason, len(told.keys)) == ("control", "failed", "out of luck", 2)
    assert sum(row.uncontrolled for row in report.behaviour) == 2


def test_here_measures_again_what_another_cpu_measured(plain: Desk) -> None:
    path = plain.results / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        if row.get("runtime"):
            row["runtime"]["isa"] = ["mmx"]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    engine = Inline()
    plain.run(engine, here=True)
    assert len([task for task in engine.done if task.trial.cell.stage == "control"]) == 2  # type: ignore[union-attr]
    assert len(measured_in(plain)) == 4


def test_a_part_of_the_matrix_has_the_controls_of_its_networks_and_of_those_that_are_trained(
    new_desk: NewDesk, plain: Desk, capfd: Capture
) -> None:
    fresh = new_desk(PLAIN, name="fresh")
    assert run(["bench", str(fresh.matrix), "--only", "/none/", "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[4].startswith("4 work items, 4 to do")
    assert not any("control of" in line for line in lines), "they would wait for a network that this run does not train"
    assert run(["bench", str(fresh.matrix), "--only", "/none/", "--dry-run"]) == 0
    assert capfd.readouterr().err.splitlines() == [
        "2 controls are left out: their triggers' networks are neither chosen nor trained here"
    ]
    assert run(["bench", str(fresh.matrix), "--only", "control of", "--dry-run"]) == 2
    assert "are controls of networks that are not trained yet, or whose trigger is not here; leave --only" in (
        capfd.readouterr().err
    )
    assert run(["bench", str(plain.matrix), "--only", "control of", "--dry-run"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].startswith("4 work items, 0 to do")


# --- the report -------------------------------------------------------------------------------------------------------


CLEAN, ATTACKED = samples.network(None), samples.network("badnets")


def control_of(made: Network, asr: float | None, scheme: str = "fp32", **changes: object) -> ControlRecord:
    twin = samples.behaviour(CLEAN, scheme)
    facts = twin.model_dump(exclude={"stage", "key", "clean_accuracy", "images", "asr", "eligible", "activity"})
    facts |= {"attacked": made, "attacked_sha256": samples.behaviour(made).artifact_sha256, "eligible": 1900}
    key = samples.sha("control", made, scheme, asr)
    return ControlRecord.model_validate({**facts, "key": key, "asr": asr, **changes})


def scanned(made: Network, score: float, verdict: Verdict) -> Record:
    return samples.defense(made, metrics=samples.scan_metrics(score, target=12, found=True), verdict=verdict)


def test_what_a_trigger_does_to_any_network_is_no_backdoor() -> None:
    records = [
        samples.behaviour(CLEAN),
        samples.behaviour(ATTACKED, asr=0.95),
        scanned(ATTACKED, 1.0, Verdict.CLEAN),
        scanned(CLEAN, 0.9, Verdict.CLEAN),
    ]
    (before,) = (row for row in scan_rows(Cohort(records)) if row.setting.attack == "badnets")
    assert before.tpr is not None
    assert (before.tpr.hits, before.tpr.n) == (0, 1)
    held = Cohort([*records, control_of(ATTACKED, 0.91)])
    (after,) = (row for row in scan_rows(held) if row.setting.attack == "badnets")
    assert after.tpr is None
    assert (after.dormant and after.dormant.n, after.inactive.measured) == (1, 1)
    (row,) = (row for row in behaviour_rows(held) if row.setting.attack == "badnets")
    assert row.activity == {Activity.DORMANT: 1}
    assert row.control is not None
    assert (row.control.mean, row.uncontrolled) == (0.91, 0)


def test_what_a_repair_leaves_is_held_against_what_the_trigger_does_to_the_clean_twin() -> None:
    metrics = RepairMetrics(
        accuracy_before=0.95, accuracy_after=0.94, asr_before=0.95, asr_after=0.3,
        activity_before=Activity.ACTIVE, activity_after=Activity.ATTENUATED,
    )  # fmt: skip
    repaired = samples.defense(ATTACKED, metrics=metrics, name="fine-pruning", kind="repair", verdict=None)
    records = [samples.behaviour(ATTACKED, asr=0.95), repaired]
    (alone,) = repair_rows(Cohort(records))
    assert (alone.control, alone.transitions, alone.uncontrolled) == (None, {"active to attenuated": 1}, 1)
    assert any(
        line.startswith("Repairs of attacked files without a control: 1.") for line in omissions(report_of(records))
    )
    (row,) = repair_rows(Cohort([*records, control_of(ATTACKED, 0.27)]))
    assert row.control is not None
    assert (row.control.mean, row.transitions, row.uncontrolled) == (0.27, {"active to dormant": 1}, 0)
    elsewhere = samples.RUNTIME.model_copy(update={"isa": ("sse2",)})
    (there,) = repair_rows(
        Cohort([records[0], repaired.model_copy(update={"runtime": elsewhere}), control_of(ATTACKED, 0.27)])
    )
    assert there.transitions == {"active to dormant": 1}, "a control counts on any CPU"
    (weak,) = repair_rows(Cohort([*records, control_of(ATTACKED, 0.2)]))
    assert weak.transitions == {"active to attenuated": 1}
    (other,) = repair_rows(Cohort([*records, control_of(samples.network("blended"), 0.27)]))
    assert (other.control, other.transitions) == (None, {"active to attenuated": 1})


def test_a_control_is_of_the_same_trigger_precision_images_and_arithmetic() -> None:
    records = [samples.behaviour(CLEAN), samples.behaviour(ATTACKED, asr=0.95)]
    others = [
        control_of(samples.network("blended"), 0.94),
        control_of(ATTACKED, 0.94, "int4"),
        control_of(ATTACKED, 0.94, data_sha256="0" * 64),
        control_of(ATTACKED, 0.94, arithmetic="exact"),
        control_of(ATTACKED, 0.94, attacked_sha256="0" * 64),
        control_of(ATTACKED, 0.94).model_copy(update={"asr": None, "failed": True}),
    ]
    (row,) = (row for row in behaviour_rows(Cohort([*records, *others])) if row.setting.attack == "badnets")
    assert row.activity == {Activity.ACTIVE: 1}
    assert (row.control, row.uncontrolled) == (None, 1)


def test_the_control_of_a_quantized_file_is_that_of_its_network() -> None:
    records = [
        *(samples.quantization(made, "int8-static") for made in (CLEAN, ATTACKED)),
        samples.behaviour(ATTACKED, "int8-static", asr=0.95),
        samples.behaviour(ATTACKED, "int8-static", asr=0.95, calibration=samples.EIGHTH),
        samples.quantization(ATTACKED, "int8-static", samples.EIGHTH),
        control_of(ATTACKED, 0.2, "int8-static"),
    ]
    found = {row.setting.calibration: row.control for row in behaviour_rows(Cohort(records))}
    assert [control and control.mean for control in found.values()] == [0.2, 0.2]


def test_of_several_controls_the_newest_code_counts_and_then_the_same_cpu() -> None:
    seen = samples.behaviour(ATTACKED, asr=0.95)
    elsewhere = samples.RUNTIME.model_copy(update={"isa": ("sse2",)})
    old, other = control_of(ATTACKED, 0.1), control_of(ATTACKED, 0.3, runtime=elsewhere, evaluation_revision=1)
    newest = control_of(ATTACKED, 0.2, evaluation_revision=1)
    for records in ([old, newest, other], [other, newest, old]):
        assert Cohort([seen, *records]).controls[seen.key].asr == 0.2
    assert Cohort([seen, old, other]).controls[seen.key].asr == 0.3


def test_a_control_with_an_fpr_counts_before_one_of_the_same_cpu() -> None:
    seen = samples.behaviour(ATTACKED, asr=0.95, fpr=0.2, bystanders=9)
    elsewhere = samples.RUNTIME.model_copy(update={"isa": ("sse2",)})
    old, new = control_of(ATTACKED, 0.1), control_of(ATTACKED, 0.2, runtime=elsewhere, fpr=0.01, bystanders=9)
    (row,) = (one for one in behaviour_rows(Cohort([seen, new, old])) if one.setting.attack == "badnets")
    assert row.control_fpr is not None
    assert (row.control_fpr.mean, row.fpr and row.fpr.mean) == (0.01, 0.2)


def test_of_two_clean_networks_of_a_recipe_the_last_one_counts_on_whatever_cpu() -> None:
    seen = samples.behaviour(ATTACKED, asr=0.95)
    first, second = control_of(ATTACKED, 0.1), control_of(ATTACKED, 0.93, replica=1)
    assert Cohort([seen, first, second]).judged(seen).activity is Activity.DORMANT
    again = control_of(ATTACKED, 0.94, replica=1)
    assert Cohort([seen, second, again]).controls[seen.key].asr == 0.94
    assert Cohort([seen, again, second]).controls[seen.key].asr == 0.93
    elsewhere = samples.RUNTIME.model_copy(update={"isa": ("sse2",)})
    for records in ([first, (other := control_of(ATTACKED, 0.93, replica=1, runtime=elsewhere))], [other, first]):
        assert Cohort([seen, *records]).judged(seen).activity is Activity.DORMANT


def test_a_failed_control_is_forgotten_once_there_is_an_answer() -> None:
    seen = samples.behaviour(ATTACKED, asr=0.95)
    failed = control_of(ATTACKED, None, failed=True, reason="no luck")
    assert [one.reason for one in report_of([seen, failed]).unanswered] == ["no luck"]
    assert report_of([seen, failed, control_of(ATTACKED, 0.1)]).unanswered == ()
    again = control_of(ATTACKED, None, failed=True, reason="no luck either", evaluation_revision=1)
    assert [one.reason for one in report_of([seen, failed, again]).unanswered] == ["no luck either"]
    another = control_of(ATTACKED, None, failed=True, reason="of another network", attacked_sha256="0" * 64)
    told = report_of([seen, control_of(ATTACKED, 0.1), another]).unanswered
    assert [one.reason for one in told] == ["of another network"]


def test_the_page_shows_the_line_of_a_behaviour_as_it_was_recorded_and_its_control() -> None:
    records = [samples.behaviour(CLEAN), samples.behaviour(ATTACKED, asr=0.95), control_of(ATTACKED, 0.93)]
    page = html.unescape(render_bench(report_of(records), Cohort(records)))
    assert '"activity": "active"' in page
    assert '"activity": "dormant"' not in page
    assert "control, seed 0" in page


def test_a_behaviour_that_failed_has_no_activity_whatever_its_control() -> None:
    failed = samples.behaviour(ATTACKED, accuracy=None, asr=None, failed=True, reason="no session")
    failed = failed.model_copy(update={"activity": None})
    (row,) = behaviour_rows(Cohort([failed, control_of(ATTACKED, 0.1)]))
    assert (row.activity, row.measured, row.uncontrolled) == ({}, 0, 0)


def test_the_report_says_of_how_many_files_there_is_no_control() -> None:
    records = [r for r in samples.matrix(data=("gtsrb",), seeds=1) if isinstance(r, BehaviourRecord)]
    attacked = sum(record.asr is not None for record in records)

    def told(*more: Record) -> list[str]:
        return [line for line in omissions(report_of((*records, *more))) if "without a control" in line]

    assert told()[0].startswith("Behaviours of attacked files without a control, the same trigger on their clean twin")
    assert f": {attacked}." in told()[0]
    assert f": {attacked - 1}." in told(control_of(ATTACKED, 0.1))[0]


def test_an_answer_hides_a_failure_only_where_it_says_as_much() -> None:
    seen = samples.behaviour(ATTACKED, asr=0.95, fpr=0.2, bystanders=9)
    old = control_of(ATTACKED, 0.1)
    failed = control_of(ATTACKED, None, key=samples.sha("newer"), failed=True, reason="no session")
    whole = control_of(ATTACKED, 0.1, key=samples.sha("newest"), fpr=0.01, bystanders=9)
    assert Cohort([seen, old, failed]).failed_controls == [failed]
    assert Cohort([seen, whole, failed]).failed_controls == []
    plain = samples.behaviour(ATTACKED, asr=0.95)
    assert Cohort([plain, old, failed]).failed_controls == []
    assert Cohort([plain, failed]).failed_controls == [failed]


# --- activity ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "rates", "recorded", "judged"),
    [
        ({}, {"asr": 0.95, "base_confusion": 0.93}, Activity.ACTIVE, Activity.DORMANT),
        ({"mode": "all-to-all"}, {"asr": 0.75, "accuracy": 0.8}, Activity.ATTENUATED, Activity.ACTIVE),
        ({"host.mode": "all-to-all"}, {"asr": 0.75, "accuracy": 0.8}, Activity.ATTENUATED, Activity.ACTIVE),
        ({"mode": "all-to-one"}, {"asr": 0.75, "accuracy": 0.8}, Activity.ATTENUATED, Activity.ATTENUATED),
        ({"mode": "all-to-all"}, {"asr": 0.4, "accuracy": 0.4}, Activity.ACTIVE, Activity.ATTENUATED),
        ({}, {"asr": 0.95, "base_confusion": None}, Activity.ACTIVE, Activity.ACTIVE),
    ],
)
def test_a_line_of_any_age_is_judged_by_its_rates(
    settings: dict[str, str], rates: dict[str, float | None], recorded: Activity, judged: Activity
) -> None:
    made = samples.network("badnets", 0, "gtsrb")
    made = made.model_copy(update={"attack_settings": {"target_class": 1} | settings})
    line = samples.behaviour(made, activity=recorded, **rates)
    ((found,),) = Cohort([line]).behaviours.values()
    assert found.activity is judged
