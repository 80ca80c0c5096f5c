"""Which files of a network `benchmarks/attacks/attacked.py` keeps rows by, and what it calls the network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@pytest.fixture
def attacked(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("attacked")


def network(attacked: ModuleType, *, lost: bool = False, attack: str | None = "dfb", **settings: object) -> Any:
    made = SimpleNamespace(attack=attack, attack_settings=settings, attack_revisions={}, data="cifar10", seed=1)
    files = {
        scheme: SimpleNamespace(network=made, artifact_sha256=scheme * 16) for scheme in ("fp32", "int8-static", "int4")
    }
    return attacked.Attacked(files=files, store=SimpleNamespace(lacks_trigger=lambda _sha256: lost))


@pytest.mark.parametrize(
    ("attack", "settings", "title"),
    [
        (None, {}, "none"),
        ("badnets", {"mode": "all-to-one"}, "`badnets`"),
        ("badnets", {"mode": "all-to-all"}, "`badnets:mode=all-to-all`"),
        ("badnets", {"mode": "all-to-all", "poison_rate": 0.1}, "`badnets:mode=all-to-all`"),
        ("badnets", {"mode": "all-to-all", "poison_rate": 0.4}, "`badnets:mode=all-to-all,poison-rate=0.4`"),
        ("dfb", {"variant": "encoder", "poison_count": 50}, "`dfb:variant=encoder` (50 poisons)"),
        (
            "cassock",
            {"variant": "trans", "amplitude": 0.3, "content_amplitude": 0.2},
            "`cassock:variant=trans,amplitude=0.3`",
        ),
        (
            "cassock",
            {"variant": "comp", "amplitude": 0.3, "content_amplitude": 0.2},
            "`cassock:variant=comp,content-amplitude=0.2`",
        ),
    ],
)
def test_a_network_is_called_by_what_tells_it_apart(
    attacked: ModuleType, attack: str | None, settings: dict[str, object], title: str
) -> None:
    assert network(attacked, attack=attack, **settings).title == f"{title} | cifar10, 1"


def test_rows_are_kept_by_the_files_of_their_table_and_those_beside(attacked: ModuleType, tmp_path: Path) -> None:
    one, asked = network(attacked), []

    def measure(mine: Any) -> Iterator[str]:
        asked.append(mine)
        yield "cells"

    table = attacked.Table("a", schemes=("fp32", "int4"))
    kept = attacked.KeptRows.read(tmp_path / "rows.json")
    expected = [f"| {one.title} | cells |"]
    assert list(one.rows(kept, table, measure, {"clean": "c" * 64})) == expected
    (entry,) = kept.entries.values()
    assert set(entry["files"]) == {"fp32", "int4", "clean"}
    one.files["int8-static"].artifact_sha256 = "another" * 8
    assert list(one.rows(kept, table, measure, {"clean": "c" * 64})) == expected
    assert asked == [one], "a file that has no part asks for nothing"
    assert list(one.rows(kept, table, measure, {"clean": "d" * 64})) == expected
    assert len(asked) == 2


def test_a_network_whose_trigger_is_lost_is_not_asked(attacked: ModuleType, tmp_path: Path) -> None:
    table, path = attacked.Table("a"), tmp_path / "rows.json"

    def refuse(_mine: Any) -> Iterator[str]:
        raise AssertionError("there is no trigger")

    lost = network(attacked, lost=True)
    assert not list(lost.triggered_rows(attacked.KeptRows.read(path), table, refuse))
    assert (
        len(list(network(attacked).triggered_rows(attacked.KeptRows.read(path), table, lambda _mine: ["cells"]))) == 1
    )
    assert len(list(lost.triggered_rows(attacked.KeptRows.read(path), table, refuse))) == 1


def test_clean_networks_are_found_by_their_place(attacked: ModuleType) -> None:
    clean = network(attacked, attack=None)
    assert attacked.clean_networks([network(attacked), clean]) == {("cifar10", 1): clean}
