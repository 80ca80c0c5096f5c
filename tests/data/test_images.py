from __future__ import annotations

from collections.abc import Callable
from dataclasses import FrozenInstanceError, replace
from typing import Any

import numpy as np
import pytest

from qdefense.data.images import DataError, ImageSet, first_line, on_grid, quoted, to_images, to_pixels

MakeNoise = Callable[..., ImageSet]


def test_image_set_gives_pixels_in_nchw_between_0_and_1(make_noise: MakeNoise) -> None:
    noise = make_noise(5)
    pixels = noise.pixels
    assert pixels.shape == (5, 3, 8, 8)
    assert pixels.dtype == np.float32
    assert pixels[4, 2, 1, 7] == np.float32(noise.images[4, 1, 7, 2]) / np.float32(255)
    assert len(noise) == 5


def test_take_gives_the_rows_named_in_that_order(make_noise: MakeNoise) -> None:
    noise = make_noise(6)
    taken = noise.take(np.array([4, 1]))
    assert taken.labels.tolist() == [0, 1]
    assert np.array_equal(taken.images, noise.images[[4, 1]])
    assert (taken.class_names, taken.source) == (noise.class_names, noise.source)


def test_take_gives_an_empty_set_when_no_row_is_named(make_noise: MakeNoise) -> None:
    assert len(make_noise(6).take(np.empty(0, dtype=np.int64))) == 0


def test_take_takes_the_groups_along(make_noise: MakeNoise) -> None:
    grouped = replace(make_noise(6), groups=np.array([7, 7, 8, 8, 9, 9]))
    taken = grouped.take(np.array([4, 1]))
    assert taken.groups is not None
    assert taken.groups.tolist() == [9, 7]
    assert make_noise(6).take(np.array([4])).groups is None


def test_digest_leaves_out_the_groups_and_what_is_said_of_the_set(make_noise: MakeNoise) -> None:
    noise = make_noise(6)
    told = replace(noise, groups=np.zeros(6, np.int64), detection="noise: made", notes=("a note",))
    assert told.digest == noise.digest


def test_digest_is_that_of_version_1(make_noise: MakeNoise) -> None:
    assert make_noise(6).digest == "2c1fbffc223d8444e79931b029ad9be0f664cf49b0fe0483ec66ec661799a5bb"


def test_image_set_takes_images_without_labels(make_noise: MakeNoise) -> None:
    noise = make_noise(3)
    unlabelled = replace(noise, labels=np.full(3, -1), class_names=(), labelled=False)
    assert unlabelled.take(np.array([2])).labels.tolist() == [-1]


@pytest.mark.parametrize("name", ["x" * 900, "\x1b[2J" * 200, "a\nb"])
def test_quoted_gives_one_short_harmless_line(name: str) -> None:
    shown = quoted(name)
    assert shown.isprintable()
    assert len(shown) <= 4 * 60 + 2


@pytest.mark.parametrize(
    ("error", "line"), [(ValueError("a\nb"), "a"), (KeyError(), "KeyError"), (OSError("x" * 900), "x" * 200)]
)
def test_first_line_gives_one_short_line(error: Exception, line: str) -> None:
    assert first_line(error) == line


def test_image_set_cannot_be_changed(make_noise: MakeNoise) -> None:
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'source'"):
        make_noise(2).source = "elsewhere"  # type: ignore[misc]


NUMBER = "; number the classes from 0, and name each"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"images": np.zeros((6, 8, 8, 3), np.float32)},
            "noise: images are float32 (6, 8, 8, 3), expected uint8 (N, H, W, 3)",
        ),
        (
            {"images": np.zeros((6, 8, 8, 1), np.uint8)},
            "noise: images are uint8 (6, 8, 8, 1), expected uint8 (N, H, W, 3)",
        ),
        ({"images": np.zeros((6, 8, 3), np.uint8)}, "noise: images are uint8 (6, 8, 3), expected uint8 (N, H, W, 3)"),
        ({"images": np.zeros((6, 0, 8, 3), np.uint8)}, "noise: images of 0x8 have no pixels; save them again"),
        ({"images": np.zeros((6, 8, 0, 3), np.uint8)}, "noise: images of 8x0 have no pixels; save them again"),
        (
            {"labels": np.zeros(5, np.int64)},
            "noise: 6 images but labels are int64 (5,), expected int64 (N,)",
        ),
        (
            {"labels": np.zeros((6, 1), np.int64)},
            "noise: 6 images but labels are int64 (6, 1), expected int64 (N,)",
        ),
        ({"labels": np.full(6, 0.5)}, "noise: 6 images but labels are float64 (6,), expected int64 (N,)"),
        ({"groups": np.zeros(5, np.int64)}, "noise: 6 images but groups are int64 (5,), expected int64 (N,)"),
        ({"groups": np.zeros(6, np.int32)}, "noise: 6 images but groups are int32 (6,), expected int64 (N,)"),
        ({"labels": np.full(6, 4)}, f"noise: labels run from 4 to 4, but there are 4 class names{NUMBER}"),
        (
            {"labels": np.array([0, 1, -1, 0, 3, 2])},
            f"noise: labels run from -1 to 3, but there are 4 class names{NUMBER}",
        ),
        (
            {"class_names": ("a", "b\ud800", "c", "d")},
            "noise: the name of class 1, 'b\\ud800', is not UTF-8; rename it",
        ),
    ],
)
def test_image_set_says_what_is_wrong_when_parts_do_not_fit(
    make_noise: MakeNoise, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        replace(make_noise(6), **change)
    assert str(caught.value) == message


def test_digest_is_equal_when_the_content_is_and_not_the_memory_layout(make_noise: MakeNoise) -> None:
    noise = make_noise(6)
    strided = replace(noise, images=np.asfortranarray(noise.images), source="elsewhere")
    assert strided.digest == noise.digest == make_noise(6).digest
    assert len(noise.digest) == 64


@pytest.mark.parametrize("field", ["images", "labels", "class_names", "shape"])
def test_digest_differs_when_anything_does(make_noise: MakeNoise, field: str) -> None:
    noise = make_noise(6)
    images, labels = noise.images.copy(), noise.labels.copy()
    images[3, 2, 1, 0] ^= 1
    labels[0] = 3
    changes: dict[str, Any] = {
        "images": {"images": images},
        "labels": {"labels": labels},
        "class_names": {"class_names": (*noise.class_names[:3], "other")},
        "shape": {"images": noise.images.reshape(6, 4, 16, 3)},
    }
    assert replace(noise, **changes[field]).digest != noise.digest


def test_to_images_inverts_to_pixels_for_every_code() -> None:
    codes = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    assert np.array_equal(to_images(to_pixels(codes)), codes)


def test_to_images_rounds_to_the_nearest_code_and_clips() -> None:
    values = np.array([-0.2, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.3], dtype=np.float32)
    pixels = np.broadcast_to(values, (1, 3, 1, 5))
    assert to_images(pixels)[0, 0, :, 0].tolist() == [0, 0, 1, 255, 255]


def test_on_grid_keeps_pixels_bit_equal_when_a_uint8_image_held_them(make_noise: MakeNoise) -> None:
    pixels = make_noise(4).pixels
    assert on_grid(pixels).tobytes() == pixels.tobytes()


def test_on_grid_equals_a_trip_through_uint8_when_pixels_are_arbitrary() -> None:
    pixels = np.random.default_rng(0).random((2, 3, 8, 8), dtype=np.float32)
    rounded = on_grid(pixels)
    assert rounded.dtype == np.float32
    assert rounded.tobytes() == to_pixels(to_images(pixels)).tobytes()
    assert on_grid(rounded).tobytes() == rounded.tobytes()


def test_on_grid_clips_when_pixels_are_out_of_range() -> None:
    assert on_grid(np.array([-0.2, 1.2], dtype=np.float32)).tolist() == [0, 1]


def test_in_pixels_gives_all_images_in_parts_of_at_most_256(make_noise: MakeNoise) -> None:
    noise = make_noise(600, size=2)
    parts = list(noise.in_pixels())
    assert [len(part) for part in parts] == [256, 256, 88]
    assert np.array_equal(np.concatenate(parts), noise.pixels)
    assert list(make_noise(0).in_pixels()) == []


def test_without_labels_keeps_the_images_alone(make_noise: MakeNoise) -> None:
    noise = make_noise(6)
    bare = noise.without_labels()
    assert (bare.labelled, bare.class_names, bare.labels.tolist()) == (False, (), [-1] * 6)
    assert np.array_equal(bare.images, noise.images)
    assert bare.source == noise.source
