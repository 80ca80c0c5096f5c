from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema  # type: ignore[import-untyped]
import numpy as np
import onnx
import pytest

from qdefense.artifact import Artifact
from qdefense.cli import _COMMANDS, run
from qdefense.cli.audit import DATASET_SCANS, RANKING
from qdefense.cli.options import default_threads, progress_bar
from qdefense.data.npz import load_npz, save_npz
from qdefense.data.opening import training_split
from qdefense.defenses import DEFENSES

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SCRIPT = Path(sysconfig.get_path("scripts"), "qdefense")
Capture = pytest.CaptureFixture[str]


def ran(capfd: Capture, *arguments: str | Path) -> str:
    """What a successful command writes to stdout; it writes nothing to stderr."""
    assert run([str(argument) for argument in arguments]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    return output


# --- help, schema -----------------------------------------------------------------------------------------------------


def test_help_lists_every_command_and_the_exit_codes(capfd: Capture) -> None:
    text = ran(capfd, "--help")
    for name, line in _COMMANDS.items():
        assert f"  {name}" in text
        assert line.split()[0] in text
    for part in ("0 every required check", "1 a finding", "2 usage", "3 incomplete", "4 the file", "130 interrupted"):
        assert part in " ".join(text.split())


@pytest.mark.parametrize("name", sorted(_COMMANDS))
def test_help_of_a_command_says_what_it_does(capfd: Capture, name: str) -> None:
    text = ran(capfd, name, "--help")
    assert text.startswith(f"Usage: qdefense {name}")
    assert max(len(line) for line in text.splitlines()) <= 80


def test_schema_is_a_schema_with_the_parts_of_the_report(capfd: Capture) -> None:
    schema = json.loads(ran(capfd, "schema"))
    jsonschema.validators.validator_for(schema).check_schema(schema)
    assert {"subject", "environment", "gate", "volatile"} <= set(schema["required"])


@pytest.mark.parametrize("arguments", [["schema"], ["audit", "-h"], ["shadow", "-h"], ["quantize", "-h"], ["adit"]])
def test_command_line_imports_no_torch_when_it_needs_none(arguments: list[str]) -> None:
    """More of them are in tests/test_packaging.py."""
    code = "import sys; from qdefense.cli import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    command = [sys.executable, "-P", "-c", code, *arguments]
    assert subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0


def test_help_imports_neither_the_runtime_nor_numpy() -> None:
    code = (
        "import sys; from qdefense.cli import run; run(['--help']); "
        "sys.exit(bool({'onnx', 'onnxruntime', 'numpy', 'pydantic', 'rich'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=False).returncode == 0


# --- inspect ----------------------------------------------------------------------------------------------------------


def test_inspect_shows_contract_precision_and_layers(toy: Toy, capfd: Capture) -> None:
    text = ran(capfd, "inspect", toy.clean)
    for part in (
        "file            clean.onnx",
        Artifact.read(toy.clean).sha256,
        "input           image: float32 (N, 3, 16, 16), RGB in [0, 1]; contract from the",
        "output          logits: logits, 8 classes",
        "scheme          fp32",
        "gradient-blind  no node",
        "integer share   0.0% of MACs, 0.0% of weights, as ONNX Runtime runs it",
        "nodes shipped   5",
        "level basic     5 nodes: nothing changes",
        "level extended  4 nodes: -1 Conv, -1 Relu, +1 FusedConv",
        "layer  operator  weights  acts     runs in   MACs  params  saturates",
        "conv   Conv      float32  float32  float    41.5k     162  no",
    ):
        assert part in text


def test_inspect_gives_the_same_facts_as_json(toy: Toy, capfd: Capture) -> None:
    body = json.loads(ran(capfd, "inspect", toy.clean, "--format", "json"))
    artifact = Artifact.read(toy.clean)
    assert (body["file"], body["sha256"]) == ("clean.onnx", artifact.sha256)
    assert body["contract"] == artifact.contract.model_dump(mode="json")
    assert body["inspection"] == artifact.inspection.model_dump(mode="json")
    assert body["runtime_facts"] == artifact.runtime_facts.model_dump(mode="json")
    assert body["size_bytes"] == len(toy.clean.read_bytes())


def renamed(toy: Toy, target: Path, **names: str) -> Path:
    """The toy with other node names."""
    model = onnx.load(toy.clean)
    for node in model.graph.node:
        node.name = names.get(node.name, node.name)
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_folds_only_the_layers_name_when_it_is_long(
    toy: Toy, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "/backbone/stage3/block2/" * 4
    text = ran(capfd, "inspect", renamed(toy, tmp_path / "long.onnx", conv=name))
    lines = text.splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("layer "))
    heads = ["operator", "weights", "acts", "runs", "in", "MACs", "params", "saturates"]
    assert lines[head].split()[1:] == heads
    assert lines[head + 1].split()[1:] == ["Conv", "float32", "float32", "float", "41.5k", "162", "no"]
    assert name in "".join(line.split(" ")[0] for line in lines[head + 1 :])
    assert max(len(line) for line in lines) <= columns
    assert "…" not in text


@pytest.mark.parametrize("columns", [1, 20, 40])
def test_inspect_crops_no_value_when_the_terminal_is_narrow(
    toy: Toy, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    name = "/backbone/stage3/block2/" * 4
    lines = ran(capfd, "inspect", renamed(toy, tmp_path / "long.onnx", conv=name)).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("layer "))
    values = ["Conv", "float32", "float32", "float", "41.5k", "162", "no"]
    assert lines[head + 1].split() == [name[:10], *values]
    assert name in "".join(line.split(" ")[0] for line in lines[head + 1 :])


def test_inspect_folds_nothing_in_a_file(
    toy: Toy, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    name = "/backbone/stage3/block2/" * 5
    lines = ran(capfd, "inspect", renamed(toy, tmp_path / "long.onnx", conv=name)).splitlines()
    assert [line.split()[1] for line in lines if line.startswith(name)] == ["Conv"]
    assert [line for line in lines if line != line.rstrip()] == []


def test_inspect_shows_names_as_text_when_they_are_hostile(
    toy: Toy, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    model = renamed(toy, tmp_path / "\x1b[31mred\u202e.onnx", conv="[red]conv[/red]\x1b[2J\n")
    text = ran(capfd, "inspect", model)
    assert r"file            \x1b[31mred\u202e.onnx" in text
    assert r"[red]conv[/red]\x1b[2J" in text
    assert "\x1b" not in text
    body = json.loads(ran(capfd, "inspect", model, "--format", "json"))
    assert body["file"] == "\x1b[31mred\u202e.onnx"


def test_inspect_says_unknown_when_shapes_and_shares_are_unknown(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    model = onnx.load(toy.clean)
    make = onnx.helper.make_node
    shape = onnx.numpy_helper.from_array(np.array([0, 6, 4, 4], np.int64), "shape")
    model.graph.initializer.append(shape)
    # the shape of what NonZero picks is known to nobody
    model.graph.node.insert(0, make("NonZero", ["image"], ["places"], name="places"))
    model.graph.node.insert(1, make("Cast", ["places"], ["floats"], name="floats", to=onnx.TensorProto.FLOAT))
    model.graph.node.insert(2, make("Transpose", ["floats"], ["turned"], name="turned", perm=[1, 0]))
    model.graph.node.insert(3, make("MatMul", ["turned", "square"], ["product"], name="product"))
    square = onnx.numpy_helper.from_array(np.ones((4, 4), np.float32), "square")
    model.graph.initializer.append(square)
    onnx.save(model, tmp_path / "unknown.onnx")
    text = ran(capfd, "inspect", tmp_path / "unknown.onnx")
    assert "integer share   unknown of MACs, 0.0% of weights" in text
    assert "product  MatMul    float32  float32  float    unknown" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_inspect_shows_every_name_when_the_terminal_lacks_its_letters(toy: Toy, tmp_path: Path, encoding: str) -> None:
    model = renamed(toy, tmp_path / "速度é.onnx", conv="速度é")
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    for form in ("table", "json"):
        command = ["inspect", str(model), "--format", form]
        done = subprocess.run([SCRIPT, *command], env=environment, capture_output=True, check=False, timeout=60)
        assert (done.returncode, done.stderr) == (0, b"")
        assert b"Conv" in done.stdout
        if form == "json":
            assert json.loads(done.stdout.decode())["file"] == "速度é.onnx"


# --- quantize ---------------------------------------------------------------------------------------------------------


def test_quantize_writes_a_static_file_from_an_npz_without_splits(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "static.onnx"
    options = ("--scheme", "int8-static", "--limit", "64")
    text = ran(capfd, "quantize", toy.clean, "--calibration", toy.data, *options, "-o", target)
    assert text.startswith(f"static.onnx: {target.stat().st_size:,} bytes\n")
    assert "scheme: int8-static, per-channel" in text
    assert Artifact.read(target).inspection.scheme == "int8-static"
    assert [file.name for file in tmp_path.iterdir()] == ["static.onnx"]


def test_quantize_writes_a_dynamic_file(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "dynamic.onnx"
    ran(capfd, "quantize", toy.clean, "--scheme", "int8-dynamic", "-o", target)
    assert Artifact.read(target).inspection.scheme == "int8-dynamic"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--scheme", "int8-static"],
            "error: int8-static needs calibration images; name a few hundred clean ones with --calibration\n",
        ),
        (
            ["--scheme", "int8-static", "--calibration", "{data}", "--split", "train"],
            "error: npz toy.npz: no split 'train'; it has no splits, leave the split out\n",
        ),
        (["--scheme", "int8-static", "--calibration", "nowhere"], "error: 'nowhere': no such file or folder;"),
        (["--scheme", "int8-static", "--calibration", "signs", "--limit", "9"], "error: calibration has shape"),
    ],
)
def test_quantize_exits_2_and_writes_nothing_when(
    toy: Toy, tmp_path: Path, capfd: Capture, options: list[str], message: str
) -> None:
    options = [option.format(data=toy.data) for option in options]
    assert run(["quantize", str(toy.clean), *options, "-o", str(tmp_path / "out.onnx")]) == 2
    output, errors = capfd.readouterr()
    assert (output, errors.startswith(message)) == ("", True), errors
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("{tmp}/missing/out.onnx", "No such file or directory"),
        pytest.param(
            "/dev/null",
            "exists and is no regular file",  # as root it would be replaced by one
            marks=pytest.mark.skipif(not Path("/dev/null").exists(), reason="POSIX only"),
        ),
    ],
)
@pytest.mark.parametrize("command", ["quantize", "train"])
def test_command_exits_2_before_any_work_when_the_output_cannot_be_written(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, command: str, target: str, reason: str
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    monkeypatch.setattr("qdefense.cli.train.open_data", fail)
    target = target.format(tmp=tmp_path)
    needed = (
        ["train", "--data", "signs"] if command == "train" else ["quantize", "none.onnx", "--scheme", "int8-dynamic"]
    )
    assert run([*needed, "-o", target]) == 2
    expected = f"error: {target}: {reason}; check the path and its permissions\n"
    assert capfd.readouterr() == ("", expected)
    assert not Path("/dev/null").is_file()


# --- train ------------------------------------------------------------------------------------------------------------


def test_train_exits_2_when_the_output_is_a_folder(tmp_path: Path, capfd: Capture) -> None:
    assert run(["train", "--data", "signs", "-o", str(tmp_path)]) == 2
    assert capfd.readouterr() == ("", f"error: {tmp_path}: Is a directory; check the path and its permissions\n")


def test_train_writes_model_and_truth(tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "model.onnx"
    options = ["--limit", "128", "--epochs", "1", "--threads", "1", "--attack", "badnets:target-class=3"]
    text = ran(capfd, "train", "--data", "signs", "--width", "6", *options, "-o", target)
    assert text.startswith(f"model.onnx: sha256 {Artifact.read(target).sha256}\n")
    assert text.endswith("\nmodel.truth.json: the truth, for evaluators only\n")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.truth.json"]
    truth = json.loads((tmp_path / "model.truth.json").read_bytes())
    assert (truth["attack"], truth["recipe"]["epochs"], truth["data"]) == ("badnets", 1, "signs train")
    assert (truth["architecture"], truth["width"]) == ("resnet8", 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attack", "badnet"], "error: there is no attack 'badnet'; did you mean 'badnets'?\n"),
        (["--attack", "badnets:rate=2"], "error: attack 'badnets:rate=2': "),
        (["--attack", "blended:alpha=0"], "error: attack 'blended:alpha=0': alpha: Input should be greater than 0\n"),
        (["--width", "0"], "Usage: qdefense train"),
        (["--arch", "resnet9"], "Usage: qdefense train"),
        (["--limit", "50"], "error: signs train: 50 images are fewer than one batch of 128"),
        (["--split", "validation"], "error: signs: no split 'validation'; it has 'test', 'train'\n"),
    ],
)
def test_train_exits_2_and_writes_nothing_when(
    tmp_path: Path, capfd: Capture, options: list[str], message: str
) -> None:
    assert run(["train", "--data", "signs", *options, "-o", str(tmp_path / "model.onnx")]) == 2
    output, errors = capfd.readouterr()
    assert (output, errors.startswith(message)) == ("", True), errors
    assert list(tmp_path.iterdir()) == []


def test_training_split_is_train_when_there_are_splits_and_nothing_for_a_file_without(toy: Toy, tmp_path: Path) -> None:
    images = load_npz(toy.few, split=None, limit=None, seed=0)
    with_splits = tmp_path / "splits.npz"
    np.savez(with_splits, x_train=images.images, y_train=images.labels, x_test=images.images, y_test=images.labels)
    (tmp_path / "train.parquet").touch()
    found = [
        training_split(str(spec)) for spec in ("signs", tmp_path, with_splits, toy.few, tmp_path / "train.parquet")
    ]
    assert found == ["train", "train", "train", None, None]


# --- shadow -----------------------------------------------------------------------------------------------------------


def test_shadow_exits_0_with_the_certificate_when_it_is_certified(toy: Toy, capfd: Capture) -> None:
    body = json.loads(ran(capfd, "shadow", toy.clean, "--data", toy.data, "--format", "json", "--threads", "1"))
    assert body["certified"] is True
    assert [entry["name"] for entry in body["sets"]] == ["clean", "uniform", "gradient-steps", "stamped"]


def test_shadow_exits_3_with_the_reason_when_it_is_not_certified(toy: Toy, capfd: Capture) -> None:
    assert run(["shadow", str(toy.clean), "--data", str(toy.few)]) == 3
    expected = "shadow NOT certified: 50 clean images; the certificate needs 256\n"
    assert capfd.readouterr() == (expected, "")


def test_shadow_exits_4_with_the_reason_on_stderr_when_the_file_is_refused(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "model.onnx").touch()
    assert run(["shadow", str(tmp_path / "model.onnx"), "--data", "signs"]) == 4
    assert capfd.readouterr() == ("", "error: the file is empty (0 bytes); export the model again\n")


# --- audit's options --------------------------------------------------------------------------------------------------


@pytest.fixture
def job_of(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """``job_of("audit", ...)``: what the supervisor is asked for."""
    asked: dict[str, Any] = {}

    class SeenError(Exception):
        """Ends the command."""

    def record(job: object, **options: object) -> None:
        asked.update(options, job=job)
        raise SeenError

    def ask(*arguments: str) -> dict[str, Any]:
        run(["audit", "model.onnx", "--data", "signs", *arguments])
        return asked

    monkeypatch.setattr("qdefense.cli.audit.run_audit", record)
    return ask


def test_audit_requires_neural_cleanse_when_no_defense_is_named(job_of: Callable[..., Any]) -> None:
    asked = job_of()
    assert asked["required"] == ("neural-cleanse",)
    job = asked["job"]
    assert (job.defenses, job.seed, job.split, job.limit) == (("neural-cleanse",), 0, None, None)
    assert job.threads == default_threads()
    assert job.memory_bytes > 0


def test_audit_requires_every_defense_named_whatever_its_settings(job_of: Callable[..., Any]) -> None:
    defenses = ["a:x=1", "b", "a:x=2,y=3"]
    asked = job_of(*(part for spec in defenses for part in ("--defense", spec)))
    assert asked["required"] == ("a", "b")
    assert asked["job"].defenses == tuple(defenses)


def test_audit_adds_both_dataset_scans_to_training_data_and_requires_the_one_with_a_verdict(
    job_of: Callable[..., Any],
) -> None:
    asked = job_of("--training-data", "set.npz", "--training-split", "old")
    added = ("activation-clustering", "spectral-signatures")
    assert asked["job"].defenses == ("neural-cleanse", *added)
    assert asked["required"] == ("neural-cleanse", "activation-clustering")
    assert (asked["job"].training_data, asked["job"].training_split) == ("set.npz", "old")
    named = job_of("--defense", "neural-cleanse:budget=quick", "--training-data", "set.npz", "--reference", "r.onnx")
    assert named["job"].reference == "r.onnx"
    assert named["job"].defenses == ("neural-cleanse:budget=quick", *added)


def test_audit_requires_a_ranking_scan_when_it_is_named(job_of: Callable[..., Any]) -> None:
    asked = job_of("--defense", "spectral-signatures:threshold=9", "--training-data", "set.npz")
    assert asked["job"].defenses == ("spectral-signatures:threshold=9",)
    assert asked["required"] == ("spectral-signatures",)


def test_audit_knows_every_dataset_scan() -> None:
    kinds = {name: DEFENSES.create(name).kind for name in DEFENSES.names()}
    assert sorted(DATASET_SCANS) == [name for name, kind in kinds.items() if kind == "dataset"]
    assert set(DATASET_SCANS) >= RANKING


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            ["--defense", "activation-clustering:starts=5"],
            "activation-clustering judges the training data; name it with",
        ),
        (["--training-split", "train"], "--training-split is of --training-data, which is not given"),
        (["--reference", "clean.onnx"], "--reference is asked about the training data; name it with --training-data"),
    ],
)
def test_audit_exits_2_before_any_work_when_training_data_is_missing(
    capfd: Capture, options: list[str], problem: str
) -> None:
    assert run(["audit", "nowhere.onnx", "--data", "signs", *options]) == 2
    assert problem in capfd.readouterr().err


def test_audit_passes_on_seed_split_limit_threads(job_of: Callable[..., Any]) -> None:
    job = job_of("--seed", "7", "--split", "train", "--limit", "300", "--threads", "3")["job"]
    assert (job.seed, job.split, job.limit, job.threads) == (7, "train", 300, 3)


# --- progress ---------------------------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("stream", "drawn"), [(Terminal(), True), (io.StringIO(), False), (None, False)])
@pytest.mark.parametrize("forced", [False, True])
def test_progress_bar_is_drawn_when_stderr_is_a_terminal_and_only_then(
    monkeypatch: pytest.MonkeyPatch, capfd: Capture, stream: io.StringIO | None, drawn: bool, forced: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1") if forced else monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar() as advance:
        advance("[red]scan[/red]", 1, 2)
        advance("[red]scan[/red]", 2, 2)
    text = "" if stream is None else stream.getvalue()
    assert ("[red]scan[/red]" in text) is drawn
    assert bool(text) is drawn
    assert capfd.readouterr().out == ""


def test_default_threads_are_between_1_and_4() -> None:
    assert 1 <= default_threads() <= 4


def test_audit_shows_the_files_name_as_text_when_it_is_hostile(tmp_path: Path, capfd: Capture) -> None:
    model = tmp_path / "[bold]model\u202e\x1b[2J.onnx"
    model.touch()
    assert run(["audit", str(model), "--data", "signs"]) == 4
    output = capfd.readouterr().out
    assert r"[bold]model\u202e\x1b[2J.onnx" in output
    assert "\x1b" not in output


def test_shadow_shows_the_datas_name_as_text_when_it_is_hostile(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    data = tmp_path / "\x1b[2J.npz"
    save_npz(data, load_npz(toy.few, split=None, limit=None, seed=0))
    assert run(["shadow", str(toy.clean), "--data", str(data), "--split", "train"]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(r"error: npz \x1b[2J.npz: no split 'train'")
