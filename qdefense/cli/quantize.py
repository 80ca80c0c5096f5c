"""`qdefense quantize`."""

from __future__ import annotations

from pathlib import Path

import click

from qdefense.artifact import Artifact
from qdefense.cli.options import output_console
from qdefense.converters.quantize import quantize
from qdefense.data.opening import open_data
from qdefense.files import write_atomically
from qdefense.report.text import harmless, inspection_rows

CALIBRATION_IMAGES = 256


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--scheme", type=click.Choice(["int8-static", "int8-dynamic"]), required=True)
@click.option("--calibration", help="Data for int8-static: 'signs', a parquet folder or an .npz file.")
@click.option("--split", default="train", show_default=True, help="Which split to calibrate on.")
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
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@click.option("-v", "--verbose", is_flag=True, help="Show tracebacks.")
def command(
    model: Path,
    scheme: str,
    calibration: str | None,
    split: str,
    limit: int,
    method: str,
    per_tensor: bool,
    reduce_range: bool,
    seed: int,
    output: Path,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> None:
    """Quantize an FP32 ONNX file with ONNX Runtime."""
    artifact = Artifact.read(model)
    pixels = None
    if calibration is not None:
        pixels = open_data(calibration, split=split, limit=limit, seed=seed).pixels
    data = quantize(
        artifact.data,
        scheme,
        calibration=pixels,
        per_channel=not per_tensor,
        reduce_range=reduce_range,
        method=method,
    )
    write_atomically(output, data)
    console = output_console()
    console.print(f"{harmless(output.name)}: {len(data):,} bytes")
    for name, value in inspection_rows(Artifact.from_bytes(data).inspection):
        console.print(f"  {name}: {harmless(value)}")
