"""`qdefense attacks`."""

from __future__ import annotations

from typing import Any

import click

from qdefense.attacks import ATTACKS, Attack, BatchAttack
from qdefense.cli.listing import name_argument, show_registered
from qdefense.cli.options import verbose_option


@click.command("attacks")
@name_argument
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@verbose_option
def command(spec: str | None, format_: str, verbose: bool) -> None:  # noqa: ARG001 (read at the boundary)
    """List the attacks of `train --attack NAME:key=value,...`: settings, defaults, what they are known to evade.

    With a NAME, how it works and where it is not as published.
    """
    show_registered(ATTACKS, _about, format_, spec)


def _about(attack: Attack) -> dict[str, Any]:
    return {
        "label_policy": attack.label_policy,
        "poisons": "batches" if isinstance(attack, BatchAttack) else "training set",
        "needs": list(attack.needs),
        "evades": list(attack.evades),
    }
