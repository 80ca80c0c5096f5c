"""Options that several commands share, and the progress bar on stderr."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Never, TextIO, TypeVar

import click
from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.segment import Segment

F = TypeVar("F", bound=Callable[..., Any])
ProgressBar = Callable[[str, int, int], None]
_UNSHOWN = re.compile(r"[^ -~\n]")
UNLIMITED = 1_000_000
"""Characters in a line: more than any has."""


verbose_option = click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
worker_verbose_option = click.option(
    "-v", "--verbose", is_flag=True, help="Show tracebacks and what libraries write to stderr."
)
"""The same of a command that works in a process of its own, whose stderr is else not shown."""


def data_options(function: F) -> F:
    """``--data``, ``--split`` and ``--limit``."""
    for option in (
        click.option(
            "--limit",
            type=click.IntRange(min=1),
            help="Use this many images, drawn by the seed; the certificate needs 256.",
        ),
        click.option("--split", help="Which split of the data.  [default: test]"),
        click.option(
            "--data", required=True, help="'signs' (built in), or a path; `qdefense data show` says what it is."
        ),
    ):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """``--seed`` and ``--threads``."""
    for option in (
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            default=default_threads,
            help="Threads.  [default: CPUs, at most 4]",
        ),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of every draw."),
    ):
        function = option(function)
    return function


class NumberRange(click.FloatRange):
    """A range that NaN is not in: it is neither below nor above anything, and so passes click's own."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number, or the command ends with a line about it."""
        number = float(super().convert(value, param, ctx))
        if math.isnan(number):
            self.fail(f"{value!r} is no number in the range {self._describe_range()}.", param, ctx)
        return number


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``224x224``.

    Raises:
        click.BadParameter: it is not that.
    """
    match = re.fullmatch(r"([1-9]\d{0,3})x([1-9]\d{0,3})", text, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text[:60]!r} is not HEIGHTxWIDTH, such as 32x32", param_hint="--size")
    return int(match[1]), int(match[2])


def default_threads() -> int:
    """The CPUs this process may use, at most 4: small networks gain nothing from more."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 4)


@contextmanager
def progress_bar() -> Iterator[ProgressBar]:
    """A bar on stderr where that is a terminal, silence elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.completed}/{task.total}"))
    with Progress(
        *columns,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not _is_terminal(sys.stderr),
    ) as progress:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total)
            progress.update(tasks[stage], completed=done, total=total)

        yield advance


def _is_terminal(stream: TextIO | None) -> bool:
    # Not what rich thinks: FORCE_COLOR makes every stream a terminal for it, build logs among them.
    return stream is not None and stream.isatty()


class _Output(Console):
    """Leaves a reader that is gone to the boundary: rich would exit with 1, which means a finding."""

    def on_broken_pipe(self) -> Never:
        raise BrokenPipeError


class _Lines(RenderHook):
    """Lays out for a width of its own and ends lines where their text ends; the console's own width would crop."""

    def __init__(self, width: int) -> None:
        self._width = width

    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        """What is printed, laid out."""
        return [_Trimmed(renderable, self._width) for renderable in renderables]


@dataclass(frozen=True)
class _Trimmed:
    renderable: ConsoleRenderable
    width: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        """Its lines, of any length, without trailing blanks."""
        for line in Segment.split_lines(console.render(self.renderable, options.update(max_width=self.width))):
            while line and not line[-1].text.strip(" "):
                line.pop()
            if line:
                text, style, control = line.pop()
                line.append(Segment(text.rstrip(" "), style, control))
            yield from line
            yield Segment.line()


def output_console() -> Console:
    """stdout, with colour only on a terminal.

    As wide as the terminal or COLUMNS say. In a file nothing is wrapped: a folded value is found by no search, and
    differs from another for its length alone.
    """
    console = _Output(width=UNLIMITED, soft_wrap=False, highlight=False, markup=False, emoji=False)
    console.push_render_hook(_Lines(output_width()))
    return console


def output_width() -> int:
    """Characters in a line of stdout, `UNLIMITED` where neither a terminal nor COLUMNS limit them."""
    columns = os.environ.get("COLUMNS", "")
    limited = _is_terminal(sys.stdout) or (columns.isdecimal() and int(columns) > 0)
    return Console().width if limited else UNLIMITED


def write_json(text: str) -> None:
    """A JSON text to stdout, in UTF-8 whatever the terminal speaks.

    What a terminal would obey or hide, and JSON leaves alone in the words of a file, is written as its code.
    """
    click.echo(_UNSHOWN.sub(_coded, text).encode())


def _coded(found: re.Match[str]) -> str:
    """A character as JSON's escape of its 16 bits, beyond those as two; one that can be shown as it is."""
    char = found[0]
    if char.isprintable():
        return char
    units = char.encode("utf-16-be").hex()
    return "".join(f"\\u{units[place : place + 4]}" for place in range(0, len(units), 4))
