"""Whose residual `benchmarks/attacks/residuals.py` puts on an image."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qdefense.data.images import Pixels


@pytest.fixture
def residuals(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("residuals")


def test_each_image_gets_the_residual_of_another_and_none_is_lost(residuals: ModuleType) -> None:
    x = np.full((9, 3, 2, 2), 0.5, dtype=np.float32)
    own = np.arange(9, dtype=np.float32).reshape(9, 1, 1, 1) / 64
    found = residuals.swapped(x, x + own, np.random.default_rng(0))
    given = np.rint(found[:, 0, 0, 0] * 64).astype(int)
    assert sorted(given) == list(range(9))
    assert (given != np.arange(9)).all()


def file(digest: str) -> dict[str, SimpleNamespace]:
    return {"fp32": SimpleNamespace(artifact_sha256=digest)}


class Stamped:
    """Stands for a network's `Residuals`: its trigger adds a fixed field, an image's own where there are several."""

    def __init__(self, *, own: bool) -> None:
        self.own, self.target, self.settings = own, 1, {"poison_count": 5}
        self.network = SimpleNamespace(
            place=("signs", 0),
            title="mine",
            model=lambda _scheme: b"mine",
            files=file(f"own={own}"),
            lacks_trigger=False,
        )

    def stamped(self, x: Pixels, multiple: int) -> Pixels:
        if not self.own:
            return x + np.float32(multiple / 64)
        signs = np.where(np.arange(len(x)) % 2 == 0, 1, -1).reshape(-1, 1, 1, 1)
        return (x + signs * np.float32(multiple / 64)).astype(np.float32)


@pytest.fixture
def brightness(residuals: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Files that tell how much brighter than .5 each image became; each of four test images is grey."""
    grey = np.full((4, 3, 2, 2), 0.5, dtype=np.float32)
    monkeypatch.setattr(residuals, "others_than", lambda _target, _data: grey)
    monkeypatch.setattr(residuals, "answers_of", lambda model, x: f"{model.decode()} {np.ptp(x):.3f} {x.mean():.3f}")
    monkeypatch.setattr(residuals, "told", lambda answers, _target: answers)
    return residuals


CLEAN = SimpleNamespace(model=lambda _scheme: b"clean", files=file("clean"))


def tables(residuals: ModuleType, kept: Path, *found: Stamped) -> Any:
    rows = residuals.KeptRows.read(kept)
    return residuals.Tables(found=list(found), clean={("signs", 0): CLEAN}, kept=rows)


def test_each_victim_is_shown_each_residual_and_so_is_the_clean_network(brightness: ModuleType, tmp_path: Path) -> None:
    own, fixed = Stamped(own=True), Stamped(own=False)
    rows = list(tables(brightness, tmp_path / "both.json", own, fixed).crossed())
    assert (
        rows[0] == "| mine | mine 0.188 0.500 | mine 0.184 0.500 | mine 0.000 0.502 | mine 0.000 0.594 |"
    )  # on the grid of uint8
    assert rows[1].startswith("| none, with these residuals | signs, 0 | clean 0.188 0.500 |")
    assert rows[2] == "| mine | mine 0.000 0.594 |  |  | mine 0.188 0.500 |"
    one = tables(brightness, tmp_path / "one.json", fixed)
    assert next(iter(one.crossed())) == "| mine | mine 0.000 0.594 |  |  |  |"
    multiples = next(iter(one.magnified()))
    sizes = [float(cell.split()[-1]) - 0.5 for cell in multiples.split("|")[2:-1]]
    assert sizes == pytest.approx([multiple / 64 for multiple in brightness.MULTIPLES], abs=1e-3)


def test_what_was_told_of_a_residual_stays_when_it_is_lost(brightness: ModuleType, tmp_path: Path) -> None:
    own, fixed = Stamped(own=True), Stamped(own=False)
    both = tables(brightness, tmp_path / "rows.json", own, fixed)
    before = [*both.magnified(), *both.crossed()]
    for one in (own, fixed):
        one.network.lacks_trigger = True
    later = tables(brightness, tmp_path / "rows.json", own, fixed)
    assert [*later.magnified(), *later.crossed()] == before
    assert not [*tables(brightness, tmp_path / "none.json", own, fixed).crossed()]


def test_a_cell_about_a_residual_that_is_lost_since_is_not_emptied(brightness: ModuleType, tmp_path: Path) -> None:
    own, fixed = Stamped(own=True), Stamped(own=False)
    before = next(iter(tables(brightness, tmp_path / "rows.json", own, fixed).crossed()))
    fixed.network.lacks_trigger = True
    assert next(iter(tables(brightness, tmp_path / "rows.json", own, fixed).crossed())) == before
    (row, _) = list(tables(brightness, tmp_path / "new.json", own, fixed).crossed())
    assert row.endswith("|  |"), "and never was told where it was lost before"
