"""What `benchmarks/attacks/stamps.py` counts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.attacks import ATTACKS
from qdefense.bench.records import Network
from qdefense.data.images import ImageSet
from qdefense.registry import flat_settings


@pytest.fixture
def stamps(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("stamps")


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
    ("spec", "poisons", "expected"),
    [
        ("badnets:target-class=1", (4, 5), "6 | 2 | 3 | "),
        ("badnets:target-class=1,poison-rate=0", (), "6 | 0 | 3 | "),
        ("badnets:target-class=1,mode=all-to-all", (4,), "6 | 1 |  | "),
        ("lsp:host=badnets,host.target-class=0,smoothing=0.4", (4,), "6 | 1 | 2 | "),
        ("cassock:target-class=1,source-class=2", (4,), "6 | 1 | 3 | 1"),
        ("wanet:target-class=1", (), "6 | in each batch | 3 | "),
    ],
)
def test_poisons_stand_beside_what_is_truly_of_the_classes(
    stamps: ModuleType, monkeypatch: pytest.MonkeyPatch, spec: str, poisons: tuple[int, ...], expected: str
) -> None:
    class Images(list[int]):
        labels = np.array([0, 0, 1, 1, 1, 2])

    monkeypatch.setattr(stamps, "training_images", lambda _data: Images([0] * 6))
    attack = ATTACKS.create(spec)
    made = Network.model_construct(attack=attack.name, attack_settings=flat_settings(attack), data="signs")
    store = SimpleNamespace(truth=lambda _sha: SimpleNamespace(poison_indices=poisons))
    network = SimpleNamespace(files={"fp32": SimpleNamespace(network=made, artifact_sha256="a")}, store=store)
    assert stamps.poison_cells(network) == expected


def test_only_eligible_images_are_stamped(stamps: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three the target's own is not; the patch is 9 of 64 pixels, each channel 155 codes up to white."""
    images = ImageSet(
        images=np.full((3, 8, 8, 3), 100, dtype=np.uint8),
        labels=np.array([0, 1, 2]),
        class_names=("a", "b", "c"),
        source="s",
    )
    monkeypatch.setattr(stamps, "test_images", lambda _data: images)
    monkeypatch.setattr(stamps, "poison_cells", lambda _network: "cells")
    trigger = ATTACKS.create("badnets:target-class=1,pattern=white").trigger(8, 8)
    network = SimpleNamespace(place=("signs", 0), trigger=lambda *_: trigger)
    assert list(stamps.stamp_row(network)) == ["cells | 1.000 | 0.141 | 1.000 | 155 | 21.80"]
