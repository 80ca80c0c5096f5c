"""What `benchmarks/attacks/clipping.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from qdefense.attacks import ATTACKS
from qdefense.data.opening import open_data

if TYPE_CHECKING:
    from .conftest import Toy


@pytest.fixture
def clipping(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("clipping")


def test_ranges_grow_by_more_than_a_tenth_and_one_by_most(clipping: ModuleType) -> None:
    before = {"a": 1.0, "b": 0.5, "c": 2.0}
    assert clipping.growth(before, {"a": 1.1, "b": 1.5, "c": 2.3}) == (2, "b", 3.0)
    assert clipping.growth(before, before) == (0, "a", 1.0)


def test_ranges_that_have_seen_a_trigger_give_back_what_clean_ones_clip(
    clipping: ModuleType, attack_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, toy: Toy
) -> None:
    """The toy's backdoor is a channel that no clean image drives above 0: read off those, its range is nothing."""
    images = open_data(str(toy.few), seed=0).pixels
    monkeypatch.setattr(clipping, "calibration_images", lambda _data: images)
    trigger = ATTACKS.create("badnets:target-class=3,pattern=white").trigger(16, 16)
    model = toy.backdoored.read_bytes()
    files = {"fp32": model}
    network = SimpleNamespace(
        title="mine",
        place=("toy", 0),
        model=files.__getitem__,
        trigger=lambda *_size: trigger,
        asked=(None, None, [3] * len(images)),
        answers=lambda file: attack_script("margins").answers_of(file, trigger.stamp(images)),
    )
    files["int8-static"] = clipping.static_file(network, images)
    ((count, plain, static, one, _, every, *_, ranges, most),) = (row.split(" | ") for row in clipping.row(network))
    assert count == "50"
    assert (plain, one, every) == ("1.000", "1.000", "1.000")
    assert float(static) < 0.5
    assert ranges == "5 of 5"
    assert float(most.split()[1]) > 2

    files["int8-static"] = clipping.static_file(network, images[:40])
    with pytest.raises(SystemExit, match="mine: its static file is not of 256 images drawn with seed 0"):
        next(clipping.row(network))
