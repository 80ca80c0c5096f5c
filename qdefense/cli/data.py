"""`qdefense data`."""

from __future__ import annotations

import shlex
from pathlib import Path

import click
import numpy as np

from qdefense.cli.options import output_console, progress_bar, verbose_option
from qdefense.cli.resize_options import resize_options
from qdefense.data.fetching import PUBLIC_SETS, fetch
from qdefense.data.images import ImageSet, quoted
from qdefense.data.opening import open_data
from qdefense.data.resizing import Resize
from qdefense.report.escaping import harmless
from qdefense.report.text import fact_grid

_NAMES_SHOWN = 5


@click.group("data")
def command() -> None:
    """Fetch public data sets, and see what a data set is taken for."""


@command.command("fetch", short_help="Fetch CIFAR-10 or GTSRB.")
@click.argument("name", type=click.Choice(sorted(PUBLIC_SETS)))
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default="data",
    show_default=True,
    help="Where to.",
)
@verbose_option
def fetch_command(name: str, output_dir: Path, verbose: bool) -> None:  # noqa: ARG001 (read at the boundary)
    """Fetch CIFAR-10 (170 MB) or GTSRB (365 MB) from where its authors keep it.

    An interrupted download goes on where it stopped; the checksum is checked before anything is used.
    """
    with progress_bar() as advance:
        target = fetch(name, output_dir, progress=advance)
    click.echo(f"{harmless(name)} is there; use it as --data {harmless(shlex.quote(str(target)))}")


@command.command("show", short_help="Say what data are taken for, and why.")
@click.argument("data")
@click.option("--split", help="Which split of the data.  [default: test, or all of data without splits]")
@click.option("--limit", type=click.IntRange(min=1), help="Read this many images only, drawn by seed 0.")
@resize_options
@verbose_option
def show_command(
    data: str,
    split: str | None,
    limit: int | None,
    resize: Resize | None,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> None:
    """Read DATA as `audit --data` does and say what it is taken for, and why."""
    output_console().print(fact_grid(_facts(open_data(data, split=split, limit=limit, resize=resize))))


def _facts(images: ImageSet) -> list[tuple[str, str]]:
    height, width = images.images.shape[1:3]
    rows = [
        ("data", images.source),
        ("read as", images.detection),
        ("images", f"{len(images):,}"),
        ("size", f"{height}x{width} (height x width)"),
        ("classes", _classes(images)),
    ]
    if images.labelled:
        rows.append(("per class", _counts(images)))
    if images.groups is not None:
        rows.append(("tracks", f"{len(np.unique(images.groups)):,} groups of images that show the same sign"))
    return [*rows, *(("note", note) for note in images.notes), ("digest", images.digest)]


def _classes(images: ImageSet) -> str:
    if not images.labelled:
        return "none, the images have no labels"
    names = images.class_names
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f"{len(names)}: {', '.join(quoted(name) for name in names[:_NAMES_SHOWN])}{more}"


def _counts(images: ImageSet) -> str:
    counts = np.bincount(images.labels, minlength=len(images.class_names))
    present = counts[counts > 0]
    without = int((counts == 0).sum())
    return f"{present.min():,} to {present.max():,} images" + (f"; {without} classes have none" if without else "")
