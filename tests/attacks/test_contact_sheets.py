from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from qdefense.attacks.badnets import BadNets
from qdefense.attacks.contact_sheets import amplification, contact_sheet, lay_out, residual
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
