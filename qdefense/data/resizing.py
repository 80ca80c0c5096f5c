"""Resize: how images of another size reach the model's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from qdefense.data.images import DataError, Images, ImageSet

if TYPE_CHECKING:
    from qdefense.converters.contract import ResizeRule  # at run time it would import onnx

_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
RULES: tuple[ResizeRule, ...] = ("nearest", "bilinear", "bicubic", "crop")
"""Those that change anything."""
MAX_PIXELS = 1 << 26


@dataclass(frozen=True)
class Resize:
    """A rule and the size it leads to; an image that has this size already is left as it is.

    ``none`` leaves every image as it is. ``nearest``, ``bilinear`` and ``bicubic`` stretch. ``crop`` is how ImageNet
    models are tested: bilinear until the image just covers 8/7 of the size (256 for 224), then the centre of it.
    Pillow computes all of them on uint8, so that a large image is averaged on its way down.
    """

    rule: ResizeRule
    height: int
    width: int

    def apply(self, image: Image.Image) -> Images:
        """One RGB image: ``(H, W, 3) uint8``.

        Raises:
            DataError: the image is so narrow that ``crop`` would blow it up beyond all bounds.
        """
        if self.rule == "none" or image.size == (self.width, self.height):
            return np.asarray(image)
        if self.rule == "crop":
            return np.asarray(self._crop(image))
        return np.asarray(image.resize((self.width, self.height), _FILTERS[self.rule]))

    def apply_all(self, images: Images) -> Images:
        """``(N, H, W, 3) uint8`` in and out.

        Raises:
            DataError: as `apply`.
        """
        if self.rule == "none" or images.shape[1:3] == (self.height, self.width):
            return images
        resized = np.empty((len(images), self.height, self.width, 3), dtype=np.uint8)
        for row, image in enumerate(images):
            resized[row] = self.apply(Image.fromarray(image))
        return resized

    def _crop(self, image: Image.Image) -> Image.Image:
        high, wide = round(self.height * 8 / 7), round(self.width * 8 / 7)
        if high * image.width >= wide * image.height:
            wide = high * image.width // image.height
        else:
            high = wide * image.height // image.width
        if high * wide > MAX_PIXELS:
            raise DataError(f"{image.width}x{image.height} is too narrow to crop; add --resize bilinear to stretch it")
        left, top = round((wide - self.width) / 2), round((high - self.height) / 2)
        covering = image.resize((wide, high), Image.Resampling.BILINEAR)
        return covering.crop((left, top, left + self.width, top + self.height))


def resize_set(image_set: ImageSet, resize: Resize | None) -> ImageSet:
    """The set with every image resized; the same set where nothing changes.

    Raises:
        DataError: as `Resize.apply`.
    """
    if resize is None:
        return image_set
    return replace(image_set, images=resize.apply_all(image_set.images))
