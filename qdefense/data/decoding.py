"""Encoded images to uint8 RGB: whatever is wrong with one is told with its name."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from qdefense.data.images import DataError, Images, first_line, quoted
from qdefense.data.resizing import Resize

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM")
IMAGE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK")
# What Pillow's decoders raise on malformed bytes; the warning is turned into an error while decoding.
_BROKEN_IMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


@dataclass(frozen=True)
class Decoded:
    """An RGB image, the mode it was stored in, and whether its EXIF orientation turned it."""

    image: Image.Image
    mode: str
    turned: bool


def decode(file: BinaryIO, name: str) -> Decoded:
    """Read one image, and turn it as its EXIF orientation says.

    Args:
        file: its bytes.
        name: what a message calls it.

    Raises:
        DataError: no image of a known format, broken, more than 8 bits a channel, or a decompression bomb.
    """
    try:
        with warnings.catch_warnings():
            # Others speak of metadata, and a pipeline's log is no place for each of thousands of images.
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=IMAGE_FORMATS) as image:
                deep = _has_16_bits(image)
                if image.mode in IMAGE_MODES and not deep:
                    return _to_rgb(image)
                mode = image.mode
    except UnidentifiedImageError as error:
        # Pillow's own words hold an address in memory or the path from the root.
        raise DataError(f"{name} is no readable image (no {', '.join(IMAGE_FORMATS)}); replace or remove it") from error
    except _BROKEN_IMAGE as error:
        raise DataError(f"{name} is no readable image ({first_line(error)}); replace or remove it") from error
    # Pillow gives 16 bits of gray as I;16 or, of a PPM, as I; a floating-point PPM as F.
    kind = "a 16-bit image" if deep or mode.startswith("I") else f"an image of mode {mode}"
    raise DataError(f"{name} is {kind}, which is not supported; convert it to 8 bits a channel")


def _has_16_bits(image: Image.Image) -> bool:
    """Whether Pillow would cut colours to 8 bits a channel without a word; how they lie in the file tells."""
    layouts = [(tile.codec_name, tile.args) for tile in getattr(image, "tile", [])]
    return any(
        args[1] > 255 if codec in {"ppm", "ppm_plain"} and isinstance(args, tuple) else str(args).endswith(";16B")
        for codec, args in layouts
    )


def _to_rgb(image: Image.Image) -> Decoded:
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
    mode = image.mode
    if turned:
        image = ImageOps.exif_transpose(image)
    # A palette may carry transparency, which Pillow only drops without a warning by way of RGBA.
    plain = image.convert("RGBA") if mode == "P" else image
    return Decoded(plain.convert("RGB"), mode, turned)


class ImageArray:
    """``(N, H, W, 3) uint8``, filled image by image; the first one decides the size unless a resize does.

    It keeps count of the images that were not in RGB or did not stand upright, for `notes`.
    """

    def __init__(self, count: int, resize: Resize | None, source: str) -> None:
        self._count, self._resize, self._source = count, resize, source
        self._images: Images | None = None
        self._first = ""
        self._modes: Counter[str] = Counter()
        self._turned = 0

    def put(self, position: int, decoded: Decoded, name: str) -> None:
        """Put an image in its place.

        Raises:
            DataError: its size is not that of the first, it cannot be resized, or the array does not fit into memory.
        """
        pixels = self._fit(decoded.image, name)
        if self._images is None:
            self._images, self._first = self._allocate(pixels.shape), name
        if pixels.shape != self._images.shape[1:]:
            sizes = f"{name} is {_size(pixels.shape)} and {self._first} is {_size(self._images.shape[1:])}"
            raise DataError(
                f"{self._source}: images differ in size: {sizes}; resize them to one size: --resize bilinear"
            )
        self._images[position] = pixels
        self._modes[decoded.mode] += 1
        self._turned += decoded.turned

    @property
    def notes(self) -> tuple[str, ...]:
        """How many of the images were of other modes than RGB, and how many did not stand upright."""
        return _notes(self._modes, self._turned)

    def finish(self) -> Images:
        """The images.

        Raises:
            DataError: there is none.
        """
        if self._images is None:
            raise DataError(f"{self._source}: holds no images")
        return self._images

    def _fit(self, image: Image.Image, name: str) -> Images:
        if self._resize is None:
            return np.asarray(image)
        try:
            return self._resize.apply(image)
        except DataError as error:
            raise DataError(f"{self._source}: {name}: {error}") from error

    def _allocate(self, shape: tuple[int, ...]) -> Images:
        try:
            return np.empty((self._count, *shape), dtype=np.uint8)
        except MemoryError as error:
            raise DataError(
                f"{self._source}: {self._count:,} images of {_size(shape)} do not fit into memory; "
                "read fewer with --limit, or smaller ones with --resize bilinear"
            ) from error


def decode_files(
    paths: Sequence[Path], names: Sequence[str], *, root: Path, resize: Resize | None, source: str
) -> tuple[Images, tuple[str, ...]]:
    """Read image files into one array, upright and in RGB, with notes on those that were not.

    Args:
        paths: of the files, in the order of the result.
        names: what messages call them.
        root: the folder that no link may lead out of.
        resize: to one size; ``None`` where they have one.
        source: the set they belong to, for messages.

    Returns:
        ``(len(paths), H, W, 3) uint8`` and the notes.

    Raises:
        DataError: a file is missing, a link that leads out or no readable image, or sizes differ. Of several that
            cannot be read the first is named, and the rest of the files are tried to count the others.
    """
    images = ImageArray(len(paths), resize, source)
    for position, (path, name) in enumerate(zip(paths, names, strict=True)):
        require_inside(path, root, source)
        try:
            decoded = _decode_file(path, f"{source}: {name}")
        except DataError as error:
            others = _count_unreadable(paths[position + 1 :], root)
            if not others:
                raise
            more = f"{others} more of the {len(paths):,} files cannot be read either"
            raise DataError(f"{error}; {more}") from error
        images.put(position, decoded, name)
    return images.finish(), images.notes


def _count_unreadable(paths: Sequence[Path], root: Path) -> int:
    count = 0
    for path in paths:
        try:
            require_inside(path, root, "")
            _decode_file(path, "")
        except DataError:
            count += 1
    return count


def require_inside(path: Path, root: Path, source: str) -> None:
    """Refuse a link that leads out of a folder of data: it would show files that nobody handed over.

    Raises:
        DataError: it does.
    """
    if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{source}: {quoted(path.name)} is a link that leads out of the folder; put the images there")


def _decode_file(path: Path, name: str) -> Decoded:
    if not path.is_file():
        raise DataError(f"{name} is missing or no regular file; copy or unpack the data again")
    try:
        file = path.open("rb")
    except OSError as error:
        raise DataError(f"{name} cannot be opened ({error.strerror}); check its permissions") from error
    with file:
        return decode(file, name)


def _notes(modes: Counter[str], turned: int) -> tuple[str, ...]:
    total = modes.total()
    others = {mode: count for mode, count in sorted(modes.items()) if mode != "RGB"}
    notes = []
    if others:
        kinds = ", ".join(f"{count} {mode}" for mode, count in others.items())
        notes.append(f"converted to RGB: {sum(others.values())} of {total} images ({kinds})")
    if turned:
        notes.append(f"turned upright as their EXIF orientation says: {turned} of {total} images")
    return tuple(notes)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
