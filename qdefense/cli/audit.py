"""`qdefense audit`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

import click

from qdefense.audit.events import Job
from qdefense.audit.gate import USAGE
from qdefense.audit.supervisor import run_audit
from qdefense.calibration import DEFAULT_RATE
from qdefense.cli.job_options import job_options
from qdefense.cli.options import NumberRange, output_console, progress_bar, write_json
from qdefense.cli.outputs import check_output, keep_inputs, keep_weights, make_folder
from qdefense.files import reason_of, write_atomically
from qdefense.report.escaping import harmless, shortened
from qdefense.report.html import render
from qdefense.report.model import Report, Subject
from qdefense.report.text import print_outcome, print_report

REPORT = "report.json"
PAGE = "report.html"
DEFAULT_DEFENSES = ("neural-cleanse",)
FILTERS = ("strip",)
"""Every filter there is, the default first: to ask the registry would import torch."""
DATASET_SCANS = ("activation-clustering", "spectral-signatures")
"""Every dataset scan there is: to ask the registry would import torch."""
RANKING = frozenset({"spectral-signatures"})
"""Those that rank samples and give no verdict as published: where the user did not name them, none is required."""
_HEAD_BYTES = 1 << 16
"""Of a page, its title among them."""


@click.command("audit")
@job_options
@click.option(
    "--defense",
    "defenses",
    multiple=True,
    metavar="NAME:key=value,...",
    help="A defense and its settings; may be given several times.  [default: neural-cleanse]",
)
@click.option(
    "--inputs",
    help="What the model was given: 'signs' or a path, as --data; judged by the filters, by strip where none is named.",
)
@click.option("--inputs-split", help="Which split of the inputs.  [default: test]")
@click.option(
    "--training-data",
    help="The training data: 'signs' or a path, as --data; read whole, judged by the dataset scans, by all of them "
    "where none is named.",
)
@click.option("--training-split", help="Which split of it.  [default: train, or all of what has no splits]")
@click.option(
    "--reference",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="A network trained without the rows that Activation Clustering flagged: asked what they are by "
    "--defense activation-clustering:rule=exclusionary-reclassification, and by nothing else.",
)
@click.option(
    "--calibration",
    "calibrations",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Thresholds made by `calibrate`, asked before those that ship; of several that fit the lowest holds.",
)
@click.option(
    "--false-alarm-rate",
    type=NumberRange(0, 1, min_open=True, max_open=True),
    help=f"Of a calibrated threshold: how often it may alarm on a clean model.  [default: {DEFAULT_RATE:g}]",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    type=click.Choice(["table", "json", "html"]),
    help="May be given several times, which needs --output-dir, as html does.  [default: table]",
)
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Write report.json here, and with --format html report.html. Reports that lie there stay as they are where "
    "the exit code is 2 or 130: only a new report replaces them.",
)
def command(
    job: Job,
    defenses: tuple[str, ...],
    inputs: str | None,
    inputs_split: str | None,
    training_data: str | None,
    training_split: str | None,
    reference: Path | None,
    calibrations: tuple[Path, ...],
    false_alarm_rate: float | None,
    formats: tuple[str, ...],
    output_dir: Path | None,
    verbose: bool,
) -> int:
    """Judge one ONNX file on clean images; the exit code is the answer.

    0 passed, 1 a backdoor was found, 2 usage, 3 something required was not measured, 4 the file was refused.
    """
    if output_dir is None and (len(set(formats)) > 1 or "html" in formats):
        raise click.UsageError("html and several formats need --output-dir; one text format alone goes to stdout")
    if output_dir is not None:
        make_folder(output_dir)
        for name in (REPORT, PAGE) if "html" in formats else (REPORT,):
            check_output(output_dir / name)
        keep_inputs(output_dir / PAGE)  # of an earlier report, which goes with it
    chosen = _with_dataset_scans(defenses or DEFAULT_DEFENSES, training_data, training_split)
    chosen = _with_filter(chosen, inputs, inputs_split)
    asked = {"calibrations": tuple(map(str, calibrations)), "false_alarm_rate": false_alarm_rate}
    if reference is not None and training_data is None:
        raise click.UsageError("--reference is asked about the training data; name it with --training-data")
    training = {"training_data": training_data, "training_split": training_split}
    training["reference"] = None if reference is None else str(reference)
    judged = {"inputs": inputs, "inputs_split": inputs_split}
    job = job.model_copy(update={"defenses": chosen, **training, **judged, **asked})
    named = {_name(spec) for spec in defenses}
    required = tuple(dict.fromkeys(name for name in map(_name, chosen) if name in named or name not in RANKING))

    def keep(subject: Subject) -> None:
        for written in () if output_dir is None else (output_dir / REPORT, output_dir / PAGE):
            keep_weights(written, Path(job.model), subject.external_files)
            if reference is not None and written.exists():
                keep_weights(written, reference, _weights_beside(reference))

    with progress_bar() as advance:
        report = run_audit(
            job,
            required=required,
            on_progress=advance,
            on_described=keep,
            command=("qdefense", *sys.argv[1:]),
            verbose=verbose,
        )
    return _tell(report, formats or ("table",), output_dir)


def _weights_beside(model: Path) -> Iterable[str]:
    from qdefense.converters.external_data import with_external_data  # noqa: PLC0415 (imports onnx)

    return with_external_data(model.read_bytes(), model.parent)[1]


def _name(spec: str) -> str:
    return spec.partition(":")[0]


def _with_dataset_scans(chosen: tuple[str, ...], data: str | None, split: str | None) -> tuple[str, ...]:
    readers = [name for name in map(_name, chosen) if name in DATASET_SCANS]
    if data is None and readers:
        raise click.UsageError(f"{readers[0]} judges the training data; name it with --training-data")
    if data is None and split is not None:
        raise click.UsageError("--training-split is of --training-data, which is not given")
    return chosen if data is None or readers else (*chosen, *DATASET_SCANS)


def _with_filter(chosen: tuple[str, ...], data: str | None, split: str | None) -> tuple[str, ...]:
    readers = [name for name in map(_name, chosen) if name in FILTERS]
    if data is None and readers:
        raise click.UsageError(f"{readers[0]} judges inputs; name them with --inputs")
    if data is None and split is not None:
        raise click.UsageError("--inputs-split is of --inputs, which is not given")
    return chosen if data is None or readers else (*chosen, FILTERS[0])


def _tell(report: Report, formats: tuple[str, ...], folder: Path | None) -> int:
    """Write and print; the exit code is the report's, but 2 in place of 0 where it could not be written.

    A folder that went away, or is full, does not take the verdict with it: it is printed all the same.
    """
    text = report.model_dump_json(indent=2)
    failure = None
    if folder is not None:
        page = render(report).encode() if "html" in formats else None
        try:
            _write(folder, f"{text}\n".encode(), page)
        except OSError as error:
            failure = error
    if folder is None and "table" not in formats:
        write_json(text)
    else:
        (print_report if "table" in formats else print_outcome)(report, output_console())
    if failure is None:
        return report.gate.exit_code
    click.echo(f"error: {harmless(shortened(reason_of(failure)))}", err=True)
    return report.gate.exit_code or USAGE


def _write(folder: Path, text: bytes, page: bytes | None) -> None:
    write_atomically(folder / REPORT, text)
    if page is not None:
        write_atomically(folder / PAGE, page)
    elif _is_own_page(folder / PAGE):  # of an earlier report, which this one has replaced
        (folder / PAGE).unlink()


def _is_own_page(path: Path) -> bool:
    """Whether an audit wrote it: a bench's report, or anybody's, may have the same name."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return b"(qdefense audit)</title>" in file.read(_HEAD_BYTES)
