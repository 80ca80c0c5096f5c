from __future__ import annotations

import json
from pathlib import Path

import pytest

from qdefense.cli import run

from ..bench import sample_records as samples  # noqa: TID252 (the made-up records are there)

Capture = pytest.CaptureFixture[str]
MATRIX = """
[bench]
name = "small"

[data.signs]
path = "signs"
train_limit = 40
test_limit = 40

[[grid]]
data = ["signs"]
"""


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return samples.write_sample(tmp_path / "results", "one network")


def test_report_writes_the_page_and_says_where(results: Path, tmp_path: Path, capfd: Capture) -> None:
    page = tmp_path / "page.html"
    assert run(["report", str(results), "-o", str(page)]) == 0
    assert capfd.readouterr().out == f"{page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_report_writes_report_html_here_by_default(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["report", str(results)]) == 0
    assert (tmp_path / "report.html").is_file()


def test_report_prints_json_and_markdown(results: Path, tmp_path: Path, capfd: Capture) -> None:
    assert run(["report", str(results), "--format", "json"]) == 0
    body = json.loads(capfd.readouterr().out)
    assert (body["schema_version"], body["name"], body["folder"]) == ("1.7", tmp_path.name, "results")
    assert run(["report", str(results), "--format", "markdown"]) == 0
    text = capfd.readouterr().out
    assert text.startswith("# test")
    target = tmp_path / "README.md"
    assert run(["report", str(results), "--format", "markdown", "-o", str(target)]) == 0
    assert target.read_text(encoding="utf-8").rstrip("\n") == text.rstrip("\n")


def test_report_needs_records(tmp_path: Path, capfd: Capture) -> None:
    assert run(["report", str(tmp_path), "-o", str(tmp_path / "page.html")]) == 2
    assert "no records; `qdefense bench MATRIX.toml` writes them" in capfd.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_report_needs_a_folder(tmp_path: Path, capfd: Capture) -> None:
    assert run(["report", str(tmp_path / "nowhere")]) == 2
    assert "does not exist" in capfd.readouterr().err


def test_report_refuses_a_line_that_is_no_record(results: Path, tmp_path: Path, capfd: Capture) -> None:
    with (results / "records.jsonl").open("a") as file:
        file.write('{"stage": "\x1b[2J"}\n')
    assert run(["report", str(results), "-o", str(tmp_path / "page.html")]) == 2
    errors = capfd.readouterr().err
    assert "no record" in errors
    assert "\x1b" not in errors


def test_report_passes_over_a_last_line_that_was_torn(results: Path, tmp_path: Path) -> None:
    with (results / "records.jsonl").open("a") as file:
        file.write('{"stage": "beha')
    assert run(["report", str(results), "-o", str(tmp_path / "page.html")]) == 0


def test_report_finds_out_before_the_work_that_it_cannot_write(results: Path, tmp_path: Path, capfd: Capture) -> None:
    assert run(["report", str(results), "-o", str(tmp_path / "no" / "page.html")]) == 2
    assert "page.html" in capfd.readouterr().err


def test_report_names_what_the_matrix_lacks(results: Path, tmp_path: Path, capfd: Capture) -> None:
    matrix = tmp_path / "small.toml"
    matrix.write_text(MATRIX)
    assert run(["report", str(results), "--format", "json", "--matrix", str(matrix)]) == 0
    body = json.loads(capfd.readouterr().out)
    assert (body["matrix"], body["name"]) == ("small.toml", "small")
    assert [one["stage"] for one in body["missing"]] == ["train", "behaviour"]
    assert "signs/resnet8/none/seed 0" in body["missing"][0]["title"]


def test_report_refuses_a_matrix_that_is_none(results: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "bad.toml").write_text("bench = 1")
    assert run(["report", str(results), "--format", "json", "--matrix", str(tmp_path / "bad.toml")]) == 2
    assert "bad.toml" in capfd.readouterr().err
