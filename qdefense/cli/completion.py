"""`qdefense completion`."""

from __future__ import annotations

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

_SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "fish": FishComplete, "zsh": ZshComplete}

_EPILOG = """\b
In ~/.bashrc                   eval "$(qdefense completion bash)"
In ~/.zshrc                    eval "$(qdefense completion zsh)"
In ~/.config/fish/config.fish  qdefense completion fish | source
"""


@click.command("completion", epilog=_EPILOG)
@click.argument("shell", type=click.Choice(sorted(_SHELLS)))
def command(shell: str) -> None:
    """Print the completion script of a shell."""
    from qdefense.cli import _COMPLETION, group  # noqa: PLC0415 (a command's module, imported by that package)

    click.echo(_SHELLS[shell](group, {}, "qdefense", _COMPLETION).source())
