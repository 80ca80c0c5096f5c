"""Why STRIP ranks BadNets on FP32 CIFAR-10 below its published figure: what images laid over each other do to the file.

    QDEFENSE_DATA=... python benchmarks/blindspots/strip_sums.py

100 eligible test images, alone and under 20 others each, with and without the trigger: the share that gets the target
class, and the mean entropy of the answers in bits. Seed 0; a minute on one core.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data
from qdefense.session import DeployedSession, Logits, SessionProfile

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
FILES = (("cifar10", 3, "4420d87c44a9da9c"), ("gtsrb", 12, "a4aeda93b40d5f22"))
IMAGES, OVERLAYS = 100, 20
Sum = Callable[[Pixels, Pixels], Pixels]
SUMS: dict[str, Sum] = {
    "x + o": lambda x, o: x + o,
    "x + o, cut at 1": lambda x, o: np.minimum(x + o, 1),
    "(x + o) / 2": lambda x, o: (x + o) / 2,
}


def entropies(logits: Logits) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p = powers / powers.sum(axis=1, keepdims=True)
    return -np.sum(p * np.log2(np.maximum(p, 1e-30)), axis=1)


def laid_over(x: Pixels, overlays: Pixels, add: Sum) -> Pixels:
    return np.concatenate([add(x, overlay[None]) for overlay in overlays]).astype(np.float32)


def main() -> None:
    print("| data | sum | target class, triggered | clean | entropy, triggered | clean |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    for data, target, name in FILES:
        file = Artifact.from_bytes((HERE / "results" / "models" / f"{name}.onnx").read_bytes())
        session = DeployedSession(file, SessionProfile(threads=1, batch=64))
        images = open_data(str(DATA / data), split="test", seed=0, limit=4 * IMAGES)
        trigger = ATTACKS.create(f"badnets:target_class={target}").trigger(32, 32)
        clean = images.take(np.flatnonzero(trigger.eligible(images.labels))[:IMAGES]).pixels
        drawn = np.random.default_rng(0).integers(2 * IMAGES, 4 * IMAGES, OVERLAYS)
        for sums, add in {"alone": None, **SUMS}.items():
            asked = (trigger.stamp(clean), clean)
            if add is not None:
                asked = tuple(laid_over(x, images.pixels[drawn], add) for x in asked)
            answers = [session.logits(x) for x in asked]
            shares = [f"{np.mean(logits.argmax(axis=1) == target):.3f}" for logits in answers]
            means = [f"{entropies(logits).mean():.3f}" for logits in answers]
            print("|", " | ".join([data, sums, *shares, *means]), "|", flush=True)


if __name__ == "__main__":
    main()
