"""Write COPIES.md: what the patch does where it was planted, mirrored, in the middle, and in several places at once.

    QDEFENSE_DATA=... python benchmarks/attacks/copies.py

The cause of the first finding: label smoothing bounds the confidence that one planted patch gets, and no more.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from margins import DATA, HERE, SEED, Attacked, attacked_networks

from qdefense.artifact import Artifact
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data
from qdefense.session import DeployedSession, profile_for

HOSTED, SCHEMES = ("badnets", "lsp"), ("fp32", "int8-static")
IMAGES = 2000
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


def success(logits: Pixels, target: int) -> tuple[float, float]:
    """ASR, and the mean confidence (softmax) in the target."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    confidence = powers[:, target] / powers.sum(axis=1)
    return float(np.mean(logits.argmax(axis=1) == target)), float(confidence.mean())


def lines(network: Attacked) -> Iterator[str]:
    data = DATA / network.files["fp32"].network.data
    images = open_data(str(data), split="test", seed=SEED, limit=IMAGES)
    size = images.images.shape[1:3]
    trigger = network.trigger(*size)
    eligible = images.take(np.flatnonzero(trigger.eligible(images.labels)))
    target, (patch, planted) = int(trigger.goal(eligible.labels)[0]), patch_of(network, *size)
    for scheme in filter(network.files.__contains__, SCHEMES):
        artifact = Artifact.from_bytes(network.model(scheme))
        session = DeployedSession(artifact, profile_for(artifact))
        cells = (
            "{:.3f} ({:.3f})".format(*success(session.logits(put(eligible.pixels, patch, where)), target))
            for where in places(planted, size, patch.shape[1:]).values()
        )
        yield f"| {network.title} | {scheme} | {' | '.join(cells)} |"


def main() -> None:
    chosen = [
        one
        for one in attacked_networks()
        if one.files["fp32"].network.attack in HOSTED
        and one.files["fp32"].network.seed == SEED
        and one.files["fp32"].network.attack_settings.get("mode", "all-to-one") == "all-to-one"
        and one.files["fp32"].network.attack_settings.get("poison_count") is None
    ]
    names = tuple(places((28, 28), (32, 32), (3, 3)))
    head = [
        "# The patch in other places, and several times",
        f"Written by `copies.py`. Of {IMAGES:,} test images (seed {SEED}) those that are eligible: ASR, and in",
        "brackets the mean confidence in the target. CIFAR-10's training mirrors half of the images, GTSRB's none.",
    ]
    table = [
        f"| attack | data, seed | precision | {' | '.join(names)} |",
        f"|---|---|---|{'---|' * len(names)}",
        *(line for network in chosen for line in lines(network)),
    ]
    body = f"{head[0]}\n\n{head[1]}\n{head[2]}\n\n" + "\n".join(table) + "\n"
    (HERE / "COPIES.md").write_text(body, encoding="utf-8")


if __name__ == "__main__":
    main()
