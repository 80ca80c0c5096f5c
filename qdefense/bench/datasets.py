"""The images of a matrix: found on whatever machine reads them, and refused where they are not those read first."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from qdefense.bench.matrix import Matrix, MatrixError
from qdefense.bench.records import DataFacts
from qdefense.data.images import DataError, ImageSet
from qdefense.data.opening import open_data, training_split

Role = Literal["train", "test"]
_SETS_KEPT = 4


class MissingDataError(DataError):
    """This machine does not have the images; another one may."""


@dataclass(frozen=True, kw_only=True)
class DataRequest:
    """Which images to read. ``folder`` is the matrix file's; ``role`` decides the split where none is named."""

    name: str
    path: str
    folder: str
    role: Role
    split: str | None = None
    limit: int | None = None
    seed: int = 0

    @property
    def location(self) -> str:
        """Where this machine has them: relative to $QDEFENSE_DATA, else to the folder of the matrix file."""
        if self.path == "signs":
            return self.path
        return str(Path(os.environ.get("QDEFENSE_DATA") or self.folder) / self.path)


def train_request(matrix: Matrix, name: str) -> DataRequest:
    """What networks are trained on."""
    table = matrix.data[name]
    return _request(matrix, name, role="train", split=table.train_split, limit=table.train_limit)


def test_request(matrix: Matrix, name: str) -> DataRequest:
    """What files are measured on."""
    table = matrix.data[name]
    return _request(matrix, name, role="test", split=table.test_split, limit=table.test_limit)


def calibration_request(matrix: Matrix, name: str, calibration: str) -> DataRequest:
    """What ranges are read off, before any trigger is put on it."""
    table = matrix.calibrations[calibration]
    split = table.split or matrix.data[name].train_split
    return _request(matrix, name, role="train", split=split, limit=table.images)


def _request(matrix: Matrix, name: str, *, role: Role, split: str | None, limit: int | None) -> DataRequest:
    return DataRequest(
        name=name,
        path=matrix.data[name].path,
        folder=str(matrix.folder),
        role=role,
        split=split,
        limit=limit,
        seed=matrix.bench.seed,
    )


@lru_cache(maxsize=_SETS_KEPT)
def read_images(request: DataRequest) -> ImageSet:
    """Read them; the last few sets stay in memory.

    Raises:
        DataError: they are not there, have no labels or cannot be used.
    """
    place = request.location
    split = request.split or (training_split(place) if request.role == "train" else None)
    images = open_data(place, split=split, limit=request.limit, seed=request.seed)
    if not images.labelled:
        raise DataError(f"{images.source}: a matrix needs labelled images; put those of each class into a folder")
    return images


def require_apart(train: DataFacts, test: DataFacts) -> None:
    """Refuse test images that networks are trained on: what a file does on them says nothing of others.

    Raises:
        MatrixError: both are one set, or drawn from one; other limits do not part them.
    """
    if test.sha256 == train.sha256 or test.source == train.source:
        raise MatrixError(_not_apart(test.name, f"training and test images both come from {train.source!r}"))


@lru_cache(maxsize=_SETS_KEPT)
def require_unseen(train: DataRequest, test: DataRequest) -> float:
    """The same, told from the pixels: both sets are read. The share of test images that are training images, too.

    Raises:
        MatrixError: every test image is a training image, too, whatever its label.
        DataError: as `read_images`.
    """
    known, images = set(_pixel_digests(train)), _pixel_digests(test)
    seen = sum(image in known for image in images)
    if seen == len(images):
        raise MatrixError(_not_apart(test.name, "every test image is among the training images"))
    return seen / len(images)


def _pixel_digests(request: DataRequest) -> list[bytes]:
    return read_images(request).pixel_digests


def _not_apart(name: str, problem: str) -> str:
    return (
        f"data.{name}: {problem}; name two splits with train_split and test_split, or divide the images into folders "
        "train and test (train_limit and test_limit draw from all of a split, and part nothing)"
    )


def facts_of(request: DataRequest) -> DataFacts:
    """What the manifest keeps of them."""
    images = read_images(request)
    return DataFacts(
        name=request.name,
        role=request.role,
        split=request.split,
        limit=request.limit,
        seed=request.seed,
        sha256=images.digest,
        images=len(images),
        classes=len(images.class_names),
        height=images.images.shape[1],
        width=images.images.shape[2],
        source=images.source,
    )


@dataclass(frozen=True, kw_only=True)
class PinnedData:
    """A request and the digest of the images that it gave first."""

    request: DataRequest
    facts: DataFacts

    def read(self) -> ImageSet:
        """The images.

        Raises:
            MissingDataError: as `read_images`, or they are others than those that the manifest names.
        """
        try:
            images = read_images(self.request)
        except DataError as error:
            raise MissingDataError(str(error)) from error
        found = _digest(self.request)
        if found != self.facts.sha256:
            raise MissingDataError(
                f"{images.source} at {self.request.location}: sha256 {found[:16]}, the manifest has "
                f"{self.facts.sha256[:16]} for {self.request.name!r}; bring the images back, or measure the new ones "
                "into another --output-dir"
            )
        return images


@lru_cache(maxsize=_SETS_KEPT)
def _digest(request: DataRequest) -> str:
    return read_images(request).digest
