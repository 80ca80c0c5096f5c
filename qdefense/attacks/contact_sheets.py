"""Contact sheets of a trigger: clean images, the same images with it, and what it changed, amplified; one PNG."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qdefense.attacks.interfaces import Trigger
from qdefense.data.images import DataError, Images, ImageSet, to_images

GREY = 128
MOST_AMPLIFIED = 16
_GAP, _HEADING, _NARROWEST = 8, 16, 76
_PAPER, _INK = 255, 0


def contact_sheet(trigger: Trigger, images: ImageSet, *, rows: int = 4) -> bytes:
    """The first ``rows`` eligible images of a labelled set under a trigger, as `lay_out` draws them.

    Raises:
        DataError: no image is eligible.
    """
    chosen = np.flatnonzero(trigger.eligible(images.labels))[:rows]
    if not len(chosen):
        raise DataError(f"{images.source}: no image is eligible for the trigger; give images of other classes")
    clean = images.take(chosen)
    return lay_out(clean.images, to_images(trigger.stamp(clean.pixels)))


def lay_out(clean: Images, stamped: Images) -> bytes:
    """A PNG with a row ``clean, triggered, residual`` for each image; its heading states the amplification.

    ``clean, stamped: (N, H, W, 3) uint8``. Small images are enlarged by a whole factor, pixel by pixel. Equal arrays
    give equal bytes.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    if clean.shape != stamped.shape or not len(clean):
        raise ValueError(f"{clean.shape} clean and {stamped.shape} stamped images; a sheet needs as many of both")
    factor = amplification(clean, stamped)
    height, width = clean.shape[1:3]
    times = max(1, -(-_NARROWEST // width))
    across, down = times * width + _GAP, times * height + _GAP
    sheet = Image.new("RGB", (3 * across + _GAP, _HEADING + len(clean) * down + _GAP), (_PAPER,) * 3)
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    columns = {"clean": clean, "triggered": stamped, f"residual x{factor}": residual(clean, stamped, factor)}
    for column, (heading, pictures) in enumerate(columns.items()):
        left = _GAP + column * across
        brush.text((left, _GAP // 2), heading, fill=(_INK,) * 3, font=font)
        for row, pixels in enumerate(pictures):
            enlarged = pixels.repeat(times, axis=0).repeat(times, axis=1)
            sheet.paste(Image.fromarray(enlarged), (left, _HEADING + _GAP // 2 + row * down))
    body = io.BytesIO()
    sheet.save(body, format="PNG", compress_level=9)
    return body.getvalue()


def residual(clean: Images, stamped: Images, factor: int) -> Images:
    """``clip(128 + factor (stamped - clean), 0, 255)``, uint8: mid-grey where the trigger changes nothing."""
    difference = stamped.astype(np.int64) - clean.astype(np.int64)
    return np.clip(GREY + factor * difference, 0, 255).astype(np.uint8)


def amplification(clean: Images, stamped: Images) -> int:
    """The largest whole factor, at most 16, under which no residual is clipped; 1 where there is none, or no change."""
    largest = int(np.abs(stamped.astype(np.int64) - clean.astype(np.int64)).max())
    return 1 if not largest else max(1, min(MOST_AMPLIFIED, (GREY - 1) // largest))
