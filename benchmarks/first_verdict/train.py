"""Train the pairs of the first-verdict measurement: GTSRB and CIFAR-10, clean and badnets, seeds 0, 1, 2.

    python benchmarks/first_verdict/train.py --threads 1

Writes the FP32 files, the truth beside each and one JSON line per model to `results/`; a model that is there is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import asdict, replace
from pathlib import Path

from qdefense.data.opening import open_data
from qdefense.models import recipe_for
from qdefense.zoo import train_artifact

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
TARGETS = {"gtsrb": 12, "cifar10": 3}
SEEDS = (0, 1, 2)


def cells() -> list[tuple[int, str, str | None]]:
    return [
        (seed, data, attack)
        for seed in SEEDS
        for data, target in TARGETS.items()
        for attack in (f"badnets:target-class={target}", None)
    ]


def name_of(seed: int, data: str, attack: str | None) -> str:
    # Neutral names: a file name may not tell a defender whether its model was poisoned (law 3).
    letter = "b" if attack is None else "a"
    return f"{data}-{letter}{seed}"


def tell(done: int, total: int, loss: float) -> None:
    print(f"epoch {done}/{total}, loss {loss:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    threads = parser.parse_args().threads
    RESULTS.mkdir(exist_ok=True)
    for seed, data, attack in cells():
        target = RESULTS / f"{name_of(seed, data, attack)}.onnx"
        if target.exists():
            continue
        dataset = open_data(str(DATA / data), split="train")
        # A mirrored traffic sign is another sign; a mirrored ship is a ship.
        recipe = replace(recipe_for("resnet8"), epochs=10, flip=data == "cifar10")
        began, cpu = time.time(), time.process_time()
        train_artifact(
            dataset,
            target,
            architecture="resnet8",
            recipe=recipe,
            attack=attack,
            seed=seed,
            threads=threads,
            on_epoch=tell,
        )
        record = {
            "model": target.stem,
            "data": data,
            "attack": attack,
            "seed": seed,
            "recipe": asdict(recipe),
            "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "threads": threads,
            "load": [round(value, 2) for value in os.getloadavg()],
        }
        with (RESULTS / "training.jsonl").open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(record, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
