"""What a command writes never takes the place of what it reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
import onnx
import pytest
from PIL import Image

from qdefense.cli import run
from qdefense.cli.options import write_json
from qdefense.cli.outputs import check_output

from ..bench import sample_records as samples  # noqa: TID252 (the made-up records are there)

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

Capture = pytest.CaptureFixture[str]
SHORT = ("--method", "fine-pruning:epochs=1")
SCHEME = ("--scheme", "int8-static")
WITH_TRAINING_DATA = ("audit", "m.onnx", "--data", "toy.npz", "--training-data", "toy.npz")
TRAIN = ("train", "--epochs", "1", "-o", "new.onnx", "--data")


@pytest.fixture
def here(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with all that a command may read."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(toy.clean, "m.onnx")
    shutil.copy(toy.data, "toy.npz")
    Path("m.toml").write_text("layout = 'NCHW'\n", encoding="utf-8")
    Path("names.txt").write_text("\n".join(f"zone {index}" for index in range(8)), encoding="utf-8")
    model = onnx.load("m.onnx")
    onnx.save(model, "big.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    for label in ("a", "b"):
        Path("images", label).mkdir(parents=True)
        for number in range(2):
            Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(Path("images", label, f"{number}.png"))
    Path("elsewhere").mkdir()
    shutil.move("images/b", "elsewhere/b")
    Path("images/b").symlink_to(tmp_path / "elsewhere/b")
    Path("link.npz").symlink_to("toy.npz")
    Path("images/data_batch_1").write_bytes(b"images")
    Path("images/out").mkdir()
    Path("others/any").mkdir(parents=True)
    shutil.copy("images/a/0.png", "others/any/0.png")
    Path("nowhere.png").symlink_to(tmp_path / "images/a/9.png")
    Path("lost.png").symlink_to(tmp_path / "gone/away/9.png")
    samples.write_sample(Path("results"), "one network")
    Path("results/models/large").mkdir(parents=True, exist_ok=True)
    Path("results/triggers").mkdir()
    Path("records.html").symlink_to("results/records.jsonl")
    return tmp_path


CASES: dict[str, tuple[list[str], str]] = {
    "repair: the data": (["repair", "m.onnx", "--data", "toy.npz", *SHORT, "-o", "./toy.npz"], "toy.npz is --data, "),
    "repair: a link to the data": (["repair", "m.onnx", "--data", "toy.npz", "-o", "link.npz"], "link.npz is --data, "),
    "repair: an image of the data": (
        ["repair", "m.onnx", "--data", "images", "-o", "images/a/0.png"],
        "images/a/0.png is a file of --data, which the result would replace; write to another folder",
    ),
    "repair: an image of a linked folder": (
        ["repair", "m.onnx", "--data", "images", "-o", "images/b/0.png"],
        "images/b/0.png is a file of --data, ",
    ),
    "repair: a batch of CIFAR-10": (
        ["repair", "m.onnx", "--data", "images", "-o", "images/data_batch_1"],
        "images/data_batch_1 is a file of --data, ",
    ),
    "repair: the contract": (
        ["repair", "m.onnx", "--data", "toy.npz", "--contract", "m.toml", "-o", "m.toml"],
        "m.toml is --contract, which the result would replace; write to another file",
    ),
    "repair: the class names": (
        ["repair", "m.onnx", "--data", "toy.npz", "--classes", "names.txt", "-o", "names.txt"],
        "names.txt is --classes, ",
    ),
    "repair: external weights": (
        ["repair", "big.onnx", "--data", "toy.npz", *SHORT, "-o", "weights.bin"],
        "weights.bin holds weights of big.onnx, which the result would replace; write to another file",
    ),
    "quantize: the calibration images": (
        ["quantize", "m.onnx", *SCHEME, "--calibration", "toy.npz", "-o", "toy.npz"],
        "toy.npz is --calibration, ",
    ),
    "quantize: one of the calibration images": (
        ["quantize", "m.onnx", *SCHEME, "--calibration", "images", "-o", "images/a/1.png"],
        "images/a/1.png is a file of --calibration, ",
    ),
    "quantize: the contract": (
        ["quantize", "m.onnx", *SCHEME, "--calibration", "toy.npz", "--contract", "m.toml", "-o", "m.toml"],
        "m.toml is --contract, ",
    ),
    "quantize: external weights": (
        ["quantize", "big.onnx", *SCHEME, "--calibration", "toy.npz", "-o", "weights.bin"],
        "weights.bin holds weights of big.onnx, ",
    ),
    "train: the data": (["train", "--data", "toy.npz", "--epochs", "1", "-o", "toy.npz"], "toy.npz is --data, "),
    "train: a new image among the data": (
        [*TRAIN, "images", "--attack", "badnets", "--contact-sheet", "images/a/9.png"],
        "images/a/9.png would be read as a file of --data; write to another folder",
    ),
    "train: a new class among the data": (
        [*TRAIN, "images", "--attack", "badnets", "--contact-sheet", "images/out/sheet.PNG"],
        "images/out/sheet.PNG would be read as a file of --data; ",
    ),
    "train: a link to a new image among the data": (
        [*TRAIN, "images", "--attack", "badnets", "--contact-sheet", "nowhere.png"],
        "nowhere.png would be read as a file of --data; ",
    ),
    "train: what the attack reads": (
        [*TRAIN, "toy.npz", "--attack", "dfb:ood=others,channels=2", "--contact-sheet", "others/any/0.png"],
        "others/any/0.png is a file of what --attack reads, which the result would replace; write to another folder",
    ),
    "train: a new image of what the attack reads": (
        [*TRAIN, "toy.npz", "--attack", "dfb:ood=./others,channels=2", "--contact-sheet", "others/any/1.png"],
        "others/any/1.png would be read as a file of what --attack reads; write to another folder",
    ),
    "train: what the attack's host reads": (
        [*TRAIN, "signs", "--attack", "lsp:host=dfb,host.ood=link.npz", "-o", "toy.npz"],
        "toy.npz is what --attack reads, which the result would replace; write to another file",
    ),
    "calibrate: a model": (
        ["calibrate", "m.onnx", "big.onnx", "--data", "toy.npz", "-o", "big.onnx"],
        "big.onnx is one of the models, ",
    ),
    "calibrate: the data": (["calibrate", "m.onnx", "--data", "toy.npz", "-o", "toy.npz"], "toy.npz is --data, "),
    "audit: the inputs": (
        ["audit", "m.onnx", "--data", "toy.npz", "--inputs", "out/report.json", "--output-dir", "out"],
        "out/report.json is --inputs, ",
    ),
    "audit: the reference": (
        [*WITH_TRAINING_DATA, "--reference", "out/report.json", "--output-dir", "out"],
        "out/report.json is --reference, ",
    ),
    "report: the records": (
        ["report", "results", "-o", "results/records.jsonl"],
        "results/records.jsonl is one of RESULTS, which the page would replace; write to another file",
    ),
    "report: a link to the records": (["report", "results", "-o", "records.html"], "records.html is one of RESULTS, "),
    "report: the manifest": (
        ["report", "results", "--format", "json", "-o", "./results/manifest.json"],
        "results/manifest.json is one of RESULTS, ",
    ),
    "report: latencies that are not there yet": (
        ["report", "results", "-o", "results/latency.jsonl"],
        "results/latency.jsonl is one of RESULTS, ",
    ),
    "report: a file among the models": (
        ["report", "results", "-o", "results/models/large/new.html"],
        "results/models/large/new.html is one of RESULTS, ",
    ),
    "report: a file among the pictures": (
        ["report", "results", "-o", "results/triggers/new.html"],
        "results/triggers/new.html is one of RESULTS, ",
    ),
    "audit: a page that would be removed": (
        ["audit", "m.onnx", "--data", "toy.npz", "--classes", "out/report.html", "--output-dir", "out"],
        "out/report.html is --classes, ",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=list(CASES))
def test_no_command_replaces_what_it_reads(here: Path, capfd: Capture, arguments: list[str], message: str) -> None:
    if arguments[0] == "audit":
        Path("out").mkdir()
        shutil.copy("names.txt", "out/report.json")
        shutil.copy("names.txt", "out/report.html")
    before = _contents(here)
    assert run(arguments) == 2
    assert message in capfd.readouterr().err
    assert _contents(here) == before


BEFORE: dict[str, list[str]] = {
    "repair": ["repair", "big.onnx", "--data", "toy.npz", "-o", "weights.bin"],
    "audit": ["audit", "big.onnx", "--data", "toy.npz", "--output-dir", "out"],
    "audit: the reference's": [
        *WITH_TRAINING_DATA,
        "--defense",
        "activation-clustering:rule=exclusionary-reclassification",
        "--reference",
        "big.onnx",
        "--output-dir",
        "out",
    ],
    "calibrate": ["calibrate", "big.onnx", "--data", "toy.npz", "-o", "weights.bin"],
}


@pytest.mark.parametrize("arguments", BEFORE.values(), ids=list(BEFORE))
def test_weights_are_kept_before_the_long_work(here: Path, capfd: Capture, arguments: list[str]) -> None:
    (here / "out").mkdir()
    (here / "out/report.json").hardlink_to(here / "weights.bin")
    assert run(arguments) == 2
    assert "holds weights of big.onnx" in capfd.readouterr().err
    assert not list(here.glob("weights.bin.reports/*")), "nothing was audited"


def test_report_may_lie_beside_the_records(here: Path) -> None:
    for _ in range(2):
        assert run(["report", "results", "-o", "results/report.html"]) == 0
    assert (here / "results/report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


ALLOWED: dict[str, tuple[dict[str, object], str]] = {
    "an earlier result among the data": ({"data": "images"}, "images/earlier.onnx"),
    "an earlier calibration among the data": ({"data": "images"}, "images/cal"),
    "an earlier file of another ending beside the model": ({"data": "."}, "x.bin"),
    "a new file among the data, of a name that no loader reads there": ({"data": "images"}, "images/new.truth.npz"),
    "a new image beside the data": ({"data": "images"}, "elsewhere/new.png"),
    "a link that leads nowhere": ({"data": "images"}, "lost.png"),
    "a new image beside a file of data": ({"data": "toy.npz"}, "new.png"),
    "what an attack draws has a file's name": ({"attack": "dfb:ood=textures"}, "textures"),
    "a file beside the data": ({"data": "images"}, "images/../elsewhere/other.bin"),
    "a file that is named as the built-in set": ({"data": "signs"}, "signs"),
    "something else than the models": ({"models": (Path("m.onnx"), Path("big.onnx"))}, "toy.npz"),
    "the names are no file": ({"classes": "zone," * 100}, "toy.npz"),
    "nothing is read": ({"data": None, "models": ()}, "toy.npz"),
}


@pytest.mark.parametrize(("params", "target"), ALLOWED.values(), ids=list(ALLOWED))
@pytest.mark.usefixtures("here")
def test_output_may_replace(params: dict[str, object], target: str) -> None:
    for name in ("images/earlier.onnx", "images/cal", "x.bin", "elsewhere/other.bin", "signs", "textures"):
        Path(name).write_bytes(b"earlier")
    context = click.Context(click.Command("any"))
    context.params = params
    with context.scope():
        check_output(Path(target))


def _contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "command",
    [
        ["audit", "m.onnx", "--data", "others", "--output-dir", "others/report"],
        ["audit", "m.onnx", "--data", "others", "--output-dir", "others/any/deep/report"],
        ["calibrate", "m.onnx", "--data", "others", "-o", "others/c.json"],
    ],
    ids=["audit", "audit, in a class", "calibrate: its reports"],
)
def test_no_new_folder_becomes_a_class_of_the_data(here: Path, command: list[str], capfd: Capture) -> None:
    before = sorted(here.rglob("*"))
    assert run(command) == 2
    assert "would be read as a part of --data; write to another folder" in capfd.readouterr().err
    assert sorted(here.rglob("*")) == before


@pytest.mark.parametrize(
    ("title", "stays"),
    [("<title>PASSED: m.onnx (qdefense audit)</title>", False), ("<title>blindspots</title>", True)],
    ids=["of an audit", "of anybody else"],
)
def test_only_an_earlier_audits_page_goes_with_it(here: Path, title: str, *, stays: bool) -> None:
    page = here / "out/report.html"
    page.parent.mkdir()
    page.write_text(f"<!DOCTYPE html>{title}", encoding="utf-8")
    assert run(["audit", "m.onnx", "--data", "toy.npz", "--output-dir", "out", "--format", "json"]) in (0, 1, 3)
    assert page.exists() is stays


def test_json_on_stdout_holds_no_character_that_a_terminal_obeys(capfd: Capture) -> None:
    words = "a\x9b2J \u202e \x7f \u2028 ü \U000e0001"
    write_json(json.dumps({"name": words}, ensure_ascii=False))
    shown = capfd.readouterr().out
    assert json.loads(shown) == {"name": words}
    assert shown == '{"name": "a\\u009b2J \\u202e \\u007f \\u2028 ü \\udb40\\udc01"}\n'
