"""Quantize, measure and audit every model of `train.py`; one JSON line per file, finished files are kept.

    python benchmarks/first_verdict/judge.py --budget quick --threads 2

`results/verdicts.jsonl` gets, for each file: clean accuracy, ASR and activity on the whole test split, the certificate,
the verdict, and rank, norm and index of the true target. The audit sees neither the truth nor this script's figures.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from train import DATA, RESULTS, SEEDS, TARGETS, cells, name_of

from qdefense.artifact import Artifact
from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.converters.quantize import Scheme, quantize
from qdefense.data.opening import open_data
from qdefense.files import write_atomically
from qdefense.findings import ScanResult
from qdefense.report.model import Report
from qdefense.session import DeployedSession, profile_for
from qdefense.trial import Behaviour, Truth, measure_behaviour, truth_path
from qdefense.zoo import trigger_of

CALIBRATION_IMAGES = 256
CLEAN_IMAGES = 1000
SCHEMES: tuple[Scheme | None, ...] = (None, "int8-static", "int8-dynamic")
RECORDS = RESULTS / "verdicts.jsonl"


def make_file(model: Path, data: str, scheme: Scheme | None) -> Path:
    if scheme is None:
        return model
    target = RESULTS.parent / "work" / f"{model.stem}.{scheme}.onnx"
    if not target.exists():
        pixels = open_data(str(DATA / data), split="train", limit=CALIBRATION_IMAGES, seed=0).pixels
        target.parent.mkdir(exist_ok=True)
        calibration = pixels if scheme == "int8-static" else None
        write_atomically(target, quantize(model.read_bytes(), scheme, calibration=calibration))
    return target


def behaviour_of(path: Path, truth: Truth, data: str, threads: int) -> Behaviour:
    artifact = Artifact.read(path)
    session = DeployedSession(artifact, profile_for(artifact, threads=threads))
    test = open_data(str(DATA / data), split="test")
    return measure_behaviour(session.logits, test, trigger_of(truth, test))


def record(
    model: str, data: str, scheme: str | None, attack: str | None, seen: Behaviour, report: Report
) -> dict[str, Any]:
    finding = report.findings[0] if report.findings else None
    found = finding.result if finding is not None else None
    result = found if isinstance(found, ScanResult) else None
    target = next((c for c in result.classes if c.target_class == TARGETS[data]), None) if result else None
    return {
        "model": model,
        "data": data,
        "scheme": scheme or "fp32",
        "attack": attack,
        "artifact_sha256": report.subject.sha256,
        "data_sha256": report.subject.data.sha256 if report.subject.data else None,
        "behaviour": seen.model_dump() | {"activity": seen.activity.value},
        "certificate": report.certificate.model_dump(mode="json") if report.certificate else None,
        "verdict": finding.verdict.value if finding else None,
        "reason": finding.reason if finding else report.gate.reasons,
        "exit_code": report.gate.exit_code,
        "settings": finding.settings if finding else None,
        "cost": finding.cost.model_dump() if finding else None,
        "score": result.score if result else None,
        "median_norm": result.median_norm if result else None,
        "mad": result.mad if result else None,
        "replay_agreement": result.replay_agreement if result else None,
        "suspects": [s.target_class for s in result.suspects] if result else None,
        "censored": sum(c.norm is None for c in result.classes) if result else None,
        "attacked_class": target.model_dump() if target else None,
        "lowest": result.classes[0].model_dump() if result and result.classes else None,
        "environment": report.environment.model_dump(mode="json"),
        "volatile": report.volatile.model_dump(mode="json", exclude={"command", "host"}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    options = parser.parse_args()
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    done = {(r["model"], r["scheme"], r["settings"]["budget"]) for r in map(json.loads, lines) if r["settings"]}
    for seed, data, attack in cells():
        for scheme in SCHEMES:
            name = name_of(seed, data, attack)
            model = RESULTS / f"{name}.onnx"
            if seed not in options.seeds or not model.exists() or (name, scheme or "fp32", options.budget) in done:
                continue
            path = make_file(model, data, scheme)
            truth = Truth.model_validate_json(truth_path(model).read_bytes())
            seen = behaviour_of(path, truth, data, options.threads)
            job = Job(
                model=str(path),
                data=str(DATA / data),
                limit=CLEAN_IMAGES,
                defenses=(f"neural-cleanse:budget={options.budget}",),
                seed=0,
                threads=options.threads,
                memory_bytes=default_memory_limit(),
            )
            report = run_audit(job, required=("neural-cleanse",), on_progress=lambda *_: None)
            line = record(name, data, scheme, attack, seen, report) | {"load": os.getloadavg()}
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True) + "\n")
            print(name, scheme, seen.activity, line["verdict"], line["reason"], flush=True)


if __name__ == "__main__":
    main()
