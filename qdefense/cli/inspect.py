"""`qdefense inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from qdefense.artifact import Artifact
from qdefense.cli.options import output_console, write_json
from qdefense.report.escaping import harmless
from qdefense.report.text import fact_grid, inspection_rows, plain_table


@click.command("inspect")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--format", "format_", type=click.Choice(["table", "json"]), default="table", show_default=True)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def command(model: Path, format_: str, verbose: bool) -> None:  # noqa: ARG001 (read at the boundary)
    """Say what is in an ONNX file: contract, precision per layer, integer share, what no gradient can see."""
    artifact = Artifact.read(model)
    if format_ == "json":
        body = {
            "file": model.name,
            "sha256": artifact.sha256,
            "contract": artifact.contract.model_dump(mode="json"),
            "inspection": artifact.inspection.model_dump(mode="json"),
        }
        write_json(json.dumps(body, indent=2))
        return
    console = output_console()
    console.print(_summary(model.name, artifact))
    console.print(_layers(artifact))


def _summary(name: str, artifact: Artifact) -> Table:
    contract, found = artifact.contract, artifact.inspection
    rows = [
        ("file", name),
        ("sha256", artifact.sha256),
        ("size", f"{len(artifact.data):,} bytes"),
        (
            "input",
            f"{contract.input_name}: {contract.dtype} ({contract.batch or 'N'}, 3, {contract.height}, "
            f"{contract.width}), contract from the {contract.source}",
        ),
        ("output", f"{contract.output_name}: {contract.head}, {contract.classes} classes"),
        *inspection_rows(found),
    ]
    return fact_grid(rows)


def _layers(artifact: Artifact) -> Table:
    table = plain_table(
        *("layer", "operator", "weights", "activations", "MACs", "params", "can saturate"),
        left=("layer", "operator", "weights", "activations", "can saturate"),
        fold="layer",
    )
    for layer in artifact.inspection.layers:
        table.add_row(
            Text(harmless(layer.name)),
            Text(harmless(layer.operator)),
            layer.weight_type or "unknown",
            layer.activation_type or "unknown",
            "unknown" if layer.macs is None else f"{layer.macs:,}",
            f"{layer.weights:,}",
            "yes" if layer.can_saturate else "no",
        )
    return table
