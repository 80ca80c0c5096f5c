"""`qdefense shadow`."""

from __future__ import annotations

from pathlib import Path

import click

from qdefense.audit.events import Job
from qdefense.audit.gate import INCOMPLETE, PASSED
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.cli.options import data_options, output_console, progress_bar, run_options, write_json
from qdefense.report.escaping import harmless
from qdefense.report.text import certificate_table


@click.command("shadow")
@click.argument("model", type=click.Path(path_type=Path))
@data_options
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@run_options
def command(
    model: Path,
    data: str,
    split: str | None,
    limit: int | None,
    format_: str,
    seed: int,
    threads: int,
    verbose: bool,
) -> int:
    """Certify the differentiable twin of a file against the deployed session; 0 certified, 3 not."""
    job = Job(
        model=str(model),
        data=data,
        split=split,
        limit=limit,
        seed=seed,
        threads=threads,
        memory_bytes=default_memory_limit(),
    )
    with progress_bar() as advance:
        report = run_audit(job, required=(), on_progress=advance, verbose=verbose)
    certificate = report.certificate
    if certificate is None:
        click.echo("\n".join(f"error: {harmless(reason)}" for reason in report.gate.reasons), err=True)
        return report.gate.exit_code
    if format_ == "json":
        write_json(certificate.model_dump_json(indent=2))
    else:
        output_console().print(certificate_table(certificate))
    return PASSED if certificate.certified else INCOMPLETE
