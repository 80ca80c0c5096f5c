"""The matrix file: every mistake is told with its key and file."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from qdefense.bench.matrix import BenchFacts, CalibrationTable, DataTable, Grid, MatrixError, read_matrix

from .conftest import TINY, Desk

NewDesk = Callable[..., Desk]


GUIDE = Path(__file__).resolve().parents[2] / "docs" / "bench.md"


def test_the_matrix_of_the_guide_loads_and_needs_nothing_but_the_package(tmp_path: Path) -> None:
    (block,) = re.findall(r"^```toml\n(.*?)^```$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    path = tmp_path / "matrix.toml"
    path.write_text(block, encoding="utf-8")
    matrix = read_matrix(path)
    assert [table.path for table in matrix.data.values()] == ["signs"]
    assert [table.train_limit for table in matrix.data.values()] == [2000]
    assert all("none" in grid.attacks and len(grid.attacks) > 1 and grid.defenses for grid in matrix.grid)


def test_the_guide_tells_every_key_of_a_matrix_and_no_other() -> None:
    _, _, section = GUIDE.read_text(encoding="utf-8").partition("\n## The matrix\n")
    tables = {
        "[bench]": BenchFacts,
        "[data.NAME]": DataTable,
        "[calibrations.NAME]": CalibrationTable,
        "[[grid]]": Grid,
    }
    told: dict[str, set[str]] = {}
    table = ""
    for line in section.partition("\n## ")[0].splitlines():
        _, *cells = line.split("|")
        if cells and (names := re.findall(r"`([^`]+)`", cells[1])):
            table = cells[0].strip(" `") or table
            told.setdefault(table, set()).update(names)
    assert told == {table: set(model.model_fields) for table, model in tables.items()}


def test_defaults(new_desk: NewDesk) -> None:
    table = read_matrix(new_desk().matrix)
    (grid,) = table.grid
    assert (grid.seeds, grid.arithmetics, grid.accesses) == ((0,), ("as-run",), ("session",))
    assert table.bench.seed == 0
    assert table.folder == new_desk().folder


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("attacks =", "atacks =", "there is no key 'grid.1.atacks'; known there: data, architectures, attacks"),
        ("train_limit", "limit", "there is no key 'data.signs.limit'; known there: path, train_split"),
        (
            "images = 16",
            "image = 16",
            "there is no key 'calibrations.few.image'; known there: images, split, triggered",
        ),
        ("[bench]", "[bench]\nfolder = 1", "there is no key 'bench.folder'; known there: name, seed"),
        ("[bench]", "folder = 'x'\n[bench]", "there is no key 'folder'; known there: bench, data, calibrations, grid"),
        ('path = "signs"\n', "", "the key 'data.signs.path' is missing"),
        ("images = 16", "images = 15", "calibrations.few.images: Input should be greater than or equal to 16"),
        ("images = 16", "triggered = 1.5", "calibrations.few.triggered: Input should be less than or equal to 1"),
        ("target_class = 7", "target_class = '7'", "data.signs.target_class: Input should be a valid integer"),
        ("[data.signs]", "[data.'a/b']", "data.a/b: String should match pattern"),
        (
            'data = ["signs"]',
            'data = ["sgins"]',
            "grid 1 names data 'sgins', and there is no table [data.sgins]; there is",
        ),
        (
            'data = ["signs"]',
            'data = ["signs"]\ncalibrations = ["x"]',
            "there is no table [calibrations.x]; there is few",
        ),
        ('data = ["signs"]', "data = []", "grid.1.data: Tuple should have at least 1 item"),
        (
            'data = ["signs"]',
            'data = ["signs"]\nseeds = [-1]',
            "grid.1.seeds.1: Input should be greater than or equal to 0",
        ),
        ('data = ["signs"]', 'data = ["signs"]\naccesses = ["gpu"]', "grid.1.accesses.1: Input should be 'session', "),
        ("[bench]", "[bench", "is no TOML"),
    ],
)
def test_mistakes_name_key_and_file(new_desk: NewDesk, old: str, new: str, told: str) -> None:
    assert old in TINY
    with pytest.raises(MatrixError) as caught:
        read_matrix(new_desk(TINY.replace(old, new)).matrix)
    assert str(caught.value).startswith("matrix.toml")
    assert told in str(caught.value)


def test_a_file_that_is_no_text_or_too_large(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_bytes(b"\xff")
    with pytest.raises(MatrixError, match="is no TOML"):
        read_matrix(path)
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(MatrixError, match="1,000,001 bytes are no matrix file"):
        read_matrix(path)
