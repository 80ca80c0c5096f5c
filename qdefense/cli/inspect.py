"""`qdefense inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich.table import Table
from rich.text import Text

from qdefense.audit.events import Job
from qdefense.audit.gate import PASSED
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.cli.options import output_console, worker_verbose_option, write_json
from qdefense.converters.contract import InputContract
from qdefense.converters.inspection import Inspection
from qdefense.converters.runtime_facts import LayerRun, RuntimeFacts
from qdefense.report.escaping import harmless
from qdefense.report.model import Subject
from qdefense.report.text import contract_rows, fact_grid, inspection_rows, optimization_rows, plain_table


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@contract_options
@worker_verbose_option
def command(model: Path, format_: str, said: dict[str, Any], verbose: bool) -> int:
    """Say what is in an ONNX file: contract, precision per layer, integer share, what no gradient can see.

    The file is parsed, and loaded by ONNX Runtime to see what it makes of it, in a worker of its own: one that ends
    its reader ends no more than that.
    """
    job = Job(model=str(model), contract=stated_contract(model, said), memory_bytes=default_memory_limit())
    report = run_audit(job, required=(), on_progress=lambda *_: None, verbose=verbose)
    subject = report.subject
    if subject.contract is not None and subject.inspection is not None:
        if format_ == "json":
            write_json(json.dumps(_body(subject, subject.contract, subject.inspection), indent=2))
        else:
            console = output_console()
            console.print(_summary(subject, subject.contract, subject.inspection))
            console.print()
            console.print(_layers(subject.inspection, subject.runtime_facts))
    if subject.runtime_facts is None:
        click.echo(f"error: {harmless(report.gate.reasons[0])}", err=True)
        return report.gate.exit_code
    return PASSED


def _body(subject: Subject, contract: InputContract, inspection: Inspection) -> dict[str, Any]:
    run = subject.runtime_facts
    return {
        "file": subject.file,
        "sha256": subject.sha256,
        "size_bytes": subject.size_bytes,
        "external_files": subject.external_files,
        "contract": contract.model_dump(mode="json"),
        "inspection": inspection.model_dump(mode="json"),
        "runtime_facts": None if run is None else run.model_dump(mode="json"),
    }


def _summary(subject: Subject, contract: InputContract, inspection: Inspection) -> Table:
    run = subject.runtime_facts
    rows = [
        ("file", subject.file),
        ("sha256", subject.sha256 or ""),
        ("size", f"{subject.size_bytes or 0:,} bytes"),
        *((f"with {name}", digest) for name, digest in subject.external_files.items()),
        *contract_rows(contract),
        *inspection_rows(inspection, run),
        *([] if run is None else optimization_rows(inspection, run)),
    ]
    return fact_grid(rows)


def _layers(inspection: Inspection, run: RuntimeFacts | None) -> Table:
    table = plain_table(
        *("layer", "operator", "weights", "acts", "runs in", "MACs", "params", "saturates"),
        left=("layer", "operator", "weights", "acts", "runs in", "saturates"),
        fold="layer",
    )
    runs = [None] * len(inspection.layers) if run is None else run.layers
    for layer, ran in zip(inspection.layers, runs, strict=True):
        table.add_row(
            Text(harmless(layer.name)),
            Text(harmless(layer.operator)),
            layer.weight_type or "unknown",
            layer.activation_type or "unknown",
            _arithmetic(ran),
            "unknown" if layer.macs is None else _short(layer.macs),
            _short(layer.weights),
            "here" if ran is not None and ran.saturates else "can" if layer.can_saturate else "no",
        )
    return table


def _arithmetic(ran: LayerRun | None) -> str:
    if ran is None:
        return "unknown"
    if ran.operator is None:
        return "(gone)"
    return "integer" if ran.integer else "float"


def _short(amount: int) -> str:
    """Three digits and a unit: 41472 is 41.5k; the JSON has all of them."""
    value = float(amount)
    for unit in ("", "k", "M", "G"):
        if value < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.0f}T"
