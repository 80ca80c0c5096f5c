"""The bench's tables as Markdown, for a README that one command makes."""

from __future__ import annotations

import re
from collections.abc import Iterator

from qdefense.bench.facts import environment_rows, network_rows, omissions
from qdefense.bench.sheets import Block, Cell, Sheet, sheets_of
from qdefense.bench.summary import BenchReport
from qdefense.report.escaping import harmless

_SPECIAL = str.maketrans({char: f"\\{char}" for char in "\\`*_{}[]<>#&~$!"} | {"|": "&#124;"})
_NOTHING = "<!-- -->"
_LINKED = re.compile(
    r"(?<=[@#])(?=[\w.-])|(?<=:)(?=//)|(?<=www)(?=\.)|(?<=GH)(?=-\d)|(?<=mailto)(?=:)|(?<=xmpp)(?=:)", re.IGNORECASE
)
"""Where GitHub sees a mention, an issue, an address or a mail. It looks after Markdown, so no backslash helps there."""


def render_markdown(report: BenchReport) -> str:
    """Every table, with what its columns mean; what is foreign is text and no markup."""
    return "\n".join(_lines(report))


def _lines(report: BenchReport) -> Iterator[str]:
    yield f"# {escaped(report.name)}"
    yield ""
    for sentence in omissions(report):
        yield f"- {escaped(sentence)}"
    yield ""
    for sheet in sheets_of(report):
        yield from _section(sheet)
    yield "## Where it comes from"
    yield ""
    digests = ((name, f"sha256 {digest}") for name, digest in report.digests.items())
    for name, value in (*digests, *network_rows(report), *environment_rows(report)):
        yield f"- {escaped(name)}: {escaped(value)}"
    yield ""


def _section(sheet: Sheet) -> Iterator[str]:
    yield f"## {sheet.form.title}"
    yield ""
    for note in sheet.form.notes:
        yield escaped(note)
        yield ""
    for block in sheet.blocks:
        yield from _table(block, sheet.form.labels)
    if not sheet.blocks:
        yield escaped(sheet.form.empty)
        yield ""


def _table(block: Block, labels: int) -> Iterator[str]:
    yield f"### {escaped(block.heading)}"
    yield ""
    yield _row(map(escaped, block.columns))
    yield _row("---" if place < labels else "---:" for place in range(len(block.columns)))
    for row in block.rows:
        yield _row(map(_told, row))
    yield ""


def _told(cell: Cell) -> str:
    return "<br>".join(map(escaped, cell.lines))


def _row(cells: Iterator[str] | map[str]) -> str:
    return f"| {' | '.join(cells)} |"


def escaped(text: str) -> str:
    """A line in which nothing is Markdown, HTML or what GitHub makes a link of; it reads as before."""
    return _NOTHING.join(part.translate(_SPECIAL) for part in _LINKED.split(harmless(text)))
