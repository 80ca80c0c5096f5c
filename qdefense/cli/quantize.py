"""`qdefense quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qdefense.artifact import Artifact
from qdefense.audit.fit import resize_for
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.converters.contract import with_contract
from qdefense.converters.quantize import Method, Scheme, quantize
from qdefense.data.opening import open_data, training_split
from qdefense.files import check_writable, write_atomically
from qdefense.report.escaping import harmless
from qdefense.report.text import inspection_rows

CALIBRATION_IMAGES = 256


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(["int8-static", "int8-dynamic"]), required=True)
@click.option("--calibration", help="Data for int8-static: 'signs', or a path; `qdefense data show` says what it is.")
@click.option("--split", help="Which split to calibrate on.  [default: train, or all of a file without splits]")
@click.option("--limit", type=click.IntRange(min=1), default=CALIBRATION_IMAGES, show_default=True)
@click.option("--method", type=click.Choice(["minmax", "percentile"]), default="minmax", show_default=True)
@click.option("--per-tensor", is_flag=True, help="One weight scale per tensor, not per channel.")
@click.option(
    "--reduce-range/--full-range",
    default=True,
    show_default=True,
    help="7-bit weights cannot saturate in int16 on CPUs without VNNI.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the calibration images.")
@click.option("-o", "output", type=click.Path(path_type=Path), required=True)
@contract_options
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def command(
    model: Path,
    scheme: Scheme,
    calibration: str | None,
    split: str | None,
    limit: int,
    method: Method,
    per_tensor: bool,
    reduce_range: bool,
    seed: int,
    output: Path,
    said: dict[str, Any],
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> None:
    """Quantize an FP32 ONNX file with ONNX Runtime; the result keeps the contract in its metadata."""
    check_writable(output)
    artifact = Artifact.read(model, stated_contract(model, said))
    pixels = None
    if calibration is not None:
        chosen = split or training_split(calibration)
        resize = resize_for(artifact.contract)
        pixels = open_data(calibration, split=chosen, limit=limit, seed=seed, resize=resize).pixels
    data = quantize(
        artifact.data,
        scheme,
        calibration=pixels,
        per_channel=not per_tensor,
        reduce_range=reduce_range,
        method=method,
        contract=artifact.contract,
    )
    if artifact.contract.source in ("options", "sidecar"):
        data = with_contract(data, artifact.contract)
    write_atomically(output, data)
    click.echo(f"{harmless(output.name)}: {len(data):,} bytes")
    for name, value in inspection_rows(Artifact.from_bytes(data).inspection):
        click.echo(f"  {name}: {harmless(value)}")
