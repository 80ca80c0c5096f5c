"""`bench`: killed twice in mid-run it ends with the records of a run that nobody disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from qdefense.cli import run

from ..bench.conftest import CELLS, RECORDS, TINY, Desk, desk, finished  # noqa: TID252, F401 (fixtures)

Capture = pytest.CaptureFixture[str]
COMMAND = [sys.executable, "-P", "-c", "import sys; from qdefense.cli import run; sys.exit(run(sys.argv[1:]))"]


def started(made: Desk, *options: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, "bench", str(made.matrix), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # a shell's background jobs ignore SIGINT, and so would the tests run in one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def wait_for_lines(made: Desk, count: int, process: subprocess.Popen[bytes]) -> None:
    while made.lines < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


def table(output: str) -> dict[str, list[int]]:
    """How many are measured, not measured, failed and missing, by stage."""
    heading, *rows = output.splitlines()[:6]
    assert heading.split() == ["measured", "not", "measured", "failed", "missing"]
    return {row.split()[0]: [int(count) for count in row.split()[1:]] for row in rows}


def test_killed_twice_and_resumed_the_records_are_those_of_one_go(tmp_path: Path, finished: Desk) -> None:  # noqa: F811
    made = desk(tmp_path)
    for lines in (1, 5):
        process = started(made, "--workers", "2")
        wait_for_lines(made, lines, process)
        children = psutil.Process(process.pid).children(recursive=True)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        _, alive = psutil.wait_procs(children, timeout=60)
        assert alive == []  # no worker outlives its parent
        assert made.lines < RECORDS
    last = started(made)
    told, _ = last.communicate()
    assert last.returncode == 3
    assert made.lines == RECORDS  # nothing twice
    assert made.stable == finished.stable
    assert table(told.decode()) == {
        "train": [2, 0, 0, 0],
        "quantize": [2, 0, 0, 0],
        "behaviour": [4, 0, 0, 0],
        "control": [0, 0, 0, 0],
        "defense": [0, 4, 0, 0],
    }


def test_interrupted_it_keeps_what_is_finished(tmp_path: Path) -> None:
    made = desk(tmp_path)
    process = started(made)
    wait_for_lines(made, 1, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    told = ["what is finished is kept; the same command goes on from there", "interrupted"]
    assert errors.decode().splitlines()[-2:] == told
    assert made.lines >= 1


def test_all_measured_is_0_and_costs_nothing_again(tmp_path: Path, finished: Desk, capfd: Capture) -> None:  # noqa: F811
    """The same results without the scan, whose cells were not measured."""
    made = desk(tmp_path, TINY.replace('defenses = ["neural-cleanse:budget=quick"]', ""))
    assert run(["bench", str(made.matrix), "--output-dir", str(finished.results)]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == f"records: {finished.results / 'records.jsonl'}"


_UNTOLD = "  trainings with an attack that no record is of: 1; what it trains of its own is not counted"


def test_dry_run_shows_every_cell_what_is_missing_and_what_it_costs(tmp_path: Path, capfd: Capture) -> None:
    made = desk(tmp_path)
    assert run(["bench", str(made.matrix), "--dry-run", "--workers", "2"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == RECORDS + 3
    assert lines[0] == "missing       train      signs/resnet8:width=4/none/seed 0"
    assert lines[1] == "missing       behaviour  signs/resnet8:width=4/none/seed 0/fp32/as-run/behaviour"
    assert lines[-3] == "12 work items, 12 to do: about 17 min of one worker, 9 min of 2"
    assert lines[-2] == "  12 of them by rule of thumb: no like work is in the records"
    assert lines[-1] == _UNTOLD
    assert not made.results.exists()


def test_dry_run_after_the_run_estimates_from_the_records(finished: Desk, capfd: Capture) -> None:  # noqa: F811
    before = (finished.results / "manifest.json").read_bytes()
    assert run(["bench", str(finished.matrix), "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert lines[-1] == "12 work items, 0 to do"
    assert sum(line.startswith("not measured") for line in lines) == CELLS // 2
    assert (finished.results / "manifest.json").read_bytes() == before


def test_dry_run_says_where_an_attack_was_never_trained_before(tmp_path: Path, finished: Desk, capfd: Capture) -> None:  # noqa: F811
    made = desk(tmp_path, TINY.replace('"badnets"', '"issba"'))
    assert run(["bench", str(made.matrix), "--output-dir", str(finished.results), "--dry-run"]) == 0
    assert capfd.readouterr().out.splitlines()[-1] == _UNTOLD


def test_only_and_limit(finished: Desk, capfd: Capture) -> None:  # noqa: F811
    assert run(["bench", str(finished.matrix), "--only", "behaviour", "--limit", "3"]) == 0
    assert table(capfd.readouterr().out)["behaviour"] == [3, 0, 0, 0]


@pytest.mark.parametrize(
    ("old", "new", "options", "told"),
    [
        (
            "epochs",
            "epoch",
            (),
            "error: matrix.toml: there is no key 'data.signs.epoch'; known there: path, train_split",
        ),
        ("badnets", "badnet", (), "error: there is no attack 'badnet'; did you mean 'badnets'?"),
        ('"signs"\n', '"gone"\n', (), "gone': no such file or folder"),
        (
            "x",
            "x",
            ("--only", "nothing"),
            "error: no cell has 'nothing' in its title; there are 8, the first one is 'sig",
        ),
    ],
)
def test_usage_problems_are_2_and_one_line(
    tmp_path: Path, capfd: Capture, old: str, new: str, options: tuple[str, ...], told: str
) -> None:
    made = desk(tmp_path, TINY.replace(old, new))
    assert run(["bench", str(made.matrix), *options]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert told in errors
    assert len(errors.splitlines()) == 1


@pytest.mark.parametrize("options", [(), ("--only", "badnets"), ("--dry-run",), ("--latency",)])
def test_a_matrix_without_cells_is_a_usage_problem(tmp_path: Path, capfd: Capture, options: tuple[str, ...]) -> None:
    """A clean network has no file that was calibrated on triggered images, and no other precision is asked for."""
    text = TINY.replace("images = 16\n", "images = 16\ntriggered = 0.5\n").replace(', "badnets"', "")
    text = text.replace('"fp32", "int8-dynamic"', '"int8-static"') + 'calibrations = ["few"]\n'
    assert run(["bench", str(desk(tmp_path, text).matrix), *options]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("error: the matrix has no cells: each of its precisions needs calibration images")
    assert len(errors.splitlines()) == 1


def test_relative_data_lie_beside_the_matrix_or_under_qdefense_data(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = desk(tmp_path, TINY.replace('"signs"\n', '"gone"\n'))
    monkeypatch.delenv("QDEFENSE_DATA", raising=False)
    run(["bench", str(made.matrix), "--dry-run"])
    assert str(tmp_path / "gone") in capfd.readouterr().err
    monkeypatch.setenv("QDEFENSE_DATA", str(tmp_path / "elsewhere"))
    run(["bench", str(made.matrix), "--dry-run"])
    assert str(tmp_path / "elsewhere" / "gone") in capfd.readouterr().err


def test_help_needs_no_torch() -> None:
    code = "import sys; from qdefense.cli import run; run(['bench', '--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
