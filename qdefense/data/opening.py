"""The one entry to every data set: what ``DATA`` means on the command line."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from qdefense.data.cifar import find_cifar, load_cifar
from qdefense.data.folders import find_folders, load_folders
from qdefense.data.gtsrb import find_gtsrb, load_gtsrb
from qdefense.data.huggingface import list_splits, load_parquet
from qdefense.data.images import DataError, ImageSet, quoted
from qdefense.data.npz import SPLIT_KEYS, load_npz
from qdefense.data.resizing import Resize, resize_set
from qdefense.data.signs import load_signs

_KNOWN = (
    "'signs' (built in); a .parquet, .npz or CIFAR-10 .tar.gz file; a folder with {split}-*.parquet (there or in "
    "data/), CIFAR-10's batches, GTSRB's Final_Training or Final_Test, folders of images (one a class, or train, val "
    "and test with those), or images"
)
_ARCHIVES = (".tar.gz", ".tgz")
_NAMED: ContextVar[Mapping[str, str]] = ContextVar("names of data, and where they are")


@dataclass(frozen=True, kw_only=True)
class _Format:
    """``load(split=, limit=, seed=, resize=)``, and the split to train on."""

    load: Callable[..., ImageSet]
    training_split: str | None = "train"


@contextmanager
def named_data(places: Mapping[str, str]) -> Iterator[None]:
    """Within it these names are data, before any path is: settings name them alike wherever a machine has them."""
    before = _NAMED.set(places)
    try:
        yield
    finally:
        _NAMED.reset(before)


def open_data(
    spec: str, *, split: str | None = None, limit: int | None = None, seed: int = 0, resize: Resize | None = None
) -> ImageSet:
    """Open images by name or path; the format is detected, and the set's ``detection`` says how.

    A file is told by its ending. A folder is the first of these that it can be: parquet shards; CIFAR-10, python before
    binary; GTSRB's official folders; train, val and test with class folders in them; class folders; images without
    labels.

    Args:
        spec: ``signs`` for the built-in set (write ``./signs`` for a path of that name), a name of `named_data`, or a
            path.
        split: ``None`` means "test", or the one split a single file holds, or all of a folder without splits.
        limit: read only this many images, drawn without repeats by ``seed``; ``None`` reads all, in order.
        seed: of the draw.
        resize: to one size; ``None`` leaves them as they are.

    Raises:
        DataError: nothing there, no known format, no such split, or data that cannot be used.
    """
    spec = _place(spec)
    if spec != "signs" and (not spec or not Path(spec).exists()):  # Path("") is the current folder
        raise DataError(f"{spec!r}: no such file or folder; {_where_else(spec)}data is {_KNOWN}")
    found = _detect(spec)
    if found is None:
        raise DataError(f"{spec!r}: unknown data format; looked for {_KNOWN}; {_what_exists(Path(spec))}")
    return found.load(split=split, limit=limit, seed=seed, resize=resize)


def _where_else(spec: str) -> str:
    """Of a name that `bench` would find below ``QDEFENSE_DATA``; all other commands take paths."""
    root = os.environ.get("QDEFENSE_DATA")
    place = None if not root or not spec else Path(root) / spec
    return f"there is {str(place)!r}; " if place is not None and place.exists() else ""


def training_split(spec: str) -> str | None:
    """The split to train or calibrate on where none was named: "train", or all of what has no splits."""
    spec = _place(spec)
    found = _detect(spec)
    if found is None:
        return None if Path(spec).is_file() else "train"
    return found.training_split


def _place(spec: str) -> str:
    return _NAMED.get({}).get(spec, spec)


def _detect(spec: str) -> _Format | None:
    if spec == "signs":
        return _Format(load=_then_resized(load_signs))
    path = Path(spec)
    if path.is_file():
        return _detect_file(path)
    return _detect_folder(path) if path.is_dir() else None


def _detect_file(path: Path) -> _Format | None:
    if path.suffix == ".parquet":
        return _Format(load=partial(load_parquet, path), training_split=None)
    if path.suffix == ".npz":
        return _Format(load=_then_resized(partial(load_npz, path)), training_split=_training_split_of_npz(path))
    if path.name.lower().endswith(_ARCHIVES):
        return _Format(load=_then_resized(partial(load_cifar, path)))
    return None


def _detect_folder(path: Path) -> _Format | None:
    if list_splits(path):
        return _Format(load=partial(load_parquet, path))
    if (cifar := find_cifar(path)) is not None:
        return _Format(load=_then_resized(partial(load_cifar, cifar)))
    if (gtsrb := find_gtsrb(path)) is not None:
        return _Format(load=partial(load_gtsrb, gtsrb))
    if (folders := find_folders(path)) is not None:
        return _Format(load=partial(load_folders, folders), training_split="train" if folders.splits else None)
    return None


def _then_resized(load: Callable[..., ImageSet]) -> Callable[..., ImageSet]:
    """For images that already are arrays of one size: resize the chosen rows."""

    def load_resized(*, resize: Resize | None, **options: object) -> ImageSet:
        return resize_set(load(**options), resize)

    return load_resized


def _training_split_of_npz(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            return "train" if f"{SPLIT_KEYS['train'][0]}.npy" in archive.namelist() else None
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return None  # what is wrong with it is told where it is read


def _what_exists(path: Path) -> str:
    if not path.is_dir():
        return f"the file ends in {path.suffix[:60]!r}"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(quoted(name) for name in names[:5]) or "nothing"
    return f"the folder holds {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
