"""The folder of results: ``records.jsonl``, ``latency.jsonl``, ``manifest.json``, ``models/`` and ``triggers/``.

One process writes, and may die. A record is appended as one whole line and forced to disk; a last line that was torn is
dropped when the file is opened to write. Files and the manifest appear whole or not at all, a file before its record,
and the record before the manifest that names the file.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from qdefense.bench.datasets import DataRequest
from qdefense.bench.records import (
    RECORD,
    SCHEMA_VERSION,
    DataFacts,
    Manifest,
    ManifestEntry,
    Record,
    Replica,
)
from qdefense.bench.timing_records import FileLatency
from qdefense.data.images import DataError, first_line
from qdefense.files import write_atomically
from qdefense.trial import Truth, read_state_bytes, state_path, truth_path

RECORDS, LATENCY, MANIFEST, MODELS, LARGE = "records.jsonl", "latency.jsonl", "manifest.json", "models", "large"
TRIGGERS = "triggers"
COMMITTED_BYTES = 400_000
"""Larger files go to a folder that git ignores; their recipe and digest are in the manifest all the same.

So does the state of a trigger that shows training images, however small: results are published, data sets are not.
"""
_NAME_DIGITS = 16
_LATENCY = TypeAdapter(FileLatency)
_Line = TypeVar("_Line")


class StoreError(ValueError):
    """The folder of results cannot be used; the message says which file, which line, and what to do."""


class Store:
    """Records, manifest and files; ``for_writing`` alone may add to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.records: dict[str, Record] = {record.key: record for record in read_records(folder / RECORDS)}
        self.manifest = read_manifest(folder / MANIFEST)
        self._entries = {entry.recipe_sha256: entry for entry in self.manifest.entries}

    @classmethod
    @contextmanager
    def for_writing(cls, folder: Path) -> Iterator[Store]:
        """The store, while no other process can write to it.

        Raises:
            StoreError: another process does, or a file of the folder is broken.
            OSError: the folder cannot be made or written to.
        """
        (folder / MODELS / LARGE).mkdir(parents=True, exist_ok=True)
        write_atomically(folder / MODELS / LARGE / ".gitignore", b"*\n")
        with _locked(folder / MODELS / LARGE / ".lock"):
            _drop_torn_line(folder / RECORDS)
            _drop_torn_line(folder / LATENCY)
            _drop_parts(folder)
            yield cls(folder)

    def add(self, record: Record) -> None:
        """Append a record; it is on the disk when this returns."""
        _append(self.folder / RECORDS, record)
        self.records[record.key] = record

    @cached_property
    def latencies(self) -> dict[str, FileLatency]:
        """What was timed, by key.

        Raises:
            StoreError: a line of the file is no latency record.
        """
        return {record.key: record for record in read_latencies(self.folder / LATENCY)}

    def add_latency(self, record: FileLatency) -> None:
        """The same for what was timed."""
        self.latencies[record.key] = record
        _append(self.folder / LATENCY, record)

    def replicas(self, recipe_sha256: str) -> tuple[Replica, ...]:
        """The files that a recipe gave, oldest first."""
        entry = self._entries.get(recipe_sha256)
        return () if entry is None else entry.replicas

    def add_replica(self, recipe_sha256: str, recipe: dict[str, object], replica: Replica) -> None:
        """Name a file in the manifest, as the one that is measured from now on."""
        known, digest = self.replicas(recipe_sha256), replica.artifact_sha256
        if digest not in {old.artifact_sha256 for old in known}:
            known = (*known, replica)
        entry = ManifestEntry(
            recipe_sha256=recipe_sha256,
            recipe=recipe,
            replicas=known,
            measured=None if known[-1].artifact_sha256 == digest else digest,
        )
        if entry != self._entries.get(recipe_sha256):
            self._entries[recipe_sha256] = entry
            self._write_manifest(self.manifest.data)

    def measured(self, recipe_sha256: str) -> Replica | None:
        """The one of the files of a recipe that is measured; ``None`` where it gave none yet."""
        known, entry = self.replicas(recipe_sha256), self._entries.get(recipe_sha256)
        chosen = None if entry is None else entry.measured
        return next((one for one in known if one.artifact_sha256 == chosen), known[-1] if known else None)

    def use_another(self, recipe_sha256: str) -> Replica | None:
        """Measure from now on a file of the recipe that is at hand, the newest such; ``None`` where there is none."""
        found = next((one for one in reversed(self.replicas(recipe_sha256)) if self.has(one)), None)
        if found is not None:
            self.add_replica(recipe_sha256, self._entries[recipe_sha256].recipe, found)
        return found

    def has(self, replica: Replica) -> bool:
        """Whether a file is at hand and, where its truth names one, the state of its trigger."""
        sha256 = replica.artifact_sha256
        return self.model_path(sha256) is not None and not self.lacks_trigger(sha256)

    def knows_trigger(self, recipe_sha256: str) -> bool:
        """Whether a network is made, and the state of its trigger, where that has one, is at hand."""
        made = self.measured(recipe_sha256)
        return made is not None and not self.lacks_trigger(made.artifact_sha256)

    def data_facts(self, request: DataRequest) -> DataFacts | None:
        """What the manifest says of the set with this name, role, split, limit and seed."""
        return next((old for old in self.manifest.data if _same_request(old, request)), None)

    @property
    def images(self) -> dict[str, int]:
        """How many images a set has, by its digest."""
        return {facts.sha256: facts.images for facts in self.manifest.data}

    def add_data(self, facts: DataFacts) -> None:
        """Pin the digest of a set."""
        self._write_manifest((*self.manifest.data, facts))

    def _write_manifest(self, data: tuple[DataFacts, ...]) -> None:
        entries = tuple(self._entries[name] for name in sorted(self._entries))
        self.manifest = Manifest(schema_version=SCHEMA_VERSION, data=data, entries=entries)
        write_atomically(self.folder / MANIFEST, f"{self.manifest.model_dump_json(indent=1)}\n".encode())

    def add_model(
        self,
        model: bytes,
        sha256: str,
        truth: bytes | None = None,
        trigger: bytes | None = None,
        *,
        trigger_shows_images: bool = False,
    ) -> None:
        """Keep a file under a name that tells nothing, and first the truth about it and the state of its trigger."""
        if trigger is not None:
            place = self._large(sha256) if trigger_shows_images else self._small(sha256)
            write_atomically(state_path(place), trigger)
            if trigger_shows_images:
                state_path(self._small(sha256)).unlink(missing_ok=True)
        if truth is not None:
            write_atomically(truth_path(self._small(sha256)), truth)
        write_atomically(self._large(sha256) if len(model) > COMMITTED_BYTES else self._small(sha256), model)

    def trigger_picture(self, sha256: str) -> Path:
        """Where the picture of a network's trigger lies, or would."""
        return self.folder / TRIGGERS / picture_name(sha256)

    def add_trigger_picture(self, sha256: str, picture: bytes) -> None:
        """Keep a picture of a network's trigger; no record knows of it."""
        (self.folder / TRIGGERS).mkdir(exist_ok=True)
        write_atomically(self.trigger_picture(sha256), picture)

    def model_path(self, sha256: str) -> Path | None:
        """Where a file lies; ``None`` where it does not."""
        return next((path for path in (self._small(sha256), self._large(sha256)) if path.is_file()), None)

    def truth(self, sha256: str) -> Truth:
        """The truth about an FP32 file.

        Raises:
            StoreError: it is not there, or unreadable.
        """
        path = truth_path(self._small(sha256))
        try:
            return Truth.model_validate_json(path.read_bytes())
        except (OSError, ValidationError) as error:
            raise StoreError(f"{path}: no readable truth beside its network; delete both to train it again") from error

    def trigger(self, sha256: str) -> bytes | None:
        """The packed state of the trigger of an FP32 file; ``None`` where its settings tell the trigger.

        Raises:
            StoreError: the truth or the state that it names is not there, or is damaged.
        """
        truth, state = truth_path(self._small(sha256)), self._state(self._small(sha256).name)
        if not truth.is_file():  # no truth, and so no trigger to be read: what needs one says so
            return None
        return _trigger(truth, state, truth.stat().st_mtime_ns, state.stat().st_mtime_ns if state.is_file() else None)

    def lacks_trigger(self, sha256: str) -> bool:
        """Whether the truth names the state of a trigger, and it is not there; damaged ones are."""
        path = truth_path(self._small(sha256))
        if self._state(self._small(sha256).name).is_file() or not path.is_file():
            return False
        return _names_state(path, path.stat().st_mtime_ns)

    def truths(self) -> Iterator[tuple[Path, Truth]]:
        """Every readable truth with its network, by name."""
        for path in sorted((self.folder / MODELS).glob("*.truth.json")):
            name = path.name.removesuffix(".truth.json") + ".onnx"
            try:
                truth = Truth.model_validate_json(path.read_bytes())
            except ValidationError:  # of no network that this version made
                continue
            model = next(
                (place / name for place in (path.parent, path.parent / LARGE) if (place / name).is_file()), None
            )
            if model is not None:
                yield model, truth

    def given_trigger(self, model: Path, truth: Truth) -> bytes | None:
        """The packed trigger state of one of `truths`.

        Raises:
            DataError: it is not there, or is another's.
        """
        return read_state_bytes(self._state(model.name), truth)

    def _state(self, name: str) -> Path:
        """Where the state of a network's trigger lies; where it would, if it could be committed."""
        small, large = (state_path(place / name) for place in (self.folder / MODELS, self.folder / MODELS / LARGE))
        return large if large.is_file() else small

    def _small(self, sha256: str) -> Path:
        return self.folder / MODELS / f"{sha256[:_NAME_DIGITS]}.onnx"

    def _large(self, sha256: str) -> Path:
        return self.folder / MODELS / LARGE / f"{sha256[:_NAME_DIGITS]}.onnx"


def picture_name(sha256: str) -> str:
    """What the picture of a network's trigger is called: the network's name, which tells nothing."""
    return f"{sha256[:_NAME_DIGITS]}.png"


@lru_cache(maxsize=32)
def _trigger(truth: Path, state: Path, _changed: int, _state_changed: int | None) -> bytes | None:
    try:
        return read_state_bytes(state, Truth.model_validate_json(truth.read_bytes()))
    except (DataError, ValidationError) as error:
        raise StoreError(f"{truth}: {first_line(error)}; delete it and its network to do so") from error


@lru_cache(maxsize=32)
def _names_state(truth: Path, _changed: int) -> bool:
    try:
        return Truth.model_validate_json(truth.read_bytes()).trigger_sha256 is not None
    except ValidationError:  # told by whoever reads the truth
        return False


def read_model(path: Path, sha256: str) -> bytes:
    """The bytes of a file, which are those of its digest or nobody's.

    Raises:
        StoreError: they have another digest.
    """
    return _checked_bytes(path, sha256, path.stat().st_mtime_ns)


@lru_cache(maxsize=32)
def _checked_bytes(path: Path, sha256: str, _changed: int) -> bytes:
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256:
        raise StoreError(
            f"{path}: damaged or another file: sha256 {found[:16]}, {MANIFEST} has {sha256[:16]}; delete it, and it is "
            "made again"
        )
    return data


def read_records(path: Path) -> Iterator[Record]:
    """The whole lines of a records file, in order; a later record of a key replaces an earlier one.

    A line in which a number that must be there is null was a NaN or an infinity once: its cell counts as missing.

    Raises:
        StoreError: a line is no record.
    """
    yield from _read_lines(path, RECORD, "record", "delete the line to measure its cell again")


def read_latencies(path: Path) -> Iterator[FileLatency]:
    """The same of a latency file.

    Raises:
        StoreError: a line is no latency record.
    """
    yield from _read_lines(path, _LATENCY, "latency record", "delete the line to time its file again")


def _read_lines(path: Path, adapter: TypeAdapter[_Line], what: str, remedy: str) -> Iterator[_Line]:
    if not path.exists():
        return
    whole, _, _torn = path.read_bytes().rpartition(b"\n")
    for number, line in enumerate(whole.split(b"\n") if whole else (), start=1):
        try:
            yield adapter.validate_json(line)
        except ValidationError as error:
            if all(problem["type"] == "float_type" and problem["input"] is None for problem in error.errors()):
                continue
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "it"
            raise StoreError(f"{path}, line {number}: no {what} ({where}: {problem['msg']}); {remedy}") from error


def read_manifest(path: Path) -> Manifest:
    """The manifest; an empty one where there is none.

    Raises:
        StoreError: it is unreadable.
    """
    if not path.exists():
        return Manifest()
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise StoreError(f"{path}: no manifest ({error.errors()[0]['msg']}); restore it, or delete it") from error


def _same_request(one: DataFacts, other: DataRequest) -> bool:
    return all(getattr(one, name) == getattr(other, name) for name in ("name", "role", "split", "limit", "seed"))


def not_finite(value: object, place: str = "") -> str | None:
    """Where in a record or a part of it there is a NaN or an infinity, which JSON lacks: ``metrics.score``."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    if isinstance(value, BaseModel):
        return not_finite(dict(value), place)
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    found = (not_finite(part, f"{place}.{name}".removeprefix(".")) for name, part in inner)
    return next((one for one in found if one is not None), None)


def _append(path: Path, record: BaseModel) -> None:
    place = not_finite(record)
    if place is not None:
        raise StoreError(f"{path}: {place} of a record is not finite, and is not written")
    with path.open("ab") as file:
        file.write(record.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _drop_torn_line(path: Path) -> None:
    if not path.exists():
        return
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)


def _drop_parts(folder: Path) -> None:
    """What a killed process had not finished writing; nobody else writes here now."""
    for place in (folder, folder / MODELS, folder / MODELS / LARGE, folder / TRIGGERS):
        for part in place.glob(".*.part"):
            part.unlink()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """A lock that ends with the process, however it ends; where the system has none, there is none."""
    try:
        import fcntl  # noqa: PLC0415 (not on every platform)
    except ImportError:
        yield
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise StoreError(
                f"{path.parent.parent.parent}: another `qdefense bench` writes here; wait for it"
            ) from error
        yield
