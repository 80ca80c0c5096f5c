"""`qdefense demo`."""

from __future__ import annotations

from pathlib import Path

import click

from qdefense.cli.options import default_threads, output_console, progress_bar, verbose_option
from qdefense.demo import run_demo
from qdefense.demo_report import print_demo


@click.command("demo")
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo"),
    show_default=True,
    help="Where the files, their truths and reports go.",
)
@click.option("--threads", type=click.IntRange(min=1), default=default_threads, help="[default: CPUs, at most 4]")
@verbose_option
def command(output_dir: Path, threads: int, verbose: bool) -> int:  # noqa: ARG001 (read at the boundary)
    """Train a clean and a backdoored network, make three files of each, audit all six; 0 if all are judged rightly."""
    with progress_bar() as advance:
        outcome = run_demo(output_dir, threads=threads, on_progress=advance)
    print_demo(outcome, output_console())
    return outcome.exit_code
