"""Shadow against deployed session: every architecture, every scheme, 512 test images each.

    python benchmarks/fidelity/measure.py [--architecture NAME] [--again failed|refused] [--state]

Trains what is not there, quantizes, compares, writes one JSON line per cell to `results/fidelity.jsonl` and then
README.md. It goes on where it stopped: a cell is measured once per network file and per version of the runtime.
Networks of at most 0.4 MB lie in `results/models`, larger ones in `work/`, which is not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from cells import NETWORKS, Network, batches, expectation, passes, schemes
from parting import float_operators, inexact, parts_at
from table import write_page

from qdefense.artifact import Artifact
from qdefense.audit.versions import versions
from qdefense.converters.quantize import Settings, quantize_as
from qdefense.converters.shadow import Shadow, build_shadow, runtime_saturation
from qdefense.data.images import ImageSet, Pixels
from qdefense.data.opening import open_data
from qdefense.fidelity import compare_logits, finite_or_none
from qdefense.files import write_atomically
from qdefense.models import recipe_for
from qdefense.session import DeployedSession, Logits, profile_for, runtime
from qdefense.trial import truth_path
from qdefense.zoo import train_artifact

HERE = Path(__file__).parent
WORK = HERE / "work"
RESULTS = HERE / "results"
MODELS = RESULTS / "models"
RECORDS = RESULTS / "fidelity.jsonl"
TRAINING = RESULTS / "training.jsonl"
SMALL_BYTES = 400_000
IMAGES, CALIBRATION_IMAGES, DATA_SEED = 512, 256, 0
ROWS_FOLLOWED, ROWS_AT_ONCE = 8, 64
# The converters' and the session's refusals are of these kinds; one cell's failure must not stop the others.
REFUSALS = (ValueError, RuntimeError)
Record = dict[str, Any]


class Cell(NamedTuple):
    """One file and the batch that its session runs at."""

    network: Network
    scheme: str
    settings: Settings | None
    batch: int | None


@cache
def images(split: str) -> ImageSet:
    count = IMAGES if split == "test" else CALIBRATION_IMAGES
    return open_data("signs", split=split, limit=count, seed=DATA_SEED)


def find(network: Network) -> Path | None:
    """The network's file, in either folder."""
    places = (MODELS / f"{network.name}.onnx", WORK / f"{network.name}.onnx")
    return next((place for place in places if place.exists()), None)


def train(network: Network) -> Path:
    if found := find(network):
        return found
    WORK.mkdir(exist_ok=True)
    target = WORK / f"{network.name}.onnx"
    recipe = replace(recipe_for(network.architecture), epochs=network.epochs)
    began, cpu = time.time(), time.process_time()
    truth = train_artifact(
        open_data("signs", split="train"),
        target,
        architecture=network.architecture,
        recipe=recipe,
        attack=None,
        seed=network.seed,
        threads=1,
        width=network.width,
        on_epoch=lambda done, total, loss: print(f"{network.name}: epoch {done}/{total}, loss {loss:.3f}", flush=True),
    )
    append(
        TRAINING,
        {
            "network": network.name,
            "recipe": asdict(recipe),
            "seed": network.seed,
            "sha256": truth.artifact_sha256,
            "size_bytes": target.stat().st_size,
            "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "load": os.getloadavg(),
        },
    )
    return keep_if_small(target)


def keep_if_small(target: Path) -> Path:
    if target.stat().st_size > SMALL_BYTES:
        return target
    MODELS.mkdir(parents=True, exist_ok=True)
    kept = MODELS / target.name
    write_atomically(truth_path(kept), truth_path(target).read_bytes())
    write_atomically(kept, target.read_bytes())
    return kept


def quantized(model: bytes, settings: Settings | None) -> bytes:
    if settings is None:
        return model
    return quantize_as(model, settings, calibration=images("train").pixels if calibrated(settings) else None)


def calibrated(settings: Settings | None) -> bool:
    return settings is not None and settings.method is not None


def shadow_answers(shadow: Shadow, x: Pixels, *, saturate: bool, batch: int) -> Logits:
    """The shadow's logits in its exact mode, its dynamic scales shared as a session of this batch shares them."""
    step = batch * max(1, ROWS_AT_ONCE // batch)
    with torch.no_grad():
        steps = torch.split(torch.from_numpy(x), step)
        parts = [shadow(part, exact=True, saturate=saturate, group=batch) for part in steps]
    return torch.cat(parts).numpy()


def measure(data: bytes, settings: Settings | None, batch: int | None) -> Record:
    """Compare one file's session at ORT_ENABLE_ALL with its shadow of the optimized graph."""
    artifact = Artifact.from_bytes(data)
    profile = profile_for(artifact)
    session = DeployedSession(artifact, profile if batch is None else profile.model_copy(update={"batch": batch}))
    shadow = build_shadow(data, source="optimized", options=session.profile)
    graph = onnx.load_from_string(session.graph)
    floats, emulate = float_operators(graph), bool(runtime_saturation())
    x, labels = images("test").pixels, images("test").labels
    deployed, own = session.logits(x), shadow_answers(shadow, x, saturate=emulate, batch=session.profile.batch)
    found, largest = compare_logits(deployed, own), float(np.abs(deployed).max())
    followed = settings is not None and settings.scheme != "int4" and found.bit_exact_rows < 1
    return {
        "artifact_sha256": artifact.sha256,
        "size_bytes": artifact.size_bytes,
        "session": session.profile.model_dump(),
        "saturation_emulated": emulate,
        "images": found.n,
        "accuracy": float((deployed.argmax(axis=1) == labels).mean()),
        "top1_agreement": found.top1_agreement,
        "bit_exact_rows": found.bit_exact_rows,
        "largest_logit": largest,
        "relative_difference": finite_or_none(found.max_abs / largest),
        "float_operators_before_a_quantize": floats,
        "expectation": expectation(settings, inexact(floats)),
        "parts_at": parts_at(session, shadow, graph, differing(x, deployed, own, session), saturate=emulate)
        if followed
        else None,
    }


def differing(x: Pixels, deployed: Logits, own: Logits, session: DeployedSession) -> Pixels:
    """The images whose logits differ most, each with the whole batch that it was run in."""
    batch = session.profile.batch if session.artifact.batch_coupled else 1
    apart = np.abs(deployed - own).max(axis=1)
    furthest = np.argsort(-apart, kind="stable")[: np.count_nonzero(apart)] // batch
    groups = list(dict.fromkeys(furthest.tolist()))[: max(1, ROWS_FOLLOWED // batch)]
    return np.concatenate([x[group * batch : (group + 1) * batch] for group in groups])


def cells(only: str | None) -> Iterator[Cell]:
    for network in NETWORKS:
        if only in (None, network.architecture):
            for name, settings in schemes().items():
                for batch in batches(settings):
                    yield Cell(network, name, settings, batch)


def key(record: Record) -> tuple[object, ...]:
    return (
        record["network"],
        record["scheme"],
        record["batch"],
        record["network_sha256"],
        record["versions"]["onnxruntime"],
    )


def append(path: Path, record: Record) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(record, sort_keys=True) + "\n")


@cache
def commit() -> str | None:
    """The commit of the code that measures, with a plus where the tree differs from it."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    )
    return found.stdout.strip() or None


def read(path: Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def forget(wanted: Callable[[Record], bool]) -> None:
    """Drop records, so that their cells are measured again."""
    kept = [record for record in read(RECORDS) if not wanted(record)]
    write_atomically(RECORDS, "".join(json.dumps(record, sort_keys=True) + "\n" for record in kept).encode())


def run_cell(cell: Cell, model: bytes) -> Record:
    began, cpu = time.time(), time.process_time()
    outcome: Record
    try:
        outcome = {"refused": None, **measure(quantized(model, cell.settings), cell.settings, cell.batch)}
    except REFUSALS as error:
        outcome = {"refused": f"{type(error).__name__}: {error}"}
    volatile = {
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "load": os.getloadavg(),
    }
    return {**identity_of(cell, model), **outcome, "volatile": volatile}


def identity_of(cell: Cell, model: bytes) -> Record:
    return {
        "network": cell.network.name,
        "scheme": cell.scheme,
        "settings": None if cell.settings is None else cell.settings.record(),
        "batch": cell.batch,
        "network_sha256": hashlib.sha256(model).hexdigest(),
        "data_seed": DATA_SEED,
        "test_sha256": images("test").digest,
        "calibration_sha256": images("train").digest if calibrated(cell.settings) else None,
        "runtime": runtime().model_dump(),
        "versions": versions(),
        "commit": commit(),
    }


def missing(only: str | None) -> list[Cell]:
    done = {key(record) for record in read(RECORDS)}
    left = []
    for cell in cells(only):
        path = find(cell.network)
        if path is None or key(identity_of(cell, path.read_bytes())) not in done:
            left.append(cell)
    return left


def tell_state(only: str | None) -> None:
    left = missing(only)
    for network in NETWORKS:
        count = sum(cell.network == network for cell in left)
        total = sum(cell.network == network for cell in cells(None))
        trained = "trained" if find(network) else "not trained"
        print(f"{network.name}: {trained}, {count} of {total} cells missing", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=[network.architecture for network in NETWORKS])
    parser.add_argument("--again", choices=["failed", "refused"], help="Measure these cells again.")
    parser.add_argument("--state", action="store_true", help="Say what is missing, write the page, measure nothing.")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.again:
        forget(lambda r: bool(r["refused"]) or (options.again == "failed" and not passes(r)))
    for cell in [] if options.state else missing(options.architecture):
        record = run_cell(cell, train(cell.network).read_bytes())
        append(RECORDS, record)
        shown = record["refused"] or f"bit-exact {record['bit_exact_rows']:.4f}, top-1 {record['top1_agreement']:.4f}"
        print(f"{cell.network.name}, {cell.scheme}, batch {cell.batch}: {shown}", flush=True)
    write_page(HERE, read(RECORDS), read(TRAINING), len(missing(None)))
    tell_state(options.architecture)


if __name__ == "__main__":
    main()
