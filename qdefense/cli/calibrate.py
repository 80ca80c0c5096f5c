"""`qdefense calibrate`."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qdefense.audit.calibrating import Measured, ReportFolder, make_entries, measure_models, read_models, scan_of
from qdefense.audit.events import Job
from qdefense.audit.gate import INCOMPLETE, PASSED
from qdefense.audit.provenance import environment
from qdefense.audit.supervisor import default_memory_limit
from qdefense.calibration import DEFAULT_RATE, CalibrationBody, CalibrationEntry
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.cli.options import data_options, output_console, progress_bar, run_options, worker_verbose_option
from qdefense.cli.outputs import check_output, keep_weights, make_folder
from qdefense.files import check_writable, write_atomically
from qdefense.rates import models_needed, rounded_up
from qdefense.report.escaping import harmless
from qdefense.report.text import plain_table

_ASIDE = frozenset({"output", "reports", "threads", "verbose"})
"""Options that do not change what is written."""


@click.command("calibrate")
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="MODEL...")
@data_options
@click.option(
    "--defense",
    "spec",
    metavar="NAME:key=value,...",
    default="neural-cleanse",
    show_default=True,
    help="The scan, with the settings that `audit` will use.",
)
@contract_options
@click.option(
    "--reports",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where every audit's report is kept and looked for.  [default: FILE.reports]",
)
@click.option("-o", "output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="What to write.")
@run_options
@worker_verbose_option
@click.pass_context
def command(
    context: click.Context,
    models: tuple[Path, ...],
    data: str,
    split: str | None,
    limit: int | None,
    spec: str,
    said: dict[str, Any],
    reports: Path | None,
    output: Path,
    seed: int,
    threads: int,
    verbose: bool,
) -> int:
    """Scan clean models and write down their scores, which give `audit` a threshold with a known false-alarm rate.

    The models must be clean, made as the audited file was, and not that file itself. Files of several architectures or
    schemes may be mixed: each kind gets an entry of its own. What was audited is kept: an interrupted run goes on.
    """
    check_output(output)
    folder = reports or output.with_name(f"{output.name}.reports")
    make_folder(folder)
    check_writable(folder / "any.json")
    memory, contract = default_memory_limit(), stated_contract(models[0], said)
    common = {"data": data, "split": split, "limit": limit, "seed": seed, "threads": threads}
    jobs = [Job(model=str(model), memory_bytes=memory, contract=contract, **common) for model in models]
    scan = scan_of(spec)
    clean = read_models(jobs)
    for one in clean:
        keep_weights(output, Path(one.job.model), one.external_files)
    kept = ReportFolder(folder)
    for reason in kept.unreadable:
        click.echo(f"passed over {harmless(reason)}", err=True)
    with progress_bar() as advance:
        measured = measure_models(
            clean, scan, kept, environment(), on_progress=advance, on_measured=_tell, verbose=verbose
        )
    entries, problems = make_entries(measured, scan)
    if problems:
        click.echo("\n".join(f"error: {harmless(problem)}; nothing was written" for problem in problems), err=True)
        return INCOMPLETE
    written = CalibrationBody(command=_command(context), entries=entries).to_bytes()
    write_atomically(output, written)
    _show(entries)
    click.echo(f"{harmless(output.name)}: sha256 {hashlib.sha256(written).hexdigest()}")
    return PASSED


def _tell(measured: Measured, kept: bool) -> None:
    score = "no score" if measured.score is None else f"score {measured.score:.2f}"
    why = f": {measured.reason}" if measured.score is None else ""
    click.echo(harmless(f"{measured.model.name}: {score}{' (kept)' if kept else ''}{why}"), err=True)


def _command(context: click.Context) -> tuple[str, ...]:
    words = ["qdefense", "calibrate"]
    for option in context.command.params:
        name = option.name or ""
        if isinstance(option, click.Option) and name not in _ASIDE:
            given = context.get_parameter_source(name) is ParameterSource.COMMANDLINE
            value = context.params[name]
            values = (value,) if not option.multiple else value
            words += [word for each in values if given for word in (option.opts[0], str(each))]
    return tuple(words)


def _show(entries: tuple[CalibrationEntry, ...]) -> None:
    left = ("scheme", "graph")
    table = plain_table("scheme", "graph", "n", "not measured", "threshold", "rate", "highest", left=left)
    needed = models_needed(DEFAULT_RATE)
    for entry in entries:
        value, rate = entry.threshold(DEFAULT_RATE) if entry.n >= needed else (None, None)
        table.add_row(
            entry.population.scheme,
            entry.population.fingerprint[:12],
            str(entry.n),
            str(entry.not_measured),
            "none" if value is None else f"{value:.3f}",
            "none" if rate is None else rounded_up(rate),
            f"{entry.scores[-1]:.3f}",
        )
        if entry.n < needed:
            click.echo(
                f"warning: {entry.n} models cannot give `audit` its default false-alarm rate of {DEFAULT_RATE:g}, "
                f"which needs {needed}; calibrate on more, or ask for --false-alarm-rate {entry.smallest_rate}",
                err=True,
            )
    output_console().print(table)
