"""Why Fine-Pruning broke one INT4 file: its fine-tuning epoch by epoch, at the default rate and at smaller ones.

    QDEFENSE_DATA=... python benchmarks/blindspots/tuning_trace.py

The channels are pruned as the record says, the images are the bench's. Loss and accuracy are the shadow's, which agrees
with the file it is written into on every image (`training_agreement` of the record). Six minutes on one core.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from qdefense.artifact import Artifact
from qdefense.bench.records import DefenseRecord
from qdefense.bench.store import RECORDS, read_records
from qdefense.converters.channels import last_feature_map
from qdefense.converters.shadow import Shadow, build_shadow
from qdefense.data.images import ImageSet
from qdefense.data.opening import open_data
from qdefense.data.selection import choose_rows, disjoint_parts
from qdefense.defenses.fine_tuning import TuningSchedule, fine_tune, silence
from qdefense.findings import RepairResult

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
BROKEN, SOUND = "72ee7257d1cadc21", "0fc40f9051743b80"
"""GTSRB, BadNets, INT4: the networks of seed 1 and of seed 0."""
TRACES = ((BROKEN, 1e-3), (BROKEN, 1e-4), (SOUND, 1e-3))
SHOWN = (0, 1, 2, 3, 4, 5, 10, 20, 50, 100)
SEED = 0


def repaired(name: str) -> DefenseRecord:
    """The record of Fine-Pruning on this file."""
    records = (one for one in read_records(HERE / "results" / RECORDS) if isinstance(one, DefenseRecord))
    return next(one for one in records if one.defense == "fine-pruning" and one.artifact_sha256.startswith(name))


def halves(record: DefenseRecord) -> tuple[ImageSet, ImageSet]:
    """What the bench gave to tune by, and to judge on."""
    rules = record.evaluation
    if rules is None:
        raise SystemExit(f"{record.key}: a record older than the rules that it was measured by; measure it again")
    test = open_data(str(DATA / record.network.data), split="test", seed=SEED, limit=None)
    seen = test.take(choose_rows(len(test), limit=rules.clean_images, seed=SEED))
    tuned, held_out = disjoint_parts(len(seen), (len(seen) // 2, len(seen) // 2), seed=SEED, groups=seen.groups)
    return seen.take(tuned), seen.take(held_out)


@torch.no_grad()
def judged(shadow: Shadow, images: ImageSet) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    logits, labels = shadow(torch.from_numpy(images.pixels)), torch.from_numpy(images.labels)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def trace(name: str, rate: float) -> None:
    """Prune as recorded, tune at this rate, and print a line for each epoch of `SHOWN`."""
    record = repaired(name)
    assert record.finding is not None
    assert isinstance(record.finding.result, RepairResult)
    assert record.finding.result.pruning is not None
    pruned, (tuned, held_out) = record.finding.result.pruning.pruned, halves(record)
    file = Artifact.from_bytes((HERE / "results" / "models" / f"{name}.onnx").read_bytes())
    silent = last_feature_map(file.data, file.contract.output_name).parameters
    shadow = build_shadow(file.data, source="shipped", contract=file.contract, trainable=True)
    silence(shadow, silent, pruned)
    first = next(weight for weight in shadow.parameters() if weight.requires_grad and weight.dim() == 4)
    start = first.detach().clone()

    def show(epoch: int) -> None:
        if epoch in SHOWN:
            figures = (*judged(shadow, tuned), *judged(shadow, held_out))
            moved = float((first.detach() - start).norm() / start.norm())
            told = " | ".join(f"{figure:.3f}" for figure in (*figures, moved))
            print(f"| seed {record.network.seed}, {rate:g} | {epoch} | {told} |", flush=True)

    show(0)
    recorded = {key: record.settings[key] for key in ("epochs", "momentum", "weight_decay", "batch_size")}
    schedule = TuningSchedule(learning_rate=rate, **recorded)
    rng = np.random.default_rng(SEED)
    fine_tune(shadow, tuned, schedule, rng, silent=silent, channels=pruned, on_epoch=show)


def main() -> None:
    torch.set_num_threads(1)
    print("| network, rate | epoch | loss, tuned by | accuracy | loss, held out | accuracy | first convolution moved |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for one in TRACES:
        trace(*one)


if __name__ == "__main__":
    main()
