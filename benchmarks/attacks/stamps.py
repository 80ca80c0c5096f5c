"""Write STAMPS.md: how many images each attack poisons, and how much of an image its trigger changes.

    QDEFENSE_DATA=... python benchmarks/attacks/stamps.py

On test images, as at inference; an attack that stamps less in training says so in its module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from attacked import HERE, IMAGES, KEPT, SEED, Attacked, attacked_networks, test_images, training_images
from kept_rows import KeptRows, Table
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import BatchAttack
from qdefense.data.images import Pixels

HEAD = (
    "| attack | data, seed | training images | poisons | of the target class | of the source class | images changed "
    "| pixels changed | at 0 or 255 | highest change | mean change |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)

STAMPS = Table("stamps")


@dataclass(frozen=True, kw_only=True)
class Change:
    """Of images by their trigger: shares of the images, of the pixels, of the changed channels; codes of 255."""

    images: float
    pixels: float
    at_the_end: float
    highest: float
    mean: float


def change_of(plain: Pixels, stamped: Pixels) -> Change:
    """A pixel or an image is changed if a channel is, which may then stand at black or white: no more shows there.

    Both ``(N, 3, H, W) float32 in [0, 1]``; the mean is over all channels of all pixels.
    """
    codes: NDArray[np.float32] = np.round(np.abs(stamped - plain) * 255)
    changed = codes > 0
    at_the_end = np.isin(np.round(stamped[changed] * 255), (0, 255))
    return Change(
        images=float(changed.any(axis=(1, 2, 3)).mean()),
        pixels=float(changed.any(axis=1).mean()),
        at_the_end=float(at_the_end.mean()) if len(at_the_end) else 0.0,
        highest=float(codes.max()),
        mean=float(codes.mean()),
    )


def poison_cells(network: Attacked) -> str:
    """Training images, poisons, and how many are truly of the target and of the source class."""
    record = network.files["fp32"]
    settings, truth = record.network.attack_settings, network.store.truth(record.artifact_sha256)
    images = training_images(record.network.data)
    attack = ATTACKS.restore(record.network.attack or "", settings)
    poisons = "in each batch" if isinstance(attack, BatchAttack) else f"{len(truth.poison_indices):,}"
    target = None if record.network.all_to_all else settings.get("target_class")
    classes = (settings.get("host.target_class") if target is None else target, settings.get("source_class"))
    counts = ("" if one is None else f"{np.sum(images.labels == one):,}" for one in classes)
    return f"{len(images):,} | {poisons} | {' | '.join(counts)}"


def stamp_row(network: Attacked) -> Iterator[str]:
    images = test_images(network.place[0])
    trigger = network.trigger(*images.images.shape[1:3])
    eligible = images.take(np.flatnonzero(trigger.eligible(images.labels))).pixels
    change = change_of(eligible, trigger.stamp(eligible))
    yield (
        f"{poison_cells(network)} | {change.images:.3f} | {change.pixels:.3f} | {change.at_the_end:.3f} "
        f"| {change.highest:.0f} | {change.mean:.2f}"
    )


def page(every: list[Attacked], kept: KeptRows) -> str:
    rows = (row for network in every for row in network.triggered_rows(kept, STAMPS, stamp_row))
    return (
        "# Poisons and stamps\n\n"
        "Written by `QDEFENSE_DATA=DIR python benchmarks/attacks/stamps.py`: how many images an attack poisons and\n"
        "how many its target and source class have, and what its trigger changes at inference, over the eligible\n"
        f"ones of {IMAGES} test images drawn with seed {SEED}: the share of images and of pixels that change at all;\n"
        "the share of the changed channels that stand at 0 or 255 then, where a stronger trigger would show no more;\n"
        "the highest change of a channel, and the mean over all channels of all pixels, in codes of 255. A network\n"
        "whose trigger was learned is here if it was looked at while the state was at hand.\n\n"
        + "\n".join((*HEAD, *rows))
        + "\n"
    )


def main() -> None:
    (HERE / "STAMPS.md").write_text(page(attacked_networks(), KeptRows.read(KEPT)), encoding="utf-8")


if __name__ == "__main__":
    main()
