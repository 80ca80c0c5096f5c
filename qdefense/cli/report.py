"""`qdefense report`."""

from __future__ import annotations

from pathlib import Path

import click

from qdefense.audit.gate import PASSED
from qdefense.cli.options import verbose_option, write_json
from qdefense.cli.outputs import check_output
from qdefense.files import write_atomically
from qdefense.report.escaping import harmless

PAGE = "report.html"


@click.command("report")
@click.argument("results", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"Write to this file.  [default: {PAGE}; JSON and Markdown go to stdout]",
)
@click.option("--format", "format_", type=click.Choice(["html", "json", "markdown"]), default="html", show_default=True)
@click.option(
    "--matrix",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    help="The matrix that RESULTS are of, to name the cells that have no record yet.",
)
@verbose_option
def command(
    results: Path,
    output: Path | None,
    format_: str,
    matrix: Path | None,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> int:
    """Make one page of RESULTS, a folder that `qdefense bench` wrote.

    The page holds every table, chart and record, and needs nothing else. Results that are not complete give a page that
    says what is missing. 0 the page is written, 2 usage, or there are no records.
    """
    target = output or (Path(PAGE) if format_ == "html" else None)
    if target is not None:
        check_output(target)
    text = _rendered(results, matrix, format_)
    if target is None:
        write_json(text)
        return PASSED
    write_atomically(target, text.encode())
    click.echo(harmless(str(target)))
    return PASSED


def _rendered(folder: Path, matrix: Path | None, format_: str) -> str:
    from qdefense.bench.cohort import Cohort  # noqa: PLC0415 (imports ONNX Runtime)
    from qdefense.bench.markdown import render_markdown  # noqa: PLC0415
    from qdefense.bench.page import render_bench  # noqa: PLC0415
    from qdefense.bench.summary import read_results, summarise  # noqa: PLC0415
    from qdefense.bench.trigger_pictures import read_trigger_pictures  # noqa: PLC0415

    found = read_results(folder, matrix)
    cohort = Cohort(found.records)
    report = summarise(found, cohort)
    if format_ == "json":
        return report.model_dump_json(indent=2)
    if format_ == "markdown":
        return render_markdown(report)
    return render_bench(report, cohort, read_trigger_pictures(folder))
