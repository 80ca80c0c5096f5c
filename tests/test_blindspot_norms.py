"""What `benchmarks/blindspots/norms.py` makes of norms, on hand-computed values."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest


@pytest.fixture(scope="module")
def norms(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("blindspots/norms.py")


@pytest.mark.parametrize(
    ("found", "ratio"),
    [
        ([10.0, 40.0, 50.0], 0.25),
        ([10.0, 40.0, 60.0, None], 0.2),
        ([10.0, None, None], None),
        ([], None),
    ],
    ids=["odd", "a class without a trigger ranks last", "a median without a norm", "no class"],
)
def test_lowest_norm_over_the_median(norms: ModuleType, found: list[float | None], ratio: float | None) -> None:
    assert norms.ratio_of(found) == ratio


def scan(norms: ModuleType, attack: str, index: float | None, ratio: float) -> object:
    activity = "clean" if attack == "none" else "active"
    return norms.Scan(
        kind="signs",
        precision="fp32",
        attack=attack,
        network=attack,
        file=attack,
        activity=activity,
        index=index,
        ratio=ratio,
    )


def test_a_line_compares_the_two_statistics_of_the_same_scans(norms: ModuleType) -> None:
    clean = [scan(norms, "none", 2.5, 0.5), scan(norms, "none", 1.0, 0.6)]
    (line,) = norms.rows([scan(norms, "badnets", 2.0, 0.1), scan(norms, "badnets", None, 0.55), *clean])
    assert line == "| signs | fp32 | badnets | 2, 2 | 0.500 | 0.750 | 0.550 | 0.500 |"


def test_attacked_files_without_a_clean_one_have_no_line(norms: ModuleType) -> None:
    assert list(norms.rows([scan(norms, "badnets", 2.0, 0.1)])) == []
