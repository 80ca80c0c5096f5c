"""`qdefense train`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from qdefense.accuracy import count_right
from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS, BatchAttack, PoisonedSet
from qdefense.attacks.contact_sheets import PoisonBlock, poison_block
from qdefense.attacks.contact_sheets import contact_sheet as draw_sheet
from qdefense.cli.options import progress_bar, run_options, verbose_option
from qdefense.cli.outputs import check_output
from qdefense.cli.resize_options import resize_options
from qdefense.data.images import ImageSet
from qdefense.data.opening import open_data, training_split
from qdefense.data.resizing import Resize
from qdefense.data.selection import choose_rows
from qdefense.files import write_atomically
from qdefense.rates import MIN_SKILL, chance_of, skill
from qdefense.report.escaping import harmless
from qdefense.trial import Truth, read_state, state_path, truth_path
from qdefense.zoo import architectures, recipe_for, train_artifact, trigger_of

_SHOWN = 1000


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
@click.option(
    "--contact-sheet",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE.png",
    help="Show the trigger on a few training images, and a few poisons; for evaluators only.",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True)
@resize_options
@run_options
@verbose_option
def command(
    data: str,
    split: str | None,
    limit: int | None,
    arch: str,
    width: int | None,
    attack: str | None,
    epochs: int | None,
    flip: bool,
    contact_sheet: Path | None,
    output: Path,
    resize: Resize | None,
    seed: int,
    threads: int,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> None:
    """Train a zoo model and write MODEL.onnx, with the truth about it in MODEL.truth.json.

    A trigger that is learned has its state in MODEL.truth.npz.
    """
    written = (output, truth_path(output), state_path(output))
    _check_sheet(contact_sheet, attack, written)
    attacker = None if attack is None else ATTACKS.create(attack)  # a misspelt one is told before the data are read
    for target in (*written, *([contact_sheet] if contact_sheet else [])):
        check_output(target)
    dataset = open_data(data, split=split or training_split(data), limit=limit, seed=seed, resize=resize)
    recipe = recipe_for(arch)
    recipe = replace(recipe, epochs=epochs or recipe.epochs, flip=flip)
    poisons: list[PoisonBlock] = []
    with progress_bar() as advance:

        def keep(poisoned: PoisonedSet) -> None:  # some attacks learn for minutes before they poison: not twice
            if attacker is not None:
                advance("poisons", 1, 1)
            advance("epochs", 0, recipe.epochs)
            poisons.append(poison_block(poisoned, made_in_training=isinstance(attacker, BatchAttack)))

        if attacker is not None:
            advance("poisons", 0, 1)
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
            on_poisoned=keep,
        )
    click.echo(f"{harmless(output.name)}: sha256 {truth.artifact_sha256}")
    click.echo(f"  {_accuracy(output, dataset, seed)}")
    click.echo(f"{harmless(truth_path(output).name)}: the truth, for evaluators only")
    if truth.trigger_sha256 is not None:
        click.echo(f"{harmless(state_path(output).name)}: the state of its trigger, for evaluators only")
    if contact_sheet is not None:
        write_atomically(contact_sheet, _sheet(output, truth, dataset, *poisons))
        click.echo(f"{harmless(contact_sheet.name)}: the trigger on training images and poisons, for evaluators only")


def _accuracy(output: Path, dataset: ImageSet, seed: int) -> str:
    """Of the file as it runs, on clean training images: what guesses is no file to try a defense on."""
    shown, artifact = dataset.take(choose_rows(len(dataset), limit=_SHOWN, seed=seed)), Artifact.read(output)
    accuracy, chance = count_right(artifact, shown) / len(shown), chance_of(artifact.contract.classes, shown.labels)
    told = f"accuracy {accuracy:.1%} on {len(shown):,} of the images it was trained on, without a trigger"
    if skill(accuracy, chance) >= MIN_SKILL:
        return told
    return f"{told}; that is near chance ({chance:.1%}), and `audit` measures no such file: train longer (--epochs)"


def _check_sheet(sheet: Path | None, attack: str | None, written: tuple[Path, ...]) -> None:
    if sheet is None:
        return
    if attack is None:
        raise click.UsageError("--contact-sheet shows a trigger, and without --attack there is none; leave it out")
    if sheet.suffix.lower() != ".png":
        raise click.UsageError(f"--contact-sheet {harmless(sheet.name)}: it is a PNG; name it FILE.png")
    if sheet.resolve() in [target.resolve() for target in written]:
        raise click.UsageError(f"--contact-sheet {harmless(sheet.name)}: the model takes this name; choose another one")


def _sheet(output: Path, truth: Truth, dataset: ImageSet, poisons: PoisonBlock) -> bytes:
    trigger = trigger_of(truth, dataset, read_state(output, truth))
    assert trigger is not None  # noqa: S101 (it was refused without an attack)
    return draw_sheet(trigger, dataset, poisons=poisons)
