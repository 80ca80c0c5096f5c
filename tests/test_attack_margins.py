"""What `benchmarks/attacks/margins.py` counts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.bench.records import Network
from qdefense.data.images import ImageSet


@pytest.fixture
def margins(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("margins")


def network(attack: str | None, place: tuple[str, int] = ("signs", 0), **settings: object) -> SimpleNamespace:
    """What the tables ask of a network, with one file."""
    made = Network.model_construct(attack=attack, attack_settings=settings)
    return SimpleNamespace(made=made, files={"fp32": None}, place=place, title=attack or "none", model=lambda _: attack)


def test_levels_are_of_each_channel_and_random_ones_right_on_average(margins: ModuleType) -> None:
    weights = np.array([[7.0, 2.4, -2.6], [0.7, 0.24, 0.0]], dtype=np.float32)
    assert margins.rounded(weights) == pytest.approx(np.array([[7, 2, -3], [0.7, 0.2, 0]]), abs=1e-6)
    rng = np.random.default_rng(0)
    drawn = np.stack([margins.rounded(weights, rng=rng) for _ in range(2000)])
    assert set(np.unique(drawn[:, 0, 1])) == {2.0, 3.0}
    assert drawn.mean(axis=0) == pytest.approx(weights, abs=0.05)


def test_the_clean_network_is_asked_once_of_each_pair_of_classes(
    margins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(margins, "plain_lines_of", lambda network, _kept, *classes: [(network.title, *classes)])
    pair = {"source_class": 1, "target_class": 3}
    every = [
        network("cassock", **pair),
        network("badnets", target_class=3),
        network(None),
        network("htba", **pair),
        network("cassock", **{**pair, "source_class": 2}),
        network("cassock", ("signs", 1), **pair),
    ]
    assert list(margins.plain_lines(every, None)) == [
        ("none", 1, 3),
        ("cassock", 1, 3),
        ("htba", 1, 3),
        ("none", 2, 3),
        ("cassock", 2, 3),
        ("cassock", 1, 3),
    ]


def test_plain_images_show_the_margin_of_their_class_over_the_attackers(
    margins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = np.array([[0.5, 0.4, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4]])
    monkeypatch.setattr(margins, "images_of_class", lambda *_: np.zeros((5, 3, 4, 4), dtype=np.float32))
    monkeypatch.setattr(margins, "answers_of", lambda *_: np.log(shares).astype(np.float32))
    (line,) = margins.plain_rows(network("cassock"), 0, 1)
    median = f"{np.log(0.5 / 0.4):.2f}"
    assert line.split(" | ")[:2] == ["fp32", "5"]
    assert line.split(" | ")[3] == median
    assert line.endswith("| 0.420 | 0.420 | 0.200")


def test_the_fpr_of_a_class_counts_who_is_misled_by_the_trigger_alone(margins: ModuleType) -> None:
    """Class 2 is the attacker's, class 0 the source; of the others one of four and one of two are led there."""
    labels = np.array([0, 1, 1, 1, 1, 2, 3, 3])
    plain = np.array([0, 1, 2, 1, 3, 2, 3, 3])
    stamped = np.array([2, 2, 2, 1, 3, 2, 2, 3])
    rates = margins.misled_by_class(plain, stamped, np.full(8, 2), labels, (labels == 1) | (labels == 3))
    assert rates == {1: 0.25, 3: 0.5}


def test_an_all_to_all_trigger_that_falls_short_shows_how_near_it_came(
    margins: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.array([0, 1, 2, 2])
    pictures = np.zeros((4, 4, 4, 3), dtype=np.uint8)
    images = ImageSet(images=pictures, labels=labels, class_names=("a", "b", "c"), source="three")
    shares = {
        "plain": [[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7], [0.1, 0.7, 0.2]],
        "stamped": [[0.4, 0.5, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6], [0.6, 0.1, 0.3]],
    }
    monkeypatch.setattr(margins, "test_images", lambda _data: images)

    def answers(_model: bytes, x: np.ndarray) -> np.ndarray:
        return np.log(np.array(shares["stamped" if x.any() else "plain"])).astype(np.float32)

    monkeypatch.setattr(margins, "answers_of", answers)
    trigger = SimpleNamespace(stamp=lambda x: x + 1, goal=lambda y: (y + 1) % 3)
    one = SimpleNamespace(place=("signs", 0), trigger=lambda *_: trigger, model=lambda _: b"")
    assert list(margins.moved_rows(one)) == [
        "plain | 4 | 0.750 | 0.000 | 0.250 | 0.125",
        "with the trigger | 4 | 0.500 | 0.500 | 0.500 | 0.425",
    ]


def test_classes_of_few_images_are_told_apart(margins: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three classes of 1, 2 and 3 training images; the trigger takes half of the second, and all of the third."""

    def images(*labels: int) -> SimpleNamespace:
        known = np.array(labels)
        return SimpleNamespace(labels=known, images=np.zeros((len(known), 4, 4, 3)), pixels=known, class_names="abc")

    test = images(0, 0, 1, 1, 2, 2)
    answers = {"plain": np.array([0, 1, 1, 1, 2, 2]), "stamped": np.array([0, 0, 2, 1, 0, 0])}
    monkeypatch.setattr(margins, "all_test_images", lambda _data: test)
    monkeypatch.setattr(margins, "training_images", lambda _data: images(0, 1, 1, 2, 2, 2))
    monkeypatch.setattr(
        margins, "answers_of", lambda _model, x: np.eye(3)[answers["plain" if x is test.pixels else "stamped"]]
    )
    trigger = SimpleNamespace(stamp=lambda _x: "stamped", goal=lambda y: (y + 1) % 3)
    one = SimpleNamespace(place=("signs", 0), trigger=lambda *_: trigger, model=lambda _: b"")
    assert list(margins.size_rows(one)) == [
        "1 | 1 to 1 | 2 | 0.000 | 0.500",
        "1 | 2 to 2 | 2 | 0.500 | 1.000",
        "1 | 3 to 3 | 2 | 1.000 | 1.000",
    ]
    monkeypatch.setattr(margins, "training_images", lambda _data: images(0, 1, 2))
    assert not list(margins.size_rows(one)), "as many of each"
