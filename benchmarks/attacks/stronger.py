"""Write STRONGER.md: what an attacker gets who stamps more at inference than was planted.

    QDEFENSE_DATA=... python benchmarks/attacks/stronger.py

BadNets' patch mirrored, in the middle, and in several places at once: label smoothing bounds the confidence that one
planted patch gets, and no more. SIG's wave at other amplitudes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from answers import table, told
from attacked import DATA, HERE, OTHERS, SEED, Attacked, clean_networks, networks, others_than, session_of

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import trigger_of
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data

HOSTED, SCHEMES = ("badnets", "lsp"), ("fp32", "int8-static")
DELTAS = (10, 20, 40, 80)
Place = tuple[int, int]


def patch_of(network: Attacked, height: int, width: int) -> tuple[Pixels, Place]:
    """The patch, ``(3, h, w)``, and the row and column of its upper left corner."""
    grey = np.full((1, 3, height, width), 0.5, dtype=np.float32)
    stamped = network.trigger(height, width).stamp(grey)[0]
    rows, columns = np.nonzero((stamped != grey[0]).any(axis=0))
    top, left = int(rows.min()), int(columns.min())
    return stamped[:, top : rows.max() + 1, left : columns.max() + 1], (top, left)


def places(planted: Place, size: tuple[int, int], patch: tuple[int, int]) -> dict[str, tuple[Place, ...]]:
    """Where the patch is put, by what the table calls it."""
    (row, column), (height, width) = planted, size
    mirrored = (row, width - column - patch[1])
    above = (height - row - patch[0], column)
    return {
        "planted": (planted,),
        "mirrored": (mirrored,),
        "middle": ((height // 2 - patch[0] // 2 - 1, width // 2 - patch[1] // 2 - 1),),
        "planted and mirrored": (planted, mirrored),
        "planted and above": (planted, above),
        "four corners": (planted, mirrored, above, (above[0], mirrored[1])),
    }


def put(pixels: Pixels, patch: Pixels, where: tuple[Place, ...]) -> Pixels:
    stamped = pixels.copy()
    for row, column in where:
        stamped[:, :, row : row + patch.shape[1], column : column + patch.shape[2]] = patch
    return stamped


@dataclass(frozen=True, kw_only=True)
class Stamps:
    """The eligible test images of a network, stamped in each way, and what the attacker wants of them."""

    stamped: dict[str, Pixels]
    images: int
    target: int

    def line(self, title: str, scheme: str, model: bytes) -> str:
        """What a file answers to them."""
        session = session_of(model)
        cells = (told(session.logits(pixels), self.target) for pixels in self.stamped.values())
        return f"| {title} | {scheme} | {self.images:,} | {' | '.join(cells)} |"


def stamps_of(network: Attacked) -> Stamps:
    data = DATA / network.made.data
    images = open_data(str(data), split="test", seed=SEED, limit=OTHERS)
    size = images.images.shape[1:3]
    trigger = network.trigger(*size)
    eligible = images.take(np.flatnonzero(trigger.eligible(images.labels)))
    patch, planted = patch_of(network, *size)
    where = places(planted, size, patch.shape[1:])
    return Stamps(
        stamped={name: put(eligible.pixels, patch, at) for name, at in where.items()},
        images=len(eligible),
        target=int(trigger.goal(eligible.labels)[0]),
    )


def chosen(every: list[Attacked]) -> list[Attacked]:
    """BadNets as it is, and with smoothed labels."""

    def is_one(network: Attacked) -> bool:
        made = network.made
        usual = not made.all_to_all and not made.attack_settings.get("poison_count")
        return made.attack in HOSTED and made.seed == SEED and usual

    return list(filter(is_one, every))


def lines(stamps: Stamps, network: Attacked) -> Iterator[str]:
    """A row for each of its files."""
    title = network.title if network.made.attack else f"none (the control) | {network.made.data}, {SEED}"
    for scheme in filter(network.files.__contains__, SCHEMES):
        yield stamps.line(title, scheme, network.model(scheme))


def copies(every: list[Attacked]) -> Iterator[str]:
    """Rows of BadNets and LSP, and of the clean networks."""
    clean = clean_networks(every)
    controlled: set[str] = set()
    for network in chosen(every):
        data, stamps = network.made.data, stamps_of(network)
        if data not in controlled:
            yield from lines(stamps, clean[network.place])
        controlled.add(data)
        yield from lines(stamps, network)


def waves(every: list[Attacked]) -> Iterator[str]:
    """Rows for each SIG network: the wave at other amplitudes on its files, and on the clean network's."""
    clean = clean_networks(every)
    for network in every:
        made = network.made
        if made.attack != "sig" or made.seed != SEED:
            continue
        target = int(made.attack_settings["target_class"])
        others = others_than(target, made.data)
        stamped = {}
        for delta in DELTAS:
            attack = ATTACKS.restore("sig", {**made.attack_settings, "inference_delta": delta})
            height, width = others.shape[2:]
            stamped[f"{delta}"] = trigger_of(attack, height, width, None).stamp(others)
        stamps = Stamps(stamped=stamped, images=len(others), target=target)
        yield from lines(stamps, clean[network.place])
        yield from lines(stamps, network)


def main() -> None:
    every = networks()
    parts = [
        "# More at inference than was planted",
        f"Written by `stronger.py`. Of {OTHERS:,} test images (seed {SEED}) those that are eligible: ASR, and in\n"
        "brackets the mean confidence in the target. An ASR of that many images has an interval (Wilson, 95 %) of at\n"
        "most .024 to either side.",
        "## The patch in other places, and several times",
        "CIFAR-10's training mirrors half of the images, GTSRB's none.",
        table(
            ("attack", "data, seed", "precision", "images", *places((28, 28), (32, 32), (3, 3))),
            copies(every),
        ),
        "## SIG's wave at other amplitudes",
        "Trained with 20 of 255.",
        table(("attack", "data, seed", "precision", "images", *map(str, DELTAS)), waves(every)),
    ]
    (HERE / "STRONGER.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
