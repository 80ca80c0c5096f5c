"""`qdefense audit`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.cli.options import data_options, output_console, progress_bar, run_options, write_json
from qdefense.files import check_writable, write_atomically
from qdefense.report.model import Report
from qdefense.report.text import print_report

REPORT = "report.json"
DEFAULT_DEFENSES = ("neural-cleanse",)


@click.command("audit")
@click.argument("model", type=click.Path(path_type=Path))
@data_options
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    metavar="NAME:key=value,...",
    help="A defense and its settings; may be given several times.  [default: neural-cleanse]",
)
@click.option("--format", "formats", multiple=True, type=click.Choice(["table", "json"]), help="[default: table]")
@click.option("--output-dir", type=click.Path(path_type=Path, file_okay=False), help="Write report.json here, too.")
@run_options
def command(
    model: Path,
    data: str,
    split: str | None,
    limit: int | None,
    defenses: tuple[str, ...],
    formats: tuple[str, ...],
    output_dir: Path | None,
    seed: int,
    threads: int,
    verbose: bool,
) -> int:
    """Judge one ONNX file on labelled clean images; the exit code is the answer.

    0 passed, 1 a backdoor was found, 2 usage, 3 something required was not measured, 4 the file was refused.
    """
    if len(set(formats)) > 1 and output_dir is None:
        raise click.UsageError("several formats need --output-dir; one alone goes to stdout")
    if output_dir is not None:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_writable(output_dir / REPORT)
    chosen = defenses or DEFAULT_DEFENSES
    job = Job(
        model=str(model),
        data=data,
        split=split,
        limit=limit,
        defenses=chosen,
        seed=seed,
        threads=threads,
        memory_bytes=default_memory_limit(),
    )
    required = tuple(dict.fromkeys(spec.partition(":")[0] for spec in chosen))
    with progress_bar() as advance:
        report = run_audit(
            job, required=required, on_progress=advance, command=("qdefense", *sys.argv[1:]), verbose=verbose
        )
    _write(report, formats or ("table",), output_dir)
    return report.gate.exit_code


def _write(report: Report, formats: tuple[str, ...], folder: Path | None) -> None:
    text = report.model_dump_json(indent=2)
    if folder is not None:
        write_atomically(folder / REPORT, f"{text}\n".encode())
    if "table" in formats:
        print_report(report, output_console())
    elif folder is None:
        write_json(text)
