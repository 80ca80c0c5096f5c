"""Rows of the pages that are kept: what was measured of a network stays when the state of its trigger is lost.

A state that shows images of the data is not committed, and training anew may draw another one. `kept_rows.json` has the
rows by the digests of the files that answered, with the runtime; a network whose files are the same is not asked again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from qdefense.files import write_atomically
from qdefense.profile import runtime

DIGITS = 16


class Entry(TypedDict):
    """The rows of a network in a table."""

    revision: int
    files: dict[str, str]
    runtime: dict[str, str]
    rows: list[str]


@dataclass(frozen=True)
class Table:
    """A table, and how its rows are measured: older revisions' are not shown."""

    name: str
    revision: int = 1


@dataclass(kw_only=True)
class KeptRows:
    """Those of a file, which is written after each network."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> KeptRows:
        """None where there is no file."""
        return cls(path=path, entries=json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def rows(
        self, table: Table, files: Mapping[str, str], measure: Callable[[], Iterable[str]] | None
    ) -> tuple[str, ...]:
        """Those of the network whose FP32 digest is ``files["fp32"]``; the others are of whatever else has a part.

        Measured where a file is another one, or the revision. ``measure`` is ``None`` where that cannot be done: then
        those that were measured before with this FP32 file, or none.
        """
        key = f"{table.name} {files['fp32'][:DIGITS]}"
        asked = {name: sha256[:DIGITS] for name, sha256 in sorted(files.items())}
        entry = self.entries.get(key)
        if entry is not None and entry["revision"] != table.revision:
            entry = None
        if measure is not None and (entry is None or entry["files"] != asked):
            entry = self.keep(
                key, Entry(revision=table.revision, files=asked, runtime=runtime().facts, rows=[*measure()])
            )
        return () if entry is None else tuple(entry["rows"])

    def keep(self, key: str, entry: Entry) -> Entry:
        """Write it down."""
        self.entries[key] = entry
        text = json.dumps(dict(sorted(self.entries.items())), indent=1, ensure_ascii=False)
        write_atomically(self.path, f"{text}\n".encode())
        return entry

    def runtimes(self, table: Table) -> Iterator[str]:
        """The runtimes and CPUs that measured what is kept of a table."""
        made = (entry["runtime"] for key, entry in self.entries.items() if key.rpartition(" ")[0] == table.name)
        yield from sorted({f"ONNX Runtime {one['onnxruntime']}, {one['machine']} ({one['isa']})" for one in made})
