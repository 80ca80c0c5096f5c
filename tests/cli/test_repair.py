"""`qdefense repair`, with workers of its own: what is written, what is said, and the exit code."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from qdefense.cli import run
from qdefense.report.reading import read_report

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SHORT = "fine-pruning:epochs=1"
BROKEN = "fine-pruning:tolerance=1,epochs=0"
"""Leaves one channel of six, and trains nothing."""
Capture = pytest.CaptureFixture[str]


def repair(*arguments: str | Path) -> int:
    return run(["repair", *map(str, arguments)])


def test_repair_writes_the_file_and_says_what_it_cost(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "out.onnx"
    assert repair(toy.backdoored, "--data", toy.data, "--method", SHORT, "-o", target) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    text = " ".join(output.split())
    data = target.read_bytes()
    assert text.startswith("PASSED (exit code 0)")
    assert "fine-pruning REPAIRED: " in text
    assert hashlib.sha256(data).hexdigest() in "".join(output.split())
    assert f"out.onnx: {len(data):,} bytes" in text
    assert "clean accuracy 100.00% before, " in text
    assert "ordered by mean activation of positive, read off the session" in text
    old, new = onnx.load(toy.backdoored).graph, onnx.load_from_string(data).graph
    assert list(old.node) == list(new.node)
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_repair_gives_the_report_as_json_and_the_same_bytes_again(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    reports: list[dict[str, Any]] = []
    for name in ("a.onnx", "b.onnx"):
        asked = ("--method", SHORT, "--format", "json", "-o", tmp_path / name)
        assert repair(toy.backdoored, "--data", toy.data, *asked) == 0
        output, _ = capfd.readouterr()
        read_report(output)
        reports.append({key: value for key, value in json.loads(output).items() if key != "volatile"})
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert reports[0] == reports[1]
    (finding,) = reports[0]["findings"]
    assert (finding["verdict"], finding["kind"]) == ("REPAIRED", "repair")
    assert finding["result"]["new_digest"] == hashlib.sha256((tmp_path / "a.onnx").read_bytes()).hexdigest()
    assert finding["result"]["pruning"]["pruned"][0] == 5


def test_repair_is_refused_and_writes_nothing_when_it_costs_too_much(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "out.onnx"
    target.write_bytes(b"what was there")
    assert repair(toy.clean, "--data", toy.data, "--method", BROKEN, "--max-accuracy-drop", "10", "-o", target) == 1
    text = " ".join(capfd.readouterr().out.split())
    assert text.startswith("FAILED (exit code 1) fine-pruning is refused: clean accuracy falls by ")
    assert "points on 160 held-out images, at most 10 were allowed" in text
    assert text.endswith("out.onnx: not written")
    assert target.read_bytes() == b"what was there"
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_repair_that_costs_more_than_its_own_tolerance_is_refused(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target, method = tmp_path / "out.onnx", "fine-pruning:epochs=3,learning_rate=50"
    assert repair(toy.clean, "--data", toy.data, "--method", method, "--max-accuracy-drop", "100", "-o", target) == 1
    text = " ".join(capfd.readouterr().out.split())
    assert text.startswith("FAILED (exit code 1) fine-pruning is refused: clean accuracy fell by ")
    assert "fine-pruning NOT_REPAIRED: " in text
    assert text.endswith("out.onnx: not written")
    assert not list(tmp_path.iterdir())


def test_repair_is_written_when_as_much_is_allowed(toy: Toy, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    assert repair(toy.clean, "--data", toy.data, "--method", BROKEN, "--max-accuracy-drop", "100", "-o", target) == 0
    assert target.exists()


def test_repair_is_incomplete_when_there_are_few_images(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    assert repair(toy.clean, "--data", toy.few, "-o", tmp_path / "out.onnx") == 3
    text = " ".join(capfd.readouterr().out.split())
    assert "fine-pruning: NOT_MEASURED: the shadow is not certified: 50 clean images; the certificate needs 256" in text
    assert not list(tmp_path.iterdir())


def test_repair_refuses_a_file_that_is_no_model(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "m.onnx").write_text("hello")
    assert repair(tmp_path / "m.onnx", "--data", toy.data, "-o", tmp_path / "out.onnx") == 4
    assert capfd.readouterr().out.startswith("REFUSED")
    assert not (tmp_path / "out.onnx").exists()


def test_repair_never_replaces_the_model(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes(toy.clean.read_bytes())
    assert repair(model, "--data", toy.data, "-o", tmp_path / "." / "m.onnx") == 2
    expected = "m.onnx is the model itself, which the result would replace; write to another file\n"
    assert capfd.readouterr().err.endswith(expected)
    assert model.read_bytes() == toy.clean.read_bytes()


USAGE = {
    "the method is unknown": (["--method", "pruning"], "error: there is no defense 'pruning'; "),
    "the method is a scan": (
        ["--method", "neural-cleanse"],
        "error: neural-cleanse is a scan, which makes no new file",
    ),
    "a setting is wrong": (
        ["--method", "fine-pruning:tolerance=2"],
        "error: defense 'fine-pruning:tolerance=2': tolerance: Input should be less than or equal to 1",
    ),
    "the drop is no number": (["--max-accuracy-drop", "nan"], "Error: Invalid value for '--max-accuracy-drop'"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=list(USAGE))
def test_repair_is_usage_when(toy: Toy, tmp_path: Path, capfd: Capture, arguments: list[str], message: str) -> None:
    assert repair(toy.clean, "--data", toy.data, *arguments, "-o", tmp_path / "out.onnx") == 2
    output, errors = capfd.readouterr()
    assert message in errors
    assert output == ""
    assert not list(tmp_path.iterdir())


def test_repair_finds_out_first_that_it_could_not_write(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    assert repair(toy.clean, "--data", toy.data, "-o", tmp_path / "no" / "out.onnx") == 2
    assert "out.onnx: No such file or directory; check the path and its permissions" in capfd.readouterr().err
