from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.audit import calibrating
from qdefense.audit.calibrating import (
    CleanModel,
    Measured,
    ReportFolder,
    Scan,
    make_entries,
    measure_models,
    read_models,
    scan_of,
)
from qdefense.audit.events import Job
from qdefense.audit.supervisor import UsageProblemError
from qdefense.calibration import CalibrationError, population_of
from qdefense.converters.contract import ContractError, StatedContract
from qdefense.converters.reading import FileRefusedError
from qdefense.data.images import DataError, ImageSet
from qdefense.data.npz import save_npz
from qdefense.data.opening import open_data
from qdefense.defenses import DEFENSES
from qdefense.findings import ScanResult, Verdict
from qdefense.registry import SpecError
from qdefense.report.model import Report
from qdefense.session import SessionProfile

from .clean_reports import HERE
from .clean_reports import report_on as clean_report

CLASSES, SIDE = 4, 4
SCAN = Scan(spec="neural-cleanse:budget=quick", defense="neural-cleanse", settings={"budget": "quick", "restarts": 1})


def write_model(path: Path, seed: int, *, hidden: int = 6) -> Path:
    rng = np.random.default_rng(seed)
    shapes = {"w1": (3 * SIDE * SIDE, hidden), "w2": (hidden, CLASSES)}
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w1"], ["hidden"]),
        helper.make_node("MatMul", ["hidden", "w2"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, SIDE, SIDE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])],
        [numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name) for name, shape in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.fixture
def data(tmp_path: Path, make_noise: Callable[..., ImageSet]) -> Path:
    save_npz(tmp_path / "data.npz", make_noise(8, size=SIDE, classes=CLASSES))
    return tmp_path / "data.npz"


@pytest.fixture
def jobs(tmp_path: Path, data: Path) -> list[Job]:
    """Three models of one architecture."""
    paths = [write_model(tmp_path / f"m{seed}.onnx", seed) for seed in range(3)]
    return [Job(model=str(path), data=str(data), seed=5) for path in paths]


def report_on(job: Job, score: float | None, **changes: Any) -> Report:
    """What an audit with `SCAN` would have said."""
    return clean_report(job, SCAN.settings, score, **changes)


def changed(report: Report, where: str, **values: Any) -> Report:
    """The same report with other values in its subject, data, contract, finding or environment."""
    subject, finding = report.subject, report.findings[0]
    assert subject.data is not None
    assert subject.contract is not None
    match where:
        case "data":
            new: dict[str, Any] = {
                "subject": subject.model_copy(update={"data": subject.data.model_copy(update=values)})
            }
        case "contract":
            other = subject.contract.model_copy(update=values)
            new = {"subject": subject.model_copy(update={"contract": other})}
        case "finding":
            new = {"findings": (finding.model_copy(update=values),)}
        case "environment":
            new = {"environment": report.environment.model_copy(update=values)}
        case _:
            new = {"subject": subject.model_copy(update=values)}
    return report.model_copy(update=new)


def store(folder: Path, name: str, report: Report) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(report.model_dump_json())


@dataclass
class Auditor:
    """Stands in for `run_audit`: scores by file name, and every job it was given."""

    scores: dict[str, float | None] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    stop_after: int = 99
    error: BaseException = field(default_factory=KeyboardInterrupt)

    def __call__(self, job: Job, *, required: tuple[str, ...], on_progress: Any, verbose: bool) -> Report:
        if len(self.jobs) == self.stop_after:
            raise self.error
        self.jobs.append(job)
        assert required == ("neural-cleanse",)
        return report_on(job, self.scores.get(Path(job.model).stem, 1.0))

    @property
    def audited(self) -> list[str]:
        return [Path(job.model).stem for job in self.jobs]


@pytest.fixture
def auditor(monkeypatch: pytest.MonkeyPatch) -> Auditor:
    auditor = Auditor(scores={"m0": 1.5, "m1": 0.5, "m2": 2.5})
    monkeypatch.setattr(calibrating, "run_audit", auditor)
    return auditor


def measure(jobs: Sequence[Job], folder: Path, told: list[tuple[str, bool]] | None = None) -> list[Measured]:
    """One run of the command's work."""
    folder.mkdir(exist_ok=True)
    return measure_models(
        read_models(jobs),
        SCAN,
        ReportFolder(folder),
        HERE,
        on_progress=lambda *_: None,
        on_measured=lambda found, kept: None if told is None else told.append((found.model.name, kept)),
    )


# --- what is asked ----------------------------------------------------------------------------------------------------


def test_scan_of_gives_the_settings_without_the_threshold() -> None:
    scan = scan_of("neural-cleanse:budget=quick,patience=3")
    assert (scan.spec, scan.defense) == ("neural-cleanse:budget=quick,patience=3", "neural-cleanse")
    assert scan.settings == {
        "budget": "quick", "learning_rate": 0.1, "batch_size": 32, "initial_cost": 1e-3, "multiplier": 2.0,
        "patience": 3, "attack_success": 0.99, "gradient_steps_per_class": 60, "restarts": 1,
    }  # fmt: skip


def test_scan_of_raises_when_the_threshold_is_set() -> None:
    with pytest.raises(CalibrationError) as raised:
        scan_of("neural-cleanse:threshold=2")
    expected = "'neural-cleanse:threshold=2' sets the threshold, which calibration is to find; leave it out"
    assert str(raised.value) == expected


def test_scan_of_raises_when_the_defense_has_no_score(monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        name: ClassVar[str] = "other"

    monkeypatch.setattr(DEFENSES, "create", lambda _spec: Other())
    with pytest.raises(CalibrationError) as raised:
        scan_of("other")
    assert str(raised.value) == "'other' gives a model no score to calibrate; name a model scan"


def test_scan_of_raises_when_the_defense_is_unknown() -> None:
    with pytest.raises(SpecError, match="did you mean 'neural-cleanse'"):
        scan_of("neural-clense")


# --- the models -------------------------------------------------------------------------------------------------------


def test_read_models_gives_identity_and_population(jobs: list[Job], data: Path) -> None:
    models = read_models(jobs)
    assert [model.name for model in models] == ["m0.onnx", "m1.onnx", "m2.onnx"]
    artifacts = [Artifact.read(Path(job.model)) for job in jobs]
    assert [model.identity for model in models] == [artifact.sha256 for artifact in artifacts]
    digest = open_data(str(data)).digest
    assert [model.population for model in models] == [population_of(artifacts[0], digest)] * 3
    assert [model.job for model in models] == jobs


def test_read_models_reads_the_images_once_for_each_way_of_resizing(
    jobs: list[Job], monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Any] = []

    def count(*arguments: Any, **options: Any) -> ImageSet:
        opened.append(options["resize"])
        return open_data(*arguments, **options)

    monkeypatch.setattr(calibrating, "open_data", count)
    stated = jobs[2].model_copy(update={"contract": StatedContract(resize="nearest")})
    models = read_models([*jobs[:2], stated])
    assert [None if resize is None else resize.rule for resize in opened] == [None, "nearest"]
    assert models[0].population.contract == {"height": SIDE, "width": SIDE}
    assert models[2].population.contract == {"height": SIDE, "width": SIDE, "resize": "nearest"}


def test_read_models_raises_when_a_file_is_named_twice(jobs: list[Job], tmp_path: Path) -> None:
    copy = tmp_path / "copy.onnx"
    copy.write_bytes(Path(jobs[1].model).read_bytes())
    with pytest.raises(CalibrationError) as raised:
        read_models([*jobs, jobs[0].model_copy(update={"model": str(copy)})])
    assert str(raised.value) == (
        f"{jobs[1].model} and {copy} are the same file, which counts for one model; name it once"
    )


def test_read_models_names_the_file_that_is_refused(jobs: list[Job], tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(FileRefusedError, match=r"^bad\.onnx: the file \(8 bytes\) is no ONNX model"):
        read_models([*jobs, jobs[0].model_copy(update={"model": str(tmp_path / "bad.onnx")})])


def test_read_models_names_the_file_whose_contract_does_not_hold(jobs: list[Job]) -> None:
    wrong = jobs[1].model_copy(update={"contract": StatedContract(output_name="none")})
    with pytest.raises(ContractError, match=r"^m1\.onnx: .*'none'"):
        read_models([jobs[0], wrong])


def test_read_models_raises_when_data_or_files_are_missing(jobs: list[Job], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_models([jobs[0].model_copy(update={"model": str(tmp_path / "none.onnx")})])
    with pytest.raises(DataError, match="no such file or folder"):
        read_models([jobs[0].model_copy(update={"data": "nowhere"})])
    with pytest.raises(CalibrationError, match="there are no images to scan the models on; name the data"):
        read_models([jobs[0].model_copy(update={"data": None})])


# --- kept reports -----------------------------------------------------------------------------------------------------


def test_report_folder_finds_a_report_by_what_it_is_about(jobs: list[Job], tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    for name, job, score in zip(("zzz.json", "a.json", "m0.json"), jobs, (1.0, 2.0, 3.0), strict=True):
        store(folder, name, report_on(job, score))
    kept, models = ReportFolder(folder), read_models(jobs)
    found = [kept.find(model, SCAN, HERE) for model in models]
    assert [None if one is None else one.score for one in found] == [1.0, 2.0, 3.0]
    assert kept.unreadable == []


def test_report_folder_opens_no_truth(jobs: list[Job], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 3: what the truth says must not reach what is judged by it."""
    folder, opened, plain = tmp_path / "reports", [], io.open
    store(folder, "m0.json", report_on(jobs[0], 1.0))
    (folder / "m0.truth.json").write_text("{}")

    def record(path: Any, *arguments: Any, **options: Any) -> Any:
        opened.append(Path(path).name)
        return plain(path, *arguments, **options)

    monkeypatch.setattr("io.open", record)
    kept = ReportFolder(folder)
    assert (opened, kept.unreadable) == (["m0.json"], [])


def test_report_folder_finds_the_right_one_of_several_about_a_file(jobs: list[Job], tmp_path: Path) -> None:
    folder, report = tmp_path / "reports", report_on(jobs[0], 1.0)
    store(folder, "1.json", changed(report, "finding", seed=4, result=ScanResult(score=4.0)))
    store(folder, "2.json", changed(report, "finding", defense="pixel"))
    store(folder, "3.json", changed(report, "finding", result=ScanResult(score=3.0)))
    (model,) = read_models(jobs[:1])
    found = ReportFolder(folder).find(model, SCAN, HERE)
    assert found is not None
    assert (found.score, found.model) == (3.0, model)


OLD = {**HERE.versions, "onnxruntime": "1.0"}
STRANGERS: dict[str, tuple[str, dict[str, Any]]] = {
    "file": ("subject", {"sha256": "0" * 64}),
    "external weights": ("subject", {"external_files": {"w.bin": "0" * 64}}),
    "no contract": ("subject", {"contract": None}),
    "no data": ("subject", {"data": None}),
    "contract": ("contract", {"channels": "BGR"}),
    "data": ("data", {"sha256": "0" * 64}),
    "setting": ("finding", {"settings": {"budget": "gate", "restarts": 1}}),
    "more settings": ("finding", {"settings": {**SCAN.settings, "patience": 1}}),
    "seed": ("finding", {"seed": 6}),
    "defense": ("finding", {"defense": "pixel"}),
    "versions": ("environment", {"versions": OLD}),
    "machine": ("environment", {"runtime": HERE.runtime.model_copy(update={"isa": ("none",)})}),
}


@pytest.mark.parametrize("key", STRANGERS)
def test_report_folder_finds_no_report_when_it_is_about_something_else(
    jobs: list[Job], tmp_path: Path, key: str
) -> None:
    where, values = STRANGERS[key]
    report = report_on(jobs[0], 1.0)
    store(tmp_path / "reports", "1.json", changed(report, where, **values))
    (model,) = read_models(jobs[:1])
    assert ReportFolder(tmp_path / "reports").find(model, SCAN, HERE) is None
    store(tmp_path / "reports", "2.json", report)
    assert ReportFolder(tmp_path / "reports").find(model, SCAN, HERE) is not None


def test_report_folder_finds_what_any_machine_made_when_none_is_named(jobs: list[Job], tmp_path: Path) -> None:
    store(tmp_path / "reports", "1.json", changed(report_on(jobs[0], 1.0), "environment", versions=OLD))
    (model,) = read_models(jobs[:1])
    assert ReportFolder(tmp_path / "reports").find(model, SCAN) is not None


def test_report_folder_finds_no_report_that_holds_no_finding(jobs: list[Job], tmp_path: Path) -> None:
    """An audit that was killed or refused is done again."""
    store(tmp_path / "reports", "1.json", report_on(jobs[0], 1.0, findings=()))
    (model,) = read_models(jobs[:1])
    assert ReportFolder(tmp_path / "reports").find(model, SCAN, HERE) is None


def test_report_folder_reads_reports_of_schema_1_0(jobs: list[Job], tmp_path: Path) -> None:
    body = json.loads(report_on(jobs[0], 1.0).model_dump_json())
    body["schema_version"] = "1.0"
    del body["subject"]["external_files"], body["subject"]["contract"]["fixed_inputs"]
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "old.json").write_text(json.dumps(body))
    (model,) = read_models(jobs[:1])
    found = ReportFolder(tmp_path / "reports").find(model, SCAN, HERE)
    assert found is not None
    assert found.score == 1.0


def test_report_folder_passes_over_what_is_no_report(jobs: list[Job], tmp_path: Path) -> None:
    store(tmp_path / "reports", "1.json", report_on(jobs[0], 1.0))
    (tmp_path / "reports" / "0.json").write_text("{}")
    (tmp_path / "reports" / "notes.txt").write_text("no report")
    kept = ReportFolder(tmp_path / "reports")
    assert [line.partition(": ")[0] for line in kept.unreadable] == ["0.json"]
    assert "schema version None" in kept.unreadable[0]
    assert kept.find(read_models(jobs[:1])[0], SCAN, HERE) is not None


def test_report_folder_keeps_no_report_of_a_file_that_was_not_described_and_says_why(
    jobs: list[Job], tmp_path: Path
) -> None:
    """Its external weights are not known then, so that it would read as another file."""
    (tmp_path / "reports").mkdir()
    (model,) = read_models(jobs[:1])
    report = report_on(jobs[0], 1.0)
    cut = report.model_copy(update={"subject": report.subject.model_copy(update={"contract": None, "sha256": None})})
    found = ReportFolder(tmp_path / "reports").keep(model, SCAN, cut)
    assert (found.finding, found.reason) == (None, "; ".join(cut.gate.reasons))
    assert list((tmp_path / "reports").iterdir()) == []


@pytest.mark.parametrize(("where", "values"), [STRANGERS["file"], STRANGERS["data"]])
def test_report_folder_keeps_no_report_when_file_or_images_changed(
    jobs: list[Job], tmp_path: Path, where: str, values: dict[str, Any]
) -> None:
    (tmp_path / "reports").mkdir()
    (model,) = read_models(jobs[:1])
    with pytest.raises(CalibrationError) as raised:
        ReportFolder(tmp_path / "reports").keep(model, SCAN, changed(report_on(jobs[0], 1.0), where, **values))
    assert str(raised.value) == "m0.onnx or its images changed while it was audited; start again"
    assert list((tmp_path / "reports").iterdir()) == []


# --- the audits -------------------------------------------------------------------------------------------------------


def test_measure_models_audits_every_model_once(jobs: list[Job], tmp_path: Path, auditor: Auditor) -> None:
    told: list[tuple[str, bool]] = []
    measured = measure(jobs, tmp_path / "reports", told)
    assert [entry.score for entry in measured] == [1.5, 0.5, 2.5]
    assert auditor.jobs == [job.model_copy(update={"defenses": (SCAN.spec,)}) for job in jobs]
    assert told == [("m0.onnx", False), ("m1.onnx", False), ("m2.onnx", False)]
    assert len(list((tmp_path / "reports").glob("*.json"))) == 3


def test_measure_models_audits_nothing_again(jobs: list[Job], tmp_path: Path, auditor: Auditor) -> None:
    first = measure(jobs, tmp_path / "reports")
    told: list[tuple[str, bool]] = []
    again = measure(jobs[::-1], tmp_path / "reports", told)
    assert auditor.audited == ["m0", "m1", "m2"]
    assert [entry.score for entry in again] == [entry.score for entry in first[::-1]]
    assert told == [("m2.onnx", True), ("m1.onnx", True), ("m0.onnx", True)]


@pytest.mark.parametrize("done", [0, 1, 2])
def test_measure_models_goes_on_where_it_was_interrupted(
    jobs: list[Job], tmp_path: Path, auditor: Auditor, done: int
) -> None:
    auditor.stop_after = done
    with pytest.raises(KeyboardInterrupt):
        measure(jobs, tmp_path / "reports")
    assert auditor.audited == ["m0", "m1", "m2"][:done]
    auditor.stop_after = 99
    assert [entry.score for entry in measure(jobs, tmp_path / "reports")] == [1.5, 0.5, 2.5]
    assert auditor.audited == ["m0", "m1", "m2"], "no model twice"


def test_measure_models_audits_again_what_was_kept_under_other_settings(
    jobs: list[Job], tmp_path: Path, auditor: Auditor
) -> None:
    """And keeps both reports."""
    other = report_on(jobs[0], 9.0)
    (model,) = read_models(jobs[:1])
    (tmp_path / "reports").mkdir()
    gate = Scan(spec="neural-cleanse", defense="neural-cleanse", settings={"budget": "gate"})
    ReportFolder(tmp_path / "reports").keep(model, gate, changed(other, "finding", settings={"budget": "gate"}))
    assert [entry.score for entry in measure(jobs[:1], tmp_path / "reports")] == [1.5]
    kept = ReportFolder(tmp_path / "reports")
    found = [kept.find(model, scan, HERE) for scan in (gate, SCAN)]
    assert [None if one is None else one.score for one in found] == [9.0, 1.5]


def test_measure_models_names_the_model_that_data_and_options_do_not_fit(
    jobs: list[Job], tmp_path: Path, auditor: Auditor
) -> None:
    auditor.stop_after, auditor.error = 1, UsageProblemError("other classes")
    with pytest.raises(UsageProblemError, match=r"^m1\.onnx: other classes$"):
        measure(jobs, tmp_path / "reports")


def test_measure_models_reports_progress(jobs: list[Job], tmp_path: Path, auditor: Auditor) -> None:
    (tmp_path / "reports").mkdir()
    steps: list[tuple[str, int, int]] = []
    measure_models(
        read_models(jobs),
        SCAN,
        ReportFolder(tmp_path / "reports"),
        HERE,
        on_progress=lambda *step: steps.append(step),
        on_measured=lambda *_: None,
    )
    assert steps == [("models", done, 3) for done in range(4)]


# --- the entries ------------------------------------------------------------------------------------------------------


def measured_of(models: list[CleanModel], scores: Sequence[float | None]) -> list[Measured]:
    found = []
    for model, score in zip(models, scores, strict=True):
        report = report_on(model.job, score)
        found.append(Measured(model=model, report=report, finding=report.findings[0]))
    return found


def test_make_entries_holds_scores_and_digests_apart_and_sorted(jobs: list[Job]) -> None:
    models = read_models(jobs)
    (entry,), problems = make_entries(measured_of(models, [1.5, 0.5, 2.5]), SCAN)
    assert problems == ()
    assert (entry.scores, entry.not_measured, entry.n) == ((0.5, 1.5, 2.5), 0, 3)
    assert entry.artifacts == tuple(sorted(model.identity for model in models))
    assert (entry.defense, entry.settings, entry.population) == ("neural-cleanse", SCAN.settings, models[0].population)
    made = entry.conditions
    assert (made.seed, made.versions, made.runtime, made.profile) == (
        5, HERE.versions, HERE.runtime, SessionProfile(batch=64),
    )  # fmt: skip


def test_make_entries_takes_the_score_of_an_alarm_and_of_a_scan_that_gave_no_verdict(jobs: list[Job]) -> None:
    measured = measured_of(read_models(jobs), [1.0, 5.0, 3.0])
    verdicts = (Verdict.CLEAN, Verdict.BACKDOORED, Verdict.NOT_MEASURED)
    measured = [
        Measured(
            model=one.model,
            report=one.report,
            finding=one.report.findings[0].model_copy(update={"verdict": verdict}),
        )
        for one, verdict in zip(measured, verdicts, strict=True)
    ]
    (entry,), _ = make_entries(measured, SCAN)
    assert entry.scores == (1.0, 3.0, 5.0), "to leave alarms out would make the rate too good"


def test_make_entries_gives_each_population_its_own(jobs: list[Job], tmp_path: Path) -> None:
    wide = write_model(tmp_path / "wide.onnx", 9, hidden=7)
    models = read_models([*jobs, jobs[0].model_copy(update={"model": str(wide)})])
    one, _ = make_entries(measured_of(models, [1.5, 0.5, 2.5, 7.0]), SCAN)
    assert sorted(entry.scores for entry in one) == [(0.5, 1.5, 2.5), (7.0,)]
    two, _ = make_entries(measured_of(models, [1.5, 0.5, 2.5, 7.0])[::-1], SCAN)
    assert one == two


def many(jobs: list[Job], tmp_path: Path, count: int) -> list[CleanModel]:
    paths = [write_model(tmp_path / f"x{seed}.onnx", 100 + seed) for seed in range(count)]
    return read_models([jobs[0].model_copy(update={"model": str(path)}) for path in paths])


def test_make_entries_counts_models_without_a_score(jobs: list[Job], tmp_path: Path) -> None:
    models = many(jobs, tmp_path, 10)
    (entry,), problems = make_entries(measured_of(models, [None, *map(float, range(9))]), SCAN)
    assert (entry.n, entry.not_measured, problems) == (9, 1, ())
    assert models[0].identity not in entry.artifacts


def test_make_entries_gives_none_when_more_than_a_tenth_has_no_score(jobs: list[Job], tmp_path: Path) -> None:
    models = many(jobs, tmp_path, 9)
    entries, problems = make_entries(measured_of(models, [None, *map(float, range(8))]), SCAN)
    assert entries == ()
    expected = "1 of 9 fp32 models have no score, more than 10%: x0.onnx: too few classes converged"
    assert problems == (expected,)
    _, problems = make_entries(measured_of(models, [None] * 9), SCAN)
    assert problems[0].endswith("; x2.onnx: too few classes converged; and 6 more")


def test_make_entries_gives_the_gates_reason_when_an_audit_came_to_no_finding(jobs: list[Job]) -> None:
    (model,) = read_models(jobs[:1])
    measured = Measured(model=model, report=report_on(model.job, 1.0, findings=()), finding=None)
    _, problems = make_entries([measured], SCAN)
    assert problems == ("1 of 1 fp32 models have no score, more than 10%: m0.onnx: some reason",)


def test_make_entries_raises_when_conditions_differ(jobs: list[Job]) -> None:
    measured = measured_of(read_models(jobs), [1.5, 0.5, 2.5])
    other = changed(measured[1].report, "environment", versions=OLD)
    measured[1] = Measured(model=measured[1].model, report=other, finding=other.findings[0])
    with pytest.raises(CalibrationError) as raised:
        make_entries(measured, SCAN)
    assert str(raised.value) == (
        f"m1.onnx and m0.onnx were audited under different conditions: onnxruntime 1.0 (m0.onnx: "
        f"{HERE.versions['onnxruntime']}); audit all of them on one machine, with the same versions"
    )
