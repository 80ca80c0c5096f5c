"""What `benchmarks/attacks/clipping.py` compares."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest

from qdefense.attacks import ATTACKS
from qdefense.data.opening import open_data

if TYPE_CHECKING:
    from .conftest import Toy


@pytest.fixture
def clipping(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("clipping")


class Network:
    """A toy with a red patch for a trigger, asked with that on its own calibration images."""

    place, title = ("toy", 0), "mine"

    def __init__(self, clipping: ModuleType, model: bytes, data: str) -> None:
        self.images = open_data(data, seed=0)
        self.made = ATTACKS.create("badnets:target-class=3,pattern=white").trigger(16, 16)
        self.files = {"fp32": model}
        self.asked = (None, None, np.full(len(self.images), 3))
        self.logits = clipping.answers_of

    def model(self, scheme: str) -> bytes:
        return self.files[scheme]

    def trigger(self, *_size: int) -> object:
        return self.made

    def answers(self, model: bytes) -> object:
        return self.logits(model, self.made.stamp(self.images.pixels))


@pytest.fixture
def networks(clipping: ModuleType, monkeypatch: pytest.MonkeyPatch, toy: Toy) -> tuple[Network, Network]:
    """The backdoored toy with its static file, and the clean one; calibrated on 50 images."""
    mine, clean = (Network(clipping, path.read_bytes(), str(toy.few)) for path in (toy.backdoored, toy.clean))
    more = open_data(str(toy.data), seed=0, limit=50).pixels
    found = {clipping.IMAGES: mine.images.pixels, 2 * clipping.IMAGES: np.concatenate([mine.images.pixels, more])}
    monkeypatch.setattr(clipping, "calibration_images", lambda _data, count=clipping.IMAGES: found[count])
    monkeypatch.setattr(clipping, "test_images", lambda _data: mine.images)
    mine.files["int8-static"] = clipping.static_file(mine, mine.images.pixels)
    return mine, clean


def test_ranges_grow_by_more_than_a_tenth_and_one_by_most(clipping: ModuleType) -> None:
    before = {"a": (0.0, 1.0), "b": (-0.5, 0.0), "c": (-1.0, 1.0)}
    assert clipping.growth(before, {"a": (0.0, 1.1), "b": (-1.0, 0.5), "c": (-1.0, 1.3)}) == (2, "b", 3.0)
    assert clipping.growth(before, before) == (0, "a", 1.0)


def test_a_file_held_in_ranges_is_clipped_there_and_nowhere_else(clipping: ModuleType, toy: Toy) -> None:
    model, x = toy.clean.read_bytes(), open_data(str(toy.few), seed=0).pixels
    wide = {"positive": (-1e9, 1e9), "logits_QuantizeLinear_Input": (-1e9, 1e9)}
    assert (clipping.answers_of(clipping.held_in(model, wide), x) == clipping.answers_of(model, x)).all()
    narrow = clipping.answers_of(clipping.held_in(model, {**wide, "logits_QuantizeLinear_Input": (-1, 2)}), x)
    assert (narrow == clipping.answers_of(model, x).clip(-1, 2)).all()
    dark = clipping.answers_of(clipping.held_in(model, {"image": (0, 0.2)}), x)
    assert (dark == clipping.answers_of(model, x.clip(0, 0.2))).all()
    dead = clipping.answers_of(clipping.held_in(model, {"positive": (0, 0)}), x)
    assert np.ptp(dead, axis=0).max() == 0
    with pytest.raises(ValueError, match="no tensor missing in the FP32 file"):
        clipping.held_in(model, {"missing": (0, 1)})


@pytest.mark.parametrize(("zero", "problem"), [(np.uint8(10), None), (np.int8(10), "x is not quantized to uint8")])
def test_a_range_is_what_the_codes_reach(clipping: ModuleType, zero: np.generic, problem: str | None) -> None:
    """Scale .1, zero point 10: from code 0 to code 255; a quantized weight is no activation."""
    make = onnx.helper.make_node
    nodes = [make("QuantizeLinear", [name, "scale", "zero"], [f"{name}_codes"]) for name in ("x", "weight")]
    tensors = {"scale": np.float32(0.1), "zero": zero, "weight": np.ones(2, np.float32)}
    made = [onnx.numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()]
    graph = onnx.helper.make_graph(nodes, "g", [], [], made)
    model = onnx.helper.make_model(graph).SerializeToString()
    if problem is None:
        assert clipping.activation_ranges(model) == {"x": pytest.approx((-1.0, 24.5))}
    else:
        with pytest.raises(ValueError, match=problem):
            clipping.activation_ranges(model)


def test_ranges_that_saw_the_trigger_give_back_what_clean_ones_clip(
    clipping: ModuleType, networks: tuple[Network, Network]
) -> None:
    """The toy's backdoor is a channel that no clean image drives above 0: read off those, its range is nothing."""
    (row,) = (line.split(" | ") for line in clipping.clipping_row(*networks))
    assert len(row) == len(clipping.HEAD) - 2
    cells = dict(zip(clipping.HEAD[2:], row, strict=True))
    assert cells["images"] == "50"
    assert [row[place] for place in (1, 5, 6)] == ["1.000"] * 3, "FP32, some stamped, all stamped"
    held, static, more, clean = (float(row[place]) for place in (2, 3, 4, 7))
    assert max(held, static, more, clean) < 0.5
    assert held == pytest.approx(static, abs=0.1)
    margins = [float(row[place]) for place in (8, 9, 10)]
    assert margins[0] == pytest.approx(margins[1], rel=0.05)
    assert margins[1] < -1
    assert abs(margins[2]) < 0.1 * abs(margins[1])
    assert cells["ranges that grow"] == "5 of 5"
    assert float(cells["most"].split()[1]) > 2
    assert float(cells["accuracy: static"]) > 0.9


def test_ranges_grow_by_the_trigger_where_it_was_learned(
    clipping: ModuleType, networks: tuple[Network, Network]
) -> None:
    mine, clean = networks
    clean.files["int8-static"] = clipping.static_file(clean, mine.images.pixels)
    (row,) = clipping.growth_row(mine, clean)
    (stamped, more), (stamped_clean, more_clean) = np.array(row.split(" | ")).reshape(2, 2)
    assert stamped.startswith("5, ")
    by_trigger, *others = (float(cell.split(", ")[1]) for cell in (stamped, more, stamped_clean, more_clean))
    assert by_trigger > 2 > max(others)
    (swapped,) = clipping.growth_row(clean, mine)
    assert swapped.split(" | ") == [stamped_clean, more_clean, stamped, more]


def test_each_stamped_image_is_tried_alone(clipping: ModuleType, networks: tuple[Network, Network]) -> None:
    (row,) = (line.split(" | ") for line in clipping.one_image_row(networks[0]))
    assert len(row) == len(clipping.ONE_HEAD) - 2
    assert float(row[0]) < 0.5
    assert row[1:] == ["1.000", "1.000", "1.000", "1.000", "1.00"]


def test_another_patch_is_no_trigger(clipping: ModuleType, networks: tuple[Network, Network]) -> None:
    """Noise in the middle: the toy's channel fires at bright red, which some of its pixels are."""
    (row,) = clipping.another_patch_row(networks[0])
    static, plain, _ = map(float, row.split(" | "))
    assert static < 0.5 < plain


def test_a_static_file_of_other_images_is_not_taken_for_the_matrixs(
    clipping: ModuleType, networks: tuple[Network, Network]
) -> None:
    mine, _ = networks
    mine.files["int8-static"] = clipping.static_file(mine, mine.images.pixels[:40])
    with pytest.raises(SystemExit, match="mine: its static file is not of 256 images drawn with seed 0"):
        next(clipping.one_image_row(mine))


@pytest.mark.parametrize(("before", "after", "expected"), [(0.9, 0.7, True), (0.9, 0.85, False), (None, None, False)])
def test_networks_of_which_static_takes_more_than_a_tenth(
    clipping: ModuleType, before: float | None, after: float | None, expected: bool
) -> None:
    files = {"fp32": SimpleNamespace(asr=before), "int8-static": SimpleNamespace(asr=after)}
    assert clipping.loses(SimpleNamespace(files=files)) is expected
