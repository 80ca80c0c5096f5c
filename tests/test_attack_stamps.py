"""What `benchmarks/attacks/stamps.py` counts."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest


@pytest.fixture
def stamps(benchmark_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports its neighbour by name, as it does when it is run."""
    monkeypatch.setitem(sys.modules, "margins", benchmark_script("attacks/margins.py"))
    return benchmark_script("attacks/stamps.py")


def test_changes_are_counted_by_image_pixel_and_channel(stamps: ModuleType) -> None:
    """Of two 2x2 images the second has a pixel with two channels changed, one of them to white: 100 and 55 codes."""
    plain = np.full((2, 3, 2, 2), 200 / 255, dtype=np.float32)
    stamped = plain.copy()
    stamped[1, 0, 0, 0], stamped[1, 1, 0, 0] = 100 / 255, 1
    change = stamps.change_of(plain, stamped)
    assert (change.images, change.pixels, change.at_the_end, change.highest) == (0.5, 1 / 8, 0.5, 100)
    assert change.mean == pytest.approx(155 / 24)
    assert stamps.change_of(plain, plain).at_the_end == 0


@pytest.mark.parametrize(
    ("settings", "poisons", "expected"),
    [
        ({"target_class": 1}, (4, 5), "6 | 2 | 3"),
        ({"host.target_class": 0, "smoothing": 0.4}, (4,), "6 | 1 | 2"),
        ({"target_class": 1, "mode": "all-to-all"}, (4,), "6 | 1 | "),
        ({"target_class": 1, "poison_rate": 0.1}, (), "6 | 0.1 of each batch | 3"),
    ],
)
def test_poisons_stand_beside_what_is_truly_of_the_target_class(
    stamps: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    poisons: tuple[int, ...],
    expected: str,
) -> None:
    class Images(list[int]):
        labels = np.array([0, 0, 1, 1, 1, 2])

    monkeypatch.setattr(stamps, "training_images", lambda _data: Images([0] * 6))
    record = SimpleNamespace(network=SimpleNamespace(attack_settings=settings, data="signs"), artifact_sha256="a")
    store = SimpleNamespace(truth=lambda _sha: SimpleNamespace(poison_indices=poisons))
    network = SimpleNamespace(files={"fp32": record}, store=store)
    assert stamps.poison_cells(network) == expected
