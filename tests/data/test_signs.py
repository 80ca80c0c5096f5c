from __future__ import annotations

import hashlib

import numpy as np
import pytest
from sklearn.linear_model import RidgeClassifier

from qdefense.data.images import DataError, ImageSet
from qdefense.data.opening import open_data
from qdefense.data.signs import CLASS_NAMES, SPLIT_SIZES, draw_signs

GOLDEN = "b6cc5a6b09bf09b22f4c5c4b30f357f186d4ac1b8ad102381b069fd5ebcbcb36"


@pytest.fixture(scope="module")
def train() -> ImageSet:
    return open_data("signs", split="train")


@pytest.fixture(scope="module")
def held_out() -> ImageSet:
    return open_data("signs")


def test_draw_signs_gives_the_same_bytes_on_every_machine() -> None:
    drawn = draw_signs(24, seed=0, split="test")
    assert hashlib.sha256(drawn.images.tobytes()).hexdigest() == GOLDEN


def test_draw_signs_begins_alike_when_more_are_drawn() -> None:
    few, many = draw_signs(20, seed=4, split="train"), draw_signs(40, seed=4, split="train")
    np.testing.assert_array_equal(few.images, many.images[:20])
    np.testing.assert_array_equal(few.labels, many.labels[:20])


def test_draw_signs_gives_another_set_when_the_seed_differs() -> None:
    assert draw_signs(12, seed=0, split="test").digest != draw_signs(12, seed=1, split="test").digest


@pytest.mark.parametrize("count", [0, -3])
def test_draw_signs_raises_when_count_is_not_positive(count: int) -> None:
    with pytest.raises(DataError, match=rf"^signs: count is {count}: ask for at least one image$"):
        draw_signs(count, seed=0, split="test")


def test_draw_signs_lists_the_splits_when_the_split_is_missing() -> None:
    with pytest.raises(DataError, match=r"^signs: no split 'valid'; it has 'test', 'train'$"):
        draw_signs(1, seed=0, split="valid")


def test_open_data_gives_the_whole_split_when_asked_for_signs(train: ImageSet, held_out: ImageSet) -> None:
    assert (train.source, held_out.source) == ("signs train", "signs test")
    assert (train.detection, train.notes, train.groups) == ("signs: the built-in set", (), None)
    assert {"train": len(train), "test": len(held_out)} == SPLIT_SIZES
    assert held_out.images.shape[1:] == (32, 32, 3)
    assert len(held_out.class_names) == len(set(CLASS_NAMES)) == 12


def test_open_data_gives_rows_of_the_same_set_when_signs_are_limited(held_out: ImageSet) -> None:
    some = open_data("signs", limit=30, seed=7)
    chosen = held_out.take(np.random.default_rng(7).permutation(2000)[:30])
    assert some.digest == chosen.digest


def test_open_data_lists_the_splits_when_signs_have_no_such() -> None:
    with pytest.raises(DataError, match=r"^signs: no split 'valid'; it has 'test', 'train'$"):
        open_data("signs", split="valid")


def test_signs_are_balanced_and_shuffled(train: ImageSet, held_out: ImageSet) -> None:
    for drawn in (train, held_out, draw_signs(31, seed=2, split="train")):
        counts = np.bincount(drawn.labels, minlength=12)
        assert counts.max() - counts.min() <= 1
    assert len({tuple(block) for block in train.labels.reshape(-1, 12).tolist()}) > 490


def test_signs_share_no_image_between_splits(train: ImageSet, held_out: ImageSet) -> None:
    seen = [image.tobytes() for drawn in (train, held_out) for image in drawn.images]
    assert len(set(seen)) == len(seen)


def test_signs_are_beyond_a_linear_model_and_above_chance(train: ImageSet, held_out: ImageSet) -> None:
    def flat(drawn: ImageSet) -> np.ndarray:
        # Every second pixel: a quarter of the columns for .60 instead of .61, and much faster.
        return (drawn.images[:, ::2, ::2].reshape(len(drawn), -1) / np.float32(255)).astype(np.float32)

    accuracy = RidgeClassifier(alpha=100).fit(flat(train), train.labels).score(flat(held_out), held_out.labels)
    assert 0.4 < accuracy < 0.75
