"""GTSRB in its official folders: to train on, class folders of ``TRACK_FRAME.ppm``; to test on, one of all images."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qdefense.data.decoding import decode_files, require_inside
from qdefense.data.images import DataError, ImageSet, NoSplitError, first_line, folder_name, quoted
from qdefense.data.resizing import Resize
from qdefense.data.selection import choose_groups, choose_rows, track_groups

CLASSES = 43
CLASS_NAMES = tuple(str(number) for number in range(CLASSES))
"""The official files number the classes and name none."""
TEST_LABELS = "GT-final_test.csv"
MAX_CSV_BYTES = 1 << 24
_ROOTS = (".", "GTSRB")
# The official archives, torchvision's choice of them, BackdoorBench's; then a path that leads further down.
_TRAIN = ("Final_Training/Images", "Training", "Train", "Images", ".")
_TEST = ("Final_Test/Images", "Test", "Images", ".")
_CLASS_FOLDER = re.compile(r"\d{5}")
_TRAIN_IMAGE = re.compile(r"(\d{5})_\d{5}\.ppm")
_TEST_IMAGE = re.compile(r"(\d{5})\.ppm")


@dataclass(frozen=True, kw_only=True)
class GtsrbFolders:
    """Where the images of each split are: class folders to train on, the images themselves to test on."""

    root: Path
    places: dict[str, Path]

    @property
    def default_split(self) -> str:
        """The split a path leads right into, else "test"."""
        alone = next(iter(self.places)) if len(self.places) == 1 else None
        return alone if alone and self.places[alone] in (self.root, self.root / "Images") else "test"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One line of a CSV: the image, what a message calls it, its class and its track."""

    path: Path
    name: str
    label: int
    track: int


def find_gtsrb(path: Path) -> GtsrbFolders | None:
    """Look for the official folders in a path, in its ``GTSRB``, and where it leads right into one of them."""
    root = path.absolute()
    found = {"train": _first(root, _TRAIN, _holds_training_images), "test": _first(root, _TEST, _holds_test_images)}
    places = {split: place for split, place in found.items() if place is not None}
    return GtsrbFolders(root=root, places=places) if places else None


def load_gtsrb(
    found: GtsrbFolders, *, split: str | None, limit: int | None, seed: int, resize: Resize | None = None
) -> ImageSet:
    """Read one split; only the chosen images are decoded.

    Of the images to train on, 30 show one sign as a car comes closer: their track is in ``groups``, and ``limit``
    draws whole tracks, of which the last is cut.

    Args:
        found: what `find_gtsrb` found.
        split: "train" or "test"; ``None`` means the one that the path leads right into, else "test".
        limit: read this many images, drawn by ``seed``; ``None`` reads all.
        seed: of the draw.
        resize: to one size; the official images have many.

    Raises:
        DataError: no such split, a missing or malformed CSV, a missing or broken image, a label that cannot be,
            sizes that differ.
    """
    wanted = split or found.default_split
    source = f"GTSRB {folder_name(found.root)}/{wanted}"
    if wanted not in found.places:
        held = ", ".join(map(repr, sorted(found.places)))
        raise NoSplitError(f"{source}: no split {quoted(wanted)}; it has {held}")
    place = found.places[wanted]
    for folder in (place, *place.parents):
        if folder == found.root:
            break
        require_inside(folder, found.root, source)
    rows = list(_training_rows(place, source) if wanted == "train" else _test_rows(place, source))
    if not rows:
        raise DataError(f"{source}: the CSV files name no images; unpack the archives again")
    labels, tracks = (np.array(values, np.int64) for values in zip(*((r.label, r.track) for r in rows), strict=True))
    groups = track_groups(labels, tracks) if wanted == "train" else None
    chosen = (
        choose_rows(len(rows), limit=limit, seed=seed)
        if groups is None
        else choose_groups(groups, limit=limit, seed=seed)
    )
    picked = [rows[row] for row in chosen.tolist()]
    images, notes = decode_files(
        [row.path for row in picked], [row.name for row in picked], root=found.root, resize=resize, source=source
    )
    return ImageSet(
        images=images,
        labels=labels[chosen],
        class_names=CLASS_NAMES,
        source=source,
        detection=f"GTSRB: the folder holds {_shown(place, found.root)} with GTSRB's {wanted} images",
        notes=notes,
        groups=None if groups is None else groups[chosen],
    )


def _first(root: Path, places: tuple[str, ...], holds_images: Callable[[Path], bool]) -> Path | None:
    candidates = (root / folder / place for folder in _ROOTS for place in places)
    return next((place for place in candidates if place.is_dir() and holds_images(place)), None)


def _holds_training_images(place: Path) -> bool:
    return any((folder / f"GT-{folder.name}.csv").is_file() for folder in _class_folders(place))


def _class_folders(place: Path) -> list[Path]:
    return sorted(entry for entry in place.iterdir() if _CLASS_FOLDER.fullmatch(entry.name) and entry.is_dir())


def _holds_test_images(place: Path) -> bool:
    """The archive with the labels may not be unpacked yet, and that shall be told."""
    named = place.parent.name == "Final_Test" or any(place.glob("GT-final_test*.csv"))
    return named and any(_TEST_IMAGE.fullmatch(entry.name) for entry in place.iterdir())


def _shown(place: Path, root: Path) -> str:
    return "class folders" if place == root else str(place.relative_to(root))


def _training_rows(place: Path, source: str) -> Iterator[_Row]:
    for folder in _class_folders(place):
        require_inside(folder, place, source)
        file = folder / f"GT-{folder.name}.csv"
        if not file.is_file():
            raise DataError(f"{source}: {folder.name}/{file.name} is missing; unpack the archive again")
        for row in _read_csv(file, _TRAIN_IMAGE, folder, source):
            if row.label != int(folder.name):
                raise DataError(
                    f"{source}: {row.name} has ClassId {row.label} in the folder of class {int(folder.name)}; "
                    "unpack the archive again"
                )
            yield row


def _test_rows(place: Path, source: str) -> Iterator[_Row]:
    above = (place, *place.parents[:3])
    candidates = [folder / sub / TEST_LABELS for folder in above for sub in _ROOTS]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    if file is None:
        raise DataError(
            f"{source}: no {TEST_LABELS} with the labels, neither beside the images nor above them; "
            "unpack GTSRB_Final_Test_GT.zip there"
        )
    yield from _read_csv(file, _TEST_IMAGE, place, source)


def _read_csv(file: Path, form: re.Pattern[str], folder: Path, source: str) -> Iterator[_Row]:
    """The rows of ``Filename;...;ClassId``; images lie in ``folder``, and a name of another form could lead out."""
    reader = csv.DictReader(io.StringIO(_read_text(file, source), newline=""), delimiter=";")
    try:
        if not {"Filename", "ClassId"} <= set(reader.fieldnames or ()):
            raise DataError(f"{source}: {file.name} has no columns Filename and ClassId; unpack the archive again")
        for row in reader:
            where = f"{file.name} row {reader.line_num}"
            image, label = row["Filename"] or "", row["ClassId"] or ""
            match = form.fullmatch(image)
            if match is None:
                raise DataError(f"{source}: {where} names the image {quoted(image)}, expected {_FORMS[form]}")
            if not (label.isascii() and label.isdigit() and len(label) < 6 and int(label) < CLASSES):
                raise DataError(f"{source}: {where} has ClassId {quoted(label)}, expected 0 to {CLASSES - 1}")
            yield _Row(path=folder / image, name=f"{where}, image {image}", label=int(label), track=int(match[1]))
    except csv.Error as error:
        raise DataError(f"{source}: {file.name} is no readable CSV ({first_line(error)})") from error


_FORMS = {_TRAIN_IMAGE: "TRACK_FRAME.ppm such as 00000_00029.ppm", _TEST_IMAGE: "NUMBER.ppm such as 00000.ppm"}


def _read_text(file: Path, source: str) -> str:
    if file.stat().st_size > MAX_CSV_BYTES:
        raise DataError(f"{source}: {file.name} has more than {MAX_CSV_BYTES:,} bytes; unpack the archive again")
    try:
        return file.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise DataError(f"{source}: {file.name} is not UTF-8 text; unpack the archive again") from error
