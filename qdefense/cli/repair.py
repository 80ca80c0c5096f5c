"""`qdefense repair`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qdefense.audit.events import Job
from qdefense.audit.repairing import run_repair
from qdefense.cli.job_options import job_options
from qdefense.cli.options import NumberRange, output_console, progress_bar, write_json
from qdefense.cli.outputs import check_output, keep_weights
from qdefense.files import write_atomically
from qdefense.report.escaping import harmless
from qdefense.report.text import print_report

USUAL_DROP = 4.0
"""Percentage points: what Fine-Pruning's own pruning may cost before it is fine-tuned."""


@click.command("repair")
@job_options
@click.option(
    "--method",
    default="fine-pruning",
    show_default=True,
    metavar="NAME:key=value,...",
    help="The repair and its settings; `qdefense defenses` lists them.",
)
@click.option(
    "--max-accuracy-drop",
    type=NumberRange(min=0, max=100),
    default=USUAL_DROP,
    show_default=True,
    metavar="POINTS",
    help="Refuse a result that loses more clean accuracy than this, in percentage points, on the half of the images "
    "that it was not made with; the method's own tolerance holds as well.",
)
@click.option(
    "-o", "output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="Where the new file goes."
)
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(job: Job, method: str, max_accuracy_drop: float, output: Path, format_: str, verbose: bool) -> int:
    """Make a new file that may have lost its backdoor, from clean images; audit it as any new file.

    It has the old one's graph: what you say of the one with options, say of the other. Nothing here tells whether there
    was a backdoor, nor whether it is gone.

    0 repaired and written, 1 it cost too much clean accuracy and nothing was written, 2 usage, 3 something was not
    measured and nothing was written, 4 the file was refused.
    """
    check_output(output)
    with progress_bar() as advance:
        report, data = run_repair(
            job.model_copy(update={"repair": method}),
            max_drop=max_accuracy_drop,
            on_progress=advance,
            on_described=lambda subject: keep_weights(output, Path(job.model), subject.external_files),
            command=("qdefense", *sys.argv[1:]),
            verbose=verbose,
        )
    if data is not None:
        write_atomically(output, data)
    if format_ == "json":
        write_json(report.model_dump_json(indent=2))
    else:
        print_report(report, output_console())
        click.echo(f"\n{harmless(output.name)}: {'not written' if data is None else f'{len(data):,} bytes'}")
    return report.gate.exit_code
