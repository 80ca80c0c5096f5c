"""Public data sets, fetched from where their authors keep them: resumed where cut, checked, then unpacked."""

from __future__ import annotations

import hashlib
import http.client
import re
import shutil
import stat
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from qdefense.data.images import DataError, first_line, quoted

Progress = Callable[[str, int, int], None]
TIMEOUT_SECONDS = 30.0
CHUNK_BYTES = 1 << 18
MAX_DOWNLOAD_BYTES = 1 << 30
"""The largest file here has 276 MB."""
MAX_UNPACKED_BYTES = 1 << 31
MAX_MEMBERS = 100_000
"""The largest archive here has 39,296."""
_MEGABYTE = 1_000_000
_RANGE = re.compile(r"bytes (\d+)-")
_CUT = "the connection was cut after {:,} bytes; call again to go on from there"
Response = Any
"""`http.client.HTTPResponse`, which urllib does not promise."""


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file of a data set, and its published checksum."""

    url: str
    algorithm: Literal["sha256", "md5"]
    digest: str
    unpack_into: str | None = None
    """Under the folder of the set; ``None`` where the archive is read as it is."""

    @property
    def name(self) -> str:
        """What it is called at home."""
        return self.url.rpartition("/")[2]


@dataclass(frozen=True, kw_only=True)
class PublicSet:
    """The files of one data set, and what to give to ``--data`` once they are there."""

    files: tuple[RemoteFile, ...]
    data: str


_ERDA = "https://sid.erda.dk/public/archives/daaeac0d7ce1152aea9b61d9f1e19370"
PUBLIC_SETS = {
    "cifar10": PublicSet(
        files=(
            RemoteFile(
                url="https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
                algorithm="sha256",
                # Keras, keras/src/datasets/cifar10.py. The authors' page and torchvision give this file's md5,
                # c58f30108f718f92721af3b95e74349a.
                digest="6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            ),
        ),
        data="cifar-10-python.tar.gz",
    ),
    "gtsrb": PublicSet(
        files=(
            RemoteFile(
                url=f"{_ERDA}/GTSRB_Final_Training_Images.zip",
                algorithm="md5",
                # DeepMind, dm_nevis/datasets_storage/handlers/german_tsr.py; torchvision fetches another training set.
                digest="f33fd80ac59bff73c82d25ab499e03a3",
                unpack_into=".",
            ),
            RemoteFile(
                url=f"{_ERDA}/GTSRB_Final_Test_Images.zip",
                algorithm="md5",
                # torchvision, torchvision/datasets/gtsrb.py
                digest="c7e4e6327067d32654124b0fe9e82185",
                unpack_into=".",
            ),
            RemoteFile(
                url=f"{_ERDA}/GTSRB_Final_Test_GT.zip",
                algorithm="md5",
                # torchvision, torchvision/datasets/gtsrb.py
                digest="fe31e9c9270bbcd7b84b7f21a9d9d9e5",
                unpack_into="GTSRB",
            ),
        ),
        data="GTSRB",
    ),
}


def fetch(name: str, folder: Path, *, progress: Progress) -> Path:
    """Fetch a data set and unpack what is not read in place.

    Archives that are there already are checked and kept; a folder that is there already is taken as it is.

    Args:
        name: one of `PUBLIC_SETS`.
        folder: where to; it is made.
        progress: is told a stage and how many megabytes or files of how many are done.

    Returns:
        What to give to ``--data``.

    Raises:
        DataError: no network, an HTTP error, a connection that was cut (call again to resume), a wrong checksum, or an
            archive with members that could do harm.
        OSError: the folder cannot be written.
    """
    public = PUBLIC_SETS[name]
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / public.data
    if any(file.unpack_into is not None for file in public.files) and target.exists():
        return target
    archives = [(file, download(file, folder, progress=progress)) for file in public.files]
    packed = [(path, file.unpack_into) for file, path in archives if file.unpack_into is not None]
    if packed:
        _unpack_all(packed, target, progress)
    return target


def download(file: RemoteFile, folder: Path, *, progress: Progress) -> Path:
    """Fetch one file to ``NAME.part``, go on where an earlier call was cut, and rename it once its checksum is right.

    Raises:
        DataError: as `fetch`.
        OSError: the folder cannot be written.
    """
    target, part = folder / file.name, folder / f"{file.name}.part"
    if target.exists():
        found = _digest(target, file.algorithm)
        if found != file.digest:
            raise DataError(f"{target}: {_mismatch(file, found)}; remove the file and call again")
        return target
    _receive(file, part, progress)
    found = _digest(part, file.algorithm)
    if found != file.digest:
        part.unlink()
        raise DataError(f"{file.url}: {_mismatch(file, found)}; it was removed, call again or {_by_hand(file, part)}")
    part.rename(target)
    return target


def _mismatch(file: RemoteFile, found: str) -> str:
    return f"{file.algorithm} is {found}, expected {file.digest}"


def _by_hand(file: RemoteFile, part: Path) -> str:
    return f"download it by hand and put it there as {part.with_name(file.name)}"


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.new(algorithm, usedforsecurity=False)).hexdigest()


def _receive(file: RemoteFile, part: Path, progress: Progress) -> None:
    start = part.stat().st_size if part.exists() else 0
    if start and _digest(part, file.algorithm) == file.digest:
        return  # an earlier call ended between the last byte and the rename
    with _request(file, part, start) as response:
        if response.status != http.client.PARTIAL_CONTENT:
            start = 0  # the server does not know ranges and sends all of it
        elif _range_start(response) != start:
            raise DataError(f"{file.url}: the server sends another part than was asked for; {_by_hand(file, part)}")
        _copy(response, file, part, start, progress)


def _request(file: RemoteFile, part: Path, start: int) -> Response:
    headers = {"User-Agent": "qdefense", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(file.url, headers=headers)  # noqa: S310 (the addresses stand above)
    try:
        response: Response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            if error.code == http.client.REQUESTED_RANGE_NOT_SATISFIABLE and start:
                return _start_anew(file, part)
            answer = f"{error.code} {error.reason}"
        raise DataError(f"{file.url}: the server answers {answer}; {_by_hand(file, part)}") from None
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{file.url}: not reached ({_reason_of(error)}); check the network, or {_by_hand(file, part)}"
        ) from error
    return response


def _start_anew(file: RemoteFile, part: Path) -> Response:
    """What is there is longer than the file, or as long and not the file."""
    part.unlink()
    return _request(file, part, 0)


def _reason_of(error: Exception) -> str:
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    return first_line(reason if isinstance(reason, Exception) else error)


def _range_start(response: Response) -> int | None:
    match = _RANGE.match(response.headers.get("Content-Range", ""))
    return None if match is None else int(match[1])


def _copy(response: Response, file: RemoteFile, part: Path, start: int, progress: Progress) -> None:
    length = response.headers.get("Content-Length", "")
    total = start + int(length) if length.isascii() and length.isdigit() else None
    done = start
    with part.open("ab" if start else "wb") as output:
        while chunk := _read(response, file, done):
            done += len(chunk)
            if done > MAX_DOWNLOAD_BYTES:
                raise DataError(f"{file.url}: sends more than {MAX_DOWNLOAD_BYTES:,} bytes; {_by_hand(file, part)}")
            output.write(chunk)
            progress(f"{file.name}, MB", done // _MEGABYTE, (total or done) // _MEGABYTE)
    if total is not None and done < total:
        raise DataError(f"{file.url}: {_CUT.format(done)}")


def _read(response: Response, file: RemoteFile, done: int) -> bytes:
    try:
        chunk: bytes = response.read(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise DataError(f"{file.url}: {_CUT.format(done)} ({first_line(error)})") from error
    return chunk


def _unpack_all(packed: list[tuple[Path, str]], target: Path, progress: Progress) -> None:
    """Unpack beside the target, which appears whole or not at all."""
    draft = target.with_name(f"{target.name}.part")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        for archive, place in packed:
            unpack(archive, draft / place, progress=progress)
        (draft / target.name).rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def unpack(path: Path, folder: Path, *, progress: Progress) -> None:
    """Unpack a zip archive, after a look at every member.

    Raises:
        DataError: no zip archive, or a member that leads out of the folder, is no file, or is too large.
        OSError: the folder cannot be written.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = _checked_members(archive, path.name)
            for count, member in enumerate(members, 1):
                _unpack_member(archive, member, folder)
                progress(f"unpacking {path.name}", count, len(members))
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(f"{path}: not readable as zip ({first_line(error)}); remove it and fetch it again") from error


def _checked_members(archive: zipfile.ZipFile, name: str) -> list[zipfile.ZipInfo]:
    members = archive.infolist()
    size = sum(member.file_size for member in members)
    if len(members) > MAX_MEMBERS or size > MAX_UNPACKED_BYTES:
        raise DataError(f"{name}: {len(members):,} members of {size:,} bytes are more than the data set has")
    for member in members:
        shown = f"{name}: member {quoted(member.filename)}"
        path, kind = PurePosixPath(member.filename), stat.S_IFMT(member.external_attr >> 16)
        if path.is_absolute() or ".." in path.parts or "\\" in member.filename or ":" in member.filename:
            raise DataError(f"{shown} leads out of the archive; remove it and fetch it again")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{shown} is no file or folder but a link or a device; remove it and fetch it again")
    return members


def _unpack_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, folder: Path) -> None:
    target = folder / member.filename
    if member.is_dir():
        target.mkdir(parents=True, exist_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, target.open("wb") as output:
        shutil.copyfileobj(source, output)
