"""Do the images fit the file? Sizes, classes and their order; what does not fit is told before anything is measured."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from qdefense.converters.contract import InputContract
from qdefense.data.images import DataError, ImageSet, Labels
from qdefense.data.resizing import Resize
from qdefense.session import Logits


def resize_for(contract: InputContract) -> Resize | None:
    """How images are brought to the file's size while they are read; ``None`` where the contract states no rule."""
    if contract.resize == "none":
        return None
    return Resize(rule=contract.resize, height=contract.height, width=contract.width)


def fit_images(contract: InputContract, clean: ImageSet) -> ImageSet:
    """The images with their labels numbered as the file numbers its classes.

    Raises:
        DataError: another size, or another number of classes.
    """
    height, width = clean.images.shape[1:3]
    if (height, width) != (contract.height, contract.width):
        raise DataError(
            f"{clean.source}: images are {height}x{width}, the model takes {contract.height}x{contract.width}; "
            "give data of that size, or say how they were resized for the model: --resize bilinear"
        )
    if not clean.labelled:
        return clean
    if len(clean.class_names) != contract.classes:
        raise DataError(
            f"{clean.source} has {len(clean.class_names)} classes, the model answers with {contract.classes}; "
            "give the data set that the model was made for"
        )
    return _renumbered(contract, clean) if contract.named else clean


def once_each(clean: ImageSet) -> ImageSet:
    """The first of images that repeat each other: the others are no evidence, and stand on both sides of a split."""
    rows = clean.first_appearances
    if len(rows) == len(clean):
        return clean
    note = f"{len(clean) - len(rows):,} of {len(clean):,} images repeat another one and are left out"
    kept = clean.take(rows)
    return replace(kept, notes=(*kept.notes, note))


def _renumbered(contract: InputContract, clean: ImageSet) -> ImageSet:
    """By name where the names are the same ones; else the numbers are taken to mean the same classes."""
    if clean.class_names == contract.class_names:
        return clean
    if sorted(clean.class_names) != sorted(contract.class_names):
        place = next(i for i, name in enumerate(clean.class_names) if name != contract.class_names[i])
        note = (
            f"class names differ: class {place} is {clean.class_names[place]!r} in the data and "
            f"{contract.class_names[place]!r} in the model; the numbers are taken to agree"
        )
        return replace(clean, notes=(*clean.notes, note))
    numbers = {name: number for number, name in enumerate(contract.class_names)}
    mapping = np.array([numbers[name] for name in clean.class_names], dtype=np.int64)
    note = f"labels were renumbered by class name, to the order of the contract ({contract.source})"
    return replace(
        clean,
        labels=mapping[clean.labels],
        class_names=contract.class_names,
        notes=(*clean.notes, note),
    )


def labelled_by(logits: Logits, clean: ImageSet, contract: InputContract) -> ImageSet:
    """Images without labels get the file's own answers for labels, and stay marked as unlabelled."""
    answers: Labels = logits.argmax(axis=1).astype(np.int64)
    return replace(clean, labels=answers, class_names=contract.class_names)
