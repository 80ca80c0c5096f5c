"""Which rows `benchmarks/attacks/kept_rows.py` keeps, and when they are measured again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

from qdefense.profile import runtime

FILES = {"fp32": "a" * 64, "int4": "b" * 64}


@pytest.fixture
def kept_rows(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("kept_rows")


class Measuring:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> Iterator[str]:
        self.times += 1
        yield f"{self.times}"


def test_rows_are_measured_once_and_again_where_a_file_or_the_revision_is_another(
    kept_rows: ModuleType, tmp_path: Path
) -> None:
    measure, first = Measuring(), kept_rows.Table("margins")
    for files, table, expected in (
        (FILES, first, "1"),
        (FILES, first, "1"),
        ({**FILES, "int8": "c" * 64}, first, "2"),
        ({**FILES, "int8": "c" * 64}, kept_rows.Table("margins", 2), "3"),
        ({**FILES, "fp32": "d" * 64}, first, "4"),
        (FILES, kept_rows.Table("stamps"), "5"),
    ):
        kept = kept_rows.KeptRows.read(tmp_path / "rows.json")
        assert kept.rows(table, files, measure) == (expected,)


def test_what_cannot_be_measured_any_more_has_the_rows_that_these_files_gave(
    kept_rows: ModuleType, tmp_path: Path
) -> None:
    table = kept_rows.Table("margins")
    kept_rows.KeptRows.read(tmp_path / "rows.json").rows(table, FILES, Measuring())
    kept = kept_rows.KeptRows.read(tmp_path / "rows.json")
    assert kept.rows(table, FILES, None) == ("1",)
    assert kept.rows(table, {**FILES, "int8": "c" * 64}, None) == ("1",), "which had no part yet"
    assert kept.rows(table, {**FILES, "int4": "c" * 64}, None) == (), "another file answers now"
    assert kept.rows(kept_rows.Table("margins", 2), FILES, None) == ()
    assert kept.rows(table, {"fp32": "d" * 64}, None) == ()


def test_a_file_that_has_no_part_any_more_asks_for_nothing(kept_rows: ModuleType, tmp_path: Path) -> None:
    """So a cell stays that was told of a residual which is lost since; that it comes back is another matter."""
    kept, table, measure = kept_rows.KeptRows.read(tmp_path / "rows.json"), kept_rows.Table("crossed"), Measuring()
    assert kept.rows(table, FILES, measure) == ("1",)
    assert kept.rows(table, {"fp32": FILES["fp32"]}, measure) == ("1",)
    assert kept.rows(table, {**FILES, "other": "c" * 64}, measure) == ("2",)


def test_what_another_script_has_written_since_stays(kept_rows: ModuleType, tmp_path: Path) -> None:
    first, second = (kept_rows.KeptRows.read(tmp_path / "rows.json") for _ in range(2))
    first.rows(kept_rows.Table("margins"), FILES, Measuring())
    second.rows(kept_rows.Table("stamps"), FILES, Measuring())
    found = kept_rows.KeptRows.read(tmp_path / "rows.json")
    assert [found.rows(kept_rows.Table(name), FILES, None) for name in ("margins", "stamps")] == [("1",), ("1",)]


def test_a_network_of_which_there_is_nothing_to_say_is_not_asked_again(kept_rows: ModuleType, tmp_path: Path) -> None:
    kept, table = kept_rows.KeptRows.read(tmp_path / "rows.json"), kept_rows.Table("bystanders")
    assert kept.rows(table, FILES, list) == ()
    assert kept_rows.KeptRows.read(tmp_path / "rows.json").rows(table, FILES, Measuring()) == ()


def test_the_runtimes_are_of_the_table_that_is_asked_for(kept_rows: ModuleType, tmp_path: Path) -> None:
    kept = kept_rows.KeptRows.read(tmp_path / "rows.json")
    kept.rows(kept_rows.Table("plain, 1 to 3"), FILES, Measuring())
    assert list(kept.runtimes(kept_rows.Table("plain"))) == []
    (told,) = kept.runtimes(kept_rows.Table("plain, 1 to 3"))
    assert told.startswith(f"ONNX Runtime {runtime().onnxruntime}, ")
