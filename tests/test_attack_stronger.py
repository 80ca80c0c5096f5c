"""Where `benchmarks/attacks/stronger.py` puts a patch, and what it counts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import trigger_of


@pytest.fixture
def stronger(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("stronger")


def test_the_patch_put_where_it_was_planted_is_the_trigger(stronger: ModuleType) -> None:
    trigger = trigger_of(ATTACKS.create("badnets"), 12, 16, None)
    network = SimpleNamespace(trigger=lambda _height, _width: trigger)
    patch, planted = stronger.patch_of(network, 12, 16)
    pixels = np.random.default_rng(0).uniform(0, 0.4, (5, 3, 12, 16)).astype(np.float32)
    kept = pixels.copy()
    assert (stronger.put(pixels, patch, (planted,)) == trigger.stamp(pixels)).all()
    assert (pixels == kept).all()


def test_a_mirrored_patch_is_where_training_on_mirrored_images_saw_it(stronger: ModuleType) -> None:
    found = stronger.places((28, 27), (32, 32), (3, 3))
    canvas, patch = np.zeros((1, 1, 32, 32), dtype=np.float32), np.ones((1, 3, 3), dtype=np.float32)
    planted, mirrored = (stronger.put(canvas, patch, found[name]) for name in ("planted", "mirrored"))
    assert (mirrored == planted[..., ::-1]).all()
    above = stronger.put(canvas, patch, found["planted and above"]) - planted
    assert (above == planted[:, :, ::-1]).all()
    assert found["middle"] == ((14, 14),)
    corners = stronger.put(canvas, patch, found["four corners"])
    assert (corners == corners[..., ::-1]).all()
    assert (corners == corners[:, :, ::-1]).all()


def test_a_row_stands_for_each_file_that_there_is(stronger: ModuleType) -> None:
    class Stamps:
        def line(self, title: str, scheme: str, model: bytes) -> str:
            return f"{title} | {scheme} | {model.decode()}"

    def network(attack: str | None, *schemes: str) -> SimpleNamespace:
        made = SimpleNamespace(attack=attack, data="signs")
        files = dict.fromkeys(schemes)
        return SimpleNamespace(
            made=made, files=files, title=f"{attack} | signs, 0", model=lambda scheme: scheme.encode()
        )

    attacked = network("sig", "int4", "int8-static", "fp32")
    assert [*stronger.lines(Stamps(), attacked)] == [
        f"sig | signs, 0 | {one} | {one}" for one in ("fp32", "int8-static")
    ]
    assert [*stronger.lines(Stamps(), network(None, "fp32"))] == ["none (the control) | signs, 0 | fp32 | fp32"]
