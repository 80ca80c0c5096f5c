"""Folders of images: ``root/class/*.png`` with or without splits above the classes, or images alone, without labels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdefense.data.decoding import decode_files, require_inside
from qdefense.data.images import DataError, ImageSet, Labels, NoSplitError, folder_name, quoted
from qdefense.data.resizing import Resize
from qdefense.data.selection import choose_rows, order_notes

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp")
SPLITS = ("test", "train", "val")


@dataclass(frozen=True, kw_only=True)
class ImageFolders:
    """A folder of images and its splits; none where classes or images lie right in it."""

    root: Path
    splits: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Listing:
    """The images and folders of one folder, sorted; hidden ones are left out, other files counted."""

    images: list[Path]
    folders: list[Path]
    others: int


def find_folders(path: Path) -> ImageFolders | None:
    """Tell what kind of folder it is.

    In this order: ``train``, ``val`` and ``test``, if one of them holds folders of images (a class may be called
    "train", too); folders of images; images.
    """
    candidates = [name for name in SPLITS if (path / name).is_dir()]
    if any(_holds_folders(path / name) for name in candidates):
        splits = [name for name in candidates if _holds_folders(path / name) or _holds_images(path / name)]
        return ImageFolders(root=path, splits=tuple(splits))
    if _holds_folders(path) or _holds_images(path):
        return ImageFolders(root=path, splits=())
    return None


def load_folders(
    found: ImageFolders, *, split: str | None, limit: int | None, seed: int, resize: Resize | None = None
) -> ImageSet:
    """Read one split, or all of a folder without; only the chosen images are decoded.

    Class names are the names of the folders, sorted as strings, as torchvision does; where there are splits, those of
    all of them together, so that a class that one split lacks does not shift the others. A folder of images alone
    gives a set without labels.

    Args:
        found: what `find_folders` found.
        split: ``None`` means "test" where there are splits.
        limit: read this many images, drawn by ``seed``; ``None`` reads all, sorted.
        seed: of the draw.
        resize: to one size; ``None`` where the images have one.

    Raises:
        DataError: no such split, a class without images, a link that leads out of the folder, a broken image, sizes
            that differ.
    """
    place, source = _choose(found, split)
    own = _list(place, found.root, source)
    names = _class_names(found, source)
    if own.folders:
        paths, labels, notes = _labelled(own, names, found.root, source)
    else:
        paths, labels, notes = own.images, np.full(len(own.images), -1, dtype=np.int64), _left_out(own.others)
    rows = choose_rows(len(paths), limit=limit, seed=seed)
    picked = [paths[row] for row in rows.tolist()]
    shown = [quoted(os.fspath(path.relative_to(place))) for path in picked]
    images, decoded_notes = decode_files(picked, shown, root=found.root, resize=resize, source=source)
    labelled = bool(own.folders)
    return ImageSet(
        images=images,
        labels=labels[rows],
        class_names=names if labelled else (),
        source=source,
        detection=_why(found, own, place),
        labelled=labelled,
        notes=(*(order_notes(names) if labelled else ()), *notes, *decoded_notes),
    )


def _choose(found: ImageFolders, split: str | None) -> tuple[Path, str]:
    name = folder_name(found.root)
    if not found.splits:
        source = f"images {name}"
        if split is not None:
            raise NoSplitError(f"{source}: no split {quoted(split)}; it has no splits, leave the split out")
        return found.root, source
    wanted = split or "test"
    source = f"images {name}/{wanted}"
    if wanted not in found.splits:
        raise NoSplitError(f"{source}: no split {quoted(wanted)}; it has {', '.join(map(repr, found.splits))}")
    require_inside(found.root / wanted, found.root, source)
    return found.root / wanted, source


def _why(found: ImageFolders, own: _Listing, place: Path) -> str:
    where = f"{place.name}/" if found.splits else "the folder"
    if own.folders:
        return f"image folder: {where} holds {len(own.folders)} folders, one for each class"
    return f"unlabelled images: {where} holds {len(own.images)} images and no folder of images"


def _class_names(found: ImageFolders, source: str) -> tuple[str, ...]:
    places = [found.root / split for split in found.splits] or [found.root]
    names: set[str] = set()
    for place in places:
        names |= {folder.name for folder in _list(place, found.root, source).folders}
    for name in sorted(names):
        if not any(_holds_images(place / name) for place in places):
            raise DataError(f"{source}: folder {quoted(name)} holds no images; is it a class? remove it, or fill it")
    return tuple(sorted(names))


def _labelled(
    own: _Listing, names: tuple[str, ...], root: Path, source: str
) -> tuple[list[Path], Labels, tuple[str, ...]]:
    paths: list[Path] = []
    labels: list[int] = []
    numbers = {name: number for number, name in enumerate(names)}
    others = own.others + len(own.images)
    for folder in own.folders:
        listing = _list(folder, root, source)
        paths += listing.images
        labels += [numbers[folder.name]] * len(listing.images)
        others += listing.others + len(listing.folders)
    lacking = len(names) - len(set(labels))
    notes = (f"{lacking} of the {len(names)} classes of all splits have no image in this one",) if lacking else ()
    return paths, np.array(labels, dtype=np.int64), (*notes, *_left_out(others))


def _left_out(others: int) -> tuple[str, ...]:
    kinds = ", ".join(suffix.removeprefix(".") for suffix in SUFFIXES)
    return (f"left out: {others} files or folders that are no {kinds} of a class",) if others else ()


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        yield from (entry for entry in entries if not entry.name.startswith("."))


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES)


def _holds_images(folder: Path) -> bool:
    return folder.is_dir() and any(_is_image(entry.name) and not entry.is_dir() for entry in _entries(folder))


def _holds_folders(folder: Path) -> bool:
    """Folders of images, that is."""
    return any(entry.is_dir() and _holds_images(folder / entry.name) for entry in _entries(folder))


def _list(folder: Path, root: Path, source: str) -> _Listing:
    images: list[Path] = []
    folders: list[Path] = []
    others = 0
    for entry in _entries(folder):
        path = folder / entry.name
        if entry.is_dir():
            require_inside(path, root, source)
            folders.append(path)
        elif _is_image(entry.name):
            images.append(path)
        else:
            others += 1
    images.sort(key=lambda path: path.name)
    folders.sort(key=lambda path: path.name)
    return _Listing(images=images, folders=folders, others=others)
