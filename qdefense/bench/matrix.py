"""``MATRIX.toml``: which cells to measure. Torch-free; names of attacks and defenses are looked up by `cells`.

::

    [bench]
    name = "blindspots"

    [data.gtsrb]
    path = "gtsrb"              # relative to $QDEFENSE_DATA, or to the folder of this file; "signs" is built in
    target_class = 12           # of attacks that do not name one; {badnets = 12, blended = 3} for one each
    epochs = 10

    [calibrations.clean256]
    images = 256

    [[grid]]
    data = ["gtsrb"]
    architectures = ["resnet8", "preactresnet18:width=16"]
    attacks = ["none", "badnets", "blended:alpha=0.1"]
    seeds = [0, 1, 2]
    precisions = ["fp32", "int8-static", "int8-dynamic", "int4:block-size=32"]
    calibrations = ["clean256"]
    arithmetics = ["as-run"]
    defenses = ["neural-cleanse:budget=quick"]
    accesses = ["session"]

Every list of a grid is an axis, and the matrix is the union of its grids, each cell once. Calibrations multiply only
the precisions that read ranges off images, arithmetics only those with products of 8-bit codes.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from qdefense.bench.records import Access
from qdefense.converters.runtime_graph import Arithmetic

_LARGEST_FILE = 1_000_000
_Count = Annotated[int, Field(ge=1)]
_Seed = Annotated[int, Field(ge=0)]
_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=60)]


class MatrixError(ValueError):
    """The matrix file cannot be used; the message says which key of which file, and what it may be."""


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BenchFacts(_Table):
    """``[bench]``: what holds for every cell."""

    name: _Name
    seed: _Seed = Field(
        default=0, description="of the evaluation's draws and of every defense; grids seed the training"
    )
    clean_images: _Count = Field(default=1000, description="clean test images that a defense sees")
    held_out_images: _Count = Field(default=1000, description="other test images that an input filter decides on")
    latency_rounds: _Count = Field(default=200, description="of --latency: calls of one image")
    latency_offline_rounds: _Count = Field(default=15, description="of --latency: calls of 64 images")


class DataTable(_Table):
    """``[data.NAME]``: where the images are, and how a network is trained on them."""

    path: str = Field(min_length=1)
    train_split: str | None = Field(default=None, description="null: the one that `train` would take")
    test_split: str | None = None
    train_limit: _Count | None = None
    test_limit: _Count | None = None
    target_class: _Seed | dict[str, _Seed] | None = Field(
        default=None, description="of every attack that does not name one; or a table by attack"
    )
    epochs: _Count | None = Field(default=None, description="null: the architecture's own")
    flip: bool = False


class CalibrationTable(_Table):
    """``[calibrations.NAME]``: the images that ranges of activations are read off."""

    images: Annotated[int, Field(ge=16)] = Field(default=256, description="at most; records say how many there were")
    split: str | None = Field(default=None, description="null: the training split")
    triggered: Annotated[float, Field(ge=0, le=1, strict=False)] = Field(
        default=0.0, description="share of the images that carry the trigger of the network's attack"
    )


class Grid(_Table):
    """``[[grid]]``: one axis per list."""

    data: tuple[str, ...] = Field(min_length=1, strict=False)
    architectures: tuple[str, ...] = Field(default=("resnet8",), min_length=1, strict=False)
    attacks: tuple[str, ...] = Field(default=("none",), min_length=1, strict=False)
    seeds: tuple[_Seed, ...] = Field(default=(0,), min_length=1, strict=False)
    precisions: tuple[str, ...] = Field(default=("fp32",), min_length=1, strict=False)
    calibrations: tuple[str, ...] = Field(default=(), strict=False)
    arithmetics: tuple[Arithmetic, ...] = Field(default=("as-run",), min_length=1, strict=False)
    defenses: tuple[str, ...] = Field(default=(), strict=False)
    accesses: tuple[Access, ...] = Field(default=("session",), min_length=1, strict=False)
    controls: bool = Field(default=True, description="put each trigger on the clean twin, too, where that is in a grid")


class Matrix(_Table):
    """The whole file; ``folder`` is where it lies."""

    bench: BenchFacts
    data: dict[_Name, DataTable] = Field(min_length=1)
    calibrations: dict[_Name, CalibrationTable] = Field(default_factory=dict)
    grid: tuple[Grid, ...] = Field(min_length=1, strict=False)
    folder: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _names_are_known(self) -> Matrix:
        for number, grid in enumerate(self.grid, start=1):
            for axis, names, known in (
                ("data", grid.data, self.data),
                ("calibrations", grid.calibrations, self.calibrations),
            ):
                for name in names:
                    if name not in known:
                        raise ValueError(
                            f"grid {number} names {axis} {name!r}, and there is no table [{axis}.{name}]; "
                            f"there is {', '.join(known) or 'none'}"
                        )
        return self


def read_matrix(path: Path) -> Matrix:
    """Read and check a matrix file.

    Raises:
        OSError: it cannot be read.
        MatrixError: it is no TOML, or a key is unknown, missing or out of range.
    """
    data = path.read_bytes()
    if len(data) > _LARGEST_FILE:
        raise MatrixError(f"{path.name}: {len(data):,} bytes are no matrix file; give a TOML file with [[grid]] tables")
    try:
        body: dict[str, Any] = tomllib.loads(data.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise MatrixError(f"{path.name} is no TOML: {error}") from error
    if "folder" in body:
        raise MatrixError(f"{path.name}: there is no key 'folder'; {_known(())}")
    try:
        matrix = Matrix.model_validate(body)
    except ValidationError as error:
        raise MatrixError(f"{path.name}: {_first_problem(error)}") from error
    return matrix.model_copy(update={"folder": path.resolve().parent})


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    place = tuple(part for part in problem["loc"] if part not in ("[key]", "constrained-int"))
    where = ".".join(str(part + 1) if isinstance(part, int) else part for part in place)
    if problem["type"] == "extra_forbidden":
        return f"there is no key {where!r}; {_known(place[:-1])}"
    if problem["type"] == "missing":
        return f"the key {where!r} is missing"
    message = problem["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
    return message if not where else f"{where}: {message}"


def _known(place: tuple[int | str, ...]) -> str:
    table: dict[str, type[BaseModel]] = {
        "bench": BenchFacts,
        "data": DataTable,
        "calibrations": CalibrationTable,
        "grid": Grid,
    }
    model: type[BaseModel] = table.get(str(place[0]), Matrix) if place else Matrix
    return f"known there: {', '.join(name for name in model.model_fields if name != 'folder')}"
