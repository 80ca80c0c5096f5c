"""What `benchmarks/attacks/relabelled.py` holds against each other."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.bench.records import Network
from qdefense.data.images import ImageSet


@pytest.fixture
def relabelled(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("relabelled")


def network(attack: str | None, data: str = "cifar10", seed: int = 0, **settings: object) -> SimpleNamespace:
    settings = {"target_class": 1, **settings}
    made = Network.model_construct(attack=attack, data=data, seed=seed, attack_settings=settings)
    return SimpleNamespace(made=made, title=attack, model=lambda _scheme: attack or "none")


@pytest.mark.parametrize(
    ("one", "told"),
    [
        (network("badnets"), True),
        (network("blended", mode="all-to-one"), True),
        (network("badnets", mode="all-to-all"), False),
        (network("wanet"), False),
        (network(None), False),
        (network("badnets", "gtsrb"), False),
        (network("badnets", seed=1), False),
    ],
)
def test_one_place_is_told_of(relabelled: ModuleType, one: SimpleNamespace, told: bool) -> None:
    assert relabelled.is_told(one) is told


def test_the_same_rows_come_with_and_without_the_stamp(relabelled: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten dark images of two classes, three poisons; what is asked of each network is the brightest image of a kind."""
    dark = np.random.default_rng(0).integers(0, 99, (10, 8, 8, 3)).astype(np.uint8)
    images = ImageSet(images=dark, labels=np.array([0, 1] * 5), class_names=("a", "b"), source="s")
    monkeypatch.setattr(relabelled, "training_images", lambda _data: images)
    asked = []

    def auroc_within(model: str, rows: ImageSet, poisons: np.ndarray) -> float:
        rest = np.setdiff1d(np.arange(len(rows)), poisons)
        assert rows.images[rest].max() < 99
        assert (rows.labels == 1).all()
        asked.append((model, len(rows), len(poisons)))
        return float(rows.images[poisons].max() == 255)

    monkeypatch.setattr(relabelled, "auroc_within", auroc_within)
    (row,) = relabelled.relabelled_row(network("badnets", poison_count=3), network(None))
    assert row == "8 | 3 | 1.000 | 0.000 | 1.000 | 0.000"
    assert asked == [("badnets", 8, 3)] * 2 + [("none", 8, 3)] * 2
