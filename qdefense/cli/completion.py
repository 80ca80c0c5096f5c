"""`qdefense completion`."""

from __future__ import annotations

import re
from pathlib import Path

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    add_completion_class,
)

_PACKAGE = Path(__file__).parents[1]
_REGISTERED = re.compile(r'(?ms)^@(?:ATTACKS|DEFENSES)\.register\n.*?^    name: ClassVar\[str\] = "([^"]+)"')
_NAMED_BY = {
    ("audit", "--defense"): ("defenses/scans", "defenses/dataset", "defenses/filters"),
    ("calibrate", "--defense"): ("defenses/scans",),
    ("repair", "--method"): ("defenses/repairs",),
    ("train", "--attack"): ("attacks",),
    ("attacks", "attacks"): ("attacks",),
    ("defenses", "defenses"): ("defenses/scans", "defenses/dataset", "defenses/filters", "defenses/repairs"),
}
"""Folders of the classes that an option names, or the word behind a command: by command and the word before."""


def registered_in(*folders: str) -> list[str]:
    """Names of what these folders of the package register, sorted, read off the source: to import it takes seconds."""
    files = [path for folder in folders for path in (_PACKAGE / folder).glob("*.py")]
    return sorted(name for path in files for name in _REGISTERED.findall(path.read_text(encoding="utf-8")))


class _Names(ShellComplete):
    """Completes names of attacks and defenses without importing the command, which would import torch on each TAB."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem]:
        """The names, or what click finds."""
        *_, previous = ("", *(word for word in args if word != "="))  # bash takes "=" for a word of its own
        option, begun = previous, incomplete.removeprefix("=")
        if incomplete.startswith("--") and "=" in incomplete:
            option, _, begun = incomplete.partition("=")
        folders = _NAMED_BY.get((args[0] if args else "", option))
        if folders is None or begun.startswith("-"):
            return super().get_completions(args, incomplete)
        return [CompletionItem(name) for name in registered_in(*folders) if name.startswith(begun)]


class _Bash(_Names, BashComplete):
    pass


class _Fish(_Names, FishComplete):
    pass


class _Zsh(_Names, ZshComplete):
    pass


_SHELLS: dict[str, type[ShellComplete]] = {"bash": _Bash, "fish": _Fish, "zsh": _Zsh}


def answer_shells() -> None:
    """Have click ask this module's classes when a shell wants completions."""
    for cls in _SHELLS.values():
        add_completion_class(cls)


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
