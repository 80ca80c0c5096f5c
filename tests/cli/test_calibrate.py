from __future__ import annotations

import os
import subprocess
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdefense.audit import calibrating
from qdefense.audit.events import Job
from qdefense.audit.supervisor import UsageProblemError, run_audit
from qdefense.calibration import read_calibration
from qdefense.cli import run
from qdefense.report.model import Report

from ..audit.clean_reports import report_on  # noqa: TID252 (two folders of tests need it)

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SCRIPT = Path(sysconfig.get_path("scripts"), "qdefense")
QUICK = "neural-cleanse:budget=quick,learning-rate=0.3,patience=3"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def models(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Twins of the clean toy: every one leans a little otherwise."""
    folder, paths = tmp_path_factory.mktemp("models"), []
    for index in range(4):
        model = onnx.load(toy.clean)
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "offset")
        drawn = np.random.default_rng(index).normal(0, 0.3, 8).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + drawn, "offset"))
        onnx.save(model, path := folder / f"m{index}.onnx")
        paths.append(path)
    return paths


@pytest.fixture
def scores(monkeypatch: pytest.MonkeyPatch) -> dict[str, float | None]:
    """Replaces the audits: every model scores what is planned here under its name, or else 1."""
    planned: dict[str, float | None] = {}

    def audit(job: Job, **_: Any) -> Report:
        settings = calibrating.scan_of(job.defenses[0]).settings
        return report_on(job, settings, planned.get(Path(job.model).stem, 1.0))

    monkeypatch.setattr(calibrating, "run_audit", audit)
    return planned


def calibrate(toy: Toy, *arguments: str | Path, data: Path | None = None) -> int:
    return run(["calibrate", "--data", str(data or toy.data), *map(str, arguments)])


# --- what it writes ---------------------------------------------------------------------------------------------------


def test_calibrate_writes_scores_and_keeps_reports(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    scores |= {"m0": 1.5, "m1": 0.25, "m2": 2.75}
    output = tmp_path / "c.json"
    assert calibrate(toy, *models[:3], "--limit", "300", "--seed", "4", "--defense", QUICK, "-o", output) == 0
    (entry,) = read_calibration(output).body.entries
    assert (entry.scores, entry.n, entry.not_measured) == ((0.25, 1.5, 2.75), 3, 0)
    assert (entry.defense, entry.settings["budget"], entry.settings["patience"]) == ("neural-cleanse", "quick", 3)
    assert "threshold" not in entry.settings
    assert (entry.population.classes, entry.population.scheme, entry.conditions.seed) == (8, "fp32", 4)
    assert len(list((tmp_path / "c.json.reports").glob("*.json"))) == 3
    shown, errors = capfd.readouterr()
    assert errors.splitlines() == [
        "m0.onnx: score 1.50",
        "m1.onnx: score 0.25",
        "m2.onnx: score 2.75",
        "warning: 3 models cannot give `audit` its default false-alarm rate of 0.05, which needs 19; calibrate on "
        "more, or ask for --false-alarm-rate 0.25",
    ]
    lines = shown.splitlines()
    assert lines[0].split() == ["scheme", "graph", "n", "not", "measured", "threshold", "rate", "highest"]
    assert lines[1].split() == ["fp32", entry.population.fingerprint[:12], "3", "0", "none", "none", "2.750"]
    assert lines[2] == f"c.json: sha256 {read_calibration(output).sha256}"


def test_calibrate_shows_the_threshold_when_there_are_enough_models(
    toy: Toy, scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    paths = []
    for index in range(20):
        model = onnx.load(toy.clean)
        model.graph.initializer[0].CopyFrom(
            numpy_helper.from_array(np.full((6, 3, 3, 3), index, np.float32), model.graph.initializer[0].name)
        )
        onnx.save(model, path := tmp_path / f"x{index}.onnx")
        paths.append(path)
    scores |= {f"x{index}": float(index) for index in range(20)} | {"x0": None}
    assert calibrate(toy, *paths, "-o", tmp_path / "c.json") == 0
    shown, errors = capfd.readouterr()
    assert shown.splitlines()[1].split()[2:] == ["19", "1", "19.000", "0.05", "19.000"]
    assert errors.splitlines()[0] == "x0.onnx: no score: too few classes converged"
    assert "warning" not in errors


def test_calibrate_writes_the_same_bytes_again_from_what_it_kept(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    assert calibrate(toy, *models[:3], "-o", tmp_path / "a.json") == 0
    scores |= {"m0": 99.0, "m1": 99.0, "m2": 99.0}
    options = ("--threads", "1", "--reports", tmp_path / "a.json.reports", "-o", tmp_path / "b.json")
    capfd.readouterr()
    assert calibrate(toy, *models[2::-1], *options) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert capfd.readouterr().err.splitlines()[:3] == [f"m{index}.onnx: score 1.00 (kept)" for index in (2, 1, 0)]


def test_calibrate_notes_the_options_that_decide_what_it_writes(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path
) -> None:
    output = tmp_path / "c.json"
    options = ("--limit", "300", "--channels", "bgr", "--threads", "2", "--defense", QUICK, "-v", "-o", output)
    assert calibrate(toy, *models[:2], *options) == 0
    body = read_calibration(output).body
    assert body.command == (
        *("qdefense", "calibrate", "--data", str(toy.data), "--limit", "300", "--defense", QUICK, "--channels", "bgr"),
    )
    (entry,) = body.entries
    assert entry.population.contract["channels"] == "BGR"


def test_calibrate_gives_every_kind_of_file_an_entry(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    other = onnx.load(models[0])
    other.graph.node[1].op_type = "Sigmoid"
    onnx.save(other, tmp_path / "other.onnx")
    assert calibrate(toy, *models, tmp_path / "other.onnx", "-o", tmp_path / "c.json") == 0
    entries = read_calibration(tmp_path / "c.json").body.entries
    assert sorted(entry.n for entry in entries) == [1, 4]
    assert len({entry.population.fingerprint for entry in entries}) == 2
    assert len(capfd.readouterr().out.splitlines()) == 4


# --- what can go wrong ------------------------------------------------------------------------------------------------


def test_calibrate_exits_3_and_writes_nothing_when_too_many_have_no_score(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    scores["m1"] = None
    assert calibrate(toy, *models, "-o", tmp_path / "c.json") == 3
    assert not (tmp_path / "c.json").exists()
    shown, errors = capfd.readouterr()
    assert errors.splitlines()[-1] == (
        "error: 1 of 4 fp32 models have no score, more than 10%: m1.onnx: too few classes converged; "
        "nothing was written"
    )
    assert shown == ""


Change = Callable[[Path], list[str]]
WRONG: dict[str, tuple[list[str], int, str]] = {
    "no model": (["-o", "{tmp}/c.json"], 2, "Missing argument 'MODEL...'"),
    "no output": (["{model}"], 2, "Missing option '-o'"),
    "folder": (["{model}", "-o", "{tmp}"], 2, "error: {tmp}: Is a directory; check the path and its permissions"),
    "no folder": (["{model}", "-o", "{tmp}/no/c.json"], 2, "error: {tmp}/no/c.json: No such file or directory; check"),
    "twice": (["{model}", "{model}", "-o", "{tmp}/c.json"], 2, "are the same file, which counts for one model"),
    "missing": (["{tmp}/x.onnx", "-o", "{tmp}/c.json"], 2, "error: {tmp}/x.onnx: No such file or directory; check"),
    "refused": (["{junk}", "-o", "{tmp}/c.json"], 4, "error: junk.onnx: the file (4 bytes) is no ONNX model"),
    "defense": (["{model}", "-o", "{tmp}/c.json", "--defense", "none"], 2, "error: there is no defense 'none'"),
    "threshold": (["{model}", "-o", "{tmp}/c.json", "--defense", "neural-cleanse:threshold=2"], 2,
                  "error: 'neural-cleanse:threshold=2' sets the threshold, which calibration is to find; leave it out"),
    "contract": (["{model}", "-o", "{tmp}/c.json", "--output", "x"], 2, "error: m0.onnx: "),
    "reports": (["{model}", "-o", "{tmp}/c.json", "--reports", "{junk}"], 2, "Directory '{junk}' is a file"),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_calibrate_says_what_is_wrong(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture, key: str
) -> None:
    arguments, code, message = WRONG[key]
    names = {"tmp": tmp_path, "model": models[0], "junk": tmp_path / "junk.onnx"}
    names["junk"].write_bytes(b"junk")
    assert calibrate(toy, *(argument.format(**names) for argument in arguments)) == code
    output, errors = capfd.readouterr()
    assert message.format(**names) in errors
    assert output == ""
    assert not (tmp_path / "c.json").exists()


def test_calibrate_exits_2_when_the_data_cannot_be_used(
    toy: Toy, models: list[Path], tmp_path: Path, capfd: Capture
) -> None:
    assert calibrate(toy, models[0], "-o", tmp_path / "c.json", data=tmp_path / "no.npz") == 2
    assert "no such file or folder" in capfd.readouterr().err


def test_calibrate_exits_2_and_names_the_model_when_a_worker_refuses_the_data(
    toy: Toy, models: list[Path], tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_job: Job, **_: Any) -> Report:
        raise UsageProblemError("the data have 3 classes")

    monkeypatch.setattr(calibrating, "run_audit", refuse)
    assert calibrate(toy, models[0], "-o", tmp_path / "c.json") == 2
    assert capfd.readouterr().err == "error: m0.onnx: the data have 3 classes\n"


def test_calibrate_passes_over_files_in_the_folder_that_are_no_reports(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "a\x1b.json").write_text("[]")
    assert calibrate(toy, models[0], "--reports", tmp_path / "r", "-o", tmp_path / "c.json") == 0
    assert capfd.readouterr().err.startswith("passed over a\\x1b.json: schema version None")


def test_calibrate_keeps_the_old_file_when_it_is_interrupted(
    toy: Toy, models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_job: Job, **_: Any) -> Report:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrating, "run_audit", interrupt)
    (tmp_path / "c.json").write_text("old")
    assert calibrate(toy, models[0], "-o", tmp_path / "c.json") == 130
    assert (tmp_path / "c.json").read_text() == "old"


# --- the whole way ----------------------------------------------------------------------------------------------------


def test_calibrate_goes_on_after_a_kill_and_audit_uses_what_it_wrote(
    toy: Toy, models: list[Path], tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real workers: a killed run, the rest of it, and the audits of another model and of one of the clean ones."""
    output, reports = tmp_path / "c.json", tmp_path / "c.json.reports"
    options = ["--data", str(toy.data), "--defense", QUICK, "--threads", "1"]
    command = [SCRIPT, "calibrate", *models[:2], *options, "-o", output]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL) as killed:
        while killed.poll() is None and not list(reports.glob("*.json")):
            time.sleep(0.02)
        killed.kill()
    assert not output.exists()
    audited: list[str] = []

    def count(job: Job, **keywords: Any) -> Report:
        audited.append(Path(job.model).name)
        return run_audit(job, **keywords)

    monkeypatch.setattr(calibrating, "run_audit", count)
    assert run(["calibrate", *map(str, models[:2]), *options, "-o", str(output)]) == 0
    assert audited == ["m1.onnx"]
    (entry,) = read_calibration(output).body.entries
    assert (entry.n, entry.not_measured) == (2, 0)
    rate = ["--calibration", str(output), "--false-alarm-rate", "0.34", "--format", "json"]
    capfd.readouterr()
    run(["audit", str(models[2]), *options, *rate])
    report = Report.model_validate_json(capfd.readouterr().out)
    threshold, result = report.findings[0].threshold, report.findings[0].result
    assert threshold is not None
    assert (threshold.value, threshold.source, threshold.n) == (entry.scores[-1], "calibrated", 2)
    assert (threshold.false_alarm_rate, threshold.note) == (1 / 3, None)
    assert result is not None
    assert result.kind == "scan"
    assert result.score is not None
    assert threshold.p_value == (1 + sum(score >= result.score for score in entry.scores)) / 3
    assert (report.gate.exit_code == 1) == (result.score > threshold.value)


def test_audit_exits_2_when_the_calibration_cannot_be_used(
    toy: Toy, models: list[Path], tmp_path: Path, capfd: Capture
) -> None:
    (tmp_path / "c.json").write_text("{}")
    arguments = ["audit", str(models[0]), "--data", str(toy.data), "--calibration", str(tmp_path / "c.json")]
    assert run(arguments) == 2
    assert capfd.readouterr().err == (
        "error: c.json: schema version None, this one reads 1.x; make it again with qdefense calibrate\n"
    )
    assert run([*arguments[:-1], str(tmp_path / "none.json")]) == 2
    assert "none.json: No such file or directory; check the path" in capfd.readouterr().err


@pytest.mark.parametrize("rate", ["0", "1", "-0.1", "x"])
def test_audit_exits_2_when_the_rate_is_none(toy: Toy, capfd: Capture, rate: str) -> None:
    assert run(["audit", str(toy.clean), "--data", str(toy.data), "--false-alarm-rate", rate]) == 2
    assert "Invalid value for '--false-alarm-rate'" in capfd.readouterr().err


def test_audit_exits_2_when_the_rate_needs_more_models(
    toy: Toy, models: list[Path], scores: dict[str, float | None], tmp_path: Path, capfd: Capture
) -> None:
    assert calibrate(toy, *models[:3], "--defense", QUICK, "-o", tmp_path / "c.json") == 0
    capfd.readouterr()
    arguments = ["audit", str(models[3]), "--data", str(toy.data), "--defense", QUICK]
    assert run([*arguments, "--calibration", str(tmp_path / "c.json")]) == 2
    assert capfd.readouterr() == (
        "",
        "error: c.json: a false-alarm rate of 0.05 needs 19 clean models, there are 3; calibrate on more, or ask for "
        "--false-alarm-rate 0.25\n",
    )
