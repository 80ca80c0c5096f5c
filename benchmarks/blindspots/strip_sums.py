"""Why STRIP ranks BadNets on CIFAR-10 below its published figure: what images laid over each other do to the file.

    QDEFENSE_DATA=... python benchmarks/blindspots/strip_sums.py

100 eligible test images, alone and under 20 others each, with and without the trigger: the share that gets the target
class, the mean entropy of the answers in bits, and the AUROC of the images' entropies. Seed 0; two minutes on one core.
Files above 0.4 MB are not committed: `qdefense bench benchmarks/blindspots/matrix.toml` makes them, and those that are
not there are left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data
from qdefense.rates import auroc
from qdefense.session import DeployedSession, Logits, SessionProfile

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
MODELS = HERE / "results" / "models"
FILES = (
    ("cifar10, ResNet-8, FP32", "cifar10", 3, "4420d87c44a9da9c.onnx"),
    ("gtsrb, ResNet-8, FP32", "gtsrb", 12, "a4aeda93b40d5f22.onnx"),
    ("cifar10, PreActResNet-18, FP32", "cifar10", 3, "large/b2ce7781da338ab5.onnx"),
    ("cifar10, PreActResNet-18, static INT8", "cifar10", 3, "large/8d095ace4bcae4b7.onnx"),
)
IMAGES, OVERLAYS = 100, 20
Sum = Callable[[Pixels, Pixels], NDArray[np.floating]]
SUMS: dict[str, Sum] = {
    "x + o": lambda x, o: x + o,
    "x + o, cut at 1": lambda x, o: np.minimum(x + o, 1),
    "(x + o) / 2": lambda x, o: (x + o) / 2,
}


def entropies(logits: Logits) -> NDArray[np.float64]:
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    p = powers / powers.sum(axis=1, keepdims=True)
    found: NDArray[np.float64] = -np.sum(p * np.log2(np.maximum(p, 1e-30)), axis=1)
    return found


def laid_over(x: Pixels, overlays: Pixels, add: Sum) -> Pixels:
    return np.concatenate([add(x, overlay[None]) for overlay in overlays]).astype(np.float32)


def row(session: DeployedSession, target: int, pair: tuple[Pixels, Pixels]) -> list[str]:
    """Of triggered images and of the same ones without it: share of the target, mean entropy, and their AUROC."""
    answers = [session.logits(x) for x in pair]
    shares = [f"{np.mean(logits.argmax(axis=1) == target):.3f}" for logits in answers]
    triggered, clean = (entropies(logits).reshape(-1, IMAGES).mean(axis=0) for logits in answers)
    return [*shares, f"{triggered.mean():.3f}", f"{clean.mean():.3f}", f"{auroc(-triggered, -clean):.3f}"]


def rows(data: str, target: int, model: Path) -> Iterator[list[str]]:
    session = DeployedSession(Artifact.from_bytes(model.read_bytes()), SessionProfile(threads=1, batch=64))
    images = open_data(str(DATA / data), split="test", seed=0, limit=4 * IMAGES)
    trigger = ATTACKS.create(f"badnets:target_class={target}").trigger(32, 32)
    clean = images.take(np.flatnonzero(trigger.eligible(images.labels))[:IMAGES]).pixels
    drawn = images.pixels[np.random.default_rng(0).integers(2 * IMAGES, 4 * IMAGES, OVERLAYS)]
    pair = (trigger.stamp(clean), clean)
    yield ["alone", *row(session, target, pair)]
    for sums, add in SUMS.items():
        yield [sums, *row(session, target, (laid_over(pair[0], drawn, add), laid_over(pair[1], drawn, add)))]


def main() -> None:
    print("| file | sum | target class, triggered | clean | entropy, triggered | clean | AUROC |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for name, data, target, file in FILES:
        if not (MODELS / file).exists():
            print(f"| {name} | {file} is not there |", flush=True)
            continue
        for cells in rows(data, target, MODELS / file):
            print("|", " | ".join([name, *cells]), "|", flush=True)


if __name__ == "__main__":
    main()
