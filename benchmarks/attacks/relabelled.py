"""Write RELABELLED.md: whether Spectral Signatures see the trigger of poisons, or that their label is wrong.

    QDEFENSE_DATA=... python benchmarks/attacks/relabelled.py

The rows of the target class as the network was trained on them, and once more with the poisons as they were before the
stamp: images of other classes under this label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from answers import table
from attacked import HERE, KEPT, Attacked, clean_networks, networks, session_of, training_images
from kept_rows import KeptRows, Table

from qdefense.attacks import ATTACKS
from qdefense.attacks.poisoning import AllToOne, poison_to_one
from qdefense.bench.scoring import dataset_metrics
from qdefense.data.images import ImageSet, Pixels
from qdefense.defenses.spectra import spectral_scores
from qdefense.features import find_penultimate, penultimate_features
from qdefense.training import poisoned_set

SHOWN = ("badnets", "blended")
RELABELLED = Table("relabelled")
HEAD = ("attack", "data, seed", "rows", "poisons", "its network: stamped", "plain", "clean: stamped", "plain")


@dataclass(frozen=True, kw_only=True)
class Unstamped(AllToOne):
    """A trigger that changes nothing."""

    def stamp(self, x: Pixels) -> Pixels:
        """The images."""
        return x


def is_told(network: Attacked) -> bool:
    made = network.made
    return (made.data, made.seed) == ("cifar10", 0) and made.attack in SHOWN and not made.all_to_all


def auroc_within(model: bytes, rows: ImageSet, poisons: np.ndarray) -> float | None:
    """Of Spectral Signatures, among rows of one label."""
    session = session_of(model)
    features, _ = penultimate_features(session, rows, find_penultimate(session))
    return dataset_metrics(spectral_scores(features).scores, (), poisons, rows.labels).within_auroc


def relabelled_row(network: Attacked, clean: Attacked) -> Iterator[str]:
    made = network.made
    attack, target = ATTACKS.restore(made.attack or "", made.attack_settings), int(made.attack_settings["target_class"])
    images = training_images(made.data)
    stamped = poisoned_set(images, attack, made.seed)
    count = len(stamped.poison_indices)
    plain = poison_to_one(
        images,
        np.random.default_rng([made.seed, 1]),
        trigger=Unstamped(target_class=target),
        count=count,
        attack="relabelled",
    )
    if not np.array_equal(plain.poison_indices, stamped.poison_indices):
        raise SystemExit(f"{network.title}: other rows are relabelled than its attack poisons")
    mine = np.flatnonzero(stamped.images.labels == target)
    poisons = np.flatnonzero(np.isin(mine, stamped.poison_indices))
    cells = (
        f"{auroc_within(one.model('fp32'), each.images.take(mine), poisons):.3f}"
        for one in (network, clean)
        for each in (stamped, plain)
    )
    yield f"{len(mine):,} | {count:,} | {' | '.join(cells)}"


def lines(network: Attacked, clean: dict[tuple[str, int], Attacked], kept: KeptRows) -> Iterator[str]:
    twin = clean[network.place]
    beside = {"clean": twin.files["fp32"].artifact_sha256}
    yield from network.rows(kept, RELABELLED, partial(relabelled_row, clean=twin), beside)


def main() -> None:
    kept, every = KeptRows.read(KEPT), networks()
    clean = clean_networks(every)
    rows = table(HEAD, (line for network in filter(is_told, every) for line in lines(network, clean, kept)))
    parts = [
        "# What Spectral Signatures see of poisons",
        "Written by `relabelled.py`, FP32 files. AUROC of the spectral scores of poisons among the training rows of\n"
        "their label: *stamped*, as the network was trained on them, and *plain*, the same rows without the trigger,\n"
        "which are then images of other classes with a wrong label. By the features of the attacked network, and of\n"
        "the clean one of the same seed, which was trained on all of them unstamped and with their true labels. The\n"
        f"AUROC of 50 poisons has a standard error of about .04. {' and '.join(kept.runtimes(RELABELLED))}.",
        rows,
    ]
    (HERE / "RELABELLED.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
