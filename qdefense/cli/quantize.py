"""`qdefense quantize`."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from qdefense.accuracy import AccuracyDrop, NotMeasuredError, accuracy_drop
from qdefense.artifact import Artifact
from qdefense.audit.fit import fit_images, resize_for
from qdefense.audit.gate import FAILED, PASSED
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.cli.options import NumberRange, verbose_option
from qdefense.cli.outputs import check_output, keep_weights
from qdefense.cli.quantize_options import scheme_options
from qdefense.converters.contract import with_contract
from qdefense.converters.quantize import Settings, quantize_as
from qdefense.data.images import DataError, ImageSet, NoSplitError
from qdefense.data.opening import open_data, training_split
from qdefense.files import write_atomically
from qdefense.report.escaping import harmless
from qdefense.report.text import inspection_rows

CALIBRATION_IMAGES = 256
MEASURED_IMAGES = 1000
"""Held-out images at most, on which the accuracy is measured."""
USUAL_DROP = 2.0


@click.command("quantize")
@click.argument("model", type=click.Path(path_type=Path))
@scheme_options
@click.option(
    "--calibration",
    help="Data to calibrate on, and to measure the accuracy with: 'signs', or a path; `qdefense data show` says what "
    "it is. Needed by int8-static and int4-a8.",
)
@click.option("--split", help="Which split to calibrate on.  [default: train, or all of a file without splits]")
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    default=CALIBRATION_IMAGES,
    show_default=True,
    help="Calibrate on this many images.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Draws the images.")
@click.option(
    "--max-accuracy-drop",
    type=NumberRange(min=0, max=100),
    default=USUAL_DROP,
    show_default=True,
    metavar="POINTS",
    help="Refuse a result that loses more clean accuracy than this, in percentage points. Measured on the test split, "
    "at most 1000 images of it, or on the calibration images of data without one; not measured without labels.",
)
@click.option(
    "-o",
    "output",
    required=True,
    metavar="FILE|FOLDER",
    help="What to write; in a folder that is there, MODEL.SCHEME-AND-SETTINGS.onnx.",
)
@contract_options
@verbose_option
@click.pass_context
def command(
    context: click.Context,
    model: Path,
    settings: Settings,
    calibration: str | None,
    split: str | None,
    limit: int,
    seed: int,
    max_accuracy_drop: float,
    output: str,
    said: dict[str, Any],
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> int:
    """Quantize an FP32 ONNX file to INT8 or INT4; the result keeps the contract in its metadata.

    Exit code 1 means that the result lost too much clean accuracy and was not written.
    """
    if settings.calibrated and calibration is None:
        raise DataError(f"{settings.scheme} needs calibration images; name a few hundred clean ones with --calibration")
    target = _target(output, model, settings)
    stated = stated_contract(model, said)
    artifact = Artifact.read(model, stated)
    keep_weights(target, model, dict(artifact.external_files))
    images = None if calibration is None else _Images.open(calibration, artifact, split=split, limit=limit, seed=seed)
    data = quantize_as(
        artifact.data,
        settings,
        calibration=None if images is None else images.calibration.pixels,
        contract=artifact.contract,
    )
    if artifact.contract.source in ("options", "sidecar"):
        data = with_contract(data, artifact.contract)
    quantized = Artifact.from_bytes(data, stated)
    stated_drop = context.get_parameter_source("max_accuracy_drop") is ParameterSource.COMMANDLINE
    only_measured = images is not None and not settings.calibrated
    drop, told = _measure(artifact, quantized, images, needed=stated_drop or only_measured)
    if drop is not None and drop.points > max_accuracy_drop:
        click.echo(
            harmless(f"error: {settings.name} is refused: {told}; at most {max_accuracy_drop:g} points were allowed"),
            err=True,
        )
        return FAILED
    write_atomically(target, data)
    click.echo(f"{harmless(target.name)}: {len(data):,} bytes")
    rows = [("name", settings.name), *inspection_rows(quantized.inspection), ("clean accuracy", told)]
    click.echo("\n".join(f"  {name}: {harmless(value)}" for name, value in rows))
    return PASSED


def _target(output: str, model: Path, settings: Settings) -> Path:
    place = Path(output)
    if place.is_dir():
        place /= f"{model.stem}.{settings.name}.onnx"
    elif output.endswith(os.sep):
        raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), output)
    check_output(place)
    return place


@dataclass(frozen=True, kw_only=True)
class _Images:
    """What is calibrated on, and what the accuracy is measured on, with words for what that is."""

    calibration: ImageSet
    measured: ImageSet
    described: str

    @classmethod
    def open(cls, spec: str, artifact: Artifact, *, split: str | None, limit: int, seed: int) -> _Images:
        """The calibration images, and the test split where there is one, with labels, that they are not from."""
        chosen, resize = split or training_split(spec), resize_for(artifact.contract)
        calibration = open_data(spec, split=chosen, limit=limit, seed=seed, resize=resize)
        if chosen not in (None, "test"):
            try:
                held_out = open_data(spec, split="test", limit=MEASURED_IMAGES, seed=seed, resize=resize)
            except NoSplitError:
                pass
            else:
                if held_out.labelled:
                    return cls(calibration=calibration, measured=held_out, described="held-out images")
        return cls(calibration=calibration, measured=calibration, described="calibration images")


def _measure(
    artifact: Artifact, quantized: Artifact, images: _Images | None, *, needed: bool
) -> tuple[AccuracyDrop | None, str]:
    """The drop and how it is told, or only why it was not measured, which is an error where it was asked for.

    Images that calibrate nothing were given for that.
    """
    try:
        drop = accuracy_drop(artifact, quantized, _fitting(artifact, images))
    except NotMeasuredError as error:
        if needed:
            raise DataError(f"the accuracy drop cannot be measured: {error}") from error
        return None, f"not measured: {error}"
    described = "" if images is None else f"{images.described} ({images.measured.source})"
    return drop, (
        f"{drop.before:.2%} in FP32, {drop.after:.2%} quantized, a drop of {drop.points:.2f} points on {drop.images} "
        f"{described}"
    )


def _fitting(artifact: Artifact, images: _Images | None) -> ImageSet:
    """The images to measure on; foreign ones may calibrate a file, but their labels say nothing of it."""
    if images is None:
        raise NotMeasuredError("it needs labelled images; give them with --calibration")
    try:
        return fit_images(artifact.contract, images.measured)
    except DataError as error:
        raise NotMeasuredError(str(error)) from error
