from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from qdefense.data.images import DataError, ImageSet
from qdefense.data.resizing import RULES, Resize, resize_set

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8)
FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@pytest.mark.parametrize("rule", sorted(FILTERS))
def test_apply_stretches_as_pillow_does(rule: str) -> None:
    image = Image.fromarray(PIXELS)
    resized = Resize(rule, 20, 30).apply(image)  # type: ignore[arg-type]
    assert (resized.shape, resized.dtype.name) == ((20, 30, 3), "uint8")
    np.testing.assert_array_equal(resized, np.asarray(image.resize((30, 20), FILTERS[rule])))


def test_apply_gives_another_image_for_every_rule() -> None:
    image = Image.fromarray(PIXELS)
    assert len({Resize(rule, 20, 30).apply(image).tobytes() for rule in RULES}) == len(RULES)


def test_apply_averages_when_an_image_shrinks() -> None:
    board = np.indices((64, 64)).sum(axis=0) % 2 * np.uint8(200)
    image = Image.fromarray(np.repeat(board[..., None], 3, axis=2).astype(np.uint8))
    shrunk = Resize("bilinear", 8, 8).apply(image)
    assert np.abs(shrunk.astype(int) - 100).max() <= 1


@pytest.mark.parametrize(
    ("size", "covering", "box"),
    [
        ((640, 480), (341, 256), (58, 16, 282, 240)),  # as torchvision: Resize(256), CenterCrop(224)
        ((480, 640), (256, 341), (16, 58, 240, 282)),
        ((500, 500), (256, 256), (16, 16, 240, 240)),
        ((100, 30), (853, 256), (314, 16, 538, 240)),
    ],
)
def test_apply_crops_as_imagenet_models_are_tested(
    size: tuple[int, int], covering: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    expected = image.resize(covering, Image.Resampling.BILINEAR).crop(box)
    np.testing.assert_array_equal(Resize("crop", 224, 224).apply(image), np.asarray(expected))


@pytest.mark.parametrize("size", [(64, 48), (48, 64), (1, 9), (200, 3)])
@pytest.mark.parametrize("target", [(32, 32), (14, 70), (70, 14), (1, 1)])
def test_apply_never_crops_beyond_the_image_when_sides_differ(size: tuple[int, int], target: tuple[int, int]) -> None:
    white = Image.new("RGB", size, (255, 255, 255))
    cropped = Resize("crop", *target).apply(white)
    assert cropped.shape == (*target, 3)
    assert cropped.min() == 255  # outside, Pillow would fill in black


def test_apply_raises_when_an_image_is_too_narrow_to_crop() -> None:
    with pytest.raises(DataError, match=r"^1x70000 is too narrow to crop; add --resize bilinear to stretch it$"):
        Resize("crop", 32, 32).apply(Image.new("RGB", (1, 70_000)))


@pytest.mark.parametrize("rule", RULES)
def test_apply_leaves_an_image_as_it_is_when_it_has_the_size(rule: str) -> None:
    np.testing.assert_array_equal(Resize(rule, 48, 64).apply(Image.fromarray(PIXELS)), PIXELS)  # type: ignore[arg-type]


def test_apply_leaves_an_image_as_it_is_when_the_rule_is_none() -> None:
    np.testing.assert_array_equal(Resize("none", 20, 30).apply(Image.fromarray(PIXELS)), PIXELS)


@pytest.mark.parametrize("rule", RULES)
def test_apply_all_equals_apply_on_each(rule: str) -> None:
    images = RNG.integers(0, 256, (3, 10, 12, 3), dtype=np.uint8)
    resize = Resize(rule, 6, 9)  # type: ignore[arg-type]
    expected = np.stack([resize.apply(Image.fromarray(image)) for image in images])
    np.testing.assert_array_equal(resize.apply_all(images), expected)


@pytest.mark.parametrize("resize", [None, Resize("none", 3, 3), Resize("crop", 10, 12), Resize("bilinear", 10, 12)])
def test_resize_set_changes_nothing_when_the_size_is_right_or_there_is_no_rule(resize: Resize | None) -> None:
    images = RNG.integers(0, 256, (3, 10, 12, 3), dtype=np.uint8)
    made = ImageSet(images=images, labels=np.array([0, 1, 0]), class_names=("a", "b"), source="made")
    assert resize_set(made, resize).images is images


def test_resize_set_keeps_everything_but_the_images() -> None:
    images = RNG.integers(0, 256, (3, 10, 12, 3), dtype=np.uint8)
    made = ImageSet(images=images, labels=np.array([0, 1, 0]), class_names=("a", "b"), source="made", notes=("n",))
    resized = resize_set(made, Resize("nearest", 5, 6))
    np.testing.assert_array_equal(resized.images, images[:, 1::2, 1::2])
    assert (resized.labels.tolist(), resized.class_names, resized.notes) == ([0, 1, 0], ("a", "b"), ("n",))
