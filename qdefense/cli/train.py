"""`qdefense train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from qdefense.attacks import ATTACKS
from qdefense.cli.options import progress_bar, run_options
from qdefense.cli.outputs import check_output
from qdefense.cli.resize_options import resize_options
from qdefense.data.opening import open_data, training_split
from qdefense.data.resizing import Resize
from qdefense.report.escaping import harmless
from qdefense.trial import state_path, truth_path
from qdefense.zoo import architectures, recipe_for, train_artifact


@click.command("train")
@click.option("--data", required=True, help="'signs' (built in), or a path; `qdefense data show` says what it is.")
@click.option("--split", help="Which split to train on.  [default: train, or all of a file without splits]")
@click.option("--limit", type=click.IntRange(min=1), help="Train on this many images, drawn by the seed.")
@click.option("--arch", type=click.Choice(architectures()), default="resnet8", show_default=True)
@click.option(
    "--width",
    type=click.IntRange(min=1),
    help="Channels of the first stage, of a ViT a token's length.  [default: the architecture's]",
)
@click.option("--attack", metavar="NAME:key=value,...", help="Poison the training set, e.g. badnets:target-class=3.")
@click.option("--epochs", type=click.IntRange(min=1), help="[default: the recipe's]")
@click.option("--flip", is_flag=True, help="Mirror half of the images; wrong for traffic signs.")
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@resize_options
@run_options
def command(
    data: str,
    split: str | None,
    limit: int | None,
    arch: str,
    width: int | None,
    attack: str | None,
    epochs: int | None,
    flip: bool,
    output: Path,
    resize: Resize | None,
    seed: int,
    threads: int,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> None:
    """Train a zoo model and write MODEL.onnx, with the truth about it in MODEL.truth.json.

    A trigger that is learned has its state in MODEL.truth.npz.
    """
    for target in (output, truth_path(output), state_path(output)):
        check_output(target)
    if attack is not None:
        ATTACKS.create(attack)  # a misspelt attack is told before the data are read
    dataset = open_data(data, split=split or training_split(data), limit=limit, seed=seed, resize=resize)
    recipe = recipe_for(arch)
    recipe = replace(recipe, epochs=epochs or recipe.epochs, flip=flip)
    with progress_bar() as advance:
        truth = train_artifact(
            dataset,
            output,
            architecture=arch,
            recipe=recipe,
            attack=attack,
            seed=seed,
            threads=threads,
            width=width,
            on_epoch=lambda done, total, _loss: advance("epochs", done, total),
        )
    click.echo(f"{harmless(output.name)}: sha256 {truth.artifact_sha256}")
    click.echo(f"{harmless(truth_path(output).name)}: the truth, for evaluators only")
    if truth.trigger_sha256 is not None:
        click.echo(f"{harmless(state_path(output).name)}: the state of its trigger, for evaluators only")
