"""Whose residual `benchmarks/attacks/residuals.py` puts on an image."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def residuals(benchmark_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports its neighbours by name, as it does when it is run."""
    for name in ("margins", "stronger"):
        monkeypatch.setitem(sys.modules, name, benchmark_script(f"attacks/{name}.py"))
    return benchmark_script("attacks/residuals.py")


def test_each_image_gets_the_residual_of_another_and_none_is_lost(residuals: ModuleType) -> None:
    x = np.full((9, 3, 2, 2), 0.5, dtype=np.float32)
    own = np.arange(9, dtype=np.float32).reshape(9, 1, 1, 1) / 64
    found = residuals.swapped(x, x + own, np.random.default_rng(0))
    given = np.rint(found[:, 0, 0, 0] * 64).astype(int)
    assert sorted(given) == list(range(9))
    assert (given != np.arange(9)).all()


def test_networks_without_their_state_and_of_other_attacks_are_left_out(residuals: ModuleType) -> None:
    def network(attack: str | None, *, lacks: bool) -> SimpleNamespace:
        made = SimpleNamespace(network=SimpleNamespace(attack=attack, attack_settings={"variant": "encoder"}))
        return SimpleNamespace(files={"fp32": made}, lacks_trigger=lacks)

    mine = network("dfb", lacks=False)
    every = [network(None, lacks=False), network("badnets", lacks=False), network("dfb", lacks=True), mine]
    (found,) = residuals.at_hand(every)
    assert found.network is mine
    assert found.own
