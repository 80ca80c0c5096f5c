"""Test images that networks are trained on are refused before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qdefense.bench.cells import plan_cells
from qdefense.bench.matrix import MatrixError, read_matrix
from qdefense.bench.running import sources_of
from qdefense.bench.store import Store
from qdefense.data.images import ImageSet
from qdefense.data.npz import SPLIT_KEYS, save_npz

from ..defenses.filters.corner_nets import images  # noqa: TID252 (images in closed form)
from .conftest import TINY, Desk

NewDesk = Callable[..., Desk]
REMEDY = "name two splits with train_split and test_split, or divide the images into folders train and test"


@pytest.fixture(autouse=True)
def _paths_are_relative_to_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("QDEFENSE_DATA", raising=False)


def text_of(*limits: str) -> str:
    text = TINY.replace('path = "signs"', 'path = "given.npz"').replace("target_class = 7", "target_class = 2")
    return text.replace("train_limit = 128\ntest_limit = 60", "\n".join(limits))


def plan(made: Desk, *, pin: bool = True) -> list[str]:
    """What is told."""
    table, told = read_matrix(made.matrix), list[str]()
    with Store.for_writing(made.results) as store:
        plan_cells(table, sources_of(table, store, pin=pin, on_notice=told.append))
    return told


def save(path: Path, **sets: ImageSet) -> None:
    arrays = {}
    for name, one in sets.items():
        arrays |= dict(zip(SPLIT_KEYS[name], (one.images, one.labels), strict=True))
    np.savez(path, allow_pickle=False, **arrays)


@pytest.mark.parametrize("limits", [(), ("train_limit = 80", "test_limit = 40")])
def test_data_without_splits_are_no_test_of_themselves(new_desk: NewDesk, limits: tuple[str, ...]) -> None:
    """Without limits both sets are one, with them both are drawn from one: some test images were trained on."""
    made = new_desk(text_of(*limits))
    save_npz(made.folder / "given.npz", images(100))
    for _ in range(2):  # what the first run pinned makes the second one no milder
        with pytest.raises(MatrixError, match=r"^data\.signs: ") as caught:
            plan(made)
        assert REMEDY in str(caught.value)


def test_a_training_set_that_holds_the_test_set_is_refused(new_desk: NewDesk) -> None:
    """In another order, with other labels, among others."""
    train, made = images(100), new_desk(text_of())
    rows = np.array([70, 3, 20, 40], dtype=np.int64)
    save(made.folder / "given.npz", train=train, test=images(100).take(rows))
    for _ in range(2):
        with pytest.raises(MatrixError, match=r"^data\.signs: every test image is among the training images; name two"):
            plan(made)


def test_one_image_that_was_not_trained_on_is_enough(new_desk: NewDesk) -> None:
    """Sets in use share a few images; how many are too many is not for the bench to say."""
    made, whole = new_desk(text_of()), images(101)
    save(made.folder / "given.npz", train=whole.take(np.arange(100)), test=whole.take(np.arange(90, 101)))
    share = ["data.signs: 90.91% of the test images are among the training images, too"]
    assert plan(made, pin=False) == share
    assert plan(made) == share
    (made.folder / "given.npz").unlink()
    assert plan(made) == []  # known from the manifest alone


def test_nothing_is_told_of_sets_that_share_no_image(new_desk: NewDesk) -> None:
    made, whole = new_desk(text_of()), images(101)
    save(made.folder / "given.npz", train=whole.take(np.arange(80)), test=whole.take(np.arange(80, 101)))
    assert plan(made) == []
