"""`attacks`, `defenses`, `doctor` and `completion`."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest
from click.testing import CliRunner

from qdefense.attacks import ATTACKS
from qdefense.cli import completion, doctor, group, probes, run
from qdefense.cli.doctor import Check, State
from qdefense.defenses.registered import DEFENSES

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SCRIPT = Path(sysconfig.get_path("scripts"), "qdefense")
Capture = pytest.CaptureFixture[str]
LISTINGS = {"attacks": ATTACKS, "defenses": DEFENSES}


def ran(capfd: Capture, *arguments: str) -> str:
    """What a successful command writes to stdout; it writes nothing to stderr."""
    assert run(list(arguments)) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    return output


def script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [SCRIPT, *arguments],
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )


# --- attacks, defenses ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", LISTINGS)
def test_listing_shows_name_paper_needs_and_settings_in_80_columns(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = ran(capfd, command)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for name in LISTINGS[command].names():
        example = LISTINGS[command].create(name)
        assert sum(line.startswith(f"{name} ") for line in text.splitlines()) == 1
        assert example.paper.split()[0] in text
        for field in dataclasses.fields(example):
            assert field.name.replace("_", "-") in text


def test_attacks_shows_settings_as_they_are_typed(capfd: Capture) -> None:
    text = ran(capfd, "attacks")
    for part in ("position=bottom-right", "target-class=0", "poison-rate=0.1", "alpha=0.2", "dirty-label"):
        assert part in text


def test_attacks_gives_types_bounds_and_choices_as_json(capfd: Capture) -> None:
    found = {entry["name"]: entry for entry in json.loads(ran(capfd, "attacks", "--format", "json"))}
    badnets = found["badnets"]
    assert (badnets["paper"], badnets["needs"]) == ("Gu et al. 2017, arXiv 1708.06733", ["training set"])
    assert (badnets["label_policy"], badnets["poisons"]) == ("dirty-label", "training set")
    assert (found["sig"]["label_policy"], found["wanet"]["poisons"]) == ("clean-label", "batches")
    assert (
        badnets["summary"]
        == "Patch poisoning with the paper's single-target attack or, in mode all-to-all, its other one."
    )
    assert badnets["settings"]["size"] == {"default": 3, "minimum": 1, "type": "integer"}
    assert badnets["settings"]["pattern"]["enum"] == ["white", "checkerboard"]
    assert found["blended"]["settings"]["alpha"]["exclusiveMinimum"] == 0
    assert (badnets["evades"], found["blended"]["evades"]) == ([], ["Spectral Signatures"])


def test_attacks_shows_what_each_is_known_to_evade(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = ran(capfd, "attacks").splitlines()
    starts = sorted(lines.index(line) for name in ATTACKS.names() for line in lines if line.startswith(f"{name} "))
    for start, end in zip(starts, [*starts[1:], len(lines)], strict=True):
        evaded = ATTACKS.create(lines[start].split()[0]).evades
        shown = " ".join(lines[start:end])
        assert (" evades " in f"{shown} ") == bool(evaded)
        assert all(word in shown for name in evaded for word in name.split())


def test_attacks_shows_the_label_policy_below_the_name(capfd: Capture) -> None:
    lines = ran(capfd, "attacks").splitlines()
    for name in ATTACKS.names():
        (place,) = [index for index, line in enumerate(lines) if line.startswith(f"{name} ")]
        assert lines[place + 1].startswith(f"({ATTACKS.create(name).label_policy})")


def test_defenses_shows_the_kind_below_the_name(capfd: Capture) -> None:
    lines = ran(capfd, "defenses").splitlines()
    for name in DEFENSES.names():
        (place,) = [index for index, line in enumerate(lines) if line.startswith(f"{name} ")]
        assert lines[place + 1].startswith(DEFENSES.create(name).kind)


@pytest.mark.parametrize("command", LISTINGS)
def test_a_name_is_explained_in_the_words_of_its_module(
    capfd: Capture, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for name in LISTINGS[command].names():
        cls = type(LISTINGS[command].create(name))
        text = ran(capfd, command, name)
        assert max(map(len, text.splitlines())) <= 40
        assert "``" not in text
        assert text.startswith(f"{name} (")
        letters = "".join(text.split())
        for documented in (sys.modules[cls.__module__], cls):
            for block in (inspect.getdoc(documented) or "").replace("``", "").split("\n\n"):
                assert "".join(block.split()) in letters
        for field in dataclasses.fields(cls):
            assert f"\n{field.name.replace('_', '-')} " in text


def test_an_explanation_shows_the_settings_that_were_given_and_what_they_may_be(capfd: Capture) -> None:
    lines = [line.split(maxsplit=2) for line in ran(capfd, "attacks", "cassock:variant=cont,size=7").splitlines()]
    assert ["size", "7", "whole, from 1"] in lines
    assert ["variant", "cont", "source-specific, trans, cont, comp"] in lines
    assert ["cover-rate", "0.05", "from 0 to 1"] in lines
    assert ["poison-count", "(unset)", "whole, from 0"] in lines
    assert ["amplitude", "0.56", "above 0 to 1"] in lines
    hosted = [line.split() for line in ran(capfd, "attacks", "lsp:host=blended,host.poison-count=3").splitlines()]
    assert ["host", "blended"] in hosted
    assert ["host.poison-count", "3"] in hosted
    assert not any(line[:1] == ["host.poison-rate"] for line in hosted), "a count stands in place of the rate"
    counted = [line.split(maxsplit=2) for line in ran(capfd, "attacks", "dfb:poison-count=5").splitlines()]
    assert ["poison-rate", "(unset)", "from 0 to 1"] in counted
    assert "'\\x1b[31mred'" in ran(capfd, "attacks", "dfb:ood=\x1b[31mred")
    found = json.loads(ran(capfd, "defenses", "strip:overlays=7", "--format", "json"))
    assert (found["name"], found["values"]["overlays"], found["settings"]["overlays"]["default"]) == ("strip", 7, 100)
    assert "\n- Superimposing is x + overlay, as the code does it" in found["explanation"]


def test_a_name_that_is_not_known_is_exit_2(capfd: Capture) -> None:
    assert run(["attacks", "dfa"]) == 2
    assert "there is no attack 'dfa'; did you mean 'dfb'?" in capfd.readouterr().err


def test_defenses_gives_needs_and_settings_as_json(capfd: Capture) -> None:
    found = {entry["name"]: entry for entry in json.loads(ran(capfd, "defenses", "--format", "json"))}
    scan = found["neural-cleanse"]
    assert (scan["kind"], scan["needs"]) == ("scan", ["clean set", "gradients", "logits"])
    assert found["activation-clustering"]["kind"] == "dataset"
    assert found["activation-clustering"]["needs"] == ["activations", "logits", "training set"]
    assert scan["settings"]["budget"]["default"] == DEFENSES.create("neural-cleanse").budget


@pytest.mark.parametrize("command", LISTINGS)
def test_every_registered_class_names_its_paper_and_has_defaults(command: str) -> None:
    for name in LISTINGS[command].names():
        example = LISTINGS[command].create(name)
        assert 8 < len(example.paper) < 80
        assert "20" in example.paper, "a paper has a year"
        assert type(example).__doc__


# --- verbose ----------------------------------------------------------------------------------------------------------

IN_A_WORKER = {"audit", "calibrate", "inspect", "repair", "shadow"}


def test_verbose_is_said_to_show_a_workers_stderr_where_there_is_one() -> None:
    said: dict[str, str | None] = {}
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        for part in command.commands.values() if isinstance(command, click.Group) else [command]:
            said.update((name, option.help) for option in part.params if option.name == "verbose")
    both = "Show tracebacks and what libraries write to stderr."
    assert {name for name, text in said.items() if text == both} == IN_A_WORKER
    assert {text for text in said.values() if text != both} == {"Show tracebacks."}


# --- completion -------------------------------------------------------------------------------------------------------

COMPLETED = {"bash": "plain,audit\n", "zsh": "plain\naudit\n", "fish": "plain,audit"}


@pytest.mark.parametrize("shell", COMPLETED)
def test_script_completes_a_command_when_the_shell_asks(shell: str) -> None:
    words = {"COMP_WORDS": "qdefense au", "COMP_CWORD": "au" if shell == "fish" else "1"}
    done = script(_QDEFENSE_COMPLETE=f"{shell}_complete", **words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(COMPLETED[shell])
    assert done.stdout.count("plain") == 1


@pytest.mark.parametrize("asked", ["bash_source", "x", ""])
def test_a_variable_that_lies_about_answers_for_no_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], asked: str
) -> None:
    """Exit code 0 or 1 would be a verdict."""
    monkeypatch.setenv("_QDEFENSE_COMPLETE", asked)
    assert run(["audit", "nothing.onnx", "--data", "signs"]) == 2
    assert "nothing.onnx" in capfd.readouterr().err


def test_a_question_that_no_shell_asks_is_a_usage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_QDEFENSE_COMPLETE", "no_such")
    assert run([]) == 2


def test_script_completes_an_option_when_the_shell_asks() -> None:
    done = script(_QDEFENSE_COMPLETE="bash_complete", COMP_WORDS="qdefense completion ", COMP_CWORD="2")
    assert done.stdout.split() == ["plain,bash", "plain,fish", "plain,zsh"]


NAMES = {
    "train --attack badn": ["badnets"],
    "train --attack=badn": ["badnets"],
    "train --attack = badn": ["badnets"],
    "train --data signs --attack cas": ["cassock", "cassock-loop"],
    "audit model.onnx --defense neu": ["neural-cleanse"],
    "audit model.onnx --defense fine": [],
    "calibrate a.onnx --defense ": ["neural-cleanse"],
    "repair a.onnx --method ": ["fine-pruning"],
    "attacks ht": ["htba"],
    "defenses s": ["spectral-signatures", "strip"],
    "completion ba": ["bash"],
}


@pytest.mark.parametrize("line", NAMES)
def test_completion_offers_names_without_importing_the_command(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    *args, incomplete = line.split(" ")
    answerer = completion._SHELLS["bash"](group, {}, "qdefense", "_QDEFENSE_COMPLETE")
    monkeypatch.setattr(answerer, "get_completion_args", lambda: (args, incomplete))
    if args[0] != "completion":
        monkeypatch.setattr(type(group), "get_command", None)  # would import torch
    assert answerer.complete().split() == [f"plain,{name}" for name in NAMES[line]]


@pytest.mark.parametrize("shell", COMPLETED)
def test_script_completes_an_attack_when_the_shell_asks(shell: str) -> None:
    words = {"COMP_WORDS": "qdefense train --attack badn", "COMP_CWORD": "badn" if shell == "fish" else "3"}
    done = script(_QDEFENSE_COMPLETE=f"{shell}_complete", **words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(COMPLETED[shell].replace("audit", "badnets"))


def test_completion_finds_in_the_source_what_is_registered() -> None:
    folders = [f"defenses/{kind}" for kind in ("scans", "dataset", "filters", "repairs")]
    assert tuple(completion.registered_in("attacks")) == ATTACKS.names()
    assert tuple(completion.registered_in(*folders)) == DEFENSES.names()


@pytest.mark.parametrize("shell", COMPLETED)
def test_completion_prints_a_script_that_asks_by_clicks_protocol(capfd: Capture, shell: str) -> None:
    text = ran(capfd, "completion", shell)
    assert f"_QDEFENSE_COMPLETE={shell}_complete" in text
    assert "qdefense" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_gives_bash_a_script_that_completes(capfd: Capture) -> None:
    source = ran(capfd, "completion", "bash")
    lines = (
        f'{source}\nCOMP_WORDS=(qdefense au); COMP_CWORD=1; _qdefense_completion "{SCRIPT}"; echo "${{COMPREPLY[@]}}"'
    )
    done = subprocess.run(["bash", "-c", lines], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "audit\n"


def test_completion_exits_2_when_the_shell_is_unknown(capfd: Capture) -> None:
    assert run(["completion", "tcsh"]) == 2
    assert "'tcsh' is not one of 'bash', 'fish', 'zsh'" in capfd.readouterr().err


# --- doctor: the whole ------------------------------------------------------------------------------------------------


def test_doctor_exits_0_and_leaves_torch_and_runtime_alone_when_all_is_well(toy: Toy) -> None:
    code = (
        "import sys; from qdefense.cli import run; code = run(sys.argv[1:]); "
        "sys.exit(code or bool({'torch', 'onnx', 'onnxruntime', 'numpy'} & set(sys.modules)))"
    )
    environment = {key: value for key, value in os.environ.items() if key != "QDEFENSE_DATA"} | {"SHELL": "/bin/zsh"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, "doctor", "--format", "json", "--data", str(toy.data)],
        capture_output=True,
        check=False,
        timeout=300,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    body = json.loads(done.stdout)
    found = {check["name"]: check for check in body["checks"]}
    assert body["can_audit"] is True
    assert [check["name"] for check in body["checks"] if check["state"] == "problem"] == []
    for name in ("python", "system", "qdefense", "onnxruntime", "torch", "runtime", "cpu", "gradients", "saturation"):
        assert found[name]["found"]
    assert found["telemetry"] == {"name": "telemetry", "state": "ok", "found": "ONNX Runtime's is off", "advice": ""}
    assert found["data"]["found"] == "npz toy.npz: 8 classes, 16x16"
    assert found["QDEFENSE_DATA"]["found"].startswith("is not set")
    assert found["shell"]["found"] == "zsh; `qdefense completion zsh` completes commands"
    assert "build type=" in found["runtime"]["found"]
    assert "CPUExecutionProvider" in found["runtime"]["found"]


def broken(folder: Path, module: str) -> dict[str, str]:
    """An environment in which a module cannot be imported."""
    (folder / f"{module}.py").write_text("raise ImportError('lib\\x1b[31mfoo.so not found')")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


@pytest.mark.parametrize(
    ("module", "name", "found", "advice"),
    [
        ("onnxruntime", "runtime", "ONNX Runtime does not run: ", "pip install --force-reinstall onnxruntime onnx"),
        ("torch", "gradients", "no shadow could be built: ", "pip install --force-reinstall torch"),
        ("psutil", "memory", "cannot be read: ", "pip install --force-reinstall psutil"),
    ],
)
def test_doctor_exits_3_with_what_to_do_when_a_library_is_broken(
    tmp_path: Path, module: str, name: str, found: str, advice: str
) -> None:
    environment = broken(tmp_path, module)
    body = json.loads(script("doctor", "--format", "json", **environment).stdout)
    (problem,) = [check for check in body["checks"] if check["state"] == "problem"]
    assert (body["can_audit"], problem["name"], problem["advice"]) == (False, name, advice)
    assert problem["found"] == f"{found}ImportError: lib\x1b[31mfoo.so not found"


def facts(**changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the probes find on a good machine."""
    known: dict[str, dict[str, Any]] = {
        "runtime": {"build": "ORT Build Info: x", "providers": ["CPU"], "machine": "x86_64", "isa": ["avx2"]},
        "gradients": {"torch": "2", "saturating_operators": []},
        "machine": {
            "total_bytes": 8 << 30,
            "available_bytes": 3 << 30,
            "cpus": 8,
            "usable_cpus": 2,
            "limit_holds": True,
        },
        "folder": {"found": ["cifar10", "gtsrb"]},
        "data": {"source": "signs test", "classes": 12, "size": [32, 32]},
    }
    return known | {name: known[name] | change for name, change in changes.items()}


Arm = Callable[[dict[str, dict[str, Any]]], None]


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Arm:
    """``answer(facts)``: probes that find these; a probe without facts breaks."""

    def arm(found: dict[str, dict[str, Any]]) -> None:
        def ask(probe: str, *arguments: str) -> dict[str, Any]:
            if probe not in found:
                raise doctor._BrokenError("killed by signal 4 (Illegal instruction)")
            return found[probe]

        monkeypatch.setattr(doctor, "_ask", ask)

    return arm


def test_doctor_shows_a_table_within_80_columns(
    answer: Arm, capfd: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    answer(facts(machine={"limit_holds": False}))
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("QDEFENSE_DATA", f"{tmp_path}/\x1b[2J[red]")
    text = ran(capfd, "doctor")
    lines = [line.rstrip() for line in text.splitlines()]
    assert max(len(line) for line in lines) <= 80
    assert lines[-1] == "This installation can audit."
    assert "ok       CPUs           2 of 8 usable, --threads" in text
    assert "ok       memory         8.0 GiB, 3.0 GiB of it free" in lines
    assert "warning  memory limit   does not hold here" in lines
    assert r"\x1b[2J[red]" in text.replace("\n", "").replace(" ", "")
    assert "\x1b" not in text


def test_doctor_exits_3_and_counts_the_problems(answer: Arm, capfd: Capture) -> None:
    found = facts(data={"error": "'x': no such file or folder"})
    del found["gradients"]
    answer(found)
    assert run(["doctor", "--data", "x"]) == 3
    output = capfd.readouterr().out
    assert output.rstrip().endswith("This installation cannot audit: 2 problems above.")
    assert "problem  gradients" in output
    assert "no shadow could be built: killed by signal 4 (Illegal instruction)" in " ".join(output.split())


# --- doctor: its lines ------------------------------------------------------------------------------------------------


def only(checks: Iterator[Check], name: str) -> Check:
    (found,) = [check for check in checks if check.name == name]
    return found


def test_saturation_is_a_warning_with_the_operators_when_it_was_measured(answer: Arm) -> None:
    answer(facts(gradients={"saturating_operators": ["MatMulInteger", "QGemm"]}))
    found = only(doctor._gradients(), "saturation")
    assert (found.state, found.found) == (State.WARNING, "saturate in int16, measured: MatMulInteger, QGemm")
    assert "--reduce-range" in found.advice


def test_telemetry_is_a_warning_when_it_was_turned_on() -> None:
    assert doctor._telemetry("0").state is State.WARNING
    assert doctor._telemetry("0").found == "ORT_DISABLE_TELEMETRY=0"
    assert doctor._telemetry("1").state is State.OK


@pytest.mark.parametrize(("machine", "state"), [("x86_64", State.OK), ("aarch64", State.WARNING)])
def test_system_is_a_warning_when_it_is_not_the_supported_one(
    monkeypatch: pytest.MonkeyPatch, machine: str, state: State
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: machine)
    assert (doctor._system().state, doctor._system().found) == (state, f"Linux {machine}")


def test_data_folder_is_a_warning_when_it_is_missing_or_empty(tmp_path: Path) -> None:
    missing, empty = doctor._data_folder(str(tmp_path / "none")), doctor._data_folder(str(tmp_path))
    assert (missing.state, empty.state) == (State.WARNING, State.WARNING)
    assert missing.found == f"{tmp_path / 'none'} is no folder"
    assert empty.found == f"{tmp_path} holds no data set"


def test_data_folder_names_the_data_sets_found(toy: Toy) -> None:
    found = doctor._data_folder(str(toy.data.parent))
    assert (found.state, found.found) == (State.OK, f"{toy.data.parent}: few.npz, toy.npz")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("fish", "fish; `qdefense completion fish` completes commands"),
        ("tcsh", "tcsh; completion is for bash, fish, zsh"),
        ("", "unknown; completion is for bash, fish, zsh"),
    ],
)
def test_shell_says_which_script_to_ask_for(name: str, found: str) -> None:
    assert doctor._shell(name) == Check("shell", State.OK, found)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``installed(**versions)``: what provides onnxruntime, an underscore standing for a dash."""

    def arm(**found: str) -> None:
        versions = {name.replace("_", "-"): version for name, version in found.items()}
        monkeypatch.setattr(doctor, "distributions_of", lambda module: tuple(versions) or (module,))
        monkeypatch.setattr(doctor, "version_of", lambda name: versions.get(name, "unknown"))

    return arm


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"onnxruntime": "1.24.1"}, Check("onnxruntime", State.OK, "1.24.1")),
        ({}, Check("onnxruntime", State.PROBLEM, "is not installed", "pip install 'onnxruntime>=1.24'")),
        (
            {"onnxruntime": "1.9.0"},
            Check(
                "onnxruntime",
                State.PROBLEM,
                "1.9.0 is older than 1.24",
                "pip install --upgrade 'onnxruntime>=1.24'",
            ),
        ),
        (
            {"onnxruntime_gpu": "1.30.0"},
            Check(
                "onnxruntime",
                State.WARNING,
                "onnxruntime-gpu 1.30.0",
                "audits run on the CPU; if your product does, pip install onnxruntime",
            ),
        ),
        (
            {"onnxruntime": "1.32.0", "onnxruntime_gpu": "1.30.0"},
            Check(
                "onnxruntime",
                State.WARNING,
                "1.32.0, onnxruntime-gpu 1.30.0",
                "they overwrite each other's files: uninstall all of them, then pip install onnxruntime",
            ),
        ),
    ],
)
def test_distribution_says_what_to_do(installed: Callable[..., None], found: dict[str, str], expected: Check) -> None:
    installed(**found)
    assert doctor._distribution("onnxruntime", "1.24") == expected


@pytest.mark.parametrize(
    ("version", "release"), [("2.13.0+cpu", (2, 13, 0)), ("1.10rc1", (1, 10)), ("unknown", ()), ("3", (3,))]
)
def test_release_is_the_numbers_that_a_version_begins_with(version: str, release: tuple[int, ...]) -> None:
    assert doctor._release(version) == release


def test_distributions_are_those_that_an_audit_needs() -> None:
    names = [check.name for check in doctor._distributions()]
    assert names[0] == "qdefense"
    assert {"click", "numpy", "onnx", "onnxruntime", "torch", "rich", "psutil"} <= set(names)
    assert not {"pytest", "mypy", "ruff"} & set(names)


def test_distributions_end_with_the_problem_when_qdefense_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> list[str]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(doctor, "requires", missing)
    monkeypatch.setattr(doctor, "version_of", lambda name: "unknown")
    (found,) = doctor._distributions()
    assert (found.name, found.state, found.found) == ("qdefense", State.PROBLEM, "is not installed")


# --- probes -----------------------------------------------------------------------------------------------------------


def test_ask_says_which_signal_killed_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    died = subprocess.CompletedProcess([], -4, b"", b"")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: died)
    with pytest.raises(doctor._BrokenError, match=r"^killed by signal 4 \(Illegal instruction\)$"):
        doctor._ask("runtime")


def test_ask_says_how_a_silent_probe_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 7, b"", b"\n"))
    with pytest.raises(doctor._BrokenError, match=r"^ended with 7$"):
        doctor._ask("runtime")


def test_ask_gives_up_when_a_probe_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_SECONDS", 0.001)
    with pytest.raises(doctor._BrokenError, match=r"^no answer in 0\.001 seconds$"):
        doctor._ask("machine")


def test_ask_reads_the_last_line_when_a_library_chatters(monkeypatch: pytest.MonkeyPatch) -> None:
    chatty = subprocess.CompletedProcess([], 0, b'hello\n{"a": 1}\n', b"a warning\n")
    monkeypatch.setattr("subprocess.run", lambda *_, **__: chatty)
    assert doctor._ask("runtime") == {"a": 1}


def test_probe_raises_when_the_runtime_computes_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_input", lambda: __import__("numpy").array([[1, 3]], "float32"))
    with pytest.raises(RuntimeError, match=r"^ONNX Runtime computes 1 \+ 2 as \[\[4\.0\]\]$"):
        probes.runtime()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the limit")
def test_machine_probe_finds_that_the_limit_holds() -> None:
    found = doctor._ask("machine")
    assert found["limit_holds"] is True
    assert 1 <= found["usable_cpus"] <= found["cpus"]
    assert 0 < found["available_bytes"] < found["total_bytes"]


# --- version ----------------------------------------------------------------------------------------------------------


def test_version_option_prints_name_and_version() -> None:
    shown = CliRunner().invoke(group, ["--version"], prog_name="qdefense").output
    assert shown == f"qdefense, version {version('qdefense')}\n"
