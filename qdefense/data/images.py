"""ImageSet: labelled uint8 images, whatever format they came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Pixels = NDArray[np.float32]

_IMAGES_AT_ONCE = 256


class DataError(ValueError):
    """Data that cannot be used; the message says what, where and what to do next."""


class NoSplitError(DataError):
    """There is no split of that name; the message says which there are."""


def quoted(name: str) -> str:
    """A foreign name for a message: in quotes, escaped, at most 60 characters of it."""
    return repr(name[:60])


def encodable(text: str) -> str:
    """The same text where UTF-8 can hold it; of a name that is none, the bytes in question escaped."""
    return text.encode(errors="backslashreplace").decode()


def folder_name(path: Path) -> str:
    """What a set read from a folder is called: the folder's own name, where ``.`` or a link leads to it."""
    return encodable(path.resolve().name)


def first_few(texts: Sequence[str], most: int) -> str:
    """The first so many of a list, and how many more there are."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return f"{', '.join(texts[:most])}{more}"


def first_line(error: BaseException) -> str:
    """What an error of a library says, on one line of at most 200 characters."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Images and labels held in memory.

    ``images: (N, H, W, 3) uint8``, RGB, H and W at least 1; ``labels: (N,) int64 in [0, len(class_names))``.
    ``source`` names the loader and split for people, never a path an attack could hide in; ``detection`` says which
    loader read it and why that one ("CIFAR-10 python: the folder holds batches.meta"). ``notes`` is what the loader
    noticed and a person should know. A set without labels has ``labelled=False``, -1 for each label, no class names.
    ``groups: (N,) int64`` where it is known which rows show the same thing (a GTSRB track): a split must not part them.
    The digest leaves them out.
    """

    images: Images
    labels: Labels
    class_names: tuple[str, ...]
    source: str
    detection: str = ""
    labelled: bool = True
    notes: tuple[str, ...] = ()
    groups: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[3] != 3 or self.images.dtype != np.uint8:
            raise DataError(
                f"{self.source}: images are {self.images.dtype} {self.images.shape}, expected uint8 (N, H, W, 3)"
            )
        if 0 in self.images.shape[1:3]:
            height, width = self.images.shape[1:3]
            raise DataError(f"{self.source}: images of {height}x{width} have no pixels; save them again")
        if self.labels.shape != (len(self.images),) or self.labels.dtype != np.int64:
            raise DataError(
                f"{self.source}: {len(self.images)} images but labels are {self.labels.dtype} {self.labels.shape}, "
                "expected int64 (N,)"
            )
        if self.groups is not None and (self.groups.shape != self.labels.shape or self.groups.dtype != np.int64):
            raise DataError(
                f"{self.source}: {len(self.images)} images but groups are {self.groups.dtype} {self.groups.shape}, "
                "expected int64 (N,)"
            )
        _require_encodable(self.class_names, self.source)
        if not self.labelled:
            return
        if len(self.labels) and not 0 <= self.labels.min() <= self.labels.max() < len(self.class_names):
            raise DataError(
                f"{self.source}: labels run from {self.labels.min()} to {self.labels.max()}, "
                f"but there are {len(self.class_names)} class names; number the classes from 0, and name each"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def pixels(self) -> Pixels:
        """The images at the model's door: ``(N, 3, H, W) float32 in [0, 1]``."""
        return to_pixels(self.images)

    def in_pixels(self) -> Iterator[Pixels]:
        """The same a part at a time, at most 256 images each: large sets do not fit in memory as floats."""
        for start in range(0, len(self), _IMAGES_AT_ONCE):
            yield to_pixels(self.images[start : start + _IMAGES_AT_ONCE])

    @property
    def digest(self) -> str:
        """sha256 over shape, pixels, labels and class names."""
        hasher = hashlib.sha256(repr((self.images.shape, self.class_names)).encode())
        hasher.update(np.ascontiguousarray(self.images).tobytes())
        hasher.update(np.ascontiguousarray(self.labels, dtype="<i8").tobytes())
        return hasher.hexdigest()

    @property
    def pixel_digests(self) -> list[bytes]:
        """sha256 over the pixels of each image: equal where images are."""
        return [hashlib.sha256(image.tobytes()).digest() for image in self.images]

    @property
    def first_appearances(self) -> NDArray[np.int64]:
        """Rows whose pixels no row before them has, in order."""
        rows: dict[bytes, int] = {}
        for row, digest in enumerate(self.pixel_digests):
            rows.setdefault(digest, row)
        return np.array(list(rows.values()), dtype=np.int64)

    def without_labels(self) -> ImageSet:
        """The same images, of which nobody has said what they show."""
        return replace(self, labels=np.full(len(self), -1, dtype=np.int64), class_names=(), labelled=False)

    def take(self, indices: NDArray[np.int64]) -> ImageSet:
        """The rows named, in that order."""
        groups = None if self.groups is None else self.groups[indices]
        return replace(self, images=self.images[indices], labels=self.labels[indices], groups=groups)


def _require_encodable(class_names: Sequence[str], source: str) -> None:
    """Reports and events are UTF-8: an audit could not tell what it found of such a class."""
    together = "".join(class_names)
    if encodable(together) == together:
        return
    for number, name in enumerate(class_names):
        if encodable(name) != name:
            raise DataError(f"{source}: the name of class {number}, {quoted(name)}, is not UTF-8; rename it")


def to_pixels(images: Images) -> Pixels:
    """Storage to the model's door: ``(N, H, W, 3) uint8 -> (N, 3, H, W) float32 in [0, 1]``."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).astype(np.float32) / np.float32(255)


def to_images(pixels: Pixels) -> Images:
    """The model's door to storage, rounded to the nearest uint8: the inverse of `to_pixels`."""
    codes = np.clip(np.rint(pixels * np.float32(255)), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(codes.transpose(0, 2, 3, 1))


def on_grid(pixels: Pixels) -> Pixels:
    """Round pixels to what a uint8 image can hold; ``float32 in [0, 1]`` in and out."""
    rounded: Pixels = np.clip(np.rint(pixels * np.float32(255)), 0, 255).astype(np.float32) / np.float32(255)
    return rounded
