"""`qdefense train --contact-sheet`: on request alone, and over nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from qdefense.cli import run

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

Capture = pytest.CaptureFixture[str]


def _train(toy: Toy, *more: str) -> int:
    return run(["train", "--data", str(toy.data), "--width", "4", "--epochs", "1", "-o", "m.onnx", *more])


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_train_draws_the_trigger_when_asked(toy: Toy, capsys: Capture) -> None:
    """All-to-all, whose trigger is told by the state beside the truth."""
    assert _train(toy, "--attack", "badnets:mode=all-to-all", "--contact-sheet", "sheet.png") == 0
    assert "sheet.png: the trigger on training images, for evaluators only" in capsys.readouterr().out
    with Image.open("sheet.png") as picture:
        assert picture.format == "PNG"


def test_train_leaves_no_picture_unasked(toy: Toy) -> None:
    assert _train(toy, "--attack", "badnets") == 0
    assert sorted(path.name for path in Path().iterdir()) == ["m.onnx", "m.truth.json"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--contact-sheet", "s.png"],
            "--contact-sheet shows a trigger, and without --attack there is none; leave it out",
        ),
        (["--attack", "badnets", "--contact-sheet", "s.jpg"], "--contact-sheet s.jpg: it is a PNG; name it FILE.png"),
        (
            ["--attack", "badnets", "--contact-sheet", "same.png", "-o", "same.png"],
            "--contact-sheet same.png: the model takes this name; choose another one",
        ),
    ],
)
def test_train_refuses_a_sheet_before_any_work(toy: Toy, capsys: Capture, options: list[str], message: str) -> None:
    assert _train(toy, *options) == 2
    assert message in capsys.readouterr().err
    assert list(Path().iterdir()) == []


def test_train_keeps_its_data(toy: Toy, capsys: Capture) -> None:
    Path("images.png").write_bytes(toy.data.read_bytes())
    options = ["--attack", "badnets", "--contact-sheet", "images.png"]
    assert run(["train", "--data", "images.png", "-o", "m.onnx", *options]) == 2
    assert "images.png is --data, which the result would replace" in capsys.readouterr().err
