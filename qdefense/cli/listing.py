"""What `qdefense attacks` and `qdefense defenses` show: name, kind, paper, needs, settings with their defaults.

Of one that is named also what its module says of it: how it works, and where it is not as published.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from qdefense.cli.options import UNLIMITED, output_console, output_width, write_json
from qdefense.data.images import quoted
from qdefense.registry import Registry, flat_settings

About = Callable[[Any], dict[str, Any]]
_ITEM = re.compile(r"\n(?=- )")
_BOUNDS = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}

name_argument = click.argument("spec", metavar="[NAME[:key=value,...]]", required=False)
"""One to be explained, with these settings."""


def show_registered(registry: Registry[Any], about: About, format_: str, spec: str | None) -> None:
    """Print everything in a registry, or explain one entry; ``about`` says its ``needs``, and further facts.

    Raises:
        SpecError: there is no such entry, or no such setting.
    """
    if spec is not None:
        _explain(registry, spec, about, format_)
        return
    entries = [_entry(registry.create(name), about) for name in registry.names()]
    if format_ == "json":
        write_json(json.dumps(entries, indent=2))
    else:
        output_console().print(_table(registry.kind, entries, narrow=output_width() < UNLIMITED))


def _explain(registry: Registry[Any], spec: str, about: About, format_: str) -> None:
    chosen = registry.create(spec)
    cls = type(chosen)
    entry = _entry(registry.create(cls.name), about) | {"values": _values(chosen)}
    blocks = [*_blocks(sys.modules[cls.__module__]), *_blocks(cls)]
    if format_ == "json":
        explanation = "\n\n".join("\n".join(lines) for lines in blocks)
        write_json(json.dumps(entry | {"explanation": explanation}, indent=2))
        return
    console = output_console()
    console.print(Text(f"{entry['name']} ({_kind(entry)}): {entry['paper']}", style="bold"))
    console.print(Text(f"Needs: {', '.join(entry['needs'])}."))
    if entry.get("evades"):
        console.print(Text(f"Reported to evade: {', '.join(entry['evades'])}."))
    for lines in blocks:
        console.print(Text())
        _print_block(console, lines)
    console.print(Text())
    console.print(_settings_table(entry["settings"], entry["values"]))


def _values(chosen: Any) -> dict[str, Any]:
    """What is in force of each setting, and of those of a host."""
    told = flat_settings(chosen)
    own = {field.name: getattr(chosen, field.name) for field in dataclasses.fields(chosen)}
    named = {key: told[key] for key, value in own.items() if dataclasses.is_dataclass(value)}
    return own | named | {key: value for key, value in told.items() if "." in key}


def _blocks(documented: object) -> Iterator[list[str]]:
    """Paragraphs of a docstring, each a line, and the items of its lists; without the marks of code."""
    for block in (inspect.getdoc(documented) or "").split("\n\n"):
        yield [" ".join(item.replace("``", "").split()) for item in _ITEM.split(block)]


def _print_block(console: Console, lines: list[str]) -> None:
    for line in lines:
        cells = ("-", Text(line[2:])) if line.startswith("- ") else (Text(line),)
        grid = Table.grid(*(Column(overflow="fold") for _ in cells), padding=(0, 1))
        grid.add_row(*cells)
        console.print(grid)


def _settings_table(settings: dict[str, Any], values: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("may be", overflow="fold")
    for key, value in values.items():
        told = "(unset)" if value is None else f"{value}"
        shown = told if told.isprintable() else quoted(told)
        table.add_row(key.replace("_", "-"), Text(shown), Text(_allowed(settings.get(key, {}))))
    return table


def _allowed(schema: dict[str, Any]) -> str:
    """``whole, from 1`` or ``from 0 to 1``; choices by name; nothing of a text, or of a host's setting."""
    known = next((one for one in schema.get("anyOf", ()) if one.get("type") != "null"), schema)
    if "enum" in known:
        return ", ".join(map(str, known["enum"]))
    bounds = " ".join(f"{word} {known[key]}" for key, word in _BOUNDS.items() if key in known)
    return f"whole, {bounds}".rstrip(", ") if known.get("type") == "integer" else bounds


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
    kind = _kind(entry)
    heading.append(f"\n{kind if 'kind' in entry else f'({kind})'}", style="dim")
    return heading


def _kind(entry: dict[str, Any]) -> str:
    found: str = entry.get("kind") or entry["label_policy"]
    return found


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
