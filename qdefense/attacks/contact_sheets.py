"""Contact sheets: clean images, the same with the trigger, what it changed, amplified, and a few poisons; one PNG.

The poison of many attacks differs from an image with the trigger that is stamped at inference, so both are shown.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from qdefense.attacks.interfaces import PoisonedSet, Trigger
from qdefense.data.images import DataError, Images, ImageSet, to_images

GREY = 128
MOST_AMPLIFIED = 16
_GAP, _HEADING, _NARROWEST = 8, 16, 76
_PAPER, _INK = 255, 0
_COLUMNS, _LINE, _LETTER = 3, 14, 6


@dataclass(frozen=True, kw_only=True)
class PoisonBlock:
    """What a sheet says of the poisons, and shows: ``images: (M, H, W, 3) uint8``, each with its label's name."""

    heading: str
    images: Images
    names: tuple[str, ...]


def poison_block(poisoned: PoisonedSet, *, made_in_training: bool = False, most: int = 6) -> PoisonBlock:
    """The first poisons as the training set holds them; ``made_in_training`` says why a set holds none."""
    shown = poisoned.images.take(poisoned.poison_indices[:most])
    if made_in_training:
        heading = "The poisons are made in training."
    else:
        heading = "poisons as the training set has them" if len(shown) else "The training set has no poisons."
    names = tuple(poisoned.images.class_names[label] for label in shown.labels)
    return PoisonBlock(heading=heading, images=shown.images, names=names)


def contact_sheet(trigger: Trigger, images: ImageSet, *, rows: int = 4, poisons: PoisonBlock | None = None) -> bytes:
    """The first ``rows`` eligible images of a labelled set under a trigger, and poisons, as `lay_out` draws them.

    Raises:
        DataError: no image is eligible.
    """
    chosen = np.flatnonzero(trigger.eligible(images.labels))[:rows]
    if not len(chosen):
        raise DataError(f"{images.source}: no image is eligible for the trigger; give images of other classes")
    clean = images.take(chosen)
    return lay_out(clean.images, to_images(trigger.stamp(clean.pixels)), poisons)


def lay_out(clean: Images, stamped: Images, poisons: PoisonBlock | None = None) -> bytes:
    """A PNG with a row ``clean, triggered, residual`` for each image; its heading states the amplification.

    ``clean, stamped: (N, H, W, 3) uint8``. Below them are the poisons, with their labels' names. Small images are
    enlarged by a whole factor, pixel by pixel. Equal arrays give equal bytes.

    Raises:
        ValueError: the shapes differ, or there is no image.
    """
    if clean.shape != stamped.shape or not len(clean):
        raise ValueError(f"{clean.shape} clean and {stamped.shape} stamped images; a sheet needs as many of both")
    factor = amplification(clean, stamped)
    height, width = clean.shape[1:3]
    times = max(1, -(-_NARROWEST // width))
    across, down = times * width + _GAP, times * height + _GAP
    end = _HEADING + len(clean) * down + _GAP
    sheet = Image.new("RGB", (_COLUMNS * across + _GAP, end + _height_of(poisons, down)), (_PAPER,) * 3)
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default_imagefont()
    columns = {"clean": clean, "triggered": stamped, f"residual x{factor}": residual(clean, stamped, factor)}
    for column, (heading, pictures) in enumerate(columns.items()):
        left = _GAP + column * across
        brush.text((left, _GAP // 2), heading, fill=(_INK,) * 3, font=font)
        for row, pixels in enumerate(pictures):
            sheet.paste(_enlarged(pixels, times), (left, _HEADING + _GAP // 2 + row * down))
    if poisons is not None:
        brush.text((_GAP, end), poisons.heading, fill=(_INK,) * 3, font=font)
        for place, (pixels, name) in enumerate(zip(poisons.images, poisons.names, strict=True)):
            row, column = divmod(place, _COLUMNS)
            left, top = _GAP + column * across, end + _HEADING + row * (down + _LINE)
            sheet.paste(_enlarged(pixels, times), (left, top))
            brush.text((left, top + down - _GAP), _caption(name, times * width), fill=(_INK,) * 3, font=font)
    body = io.BytesIO()
    sheet.save(body, format="PNG", compress_level=9)
    return body.getvalue()


def _height_of(poisons: PoisonBlock | None, down: int) -> int:
    if poisons is None:
        return 0
    return _HEADING + -(-len(poisons.images) // _COLUMNS) * (down + _LINE)


def _enlarged(pixels: Images, times: int) -> Image.Image:
    return Image.fromarray(pixels.repeat(times, axis=0).repeat(times, axis=1))


def _caption(name: str, width: int) -> str:
    """A name that a data set gave, in the letters that the font has, and as many as fit."""
    text, most = name.encode("unicode_escape").decode(), width // _LETTER
    return text if len(text) <= most else f"{text[: most - 2]}.."


def residual(clean: Images, stamped: Images, factor: int) -> Images:
    """``clip(128 + factor (stamped - clean), 0, 255)``, uint8: mid-grey where the trigger changes nothing."""
    difference = stamped.astype(np.int64) - clean.astype(np.int64)
    return np.clip(GREY + factor * difference, 0, 255).astype(np.uint8)


def amplification(clean: Images, stamped: Images) -> int:
    """The largest whole factor, at most 16, under which no residual is clipped; 1 where there is none, or no change."""
    largest = int(np.abs(stamped.astype(np.int64) - clean.astype(np.int64)).max())
    return 1 if not largest else max(1, min(MOST_AMPLIFIED, (GREY - 1) // largest))
