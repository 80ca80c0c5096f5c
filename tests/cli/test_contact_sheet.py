"""`qdefense train --contact-sheet`: on request alone, and over nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from qdefense.attacks import ATTACKS
from qdefense.attacks.contact_sheets import contact_sheet, poison_block
from qdefense.cli import run
from qdefense.data.opening import open_data, training_split
from qdefense.training import poisoned_set
from qdefense.trial import Truth, read_state, truth_path
from qdefense.zoo import trigger_of

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
    assert "sheet.png: the trigger on training images and poisons, for evaluators only" in capsys.readouterr().out
    with Image.open("sheet.png") as picture:
        assert picture.format == "PNG"


@pytest.mark.parametrize("attack", ["badnets:target-class=3", "lsp:host=badnets"])
def test_the_sheet_shows_what_the_network_learned_from(toy: Toy, attack: str) -> None:
    """The poisons as the set holds them that the truth file's rows are of, and the same bytes each time."""
    for name in ("a.png", "b.png"):
        assert _train(toy, "--limit", "160", "--attack", attack, "--contact-sheet", name) == 0
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()
    truth = Truth.model_validate_json(truth_path(Path("m.onnx")).read_text(encoding="utf-8"))
    dataset = open_data(str(toy.data), split=training_split(str(toy.data)), limit=160)
    poisoned = poisoned_set(dataset, ATTACKS.create(attack), truth.seed)
    trigger = trigger_of(truth, dataset)
    assert trigger is not None
    expected = contact_sheet(trigger, dataset, poisons=poison_block(poisoned))
    assert Path("a.png").read_bytes() == expected != contact_sheet(trigger, dataset)


@pytest.mark.parametrize(("right", "near_chance"), [(1, True), (160, False)])
def test_train_tells_of_a_network_that_guesses(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, capfd: Capture, right: int, near_chance: bool
) -> None:
    monkeypatch.setattr("qdefense.cli.train.count_right", lambda *_: right)
    assert _train(toy, "--limit", "160") == 0
    (line,) = [line for line in capfd.readouterr().out.splitlines() if line.startswith("  accuracy ")]
    told = f"  accuracy {right / 160:.1%} on 160 of the images it was trained on, without a trigger"
    assert line.startswith(told)
    assert ("and `audit` measures no such file: train longer (--epochs)" in line) == near_chance


@pytest.mark.parametrize("attack", ["badnets", "wanet", None])
def test_train_tells_of_the_poisons_before_the_first_epoch(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, attack: str | None
) -> None:
    """Some attacks learn for hours before there is an epoch."""
    told: list[tuple[str, int, int]] = []

    @contextmanager
    def bar() -> Iterator[Callable[[str, int, int], None]]:
        yield lambda *stage: told.append(stage)

    monkeypatch.setattr("qdefense.cli.train.progress_bar", bar)
    assert _train(toy, "--limit", "160", *([] if attack is None else ["--attack", attack])) == 0
    poisons = [] if attack is None else [("poisons", 0, 1), ("poisons", 1, 1)]
    assert told == [*poisons, ("epochs", 0, 1), ("epochs", 1, 1)]


def test_the_sheet_of_an_attack_in_training_says_so(toy: Toy) -> None:
    attack = "wanet"
    assert _train(toy, "--limit", "160", "--attack", attack, "--contact-sheet", "sheet.png") == 0
    truth = Truth.model_validate_json(truth_path(Path("m.onnx")).read_text(encoding="utf-8"))
    dataset = open_data(str(toy.data), split=training_split(str(toy.data)), limit=160)
    trigger = trigger_of(truth, dataset, read_state(Path("m.onnx"), truth))
    assert trigger is not None
    poisons = poison_block(poisoned_set(dataset, ATTACKS.create(attack), truth.seed), made_in_training=True)
    assert Path("sheet.png").read_bytes() == contact_sheet(trigger, dataset, poisons=poisons)


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
