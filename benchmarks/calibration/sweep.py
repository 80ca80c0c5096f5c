"""Train, quantize, measure and audit the networks of the calibration sweep; whatever is there is kept.

    python benchmarks/calibration/sweep.py --threads 1 [--part 0/2]

Three groups of ResNet-8 on `signs`, trained as the demo trains its own: `calibrate` (20 clean ones, which set the
threshold), `clean` (20 others) and `badnets` (10), which are scored by it. Each is a file as FP32, static and dynamic
INT8. An audit's report goes to `results/reports/`, one line of behaviour per file to `results/behaviour.jsonl`; the
audit sees neither. `--part I/N` takes every N-th network, for N processes side by side.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from qdefense.artifact import Artifact
from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.converters.quantize import Scheme, quantize
from qdefense.data.opening import open_data
from qdefense.files import write_atomically
from qdefense.models import recipe_for
from qdefense.session import DeployedSession, profile_for
from qdefense.trial import Truth, measure_behaviour, truth_path
from qdefense.zoo import train_artifact, trigger_of

HERE = Path(__file__).parent
WORK = HERE / "work"
REPORTS = HERE / "results" / "reports"
RESULTS = HERE / "results"
BEHAVIOUR = RESULTS / "behaviour.jsonl"
SCHEMES: tuple[Scheme | None, ...] = (None, "int8-static", "int8-dynamic")
EPOCHS = 8
CLASSES = 12
CLEAN_IMAGES = 1000
CALIBRATION_IMAGES = 256


@dataclass(frozen=True)
class Network:
    """One network of the sweep; its name says nothing of how it was trained (law 3)."""

    group: str
    seed: int
    attack: str | None = None

    @property
    def path(self) -> Path:
        """Where its FP32 file lies."""
        return WORK / f"n{self.seed}.onnx"


# Fixed before the first of them was trained, and never changed. The target class follows the seed.
NETWORKS = (
    *(Network("calibrate", seed) for seed in range(100, 120)),
    *(Network("badnets", seed, f"badnets:target-class={seed % CLASSES}") for seed in range(300, 310)),
    *(Network("clean", seed) for seed in range(200, 220)),
)


def train(network: Network, threads: int) -> Truth:
    if network.path.exists():
        return Truth.model_validate_json(truth_path(network.path).read_bytes())
    recipe = replace(recipe_for("resnet8"), epochs=EPOCHS)
    dataset = open_data("signs", split="train")
    return train_artifact(
        dataset,
        network.path,
        architecture="resnet8",
        recipe=recipe,
        attack=network.attack,
        seed=network.seed,
        threads=threads,
    )


def files(network: Network) -> Iterator[tuple[str, Path]]:
    for scheme in SCHEMES:
        if scheme is None:
            yield "fp32", network.path
            continue
        target = WORK / f"{network.path.stem}.{scheme}.onnx"
        if not target.exists():
            images = open_data("signs", split="train").pixels[:CALIBRATION_IMAGES] if scheme == "int8-static" else None
            write_atomically(target, quantize(network.path.read_bytes(), scheme, calibration=images))
        yield scheme, target


def measure(network: Network, scheme: str, path: Path, truth: Truth) -> None:
    artifact = Artifact.read(path)
    session = DeployedSession(artifact, profile_for(artifact))
    test = open_data("signs", split="test")
    seen = measure_behaviour(session.logits, test, trigger_of(truth, test))
    line = {
        "model": network.path.stem,
        "group": network.group,
        "seed": network.seed,
        "attack": network.attack,
        "scheme": scheme,
        "artifact_sha256": artifact.sha256,
        "behaviour": seen.model_dump() | {"activity": seen.activity.value},
    }
    RESULTS.mkdir(exist_ok=True)
    with BEHAVIOUR.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, sort_keys=True) + "\n")


def audit(path: Path, threads: int) -> None:
    job = Job(
        model=str(path),
        data="signs",
        limit=CLEAN_IMAGES,
        defenses=("neural-cleanse",),
        seed=0,
        threads=threads,
        memory_bytes=default_memory_limit(),
    )
    report = run_audit(job, required=("neural-cleanse",), on_progress=lambda *_: None)
    REPORTS.mkdir(exist_ok=True)
    write_atomically(REPORTS / f"{path.stem}.json", (report.model_dump_json(indent=2) + "\n").encode())
    print(path.stem, report.gate.outcome, *report.gate.reasons, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--part", default="0/1")
    options = parser.parse_args()
    part, parts = map(int, options.part.split("/"))
    WORK.mkdir(exist_ok=True)
    for network in NETWORKS[part::parts]:
        truth = train(network, options.threads)
        for scheme, path in files(network):
            if not (REPORTS / f"{path.stem}.json").exists():
                measure(network, scheme, path, truth)
                audit(path, options.threads)


if __name__ == "__main__":
    main()
