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
    """A table, and of which files its rows are: those that an older revision measured are not shown.

    Raise ``revision`` where rows are measured otherwise; neither the code nor the data are in what a row is kept by.
    """

    name: str
    revision: int = 1
    schemes: tuple[str, ...] = ("fp32",)


@dataclass(kw_only=True)
class KeptRows:
    """Those of a file, which is written after each network."""

    path: Path
    entries: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> KeptRows:
        """No rows where there is no file."""
        return cls(path=path, entries=json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {})

    def rows(
        self, table: Table, files: Mapping[str, str], measure: Callable[[], Iterable[str]] | None
    ) -> tuple[str, ...]:
        """Those of the network whose FP32 digest is ``files["fp32"]``.

        ``files`` names every file that has a part in them: rows that another one answered are measured again.
        ``measure`` is ``None`` where that cannot be done; then there are those that these files gave, or none.
        """
        key = f"{table.name} {files['fp32'][:DIGITS]}"
        wanted = {name: sha256[:DIGITS] for name, sha256 in sorted(files.items())}
        entry = self.entries.get(key)
        before = {} if entry is None or entry["revision"] != table.revision else entry["files"]
        if measure is not None and any(before.get(name) != sha256 for name, sha256 in wanted.items()):
            made = Entry(revision=table.revision, files=wanted, runtime=runtime().facts, rows=[*measure()])
            self.keep(key, made)
            return tuple(made["rows"])
        same = before and all(before.get(name, sha256) == sha256 for name, sha256 in wanted.items())
        return tuple(self.entries[key]["rows"]) if same else ()

    def keep(self, key: str, entry: Entry) -> None:
        """Write it down, beside what another script has written since."""
        self.entries = {**self.read(self.path).entries, key: entry}
        text = json.dumps(dict(sorted(self.entries.items())), indent=1, ensure_ascii=False)
        write_atomically(self.path, f"{text}\n".encode())

    def runtimes(self, table: Table) -> Iterator[str]:
        """The runtimes and CPUs that measured what is kept of a table."""
        ours = (entry for key, entry in self.entries.items() if key.rpartition(" ")[0] == table.name)
        made = (entry["runtime"] for entry in ours if entry["revision"] == table.revision)
        yield from sorted({f"ONNX Runtime {one['onnxruntime']}, {one['machine']} ({one['isa']})" for one in made})
