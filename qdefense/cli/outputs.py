"""What a command writes never takes the place of what it reads."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import click

from qdefense.data.folders import SUFFIXES
from qdefense.data.images import DataError
from qdefense.files import check_writable

_INPUTS = {
    "calibration": "--calibration",
    "calibrations": "--calibration",
    "classes": "--classes",
    "contract": "--contract",
    "data": "--data",
    "inputs": "--inputs",
    "matrix": "--matrix",
    "model": "the model itself",
    "models": "one of the models",
    "reference": "--reference",
    "training_data": "--training-data",
}
"""Parameters of the commands that name what is read, and what people call it."""

_BUILT_IN = "signs"
_READ_THERE = (*SUFFIXES, ".csv", ".parquet")
"""Endings of what is read of a folder of data: a new file would be a row, a class or a shard more, or break the set."""
_READ = (*_READ_THERE, ".npz", ".tar.gz", ".tgz")
"""Those of files of data: such a one is kept in a folder, too. An earlier result of another ending may be replaced."""
_BATCHES = ("data_batch_", "test_batch", "batches.meta")
"""How the names of CIFAR-10's files begin, which have other endings or none."""


def check_output(target: Path) -> None:
    """Find out before long work that ``target`` can be written, and replaces nothing that the command reads.

    Raises:
        DataError: it is the model, data, calibration, contract, class names or results of this command, a file of
            them, or a new one that would be read as theirs.
        OSError: as `qdefense.files.check_writable`.
    """
    check_writable(target)
    keep_inputs(target)


def make_folder(folder: Path) -> None:
    """The folder of results, unless it would be a new one in a folder of data: a class more, without an image.

    Raises:
        DataError: it would.
        OSError: it cannot be made.
    """
    for path, called in () if folder.exists() else _inputs(click.get_current_context().params):
        if path.is_dir() and _lies_in(folder, path):
            raise DataError(f"{folder} would be read as a part of {called}; write to another folder")
    folder.mkdir(parents=True, exist_ok=True)


def keep_inputs(target: Path) -> None:
    """The same of a file that would be replaced or removed, or that would be new in a folder of data or results.

    A page may lie beside the records and the models of a folder of results.
    """
    params = click.get_current_context().params
    if params.get("results") is not None:
        _keep_results(target, params["results"])
    there = target.exists()
    for path, called in _inputs(params):
        if path.is_dir() and _is_named(target, _READ if there else _READ_THERE) and _lies_in(target, path):
            told = f"is a file of {called}, which the result would replace"
            raise DataError(
                f"{target} {told if there else f'would be read as a file of {called}'}; write to another folder"
            )
        if there and path.samefile(target):
            raise DataError(f"{target} is {called}, which the result would replace; write to another file")


def _keep_results(target: Path, folder: Path) -> None:
    from qdefense.bench.store import LATENCY, MANIFEST, MODELS, RECORDS, TRIGGERS  # noqa: PLC0415 (imports ONNX Runtime)

    kept = [folder / name for name in (RECORDS, LATENCY, MANIFEST)]
    folders = [folder / name for name in (MODELS, TRIGGERS)]
    if any(_same(target, path) for path in kept) or any(one.is_dir() and _lies_in(target, one) for one in folders):
        raise DataError(f"{target} is one of RESULTS, which the page would replace; write to another file")


def _same(target: Path, path: Path) -> bool:
    if target.exists() and path.exists():
        return path.samefile(target)
    return target.parent.resolve() / target.name == path.parent.resolve() / path.name


def keep_weights(target: Path, model: Path, external: Iterable[str]) -> None:
    """The same of the files with weights beside a model, whose names only reading it tells.

    Raises:
        DataError: ``target`` is one of them.
    """
    for name in external:
        path = model.parent / name
        if target.exists() and path.exists() and path.samefile(target):
            raise DataError(
                f"{target} holds weights of {model.name}, which the result would replace; write to another file"
            )


def _inputs(params: dict[str, Any]) -> Iterator[tuple[Path, str]]:
    """What is there of what this command reads."""
    for name, called in _INPUTS.items():
        given = params.get(name)
        for one in given if isinstance(given, tuple) else (given,):
            if one is not None and one != _BUILT_IN and _exists(Path(one)):
                yield Path(one), called
    for path in _read_by(params.get("attack")):
        if _exists(path):
            yield path, "what --attack reads"


def _read_by(attack: str | None) -> tuple[Path, ...]:
    if attack is None:
        return ()
    from qdefense.attacks import ATTACKS  # noqa: PLC0415 (making one imports torch)
    from qdefense.attacks.interfaces import data_read_by  # noqa: PLC0415 (as above)

    return tuple(map(Path, data_read_by(ATTACKS.create(attack))))


def _is_named(target: Path, endings: tuple[str, ...]) -> bool:
    """By the name of what a link leads to, too."""
    names = {target.name.lower(), target.resolve().name.lower()}
    return any(name.endswith(endings) or name.startswith(_BATCHES) for name in names)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a long list of classes is no file's name
        return False


def _lies_in(target: Path, folder: Path) -> bool:
    """By its name as well as where links lead it: either entry would be lost to the folder."""
    names = (Path(os.path.abspath(target)), target.parent.resolve() / target.name, target.resolve())  # noqa: PTH100
    return any(_same(parent, folder) for name in names for parent in name.parents)
