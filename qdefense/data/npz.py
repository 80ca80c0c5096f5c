"""NumPy archives: ``images`` and ``labels``, or the names Keras and others use; never a pickle."""

from __future__ import annotations

import os
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray

from qdefense.data.images import DataError, Images, ImageSet, Labels, NoSplitError, first_line, quoted
from qdefense.data.selection import choose_rows, numbered_names, order_notes, to_labels

PLAIN_KEYS = (("images", "labels"), ("X", "y"), ("data", "labels"))
SPLIT_KEYS = {"train": ("x_train", "y_train"), "test": ("x_test", "y_test")}
CLASS_NAMES_KEY = "class_names"
# What a damaged archive can raise: RuntimeError where a member claims to be encrypted, TokenError and SyntaxError where
# the header of an array is no Python literal, SystemError where a text holds what is no character.
_BROKEN_ARCHIVE = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    SystemError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
# In steps of 1/255; what float16 loses on such a value is just below.
GRID_TOLERANCE = 1 / 16


def load_npz(path: Path, *, split: str | None, limit: int | None, seed: int) -> ImageSet:
    """Read one set from an ``.npz``.

    Images are ``(N, H, W, 3)`` or ``(N, 3, H, W)``, uint8, or floats in [0, 1] that stand on the uint8 grid; labels are
    integers of shape ``(N,)`` or ``(N, 1)``; ``class_names`` may name the classes.

    Args:
        path: the archive.
        split: ``None`` means "test" where the archive has splits, and all of it where it has none.
        limit: take this many rows, drawn by ``seed``; ``None`` takes all.
        seed: of the draw.

    Raises:
        DataError: not an archive of plain arrays, unknown keys, no such split, or arrays of another kind.
    """
    source = f"npz {path.name}"
    with _readable(source), path.open("rb") as file, _open_archive(file, source) as archive:
        keys = _find_keys(archive.files, split, source)
        images, labels = _require_labels(_read(archive, keys[0], source), _read(archive, keys[1], source), keys, source)
        rows = choose_rows(len(labels), limit=limit, seed=seed)
        names = _read_names(archive, source) or numbered_names(labels, source)
    if keys in SPLIT_KEYS.values():
        source = f"{source}/{split or 'test'}"
    codes = _to_codes(_to_nhwc(images, keys[0], source)[rows], keys[0], source)
    return ImageSet(
        images=codes,
        labels=labels[rows],
        class_names=names,
        source=source,
        detection=f"npz: the file ends in .npz and holds {' and '.join(keys)}",
        notes=order_notes(names),
    )


def save_npz(path: Path, image_set: ImageSet) -> None:
    """Write a set that `load_npz` reads back; the file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    names = np.array(image_set.class_names, dtype=np.str_)
    try:
        with draft.open("wb") as file:
            np.savez(file, allow_pickle=False, images=image_set.images, labels=image_set.labels, class_names=names)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@contextmanager
def _readable(source: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _BROKEN_ARCHIVE as error:
        if "allow_pickle" in str(error):
            hint = "save plain arrays: integers, floats or unicode, not dtype object"
            raise DataError(f"{source}: holds Python objects, which are never loaded; {hint}") from error
        raise DataError(
            f"{source}: not readable as npz ({first_line(error)}); write it again with numpy.savez"
        ) from error


def _open_archive(file: BinaryIO, source: str) -> NpzFile:
    if not zipfile.is_zipfile(file):
        raise DataError(f"{source}: not an npz archive; write it with numpy.savez")
    file.seek(0)
    # From a path numpy would leave the file open where the archive is damaged.
    archive: NpzFile = np.load(file, allow_pickle=False)
    return archive


def _find_keys(held: list[str], split: str | None, source: str) -> tuple[str, str]:
    plain = [pair for pair in PLAIN_KEYS if set(pair) <= set(held)]
    splits = {name: pair for name, pair in SPLIT_KEYS.items() if set(pair) <= set(held)}
    if len(plain) + bool(splits) != 1:
        known = ", ".join("+".join(pair) for pair in (*PLAIN_KEYS, *SPLIT_KEYS.values()))
        shown = ", ".join(quoted(key) for key in held[:10]) or "nothing"
        raise DataError(f"{source}: expected arrays of one naming ({known}); it holds {shown}")
    if plain:
        if split is not None:
            raise NoSplitError(f"{source}: no split {split!r}; it has no splits, leave the split out")
        return plain[0]
    if (split or "test") not in splits:
        raise NoSplitError(f"{source}: no split {split or 'test'!r}; it has {', '.join(map(repr, sorted(splits)))}")
    return splits[split or "test"]


def _read(archive: NpzFile, key: str, source: str) -> NDArray[Any]:
    array = archive[key]
    if not isinstance(array, np.ndarray):
        raise DataError(f"{source}: {key!r} is no array; write it again with numpy.savez")
    return array


def _require_labels(
    images: NDArray[Any], labels: NDArray[Any], keys: tuple[str, str], source: str
) -> tuple[NDArray[Any], Labels]:
    flat = labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        kind = f"{labels.dtype} {labels.shape}"
        raise DataError(f"{source}: {keys[1]!r} is {kind}, expected integers (N,) or (N, 1), a class number each")
    if images.ndim != 4 or len(images) != len(flat) or not len(flat):
        shapes = f"{keys[0]!r} is {images.shape} and {keys[1]!r} {labels.shape}"
        raise DataError(f"{source}: {shapes}, expected N images in 4 dimensions and N labels, at least one")
    return images, to_labels(flat, source)


def _read_names(archive: NpzFile, source: str) -> tuple[str, ...] | None:
    if CLASS_NAMES_KEY not in archive.files:
        return None
    names = _read(archive, CLASS_NAMES_KEY, source)
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(f"{source}: {CLASS_NAMES_KEY!r} is {names.dtype} {names.shape}, expected unicode (K,)")
    return tuple(names.tolist())


def _to_nhwc(images: NDArray[Any], key: str, source: str) -> NDArray[Any]:
    last, second = images.shape[3] == 3, images.shape[1] == 3
    if last == second:
        raise DataError(f"{source}: {key!r} is {images.shape}, expected (N, H, W, 3) or (N, 3, H, W) and not both")
    return images if last else images.transpose(0, 2, 3, 1)


def _to_codes(images: NDArray[Any], key: str, source: str) -> Images:
    if images.dtype == np.uint8:
        return np.ascontiguousarray(images)
    if images.dtype.kind != "f":
        raise DataError(f"{source}: {key!r} is {images.dtype}, expected uint8, or floats in [0, 1]")
    if not images.size:
        return np.zeros(images.shape, dtype=np.uint8)  # without pixels, which the set says of itself
    low, high = float(images.min()), float(images.max())
    if np.isnan(low):
        raise DataError(f"{source}: {key!r} holds values that are no numbers (NaN); save uint8, or floats in [0, 1]")
    if not 0 <= low <= high <= 1:
        hint = "undo the normalisation, or save uint8"
        raise DataError(
            f"{source}: {key!r} runs from {low:.4g} to {high:.4g}, expected uint8, or floats in [0, 1]; {hint}"
        )
    scaled = np.ascontiguousarray(images, dtype=np.float32) * 255
    codes = np.rint(scaled)
    off = float(np.abs(scaled - codes).max())
    if off > GRID_TOLERANCE:
        raise DataError(f"{source}: {key!r} is up to {off:.2f} of a step of 1/255 off the uint8 grid; save uint8")
    return codes.astype(np.uint8)
