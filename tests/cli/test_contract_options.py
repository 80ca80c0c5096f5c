from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

from qdefense.audit.events import Job
from qdefense.cli import group, run
from qdefense.converters.contract import ContractError, StatedContract

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

Capture = pytest.CaptureFixture[str]
Ask = Callable[..., Job]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where a model would lie; nothing here opens it."""
    return tmp_path / "model.onnx"


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch, model: Path) -> Ask:
    """``ask(*options)``: the job that `inspect` gives to its worker; errors pass through."""

    class SeenError(Exception):
        """Ends the command."""

    def record(job: Job, **options: object) -> None:
        raise SeenError(job)

    monkeypatch.setattr("qdefense.cli.inspect.run_audit", record)

    def asked(*options: str, of: Path = model) -> Job:
        with pytest.raises(SeenError) as caught:
            # Not the command alone: click would remember its help option without the group's -h, for all later tests.
            group.main(["inspect", str(of), *options], standalone_mode=False)
        (job,) = caught.value.args
        assert isinstance(job, Job)
        return job

    return asked


def stated(ask: Ask, *options: str) -> dict[str, Any]:
    contract = ask(*options).contract
    assert contract is not None
    return contract.values


# --- options ----------------------------------------------------------------------------------------------------------


def test_contract_is_left_to_the_file_when_nothing_is_said(ask: Ask) -> None:
    assert ask().contract is None


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--layout nhwc", {"layout": "NHWC"}),
        ("--layout NCHW", {"layout": "NCHW"}),
        ("--channels bgr", {"channels": "BGR"}),
        ("--channels RGB", {"channels": "RGB"}),
        ("--range 0,255", {"range": (0.0, 255.0)}),
        ("--range -1,1", {"range": (-1.0, 1.0)}),
        ("--mean 0.5", {"mean": (0.5, 0.5, 0.5)}),
        ("--mean -1,2e-1,3", {"mean": (-1.0, 0.2, 3.0)}),
        ("--std .25 ", {"std": (0.25, 0.25, 0.25)}),
        ("--std 1,2,3", {"std": (1.0, 2.0, 3.0)}),
        ("--resize crop", {"resize": "crop"}),
        ("--size 224x160", {"height": 224, "width": 160}),
        ("--input pixels", {"input_name": "pixels"}),
        ("--output scores", {"output_name": "scores"}),
        ("--head log-softmax", {"head": "log-softmax"}),
        ("--classes dog,cat", {"class_names": ("dog", "cat")}),
        ("--fixed-input a=1.5 --fixed-input b=c=-2", {"fixed_inputs": {"a": 1.5, "b=c": -2.0}}),
        ("--fixed-input t=true --fixed-input f=False", {"fixed_inputs": {"t": 1.0, "f": 0.0}}),
        ("--head logits --size 2x2", {"head": "logits", "height": 2, "width": 2}),
    ],
)
def test_options_become_the_contract(ask: Ask, options: str, expected: dict[str, Any]) -> None:
    assert stated(ask, *options.split()) == expected
    contract = ask(*options.split()).contract
    assert contract is not None
    assert contract.source == "options"


def test_classes_may_hold_spaces_around_and_in_their_names(ask: Ask) -> None:
    assert stated(ask, "--classes", " stop sign, no entry ,80")["class_names"] == ("stop sign", "no entry", "80")


def test_classes_are_read_from_a_file_a_line_each(ask: Ask, tmp_path: Path) -> None:
    file = tmp_path / "names, sorted.txt"
    file.write_text("größe\n\n  two words  \r\nlast", encoding="utf-8")
    assert stated(ask, "--classes", str(file))["class_names"] == ("größe", "two words", "last")


def test_files_may_begin_with_the_mark_that_windows_editors_write(ask: Ask, tmp_path: Path) -> None:
    classes, sidecar = tmp_path / "names.txt", tmp_path / "model.contract.toml"
    classes.write_text("dog\ncat\n", encoding="utf-8-sig")
    sidecar.write_text('class_names = ["dog", "cat"]', encoding="utf-8-sig")
    assert stated(ask, "--classes", str(classes)) == {"class_names": ("dog", "cat")}
    assert stated(ask, "--contract", str(sidecar)) == {"class_names": ("dog", "cat")}


def test_classes_are_a_list_when_it_is_longer_than_any_file_name(ask: Ask) -> None:
    names = tuple(f"speed limit {number}" for number in range(0, 1000, 5))
    assert stated(ask, "--classes", ",".join(names))["class_names"] == names


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--range 1", "Invalid value for --range: '1' is not 2 numbers with commas between"),
        ("--range 0,1,2", "Invalid value for --range: '0,1,2' is not 2 numbers with commas between"),
        ("--range 0;1", "Invalid value for --range: '0;1' is not 2 numbers with commas between"),
        ("--mean 1,2", "Invalid value for --mean: '1,2' is not 1 or 3 numbers with commas between"),
        ("--mean half", "Invalid value for --mean: 'half' is not 1 or 3 numbers with commas between"),
        ("--std ,", "Invalid value for --std: ',' is not 1 or 3 numbers with commas between"),
        ("--size 224", "Invalid value for --size: '224' is not HEIGHTxWIDTH, such as "),
        ("--size x224", "Invalid value for --size: 'x224' is not HEIGHTxWIDTH, such as "),
        ("--size 2x-2", "Invalid value for --size: '2x-2' is not HEIGHTxWIDTH, such as "),
        ("--size 0x5", "Invalid value for --size: '0x5' is not HEIGHTxWIDTH, such as "),
        ("--size 2.5x2", "Invalid value for --size: '2.5x2' is not HEIGHTxWIDTH, such as "),
        ("--fixed-input flag", "Invalid value for --fixed-input: 'flag' is not NAME=NUMBER"),
        ("--fixed-input flag=", "Invalid value for --fixed-input: 'flag=' is not NAME=NUMBER"),
        ("--fixed-input =1", "Invalid value for --fixed-input: '=1' is not NAME=NUMBER"),
        ("--fixed-input flag=on", "Invalid value for --fixed-input: 'flag=on' is not NAME=NUMBER"),
        ("--layout CHW", "'CHW' is not one of 'nchw', 'nhwc'"),
        ("--channels grey", "'grey' is not one of 'rgb', 'bgr'"),
        ("--resize lanczos", "'lanczos' is not one of 'none', 'nearest', 'bilinear', 'bicubic', 'crop'"),
        ("--head argmax", "'argmax' is not one of 'logits', 'softmax', 'log-softmax', 'sigmoid'"),
        ("--contract {folder}", "is a directory"),
    ],
)
def test_command_exits_2_and_says_what_it_wants_when_an_option_is(
    toy: Toy, tmp_path: Path, capfd: Capture, options: str, message: str
) -> None:
    assert run(["inspect", str(toy.clean), *options.format(folder=tmp_path).split()]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert message in errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--range 1,0", "range: 1 to 0 is no range from low to high"),
        ("--range 0,inf", "range: 0 to inf is no range from low to high"),
        ("--mean nan", "mean: a value is not finite"),
        ("--std 0", "std: a standard deviation must be above 0"),
        ("--classes a,b,a", "class_names: class 'a' is named twice"),
        ("--fixed-input flag=nan", "fixed_inputs.flag: Input should be a finite number"),
        ("--fixed-input flag=-inf", "fixed_inputs.flag: Input should be a finite number"),
    ],
)
def test_command_exits_2_and_says_why_when_a_value_makes_no_sense(
    toy: Toy, capfd: Capture, options: str, message: str
) -> None:
    assert run(["inspect", str(toy.clean), *options.split()]) == 2
    expected = f"error: the contract given for 'clean.onnx' does not hold: {message}; correct the options\n"
    assert capfd.readouterr() == ("", expected)


def test_command_exits_2_when_the_file_of_classes_is_missing_or_no_text(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    assert run(["inspect", str(toy.clean), "--classes", str(tmp_path / "none.txt")]) == 2
    expected = f"error: {tmp_path}/none.txt: No such file or directory; check the path and its permissions\n"
    assert capfd.readouterr() == ("", expected)
    (tmp_path / "names.txt").write_bytes(b"one\n\xff\xfe")
    assert run(["inspect", str(toy.clean), "--classes", str(tmp_path / "names.txt")]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert f"Invalid value for --classes: '{tmp_path}/names.txt' is no UTF-8 text: 'utf-8' codec can't" in errors


# --- the sidecar ------------------------------------------------------------------------------------------------------

SIDECAR = """
layout = "NHWC"
mean = [0.5, 0.5, 0.5]
class_names = ["dog", "cat"]
[fixed_inputs]
training = 0
"""
IN_SIDECAR = {
    "layout": "NHWC",
    "mean": (0.5, 0.5, 0.5),
    "class_names": ("dog", "cat"),
    "fixed_inputs": {"training": 0.0},
}


def test_sidecar_is_left_alone_when_nobody_named_it(ask: Ask, tmp_path: Path) -> None:
    """Whoever sends a file could send one along."""
    (tmp_path / "model.contract.toml").write_text(SIDECAR)
    assert ask(of=tmp_path / "model.onnx").contract is None


def test_sidecar_may_lie_anywhere_when_it_is_named(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "model.contract.toml").write_text('head = "sigmoid"')
    (tmp_path / "other.toml").write_text(SIDECAR)
    assert stated(ask, "--contract", str(tmp_path / "other.toml")) == IN_SIDECAR


def test_options_stand_over_the_sidecar_one_by_one(ask: Ask, tmp_path: Path) -> None:
    (tmp_path / "model.contract.toml").write_text(SIDECAR)
    sidecar = ("--contract", str(tmp_path / "model.contract.toml"))
    contract = ask(*sidecar, "--mean", "0.25", "--head", "softmax", "--fixed-input", "mode=2").contract
    assert contract is not None
    assert contract.values == {
        "layout": "NHWC",
        "mean": (0.25, 0.25, 0.25),
        "class_names": ("dog", "cat"),
        "head": "softmax",
        "fixed_inputs": {"mode": 2.0},
    }
    assert contract.source == "options"


@pytest.mark.parametrize("text", ["", "# nothing is said\n"])
def test_sidecar_that_says_nothing_is_as_none(ask: Ask, tmp_path: Path, text: str) -> None:
    (tmp_path / "model.contract.toml").write_text(text)
    assert ask("--contract", str(tmp_path / "model.contract.toml")).contract is None


KNOWN = (
    "; a contract may hold input_name, output_name, layout, channels, height, width, resize, range, mean, std, head, "
    "class_names, fixed_inputs"
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b'colour = "red"', f"'model.contract.toml': colour: there is no such entry{KNOWN}"),
        (b"mean = [1, 2]", f"'model.contract.toml': mean.2: Field required{KNOWN}"),
        (b'mean = "half"', f"'model.contract.toml': mean: expected a list{KNOWN}"),
        (b"std = [1, 0, 1]", f"'model.contract.toml': std: a standard deviation must be above 0{KNOWN}"),
        (b"fixed_inputs = {a = nan}", f"'model.contract.toml': fixed_inputs.a: Input should be a finite number{KNOWN}"),
        (b"layout NHWC", "'model.contract.toml' is no TOML file: Expected '=' after a key in a key/value pair"),
        (b"mean = " + b"[" * 5000, "'model.contract.toml' is no TOML file: maximum recursion depth exceeded"),
        (b"height = " + b"9" * 5000, "'model.contract.toml' is no TOML file: Exceeds the limit (4300 digits) for int"),
        (b'head = "\xff"', "'model.contract.toml' is no TOML file: 'utf-8' codec can't decode byte 0xff"),
    ],
)
def test_sidecar_raises_one_line_with_its_name_when(ask: Ask, tmp_path: Path, text: bytes, message: str) -> None:
    sidecar = tmp_path / "model.contract.toml"
    sidecar.write_bytes(text)
    with pytest.raises(ContractError) as caught:
        group.main(["inspect", "model.onnx", "--contract", str(sidecar)], standalone_mode=False)
    found = str(caught.value)
    assert found.startswith(message)
    assert found.splitlines() == [found]


def test_sidecar_is_refused_when_it_claims_another_source_or_is_huge(ask: Ask, tmp_path: Path, capfd: Capture) -> None:
    sidecar = tmp_path / "model.contract.toml"
    sidecar.write_text('source = "options"\nhead = "logits"')
    contract = ask("--contract", str(sidecar)).contract
    assert contract is not None
    assert contract.source == "sidecar"
    with sidecar.open("wb") as file:
        file.truncate(10 * 2**20 + 1)
    assert run(["inspect", str(tmp_path / "model.onnx"), "--contract", str(sidecar)]) == 2
    expected = "error: 'model.contract.toml' is larger than 10 MB, which no contract is\n"
    assert capfd.readouterr() == ("", expected)


def test_command_exits_2_when_the_named_sidecar_is_missing(tmp_path: Path, capfd: Capture) -> None:
    assert run(["inspect", "model.onnx", "--contract", str(tmp_path / "none.toml")]) == 2
    expected = f"error: {tmp_path}/none.toml: No such file or directory; check the path and its permissions\n"
    assert capfd.readouterr() == ("", expected)


# --- the job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * 2**30),
        ("4 gib", 4 * 2**30),
        ("1.5GB", 1_500_000_000),
        ("500MB", 500_000_000),
        ("500MiB", 500 * 2**20),
        ("64kib", 64 * 2**10),
        ("2kB", 2000),
        ("123456", 123_456),
        ("1e9", 10**9),
    ],
)
def test_memory_limit_takes_sizes(monkeypatch: pytest.MonkeyPatch, text: str, size: int) -> None:
    assert job_of(monkeypatch, "--memory-limit", text).memory_bytes == size


@pytest.mark.parametrize(
    "text", ["4G", "4TiB", "GiB", "", "0", "-1GiB", "nan", "inf", "1e999", "0.1", "four GiB", "4GiBs"]
)
def test_memory_limit_refuses_what_is_no_size(capfd: Capture, text: str) -> None:
    assert run(["shadow", "m.onnx", "--data", "signs", "--memory-limit", text]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    expected = f"{text!r} is no size; give a number with KiB, MiB or GiB, such as 4GiB"
    assert errors.splitlines()[-1] == f"Error: Invalid value for '--memory-limit': {expected}"


def test_memory_limit_is_all_that_is_free_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdefense.cli.job_options.default_memory_limit", lambda: 12345)
    assert job_of(monkeypatch).memory_bytes == 12345


@pytest.mark.parametrize("command", ["audit", "shadow"])
def test_job_holds_contract_and_expected_accuracy(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    job = job_of(monkeypatch, "--expected-accuracy", "0.9", "--mean", "0.5", command=command)
    assert job.expected_accuracy == 0.9
    assert job.contract == StatedContract(mean=(0.5, 0.5, 0.5))
    assert (job.model, job.data) == ("model.onnx", "signs")


@pytest.mark.parametrize("command", ["audit", "shadow"])
def test_job_holds_the_arithmetic(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    assert job_of(monkeypatch, command=command).arithmetic == "as-run"
    assert job_of(monkeypatch, "--arithmetic", "exact", command=command).arithmetic == "exact"


def test_arithmetic_refuses_what_is_none(capfd: Capture) -> None:
    assert run(["shadow", "m.onnx", "--data", "signs", "--arithmetic", "precise"]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    expected = "'precise' is not one of 'as-run', 'exact'."
    assert errors.splitlines()[-1] == f"Error: Invalid value for '--arithmetic': {expected}"


@pytest.mark.parametrize("option", ["--expected-accuracy", "--false-alarm-rate"])
@pytest.mark.parametrize("value", ["nan", "-NaN", "inf", "-inf"])
def test_audit_exits_2_when_a_share_is_not_finite(capfd: Capture, option: str, value: str) -> None:
    assert run(["audit", "m.onnx", "--data", "signs", option, value]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert errors.splitlines()[-1].startswith(f"Error: Invalid value for '{option}': ")
    assert " in the range 0<" in errors


@pytest.mark.parametrize("value", ["1.01", "-0.1", "90%"])
def test_expected_accuracy_is_a_share(capfd: Capture, value: str) -> None:
    assert run(["audit", "m.onnx", "--data", "signs", "--expected-accuracy", value]) == 2
    assert "--expected-accuracy" in capfd.readouterr().err


def job_of(monkeypatch: pytest.MonkeyPatch, *options: str, command: str = "shadow") -> Job:
    class SeenError(Exception):
        """Ends the command."""

    def record(job: Job, **_: object) -> None:
        raise SeenError(job)

    monkeypatch.setattr(f"qdefense.cli.{command}.run_audit", record)
    import importlib  # noqa: PLC0415

    found: click.Command = importlib.import_module(f"qdefense.cli.{command}").command
    with pytest.raises(SeenError) as caught:
        found.main(["model.onnx", "--data", "signs", *options], standalone_mode=False)
    (job,) = caught.value.args
    assert isinstance(job, Job)
    return job
