"""CIFAR-10 as its authors publish it: the python and the binary version, as a folder or as the ``.tar.gz`` itself."""

from __future__ import annotations

import gzip
import stat
import tarfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import DataError, Images, ImageSet, Labels, NoSplitError, first_line, folder_name, quoted
from qdefense.data.pickled import load_batch, load_names
from qdefense.data.selection import choose_rows

SIDE = 32
PIXELS = 3 * SIDE * SIDE
RECORD = 1 + PIXELS
BATCHES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
FOLDERS = ("cifar-10-batches-py", "cifar-10-batches-bin")
MAX_FILE_BYTES = 1 << 26
"""A batch has 31 MB."""
MAX_ARCHIVE_BYTES = 1 << 29
"""The archive unpacks to 186 MB."""
MAX_MEMBERS = 1000
"""The archive has nine."""
_DRAINED_BYTES = 1 << 20
_REMEDY = "fetch the official archive again: qdefense data fetch cifar10"

Batch = tuple[NDArray[np.uint8], Labels]
"""``(n, 3072) uint8``, the planes R, G, B; ``(n,) int64``."""


class _Place(Protocol):
    """Where the files of one version lie."""

    names: frozenset[str]

    def read(self, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        """These files, in whatever order is cheap."""


@dataclass(frozen=True, kw_only=True)
class _Version:
    name: str
    suffix: str
    meta: str
    parse: Callable[[bytes, str], Batch]
    parse_names: Callable[[bytes, str], tuple[str, ...]]

    def found_in(self, names: frozenset[str]) -> str | None:
        """The batch that gives the version away, if it is there."""
        batches = (f"{batch}{self.suffix}" for batch in (*BATCHES["test"], *BATCHES["train"]))
        return next((batch for batch in batches if batch in names), None)


def find_cifar(path: Path) -> Path | None:
    """The folder with the batches: the path itself, or the folder of the official archives in it."""
    for folder in (path, *(path / name for name in FOLDERS)):
        if folder.is_dir() and _version_of(_names_in(folder)) is not None:
            return folder
    return None


def load_cifar(path: Path, *, split: str | None, limit: int | None, seed: int) -> ImageSet:
    """Read one split of a folder that `find_cifar` found, or of a ``.tar.gz``, which is read in place.

    Args:
        path: the folder or the archive.
        split: "train" or "test"; ``None`` means "test".
        limit: take this many rows, drawn by ``seed``; ``None`` takes all.
        seed: of the draw.

    Raises:
        DataError: no such split, a missing or malformed file, a pickle that wants more than arrays, or an archive with
            members that could do harm.
    """
    if path.is_dir():
        return _load(_Folder(path), folder_name(path), "folder", split=split, limit=limit, seed=seed)
    with _opened(path) as archive:
        return _load(_Archive(archive, path.name), path.name, "archive", split=split, limit=limit, seed=seed)


def _load(place: _Place, name: str, kind: str, *, split: str | None, limit: int | None, seed: int) -> ImageSet:
    version = _version_of(place.names)
    if version is None:
        raise DataError(f"{name}: no CIFAR-10; {_looked_for(place.names)}")
    wanted = split or "test"
    source = f"{version.name} {name}/{wanted}"
    files = _files_of(version, wanted, place.names, source)
    content = {file: version.parse(data, f"{source}: {file}") for file, data in place.read(files)}
    ((_, meta),) = place.read((version.meta,))
    class_names = version.parse_names(meta, f"{source}: {version.meta}")
    batches = [content[file] for file in files]
    labels = np.concatenate([labels for _, labels in batches])
    rows = choose_rows(len(labels), limit=limit, seed=seed)
    return ImageSet(
        images=_take([data for data, _ in batches], rows),
        labels=labels[rows],
        class_names=class_names,
        source=source,
        detection=f"{version.name}: the {kind} holds {version.meta} and {version.found_in(place.names)}",
    )


def _version_of(names: frozenset[str]) -> _Version | None:
    return next((version for version in _VERSIONS if version.found_in(names) is not None), None)


def _looked_for(names: frozenset[str]) -> str:
    shown = ", ".join(quoted(name) for name in sorted(names)[:5]) or "nothing"
    return f"looked for test_batch, data_batch_1 and the like, with or without .bin; it holds {shown}"


def _files_of(version: _Version, split: str, names: frozenset[str], source: str) -> tuple[str, ...]:
    needed = {name: tuple(f"{batch}{version.suffix}" for batch in batches) for name, batches in BATCHES.items()}
    held = [name for name, files in sorted(needed.items()) if names & set(files)]
    if split not in held:
        raise NoSplitError(f"{source}: no split {quoted(split)}; it has {', '.join(map(repr, held))}")
    missing = [file for file in (*needed[split], version.meta) if file not in names]
    if missing:
        raise DataError(f"{source}: {', '.join(missing)} missing; {_REMEDY}")
    return needed[split]


def _take(batches: list[NDArray[np.uint8]], rows: NDArray[np.int64]) -> Images:
    images = np.empty((len(rows), SIDE, SIDE, 3), dtype=np.uint8)
    start = 0
    for batch in batches:
        places = np.flatnonzero((rows >= start) & (rows < start + len(batch)))
        planes = batch[rows[places] - start].reshape(-1, 3, SIDE, SIDE)
        images[places] = planes.transpose(0, 2, 3, 1)
        start += len(batch)
    return images


def _parse_python(data: bytes, name: str) -> Batch:
    pixels, labels = load_batch(data, name)
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS or not len(pixels):
        raise DataError(f"{name}: data is {pixels.dtype} {pixels.shape}, expected uint8 (N, {PIXELS}); {_REMEDY}")
    if len(labels) != len(pixels):
        raise DataError(f"{name}: {len(pixels)} images but {len(labels)} labels; {_REMEDY}")
    return pixels, labels


def _parse_binary(data: bytes, name: str) -> Batch:
    if not data or len(data) % RECORD:
        raise DataError(
            f"{name}: {len(data)} bytes are no whole number of records of {RECORD} (a label and {PIXELS} pixels); "
            f"{_REMEDY}"
        )
    records = np.frombuffer(data, dtype=np.uint8).reshape(-1, RECORD)
    return records[:, 1:], records[:, 0].astype(np.int64)


def _parse_names(data: bytes, name: str) -> tuple[str, ...]:
    try:
        return tuple(line.strip() for line in data.decode().splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: the class names are not UTF-8; {_REMEDY}") from error


_VERSIONS = (
    _Version(name="CIFAR-10 python", suffix="", meta="batches.meta", parse=_parse_python, parse_names=load_names),
    _Version(
        name="CIFAR-10 binary", suffix=".bin", meta="batches.meta.txt", parse=_parse_binary, parse_names=_parse_names
    ),
)


def _names_in(folder: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in folder.iterdir())


class _Folder:
    def __init__(self, path: Path) -> None:
        self._path = path
        self.names = _names_in(path)

    def read(self, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            path = self._path / name
            facts = path.stat()
            if not stat.S_ISREG(facts.st_mode):
                raise DataError(f"{self._path.name}: {name} is no regular file; {_REMEDY}")
            _require_small(facts.st_size, f"{self._path.name}: {name}")
            yield name, path.read_bytes()


class _Archive:
    """The regular files of one folder of a tar, whose every member has been looked at."""

    def __init__(self, archive: tarfile.TarFile, name: str) -> None:
        self._archive = archive
        self._members = _find_batches(_checked_members(archive, name), name)
        self.names = frozenset(self._members)

    def read(self, names: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
        # Front to back: a step backwards decompresses everything again.
        for name in sorted(names, key=lambda name: self._members[name].offset):
            file = self._archive.extractfile(self._members[name])
            if file is not None:
                yield name, file.read()


class _BoundedGzip(gzip.GzipFile):
    """Gives up before a compressed bomb has filled the memory or taken minutes."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= MAX_FILE_BYTES:
            raise DataError(f"{Path(self.name).name}: a header claims {size} bytes, more than a batch has; {_REMEDY}")
        return super().read(size)

    def seek(self, offset: int, whence: int = 0) -> int:
        if not 0 <= offset <= MAX_ARCHIVE_BYTES:
            name = Path(self.name).name
            raise DataError(f"{name}: unpacks to more than {MAX_ARCHIVE_BYTES:,} bytes, CIFAR-10 to 186 MB; {_REMEDY}")
        return super().seek(offset, whence)


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    name = path.name
    try:
        with _BoundedGzip(path) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            yield archive
    except DataError:
        raise
    except (OSError, EOFError, zlib.error, tarfile.TarError, ValueError, OverflowError, RecursionError) as error:
        raise DataError(f"{name}: not readable as .tar.gz ({first_line(error)}); {_REMEDY}") from error


def _checked_members(archive: tarfile.TarFile, name: str) -> list[tarfile.TarInfo]:
    members: list[tarfile.TarInfo] = []
    for member in archive:
        shown = f"{name}: member {quoted(member.name)}"
        path = PurePosixPath(member.name)
        if path.is_absolute() or ".." in path.parts:
            raise DataError(f"{shown} leads out of the archive; {_REMEDY}")
        if not (member.isreg() or member.isdir()):
            raise DataError(f"{shown} is no regular file or folder but a link or a device; {_REMEDY}")
        _require_small(member.size, shown)
        members.append(member)
        if len(members) > MAX_MEMBERS:
            raise DataError(f"{name}: more than {MAX_MEMBERS} members, CIFAR-10 has nine; {_REMEDY}")
    _check_sum(archive)
    return [member for member in members if member.isreg()]


def _check_sum(archive: tarfile.TarFile) -> None:
    """Read to the end, where gzip compares its checksum: a damaged header looks like the end of the archive to tar."""
    stream = archive.fileobj
    while stream is not None and stream.read(_DRAINED_BYTES):
        stream.seek(stream.tell())  # which looks at how much has been unpacked


def _require_small(size: int, shown: str) -> None:
    if not 0 <= size <= MAX_FILE_BYTES:
        raise DataError(f"{shown} has {size:,} bytes, more than any file of CIFAR-10; {_REMEDY}")


def _find_batches(members: list[tarfile.TarInfo], name: str) -> dict[str, tarfile.TarInfo]:
    """The files of the one folder that holds batches; where none does, all files by their whole names."""
    folders: dict[str, dict[str, tarfile.TarInfo]] = {}
    for member in members:
        path = PurePosixPath(member.name)
        files = folders.setdefault(str(path.parent), {})
        if path.name in files:
            raise DataError(f"{name}: two members are called {quoted(member.name)}; {_REMEDY}")
        files[path.name] = member
    found = [folder for folder, files in folders.items() if _version_of(frozenset(files)) is not None]
    if len(found) > 1:
        raise DataError(f"{name}: CIFAR-10 batches in {len(found)} folders, {quoted(found[0])} and others; keep one")
    return folders[found[0]] if found else {member.name: member for member in members}
