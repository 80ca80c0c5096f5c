"""`qdefense attacks`."""

from __future__ import annotations

import click

from qdefense.attacks import ATTACKS, Attack
from qdefense.cli.listing import show_registered
from qdefense.cli.options import verbose_option


@click.command("attacks")
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@verbose_option
def command(format_: str, verbose: bool) -> None:  # noqa: ARG001 (read at the boundary)
    """List the attacks of `train --attack NAME:key=value,...`: settings, defaults, what they are known to evade."""
    show_registered(ATTACKS, _needs, format_)


def _needs(attack: type[Attack]) -> tuple[str, ...]:
    return (*attack.needs, attack.label_policy)
