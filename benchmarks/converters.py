"""What a shadow and a deployed session cost beside plain PyTorch and a bare ONNX Runtime session, as ratios.

    python benchmarks/converters.py [--rounds 15]

One process, one thread, batch 64, ResNet-8 and ResNet-20 with random weights (no cost depends on them) and random
images; the variants take turns in every round, and a ratio is that of their median CPU-seconds. Prints the page that
it writes to `converters.md`, with the figures in `converters.json`; exits with 1 where a limit fails.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from qdefense.artifact import Artifact
from qdefense.audit.provenance import environment
from qdefense.converters.export import export_model
from qdefense.converters.quantize import quantize
from qdefense.converters.shadow import build_shadow
from qdefense.models import build_model
from qdefense.session import DeployedSession, profile_for

HERE = Path(__file__).parent
ARCHITECTURES = ("resnet8", "resnet20")
BATCH, SIZE, CLASSES, SEED = 64, 32, 12, 0
CALIBRATION_IMAGES = 256
SESSIONS_PER_ROUND = 8
"""A forward pass is over in milliseconds: more of them for each gradient."""


@dataclass(frozen=True)
class Figure:
    """One claim: median CPU-seconds of two variants that took turns, and how large their ratio may be."""

    claim: str
    seconds: float
    reference_seconds: float
    limit: float
    unit: str = "x"

    @property
    def value(self) -> float:
        """What is held against the limit: a ratio, or seconds where there is nothing to compare with."""
        return self.seconds / self.reference_seconds if self.unit == "x" else self.seconds

    @property
    def holds(self) -> bool:
        """Whether it is within the limit."""
        return self.value <= self.limit


def medians(variants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU-seconds of each, after one call to warm up; they take turns, so that a busy machine slows all."""
    spent: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        variant()
    for _ in range(rounds):
        for name, variant in variants.items():
            begin = time.process_time()
            variant()
            spent[name].append(time.process_time() - begin)
    return {name: statistics.median(seconds) for name, seconds in spent.items()}


def to_the_input(network: nn.Module, images: torch.Tensor) -> Callable[[], object]:
    """Forward and backward to the images."""

    def run() -> None:
        x = images.clone().requires_grad_()
        network(x).sum().backward()

    return run


def gradient_figures(name: str, module: nn.Module, files: Mapping[str, bytes], rounds: int) -> list[Figure]:
    images = torch.rand(BATCH, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(SEED))
    shadows = {form: build_shadow(data, source="optimized") for form, data in files.items()}
    networks: dict[str, nn.Module] = {"plain": module, **shadows}
    seconds = medians({form: to_the_input(network, images) for form, network in networks.items()}, rounds)
    return [
        Figure(
            f"{name}: gradient, shadow of the {form} file over plain PyTorch", seconds[form], seconds["plain"], limit
        )
        for form, limit in (("int8-static", 1.25), ("fp32", 1.0))
    ]


def building_figures(name: str, files: Mapping[str, bytes], rounds: int) -> list[Figure]:
    def build(data: bytes) -> Callable[[], object]:
        return lambda: build_shadow(data, source="optimized")

    seconds = medians({form: build(data) for form, data in files.items()}, rounds)
    return [Figure(f"{name}: building the shadow of the {form} file", seconds[form], 0.0, 1.0, "s") for form in files]


def session_figures(name: str, files: Mapping[str, bytes], rounds: int) -> list[Figure]:
    images = np.random.default_rng(SEED).random((BATCH, 3, SIZE, SIZE), dtype=np.float32)
    figures = []
    for form, data in files.items():
        artifact = Artifact.from_bytes(data)
        session = DeployedSession(artifact, profile_for(artifact))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        bare = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        fed, output = {artifact.contract.input_name: images}, [artifact.contract.output_name]
        variants: dict[str, Callable[[], object]] = {
            "bare": partial(bare.run, output, fed),
            "ours": partial(session.logits, images),
        }
        seconds = medians(variants, rounds * SESSIONS_PER_ROUND)
        claim = f"{name}: session.logits over InferenceSession.run, {form}"
        figures.append(Figure(claim, seconds["ours"], seconds["bare"], 1.03))
    return figures


def measure(name: str, rounds: int) -> tuple[list[Figure], dict[str, str]]:
    torch.manual_seed(SEED)
    module = build_model(name, classes=CLASSES).eval().requires_grad_(False)
    plain = export_model(module, height=SIZE, width=SIZE, class_names=tuple(map(str, range(CLASSES))))
    images = np.random.default_rng(SEED).random((CALIBRATION_IMAGES, 3, SIZE, SIZE), dtype=np.float32)
    files = {"fp32": plain, "int8-static": quantize(plain, "int8-static", calibration=images)}
    figures = [
        *gradient_figures(name, module, files, rounds),
        *building_figures(name, files, rounds),
        *session_figures(name, files, rounds),
    ]
    return figures, {f"{name}.{form}": hashlib.sha256(data).hexdigest() for form, data in files.items()}


def page(results: Mapping[str, Any], figures: list[Figure]) -> str:
    rows = [
        f"| {figure.claim} | {'' if figure.unit == 's' else f'{1e3 * figure.reference_seconds:.2f} ms'} "
        f"| {1e3 * figure.seconds:.2f} ms | {figure.value:.3f} {figure.unit} | {figure.limit:g} {figure.unit} "
        f"| {'holds' if figure.holds else 'FAILS'} |"
        for figure in figures
    ]
    before, after = (", ".join(f"{value:.2f}" for value in results["load"][when]) for when in ("before", "after"))
    return "\n".join(
        [
            "# What a shadow and a deployed session cost",
            "",
            f"`{results['command']}`: one process, one thread, batch {BATCH}, seed {SEED}, medians of CPU-seconds",
            f"over {results['rounds']} rounds in which the variants take turns ({SESSIONS_PER_ROUND} times as many for",
            "sessions).",
            "",
            "| claim | reference | ours | value | limit | |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows,
            "",
            f"Machine: {results['machine']}, {results['cores']} cores; load averages {before} before, {after} after.",
            f"Versions: {', '.join(f'{name} {value}' for name, value in results['versions'].items())}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    before = os.getloadavg()
    measured = {name: measure(name, options.rounds) for name in ARCHITECTURES}
    figures = [figure for found, _ in measured.values() for figure in found]
    here = environment()
    results = {
        "command": f"python benchmarks/converters.py --rounds {options.rounds}",
        "rounds": options.rounds,
        "figures": [asdict(figure) | {"value": figure.value, "holds": figure.holds} for figure in figures],
        "sha256": {name: digest for _, digests in measured.values() for name, digest in digests.items()},
        "machine": f"{platform.machine()} {' '.join(here.runtime.isa)}",
        "cores": os.cpu_count(),
        "load": {"before": before, "after": os.getloadavg()},
        "versions": here.versions,
    }
    (HERE / "converters.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = page(results, figures)
    (HERE / "converters.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if all(figure.holds for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
