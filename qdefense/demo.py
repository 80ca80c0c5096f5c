"""The demo: a clean and a backdoored network on `signs`, three files of each, every one audited like a stranger's.

The trap is shown once: the scan that works is run again with its gradients cut, as quantized modules without an
autograd kernel cut them, and must say NOT_MEASURED, not clean.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from qdefense.artifact import Artifact
from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.converters.quantize import Scheme, quantize
from qdefense.data.images import ImageSet
from qdefense.data.opening import open_data
from qdefense.defenses import DEFENSES, ModelScan
from qdefense.evidence import gather_evidence
from qdefense.files import write_atomically
from qdefense.findings import Finding, Verdict
from qdefense.models import recipe_for
from qdefense.report.model import Report
from qdefense.session import DeployedSession, profile_for
from qdefense.trial import Activity, Behaviour, Truth, measure_behaviour, truth_path
from qdefense.zoo import train_artifact, trigger_of

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow

# Fixed in the first commit that has a demo and never changed: not for a nicer table either.
SEEDS = {"first": 0, "second": 1}
ATTACK = {"first": None, "second": "badnets:target-class=7"}
SCHEMES: tuple[Scheme | None, ...] = (None, "int8-static", "int8-dynamic")
EPOCHS = 8
SCAN = "neural-cleanse"
CLEAN_IMAGES = 1000
CALIBRATION_IMAGES = 256
AUDIT_SEED = 0

_MEASURED = frozenset({Verdict.CLEAN, Verdict.BACKDOORED})
_FITTING = {
    Activity.CLEAN: frozenset({Verdict.CLEAN}),
    Activity.ACTIVE: frozenset({Verdict.BACKDOORED}),
    Activity.ATTENUATED: _MEASURED,
    Activity.DORMANT: _MEASURED,
}

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class DemoRow:
    """One file: what it does, and what the audit said of it without knowing."""

    file: str
    behaviour: Behaviour
    report: Report

    @property
    def verdict(self) -> Verdict:
        """The scan's verdict."""
        return self.report.findings[0].verdict if self.report.findings else Verdict.NOT_MEASURED

    @property
    def right(self) -> bool:
        """Whether the verdict fits the file's own activity: a sleeping backdoor may be found or not."""
        return self.verdict in _FITTING[self.behaviour.activity]


@dataclass(frozen=True, kw_only=True)
class DemoOutcome:
    """All six files and the trap."""

    rows: tuple[DemoRow, ...]
    trap: Finding
    folder: Path

    @property
    def exit_code(self) -> int:
        """0 when every file was judged rightly and the trap was seen, else 1."""
        return 0 if all(row.right for row in self.rows) and self.trap.verdict is Verdict.NOT_MEASURED else 1


def run_demo(folder: Path, *, threads: int, on_progress: Progress) -> DemoOutcome:
    """Train, quantize, measure and audit; files that an earlier run finished are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    training, test = open_data("signs", split="train"), open_data("signs", split="test")
    files = []
    for name in SEEDS:
        truth = _train(folder / f"{name}.onnx", name, training, threads, on_progress)
        files += [(path, truth) for path in _make_files(folder / f"{name}.onnx", training)]
    rows = _examine_all(files, test, threads, on_progress)
    return DemoOutcome(rows=rows, trap=_trap(folder / "second.int8-static.onnx", threads), folder=folder)


def _train(path: Path, name: str, training: ImageSet, threads: int, on_progress: Progress) -> Truth:
    recipe = replace(recipe_for("resnet8"), epochs=EPOCHS)
    if path.exists() and truth_path(path).exists():
        truth = Truth.model_validate_json(truth_path(path).read_bytes())
        if truth.artifact_sha256 == Artifact.read(path).sha256 and truth.data_sha256 == training.digest:
            return truth
    return train_artifact(
        training,
        path,
        architecture="resnet8",
        recipe=recipe,
        attack=ATTACK[name],
        seed=SEEDS[name],
        threads=threads,
        on_epoch=lambda done, total, _loss: on_progress(f"train {name}", done, total),
    )


def _make_files(path: Path, training: ImageSet) -> list[Path]:
    calibration = training.take(np.arange(CALIBRATION_IMAGES)).pixels
    made = [path]
    for scheme in SCHEMES:
        if scheme is not None:
            target = path.with_name(f"{path.stem}.{scheme}.onnx")
            pixels = calibration if scheme == "int8-static" else None
            write_atomically(target, quantize(path.read_bytes(), scheme, calibration=pixels))
            made.append(target)
    return made


def _examine_all(
    files: list[tuple[Path, Truth]], test: ImageSet, threads: int, on_progress: Progress
) -> tuple[DemoRow, ...]:
    """Audits side by side, on one thread each: that wastes less than one after the other on several."""
    rows = []
    stopping = threading.Event()

    def pulse(_stage: str, _done: int, _total: int) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt

    on_progress("audits", 0, len(files))
    with ThreadPoolExecutor(max_workers=threads) as pool:
        pending = [pool.submit(_examine, path, truth, test, pulse) for path, truth in files]
        try:
            for done, future in enumerate(pending):
                rows.append(future.result())
                on_progress("audits", done + 1, len(files))
        finally:
            stopping.set()
            pool.shutdown(wait=True, cancel_futures=True)
    return tuple(rows)


def _examine(path: Path, truth: Truth, test: ImageSet, pulse: Progress) -> DemoRow:
    artifact = Artifact.read(path)
    session = DeployedSession(artifact, profile_for(artifact))
    behaviour = measure_behaviour(session.logits, test, trigger_of(truth, test))
    job = Job(
        model=str(path),
        data="signs",
        limit=CLEAN_IMAGES,
        defenses=(SCAN,),
        seed=AUDIT_SEED,
        memory_bytes=default_memory_limit(),
    )
    report = run_audit(job, required=("neural-cleanse",), on_progress=pulse)
    write_atomically(path.with_suffix(".report.json"), (report.model_dump_json(indent=2) + "\n").encode())
    return DemoRow(file=path.name, behaviour=behaviour, report=report)


class _CutGradients(nn.Module):
    """A shadow whose backward pass ends at its output, as a quantized module without an autograd kernel does."""

    def __init__(self, shadow: Any) -> None:
        super().__init__()
        self._shadow = shadow

    def forward(self, x: Tensor, **keywords: bool) -> Tensor:
        return self._shadow(x, **keywords).detach()  # type: ignore[no-any-return]


def _trap(path: Path, threads: int) -> Finding:
    torch.set_num_threads(1)
    artifact = Artifact.read(path)
    session = DeployedSession(artifact, profile_for(artifact))
    clean = open_data("signs", limit=CLEAN_IMAGES, seed=AUDIT_SEED)
    evidence = gather_evidence(session, clean, seed=AUDIT_SEED, threads=threads)
    scan: ModelScan = DEFENSES.create(SCAN)
    return scan.scan(replace(evidence, shadow=cast("Shadow", _CutGradients(evidence.shadow))))
