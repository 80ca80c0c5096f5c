from __future__ import annotations

import errno
import json
import os
import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
import onnx
import pytest

import qdefense.cli
from qdefense.calibration import CalibrationError
from qdefense.cli import run
from qdefense.cli.failures import exit_code_of, message_of
from qdefense.converters.contract import ContractError
from qdefense.converters.quantize import QuantizationError
from qdefense.converters.reading import FileRefusedError
from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.data.images import DataError
from qdefense.data.npz import load_npz, save_npz
from qdefense.registry import SpecError
from qdefense.session import SessionError

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SCRIPT = Path(sysconfig.get_path("scripts"), "qdefense")
Capture = pytest.CaptureFixture[str]


def script(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the installed script."""
    settings: dict[str, Any] = {"capture_output": True, "timeout": 120} | options
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | settings.pop("env", {})
    ran: subprocess.CompletedProcess[bytes] = subprocess.run(
        [SCRIPT, *arguments], check=False, env=environment, **settings
    )
    return ran


def first_on_path(folder: Path) -> str:
    return os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))


# --- audit: 0 and 1 ---------------------------------------------------------------------------------------------------


def test_audit_exits_0_with_table_and_report_when_the_scan_is_clean(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    folder = tmp_path / "new" / "folder"
    options = ["--defense", toy.scan, "--threads", "1", "--output-dir", str(folder)]
    assert run(["audit", str(toy.clean), "--data", str(toy.data), *options]) == 0
    output, errors = capfd.readouterr()
    assert output.startswith("PASSED  (exit code 0)\n")
    assert errors == ""
    assert [file.name for file in folder.iterdir()] == ["report.json"]
    report = json.loads((folder / "report.json").read_bytes())
    assert (report["gate"]["outcome"], report["gate"]["exit_code"]) == ("PASSED", 0)


def test_audit_exits_1_with_json_alone_on_stdout_when_the_scan_finds_a_backdoor(toy: Toy) -> None:
    """FORCE_COLOR, as build services set it, makes no progress bar in their logs and no colours in the JSON."""
    options = ("--format", "json", "--defense", toy.sharp_scan, "--threads", "1")
    ran = script("audit", toy.backdoored, "--data", toy.data, *options, env={"FORCE_COLOR": "1"})
    assert (ran.returncode, ran.stderr) == (1, b"")
    report = json.loads(ran.stdout)
    assert (report["gate"]["outcome"], report["gate"]["exit_code"]) == ("FAILED", 1)
    (finding,) = report["findings"]
    assert finding["verdict"] == "BACKDOORED"
    assert finding["result"]["suspects"][0]["target_class"] == 3


# --- audit: 2 ---------------------------------------------------------------------------------------------------------


def test_audit_exits_2_when_the_model_is_missing(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", "no-such.onnx", "--data", str(toy.data)]) == 2
    expected = "error: no-such.onnx: No such file or directory; check the path and its permissions\n"
    assert capfd.readouterr() == ("", expected)


def test_audit_exits_2_when_the_data_are_missing(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", str(toy.clean), "--data", "no-such.npz"]) == 2
    output, errors = capfd.readouterr()
    assert errors.startswith("error: 'no-such.npz': no such file or folder; data is 'signs'")
    assert (output, errors.count("\n")) == ("", 1)


def test_audit_exits_2_and_writes_no_report_when_images_have_another_size(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    arguments = ["audit", str(toy.clean), "--data", "signs", "--limit", "10", "--output-dir", str(tmp_path)]
    assert run(arguments) == 2
    expected = (
        "error: signs test: images are 32x32, the model takes 16x16; give data of that size, or say how they were "
        "resized for the model: --resize bilinear\n"
    )
    assert capfd.readouterr() == ("", expected)
    assert list(tmp_path.iterdir()) == []


def test_audit_exits_2_when_there_are_other_classes(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    images = load_npz(toy.data, split=None, limit=None, seed=0)
    save_npz(tmp_path / "nine.npz", replace(images, class_names=(*images.class_names, "zone 8")))
    assert run(["audit", str(toy.clean), "--data", str(tmp_path / "nine.npz")]) == 2
    assert "nine.npz has 9 classes, the model answers with 8;" in capfd.readouterr().err


def test_audit_exits_2_with_a_suggestion_when_the_defense_is_misspelt(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", str(toy.clean), "--data", str(toy.data), "--defense", "neural-clense"]) == 2
    expected = "error: there is no defense 'neural-clense'; did you mean 'neural-cleanse'?\n"
    assert capfd.readouterr() == ("", expected)


def test_audit_shows_the_workers_traceback_when_verbose(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", "no-such.onnx", "--data", str(toy.data), "-v"]) == 2
    errors = capfd.readouterr().err
    assert "qdefense/audit/worker.py" in errors
    assert "FileNotFoundError" in errors
    assert errors.splitlines()[-1].startswith("error: no-such.onnx: No such file")


@pytest.fixture
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("qdefense.cli.audit.run_audit", fail)


@pytest.mark.usefixtures("_no_worker")
def test_audit_exits_2_before_any_work_when_several_formats_have_no_folder(toy: Toy, capfd: Capture) -> None:
    formats = ["--format", "json", "--format", "table"]
    assert run(["audit", str(toy.clean), "--data", str(toy.data), *formats]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    message = "Error: html and several formats need --output-dir; one text format alone goes to stdout"
    assert errors.endswith(f"\n{message}\n")


@pytest.mark.usefixtures("_no_worker")
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("{toy}/x", "clean.onnx/x: Not a directory; check the path and its permissions"),
        pytest.param(
            "/proc/self",  # not even root can write there
            "/proc/self/report.json: No such file or directory; check the path and its permissions",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux only"),
        ),
    ],
)
def test_audit_exits_2_before_any_work_when_the_output_folder_is_not_writable(
    toy: Toy, capfd: Capture, folder: str, reason: str
) -> None:
    folder = folder.format(toy=toy.clean)
    assert run(["audit", str(toy.clean), "--data", str(toy.data), "--output-dir", folder]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.startswith("error: ")
    assert errors.endswith(f"{reason}\n")


@pytest.mark.usefixtures("_no_worker")
def test_audit_exits_2_before_any_work_when_a_file_has_the_folders_name(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", str(toy.clean), "--data", str(toy.data), "--output-dir", str(toy.data)]) == 2
    assert "is a file." in capfd.readouterr().err


@pytest.mark.parametrize(("model", "code", "told"), [("clean", 2, "PASSED"), ("empty", 4, "REFUSED")])
def test_audit_tells_its_answer_and_leaves_nothing_half_written_when_the_disk_fills_up(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, model: str, code: int, told: str
) -> None:
    """A verdict is not lost with its report, and no pass is without one."""

    def fill_up(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    empty = tmp_path / "empty.onnx"
    empty.touch()
    file = {"clean": toy.clean, "empty": empty}[model]
    monkeypatch.setattr(pathlib.Path, "write_bytes", fill_up)
    folder = tmp_path / "reports"
    command = ["audit", str(file), "--data", str(toy.data), "--defense", toy.scan, "--output-dir", str(folder)]
    assert run(command) == code
    assert list(folder.iterdir()) == []
    shown = capfd.readouterr()
    assert f"error: {folder}/report.json: No space left on device;" in shown.err
    assert told in shown.out


# --- audit: 3 ---------------------------------------------------------------------------------------------------------


def nan_weights(toy: Toy, target: Path) -> Path:
    model = onnx.load(toy.clean)
    array = onnx.numpy_helper.to_array(model.graph.initializer[2]).copy()
    array[0, 0] = np.nan
    model.graph.initializer[2].CopyFrom(onnx.numpy_helper.from_array(array, "weight"))
    onnx.save(model, target)
    return target


def test_audit_exits_3_when_weights_are_nan(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    model = nan_weights(toy, tmp_path / "nan.onnx")
    assert run(["audit", str(model), "--data", str(toy.data), "--defense", toy.scan]) == 3
    output = capfd.readouterr().out
    assert output.startswith("INCOMPLETE  (exit code 3)\n  neural-cleanse: NOT_MEASURED: ")
    assert "not finite" in output
    assert "clean accuracy  NOT_MEASURED\n" in output


def test_audit_exits_3_when_there_are_only_50_images(toy: Toy, capfd: Capture) -> None:
    assert run(["audit", str(toy.clean), "--data", str(toy.few), "--defense", toy.scan]) == 3
    assert "neural-cleanse: NOT_MEASURED: 50 clean images; at least 200 are needed\n" in capfd.readouterr().out


BUG = """
import os, sys
def _break(event, arguments):
    if event == "open" and str(arguments[0]) == os.environ["BREAK_AT"]:
        raise ZeroDivisionError("a bug")
sys.addaudithook(_break)
"""


@pytest.mark.parametrize("verbose", [False, True])
def test_audit_exits_3_with_a_report_when_the_worker_has_a_bug(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture, verbose: bool
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BUG)
    monkeypatch.setenv("PYTHONPATH", first_on_path(tmp_path))
    monkeypatch.setenv("BREAK_AT", str(toy.clean))
    options = ["--format", "json", *(["--verbose"] if verbose else [])]
    assert run(["audit", str(toy.clean), "--data", str(toy.data), *options]) == 3
    output, errors = capfd.readouterr()
    reasons = json.loads(output)["gate"]["reasons"]
    assert reasons == ["internal error: ZeroDivisionError: a bug", "neural-cleanse: gave no answer"]
    assert ("Traceback" in errors) is verbose
    assert errors == "" or verbose


# --- audit: 4 ---------------------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "it is cut short": (lambda data: data[: len(data) // 2], "no ONNX model or is cut short"),
    "it is random": (lambda _: np.random.default_rng(0).bytes(3000), "no ONNX model or is cut short"),
    "it is empty": (lambda _: b"", "the file is empty"),
}


@pytest.mark.parametrize(("spoil", "reason"), REFUSED.values(), ids=list(REFUSED))
def test_audit_exits_4_with_digest_and_reason_when(
    toy: Toy, tmp_path: Path, capfd: Capture, spoil: Callable[[bytes], bytes], reason: str
) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(spoil(toy.clean.read_bytes()))
    assert run(["audit", str(model), "--data", str(toy.data), "--format", "json"]) == 4
    output, errors = capfd.readouterr()
    report = json.loads(output)
    assert (errors, report["gate"]["outcome"], report["gate"]["exit_code"]) == ("", "REFUSED", 4)
    assert reason in report["gate"]["reasons"][0]
    assert report["subject"]["size_bytes"] == model.stat().st_size
    assert len(report["subject"]["sha256"]) == 64


def test_audit_writes_json_in_utf_8_when_the_terminal_speaks_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "größe.onnx").touch()
    options = ("--data", "signs", "--format", "json")
    ran = script("audit", tmp_path / "größe.onnx", *options, env={"PYTHONIOENCODING": "latin-1"})
    assert (ran.returncode, ran.stderr) == (4, b"")
    assert json.loads(ran.stdout.decode())["subject"]["file"] == "größe.onnx"


# --- the other commands -----------------------------------------------------------------------------------------------


def test_inspect_exits_4_when_the_file_is_refused(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "model.onnx").touch()
    assert run(["inspect", str(tmp_path / "model.onnx")]) == 4
    assert capfd.readouterr() == ("", "error: the file is empty (0 bytes); export the model again\n")


def test_inspect_exits_4_but_shows_the_file_when_the_runtime_refuses_it(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    model = onnx.load(toy.clean)
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    next(node for node in model.graph.node if node.op_type == "Relu").domain = "com.microsoft"
    onnx.save(model, tmp_path / "model.onnx")
    assert run(["inspect", str(tmp_path / "model.onnx")]) == 4
    output, errors = capfd.readouterr()
    assert errors.startswith("error: ONNX Runtime cannot load the file: ")
    assert errors.endswith("; export the model again or use another onnxruntime\n")
    assert "integer share   unknown of MACs, 0.0% of weights, predicted" in output
    rows = [line.split() for line in output.splitlines()]
    assert ["conv", "Conv", "float32", "float32", "unknown", "41.5k", "162", "no"] in rows


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["-h"], ["--version"], ["audit", "--help"], ["schema"], ["inspect", "-h"]],
    ids=" ".join,
)
def test_run_exits_0_when_asked_for_text(arguments: list[str], capfd: Capture) -> None:
    assert run(arguments) == 0
    output, errors = capfd.readouterr()
    assert output
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Usage: qdefense"),
        (["adit"], "No such command 'adit'"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["audit", "model.onnx"], "Missing option '--data'"),
        (["audit", "m.onnx", "--data", "signs", "--format", "yaml"], "'yaml' is not one of 'table', 'json'"),
        (["audit", "m.onnx", "--data", "signs", "--threads", "0"], "0 is not in the range x>=1"),
        (["audit", "m.onnx", "--data", "signs", "--limit", "0"], "0 is not in the range x>=1"),
        (["audit", "m.onnx", "--data", "signs", "--seed", "-1"], "-1 is not in the range x>=0"),
        (["audit", "m.onnx", "--data", "signs", "--wat"], "--wat"),
        (["quantize", "m.onnx", "--scheme", "int2", "-o", "x"], "'int2' is not one of"),
        (["quantize", "m.onnx", "-o", "x"], "Choose from:\n    int8-static,"),
        (["inspect", "a\udcff.onnx"], "'a\\udcff.onnx' is not UTF-8; rename the file"),
        (["inspect", "a", "b\x07\u202e"], "unexpected extra argument (b\\x07\\u202e)"),
    ],
)
def test_run_exits_2_when_the_command_line_is_wrong(arguments: list[str], message: str, capfd: Capture) -> None:
    assert run(arguments) == 2
    output, errors = capfd.readouterr()
    assert message in errors.replace('"', "'")
    assert output == ""
    assert len(errors.splitlines()) <= 25, "an error fits on a screen"


# --- the boundary -----------------------------------------------------------------------------------------------------


@pytest.fixture
def raising(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], list[str]]:
    """``raising(error)``: a command line that runs into it."""

    def arm(error: BaseException) -> list[str]:
        @click.command("schema")
        @click.option("-v", "--verbose", is_flag=True)
        def command(verbose: bool) -> None:
            raise error

        monkeypatch.setattr("qdefense.cli.schema.command", command)
        return ["schema"]

    return arm


BUGS = {
    "a bug": (RuntimeError("boom"), "internal error: RuntimeError: boom; run with -v and report it"),
    "a failed assertion": (AssertionError(), "internal error: AssertionError; run with -v and report it"),
    "memory": (MemoryError(), "internal error: MemoryError; run with -v and report it"),
    "an end of file": (EOFError("eof"), "internal error: EOFError: eof; run with -v and report it"),
    "recursion": (RecursionError("deep"), "internal error: RecursionError: deep; run with -v and report it"),
    "a full stdout": (OSError(errno.ENOSPC, "No space left on device"), "[Errno 28] No space left on device"),
    "hostile text": (RuntimeError("\x1b[2J\u202e"), "internal error: RuntimeError: \\x1b[2J\\u202e; run with"),
}


@pytest.mark.parametrize(("error", "message"), BUGS.values(), ids=list(BUGS))
def test_run_exits_3_and_never_1_when_it_meets(
    raising: Callable[[BaseException], list[str]], capfd: Capture, error: Exception, message: str
) -> None:
    assert run(raising(error)) == 3
    output, errors = capfd.readouterr()
    assert errors.startswith(f"error: {message}")
    assert (output, errors.count("\n")) == ("", 1)


def test_run_shows_the_traceback_only_when_verbose(
    raising: Callable[[BaseException], list[str]], capfd: Capture
) -> None:
    command = raising(RuntimeError("boom\x1b[2J"))
    assert run(command) == 3
    assert "Traceback" not in capfd.readouterr().err
    assert run([*command, "--verbose"]) == 3
    errors = capfd.readouterr().err
    assert errors.startswith("Traceback (most recent call last):\n")
    assert "\x1b" not in errors


def test_run_keeps_errors_short_when_the_reason_is_long(
    raising: Callable[[BaseException], list[str]], capfd: Capture
) -> None:
    assert run(raising(DataError("x\n" * 5000))) == 2
    errors = capfd.readouterr().err
    assert len(errors) < 700
    assert errors.count("\n") == 1


def test_run_exits_130_when_interrupted(raising: Callable[[BaseException], list[str]], capfd: Capture) -> None:
    assert run(raising(KeyboardInterrupt())) == 130
    assert capfd.readouterr() == ("", "interrupted\n")


FAILURES = {
    DataError("d"): 2,
    SpecError("s"): 2,
    ContractError("c"): 2,
    QuantizationError("q"): 2,
    CalibrationError("c"): 2,
    FileNotFoundError(errno.ENOENT, "gone", "file"): 2,
    FileRefusedError("f"): 4,
    RuntimeGraphError("r"): 4,
    SessionError("s"): 4,
    OSError("nameless"): 3,
    ValueError("a bug"): 3,
}


@pytest.mark.parametrize(("error", "code"), FAILURES.items(), ids=[type(error).__name__ for error in FAILURES])
def test_exit_code_of_knows_whose_fault_it_is(error: Exception, code: int) -> None:
    assert exit_code_of(error) == code
    assert message_of(error)


def test_run_exits_3_when_the_installation_is_broken(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libcudart\\x1b[31m not found')")
    ran = script("inspect", "model.onnx", env={"PYTHONPATH": first_on_path(tmp_path)})
    assert (ran.returncode, ran.stdout) == (3, b"")
    expected = b"error: the installation is broken: libcudart\\x1b[31m not found; install qdefense again\n"
    assert ran.stderr == expected


@pytest.mark.parametrize("arguments", [["schema"], ["inspect", "MODEL"], ["--help"]], ids=" ".join)
def test_script_exits_3_and_says_nothing_when_the_reader_left(toy: Toy, arguments: list[str]) -> None:
    """`qdefense audit ... | head -1` must not exit with 1, which means a finding; click and rich both would."""
    reader, writer = os.pipe()
    os.close(reader)
    arguments = [str(toy.clean) if argument == "MODEL" else argument for argument in arguments]
    ran = script(*arguments, capture_output=False, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (ran.returncode, ran.stderr) == (3, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux only")
def test_script_exits_3_when_stdout_is_full() -> None:
    with Path("/dev/full").open("wb") as full:
        ran = script("schema", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (ran.returncode, ran.stderr) == (3, b"error: [Errno 28] No space left on device\n")


def test_script_passes_the_code_on_to_the_shell() -> None:
    assert script("adit").returncode == 2


def test_main_hands_the_arguments_to_run_and_its_code_to_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["qdefense", "one", "two"])
    monkeypatch.setattr(qdefense.cli, "run", len)
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    with pytest.raises(SystemExit) as stop:
        qdefense.cli.main()
    assert stop.value.code == 2
    assert os.environ["OMP_WAIT_POLICY"] == "active"
