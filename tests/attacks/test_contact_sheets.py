from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qdefense.attacks.badnets import BadNets
from qdefense.attacks.contact_sheets import (
    PoisonBlock,
    _caption,
    amplification,
    contact_sheet,
    lay_out,
    poison_block,
    residual,
)
from qdefense.attacks.interfaces import PoisonedSet
from qdefense.data.images import DataError, Images, ImageSet, to_images

MakeNoise = Callable[..., ImageSet]


def _flat(*codes: int, side: int = 76) -> Images:
    return np.stack([np.full((side, side, 3), code, np.uint8) for code in codes])


def _read(png: bytes) -> Images:
    with Image.open(io.BytesIO(png)) as picture:
        picture.load()
        assert (picture.format, picture.mode, picture.info) == ("PNG", "RGB", {})
        return np.asarray(picture)


def test_residual_is_about_mid_grey_amplified_and_clipped() -> None:
    found = residual(_flat(100, 100, 100, 0, 255), _flat(100, 103, 90, 255, 0), 4)
    assert found[:, 0, 0, 0].tolist() == [128, 140, 88, 255, 0]
    assert found.dtype == np.uint8


@pytest.mark.parametrize(("change", "factor"), [(0, 1), (1, 16), (7, 16), (8, 15), (51, 2), (63, 2), (64, 1), (255, 1)])
def test_amplification_is_the_largest_that_clips_nothing_where_there_is_one(change: int, factor: int) -> None:
    assert amplification(_flat(0, 0), _flat(0, change)) == factor
    assert amplification(_flat(0, change), _flat(0, 0)) == factor


def test_lay_out_has_a_row_of_three_for_each_image() -> None:
    """Cells of 76 pixels with 8 between them, below a heading."""
    sheet = _read(lay_out(_flat(10, 200), _flat(30, 190)))
    assert sheet.shape == (16 + 2 * 84 + 8, 3 * 84 + 8, 3)
    for row, codes in enumerate([(10, 30, 128 + 6 * 20), (200, 190, 128 - 6 * 10)]):
        for column, code in enumerate(codes):
            top, left = 20 + row * 84, 8 + column * 84
            assert (sheet[top : top + 76, left : left + 76] == code).all()
            assert (sheet[top : top + 76, left + 76 : left + 84] == 255).all()
    assert (sheet[:16] < 255).any(), "the heading"


def test_lay_out_states_the_factor() -> None:
    """Sheets of equal images whose residuals look alike differ in their heading alone."""
    by_one, by_two = (_read(lay_out(_flat(0), _flat(change))) for change in (64, 63))
    assert (by_one[:16, : 8 + 2 * 84] == by_two[:16, : 8 + 2 * 84]).all()
    assert (by_one[:16, 8 + 2 * 84 :] != by_two[:16, 8 + 2 * 84 :]).any()


@pytest.mark.parametrize(("side", "times"), [(75, 2), (76, 1), (32, 3), (224, 1)])
def test_lay_out_enlarges_small_images_pixel_by_pixel(side: int, times: int) -> None:
    clean = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), dtype=np.uint8)
    sheet = _read(lay_out(clean, clean))
    cell = sheet[20 : 20 + side * times, 8 : 8 + side * times]
    assert (cell == clean[0].repeat(times, axis=0).repeat(times, axis=1)).all()


def test_equal_arrays_give_equal_bytes(make_noise: MakeNoise) -> None:
    trigger = BadNets(target_class=2).trigger(8, 8)
    first, same = (contact_sheet(trigger, make_noise(40)) for _ in range(2))
    assert first == same != contact_sheet(BadNets(size=2).trigger(8, 8), make_noise(40))


def test_contact_sheet_shows_the_first_eligible_images(make_noise: MakeNoise) -> None:
    trigger, images = BadNets(target_class=0).trigger(8, 8), make_noise(40)
    chosen = images.take(np.flatnonzero(images.labels)[:3])
    assert contact_sheet(trigger, images, rows=3) == lay_out(chosen.images, to_images(trigger.stamp(chosen.pixels)))


def test_contact_sheet_refuses_images_none_of_which_is_eligible(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    with pytest.raises(DataError) as caught:
        contact_sheet(BadNets(target_class=2).trigger(8, 8), images.take(np.flatnonzero(images.labels == 2)))
    assert str(caught.value) == "noise: no image is eligible for the trigger; give images of other classes"


def test_lay_out_refuses_what_is_no_pair() -> None:
    with pytest.raises(
        ValueError, match=r"^\(1, 76, 76, 3\) clean and \(2, 76, 76, 3\) stamped images; a sheet needs "
    ):
        lay_out(_flat(1), _flat(1, 2))
    with pytest.raises(ValueError, match=r"a sheet needs as many of both"):
        lay_out(_flat(1)[:0], _flat(1)[:0])


# --- poisons ----------------------------------------------------------------------------------------------------------


def test_poisons_are_rows_of_the_set_below_the_others() -> None:
    """Four: three in a line of 98 pixels, the fourth below the first; the rest of the sheet is as without them."""
    poisons = PoisonBlock(heading="poisons", images=_flat(1, 2, 3, 4), names=("a", "b", "c", "d"))
    bare, sheet = _read(lay_out(_flat(10), _flat(30))), _read(lay_out(_flat(10), _flat(30), poisons))
    end = 16 + 84 + 8
    assert (bare.shape[0], sheet.shape) == (end, (end + 16 + 2 * 98, *bare.shape[1:]))
    assert (sheet[:end] == bare).all()
    assert (sheet[end : end + 16] < 255).any(), "the heading"
    for place, code in enumerate((1, 2, 3, 4)):
        top, left = end + 16 + place // 3 * 98, 8 + place % 3 * 84
        assert (sheet[top : top + 76, left : left + 76] == code).all()
        assert (sheet[top + 76 : top + 98, left : left + 76] < 255).any(), "the name of its label"


def test_poison_block_takes_the_first_poisons_with_the_labels_they_carry(make_noise: MakeNoise) -> None:
    poisoned = BadNets(target_class=2, poison_count=9).poison(make_noise(40), np.random.default_rng(0))
    block = poison_block(poisoned, most=5)
    assert (block.images == poisoned.images.images[poisoned.poison_indices[:5]]).all()
    assert block.names == ("class 2",) * 5
    assert block.heading == "poisons as the training set has them"


@pytest.mark.parametrize(
    ("made_in_training", "heading"),
    [(True, "The poisons are made in training."), (False, "The training set has no poisons.")],
)
def test_without_poisons_the_sheet_says_why(make_noise: MakeNoise, made_in_training: bool, heading: str) -> None:
    none = PoisonedSet(images=make_noise(8), poison_indices=np.empty(0, np.int64))
    block = poison_block(none, made_in_training=made_in_training)
    assert (block.heading, len(block.images), block.names) == (heading, 0, ())
    bare, sheet = _read(lay_out(_flat(10), _flat(30))), _read(lay_out(_flat(10), _flat(30), block))
    assert len(sheet) == len(bare) + 16
    assert (sheet[len(bare) :] < 255).any()
    assert (sheet[len(bare) :, -8:] == 255).all(), "the heading fits"


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("stop", "stop"),
        ("a\nb", "a\\nb"),
        ("\u4e2d", "\\u4e2d"),
        ("\ud800", "\\ud800"),
        ("thirteen long", "thirteen l.."),
    ],
)
def test_names_are_escaped_and_cut_to_the_picture(name: str, shown: str) -> None:
    assert _caption(name, 76) == shown
    lay_out(_flat(1), _flat(2), PoisonBlock(heading="", images=_flat(1), names=(name,)))
