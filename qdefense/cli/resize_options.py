"""``--resize`` and ``--size`` for the commands that have no contract to read them from."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click

from qdefense.cli.options import parse_size
from qdefense.data.resizing import RULES, Resize

if TYPE_CHECKING:
    from qdefense.converters.contract import ResizeRule

F = TypeVar("F", bound=Callable[..., Any])


def resize_options(function: F) -> F:
    """``--resize`` and ``--size``, which go together; the command gets them as ``resize``."""

    @functools.wraps(function)
    def gathered(*, rule: ResizeRule | None, size: str | None, **values: Any) -> Any:
        if (rule is None) != (size is None):
            raise click.UsageError("--resize and --size go together, such as --resize bilinear --size 32x32")
        resize = None if rule is None or size is None else Resize(rule, *parse_size(size))
        return function(resize=resize, **values)

    for option in (
        click.option("--size", metavar="HxW", help="Height and width, for --resize."),
        click.option("--resize", "rule", type=click.Choice(RULES), help="Resize images to --size by this rule."),
    ):
        gathered = option(gathered)
    return cast("F", gathered)
