"""`qdefense defenses`."""

from __future__ import annotations

from typing import Any

import click

from qdefense.cli.listing import name_argument, show_registered
from qdefense.cli.options import verbose_option
from qdefense.defenses.registered import DEFENSES


@click.command("defenses")
@name_argument
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@verbose_option
def command(spec: str | None, format_: str, verbose: bool) -> None:  # noqa: ARG001 (read at the boundary)
    """List the defenses of `audit --defense` and `repair --method NAME:key=value,...`, with settings and defaults.

    With a NAME, how it works and where it is not as published.
    """
    show_registered(DEFENSES, _about, format_, spec)


def _about(defense: Any) -> dict[str, Any]:
    return {"kind": defense.kind, "needs": sorted(need.value for need in defense.needs)}
