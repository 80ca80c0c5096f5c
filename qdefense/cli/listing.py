"""What `qdefense attacks` and `qdefense defenses` show: name, kind, paper, needs, settings with their defaults."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

from pydantic import TypeAdapter
from rich.table import Table
from rich.text import Text

from qdefense.cli.options import UNLIMITED, output_console, output_width, write_json
from qdefense.registry import Registry, flat_settings

About = Callable[[Any], dict[str, Any]]


def show_registered(registry: Registry[Any], about: About, format_: str) -> None:
    """Print everything in a registry; ``about`` says of one entry its ``needs``, and further facts for the JSON."""
    entries = [_entry(registry.create(name), about) for name in registry.names()]
    if format_ == "json":
        write_json(json.dumps(entries, indent=2))
    else:
        output_console().print(_table(registry.kind, entries, narrow=output_width() < UNLIMITED))


def _entry(example: Any, about: About) -> dict[str, Any]:
    cls = type(example)
    return {
        "name": cls.name,
        "paper": cls.paper,
        "summary": (inspect.getdoc(cls) or "").partition("\n")[0],
        **about(example),
        "settings": {field.name: _setting(example, field.name) for field in dataclasses.fields(example)},
    }


def _setting(example: Any, name: str) -> dict[str, Any]:
    schema = TypeAdapter(type(example)).json_schema()["properties"][name]
    default = flat_settings(example).get(name, schema.get("default"))
    return {key: value for key, value in schema.items() if key != "title"} | {"default": default}


def _table(kind: str, entries: list[dict[str, Any]], *, narrow: bool) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 1, 0))
    table.add_column(kind, no_wrap=True)
    table.add_column("paper", overflow="fold", max_width=14 if narrow else None)
    table.add_column("needs", overflow="fold", max_width=12 if narrow else None)
    table.add_column("settings and defaults", overflow="fold")
    for entry in entries:
        settings = [_shown(key, value["default"]) for key, value in entry["settings"].items()]
        table.add_row(_heading(entry), Text(entry["paper"]), _needed(entry), Text("\n".join(settings)))
    return table


def _heading(entry: dict[str, Any]) -> Text:
    """Its name and, below it, what kind of entry it is: the kind of a defense, the label policy of an attack."""
    heading = Text(entry["name"])
    kind = entry["kind"] if "kind" in entry else f"({entry['label_policy']})"
    heading.append(f"\n{kind}", style="dim")
    return heading


def _needed(entry: dict[str, Any]) -> Text:
    """What an entry needs and, in the same narrow column, what an attack evades: 80 columns hold no fifth."""
    needed = Text("\n".join(entry["needs"]))
    if entry.get("evades"):
        needed.append("\nevades", style="dim")
        needed.append("".join(f"\n{evaded}" for evaded in entry["evades"]))
    return needed


def _shown(key: str, default: object) -> str:
    name = key.replace("_", "-")
    return f"{name} (unset)" if default is None else f"{name}={default}"
