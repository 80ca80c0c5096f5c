"""`qdefense shadow`."""

from __future__ import annotations

import click

from qdefense.audit.events import Job
from qdefense.audit.gate import INCOMPLETE, PASSED
from qdefense.audit.supervisor import run_audit
from qdefense.cli.job_options import job_options
from qdefense.cli.options import output_console, progress_bar, write_json
from qdefense.report.escaping import harmless
from qdefense.report.model import Report
from qdefense.report.text import certificate_table


@click.command("shadow")
@job_options
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
def command(job: Job, format_: str, verbose: bool) -> int:
    """Certify the differentiable twin of a file against the deployed session; 0 certified, 3 not."""
    with progress_bar() as advance:
        report = run_audit(job, required=(), on_progress=advance, verbose=verbose)
    certificate = report.certificate
    if certificate is None:
        click.echo("\n".join(f"error: {harmless(reason)}" for reason in _reasons(report)), err=True)
        return report.gate.exit_code
    if format_ == "json":
        write_json(certificate.model_dump_json(indent=2))
    else:
        output_console().print(certificate_table(certificate))
    return PASSED if certificate.certified else INCOMPLETE


def _reasons(report: Report) -> tuple[str, ...]:
    contract, reasons = report.subject.contract, report.gate.reasons
    if report.gate.exit_code != INCOMPLETE or contract is None or contract.head != "sigmoid":
        return reasons
    # The last one is about scans, which were not asked for.
    return (*reasons[:-1], "the file is multi-label (a sigmoid per class), and a certificate is for single-label ones")
