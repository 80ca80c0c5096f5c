from __future__ import annotations

import base64
import io
import struct

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from qdefense.data.images import Pixels, on_grid
from qdefense.defenses.inversion import MaskedPattern
from qdefense.defenses.pictures import picture_trigger
from qdefense.findings import TriggerPicture

HEIGHT, WIDTH = 5, 7


@pytest.fixture
def trigger() -> MaskedPattern:
    rng = np.random.default_rng(3)
    return MaskedPattern(
        mask=rng.random((1, HEIGHT, WIDTH), dtype=np.float32), pattern=rng.random((3, HEIGHT, WIDTH), dtype=np.float32)
    )


@pytest.fixture
def example() -> Pixels:
    return on_grid(np.random.default_rng(4).random((3, HEIGHT, WIDTH), dtype=np.float32))


def pixels(png: str) -> NDArray[np.int64]:
    return np.array(Image.open(io.BytesIO(base64.b64decode(png, validate=True)))).astype(np.int64)


def codes(pixels: Pixels) -> NDArray[np.int64]:
    return np.rint(pixels.astype(np.float64) * 255).astype(np.int64)


def test_picture_trigger_draws_mask_trigger_and_both_images(trigger: MaskedPattern, example: Pixels) -> None:
    drawn = picture_trigger(trigger, 4, example)
    assert (drawn.target_class, drawn.trigger_id) == (4, trigger.trigger_id)
    np.testing.assert_array_equal(pixels(drawn.mask_png), codes(trigger.mask[0]))
    np.testing.assert_array_equal(pixels(drawn.trigger_png), codes(trigger.mask * trigger.pattern).transpose(1, 2, 0))
    np.testing.assert_array_equal(pixels(drawn.example_png), codes(example).transpose(1, 2, 0))


def test_picture_trigger_shows_the_pixels_that_the_session_was_given(trigger: MaskedPattern, example: Pixels) -> None:
    drawn = picture_trigger(trigger, 0, example)
    given = trigger.stamp(example[None])[0]
    np.testing.assert_array_equal(pixels(drawn.stamped_png), codes(given).transpose(1, 2, 0))
    assert drawn.stamped_png != drawn.example_png


def test_picture_trigger_gives_the_same_bytes_twice(trigger: MaskedPattern, example: Pixels) -> None:
    assert picture_trigger(trigger, 0, example) == picture_trigger(trigger, 0, example.copy())


@pytest.mark.parametrize("name", [name for name in TriggerPicture.model_fields if name.endswith("_png")])
def test_picture_trigger_writes_no_metadata(trigger: MaskedPattern, example: Pixels, name: str) -> None:
    body = base64.b64decode(getattr(picture_trigger(trigger, 0, example), name))
    chunks, place = [], 8
    while place < len(body):
        length, kind = struct.unpack(">I4s", body[place : place + 8])
        chunks.append(kind)
        place += 12 + length
    assert chunks == [b"IHDR", b"IDAT", b"IEND"]
