"""The one entry to every data set: what ``DATA`` means on the command line."""

from __future__ import annotations

import zipfile
from pathlib import Path

from qdefense.data.huggingface import list_splits, load_parquet
from qdefense.data.images import DataError, ImageSet
from qdefense.data.npz import SPLIT_KEYS, load_npz
from qdefense.data.signs import load_signs

_KNOWN = "'signs' (built in), a folder with {split}-*.parquet in it or in data/, a .parquet or an .npz file"


def open_data(spec: str, *, split: str | None = None, limit: int | None = None, seed: int = 0) -> ImageSet:
    """Open labelled images by name or path; the format is detected.

    Args:
        spec: ``signs`` for the built-in set (write ``./signs`` for a path of that name), or a path.
        split: ``None`` means "test", or the one split a single file holds.
        limit: read only this many images, drawn without repeats by ``seed``; ``None`` reads all, in order.
        seed: of the draw.

    Raises:
        DataError: nothing there, no known format, no such split, or data that cannot be used.
    """
    if spec == "signs":
        return load_signs(split=split, limit=limit, seed=seed)
    path = Path(spec)
    if not path.exists():
        raise DataError(f"{spec!r}: no such file or folder; data is {_KNOWN}")
    if (path.is_file() and path.suffix == ".parquet") or list_splits(path):
        return load_parquet(path, split=split, limit=limit, seed=seed)
    if path.is_file() and path.suffix == ".npz":
        return load_npz(path, split=split, limit=limit, seed=seed)
    raise DataError(f"{spec!r}: unknown data format; looked for {_KNOWN}; {_what_exists(path)}")


def training_split(spec: str) -> str | None:
    """The split to train or calibrate on where none was named: "train", or all of a file that has no splits."""
    path = Path(spec)
    if spec == "signs" or not path.is_file():
        return "train"
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        return "train" if f"{SPLIT_KEYS['train'][0]}.npy" in archive.namelist() else None


def _what_exists(path: Path) -> str:
    if not path.is_dir():
        return f"the file ends in {path.suffix!r}"
    names = sorted(entry.name for entry in path.iterdir())
    shown = ", ".join(repr(name[:60]) for name in names[:5]) or "nothing"
    return f"the folder holds {shown}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
