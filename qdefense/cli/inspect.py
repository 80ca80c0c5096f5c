"""`qdefense inspect`."""

from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table
from rich.text import Text

from qdefense.artifact import Artifact
from qdefense.cli.options import output_console
from qdefense.report.text import harmless, inspection_rows


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
        click.echo(_json(body))
        return
    console = output_console()
    console.print(_summary(model.name, artifact))
    console.print(_layers(artifact))


def _json(body: dict[str, object]) -> str:
    import json  # noqa: PLC0415

    return json.dumps(body, indent=2, ensure_ascii=True)


def _summary(name: str, artifact: Artifact) -> Table:
    contract, found = artifact.contract, artifact.inspection
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
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
    for label, value in rows:
        grid.add_row(label, Text(harmless(value)))
    return grid


def _layers(artifact: Artifact) -> Table:
    table = Table(box=None, header_style="dim", padding=(0, 2))
    for name in ("layer", "operator", "weights", "activations", "MACs", "parameters", "can saturate"):
        table.add_column(name, justify="right" if name in ("MACs", "parameters") else "left")
    for layer in artifact.inspection.layers:
        table.add_row(
            Text(harmless(layer.name)),
            Text(harmless(layer.operator)),
            layer.weight_type,
            layer.activation_type,
            f"{layer.macs:,}",
            f"{layer.weights:,}",
            "yes" if layer.can_saturate else "no",
        )
    return table
