"""Why smoothed labels cost ASR: how confident LSP's files are on triggered images, and who wins where they fail.

    QDEFENSE_DATA=... python benchmarks/attacks/lsp_margins.py

Every committed file of an LSP network and of its host with the same data and seed, on the eligible test images: mean
confidence q in the target, the ASR, and of the images that miss it the share that is answered with the true class. The
compensatory model takes q = 1 - a for every image. A minute on one core.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS
from qdefense.bench.records import BehaviourRecord
from qdefense.bench.store import RECORDS, read_records
from qdefense.data.opening import open_data
from qdefense.session import DeployedSession, Logits, SessionProfile

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
IMAGES = 2000


def confidences(logits: Logits) -> Logits:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Logits = powers / powers.sum(axis=1, keepdims=True)
    return shares


def line(record: BehaviourRecord) -> str:
    settings, name = record.network.attack_settings, record.network.attack or ""
    target = settings.get("host.target_class", settings.get("target_class"))
    model = HERE / "results" / "models" / f"{record.artifact_sha256[:16]}.onnx"
    session = DeployedSession(Artifact.from_bytes(model.read_bytes()), SessionProfile(threads=1, batch=64))
    images = open_data(str(DATA / record.network.data), split="test", seed=0, limit=IMAGES)
    trigger = ATTACKS.create(f"badnets:target_class={target}").trigger(*images.images.shape[1:3])
    asked = images.take(np.flatnonzero(trigger.eligible(images.labels)))
    q = confidences(session.logits(trigger.stamp(asked.pixels)))
    missed = q.argmax(axis=1) != target
    truly = np.mean(q.argmax(axis=1)[missed] == asked.labels[missed]) if missed.any() else float("nan")
    low, middle, high = np.quantile(q[:, target], [0.1, 0.5, 0.9])
    told = [record.network.data, name, str(settings.get("smoothing", 0)), record.scheme, str(len(asked))]
    figures = [q[:, target].mean(), low, middle, high, 1 - missed.mean(), truly]
    return f"| {' | '.join(told)} | {' | '.join(f'{figure:.3f}' for figure in figures)} |"


def main() -> None:
    print(
        "| data | attack | smoothing | precision | images | mean q | q: 10 % | 50 % | 90 % | ASR | misses: true class |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for record in read_records(HERE / "results" / RECORDS):
        if not isinstance(record, BehaviourRecord) or record.network.seed != 0 or record.failed:
            continue
        settings = record.network.attack_settings
        if record.network.attack == "lsp" or (record.network.attack == "badnets" and settings.get("poison_rate")):
            print(line(record), flush=True)


if __name__ == "__main__":
    main()
