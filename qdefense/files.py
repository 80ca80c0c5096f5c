"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(target: Path, data: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: the folder is missing, full or read-only, or ``target`` is there and no regular file.
    """
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    with _named(target):
        _check_regular(target)
        try:
            partial.write_bytes(data)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Find out before long work whether `write_atomically` could write ``target`` now.

    Raises:
        OSError: as there.
    """
    with _named(target):
        _check_regular(target)
        with tempfile.TemporaryFile(dir=target.parent):
            pass


def reason_of(error: OSError) -> str:
    """One line: which file, what about it, and what to do next."""
    if error.filename is None:
        return str(error)
    return f"{error.filename}: {error.strerror}; check the path and its permissions"


def _check_regular(target: Path) -> None:
    if target.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
    if target.exists() and not target.is_file():
        raise FileExistsError(errno.EEXIST, "exists and is no regular file", str(target))


@contextmanager
def _named(target: Path) -> Iterator[None]:
    """Errors name the file that was asked for, not a part of it that nobody knows."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
