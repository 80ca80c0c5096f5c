"""Scan a fixed list of files with every start, and again with the screened scheduler; finished scans are kept.

    QDEFENSE_DATA=... python benchmarks/neural_cleanse/compare.py [--mode exhaustive|screened]

`results/records.jsonl` gets one line per file and mode. The files are those of benchmarks/first_verdict, quantized as
its `judge.py` does. The list was fixed, with budget and restarts, before the scheduler was run on any of them; the
scheduler itself was developed on networks on `signs` only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
from pathlib import Path
from typing import Any, Literal

from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit
from qdefense.converters.quantize import Scheme, quantize
from qdefense.data.opening import open_data
from qdefense.files import write_atomically
from qdefense.report.model import Report

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
MODELS = HERE.parent / "first_verdict" / "results"
WORK = HERE / "work"
RECORDS = HERE / "results" / "records.jsonl"
CALIBRATION_IMAGES = 256
CLEAN_IMAGES = 1000

# Fixed before the first scan: every CIFAR-10 network of first_verdict (a: attacked, b: its clean twin), two precisions.
Precision = Literal["fp32"] | Scheme
SCHEMES: tuple[Precision, ...] = ("fp32", "int8-static")
FILES = tuple((f"cifar10-{kind}{seed}", scheme) for seed in (0, 1, 2) for kind in "ab" for scheme in SCHEMES)
EXHAUSTIVE = "neural-cleanse:budget=quick,restarts=4"
SPECS = {"exhaustive": EXHAUSTIVE, "screened": f"{EXHAUSTIVE},scheduler=screened"}


def make_file(name: str, scheme: Precision, data: str = "cifar10") -> Path:
    model = MODELS / f"{name}.onnx"
    if scheme == "fp32":
        return model
    target = WORK / f"{name}.{scheme}.onnx"
    if not target.exists():
        calibration = open_data(str(DATA / data), split="train", limit=CALIBRATION_IMAGES, seed=0).pixels
        WORK.mkdir(exist_ok=True)
        write_atomically(target, quantize(model.read_bytes(), scheme, calibration=calibration))
    return target


def record(name: str, scheme: str, mode: str, report: Report) -> dict[str, Any]:
    return {
        "model": name,
        "scheme": scheme,
        "mode": mode,
        "artifact_sha256": report.subject.sha256,
        "data_sha256": report.subject.data.sha256 if report.subject.data else None,
        "findings": [finding.model_dump(mode="json", exclude={"result": {"pictures"}}) for finding in report.findings],
        "gate": report.gate.model_dump(mode="json"),
        "environment": report.environment.model_dump(mode="json"),
        "volatile": report.volatile.model_dump(mode="json", exclude={"command", "host"}),
    }


def scan(name: str, scheme: Precision, mode: str) -> dict[str, Any]:
    job = Job(
        model=str(make_file(name, scheme)),
        data=str(DATA / "cifar10"),
        limit=CLEAN_IMAGES,
        defenses=(SPECS[mode],),
        seed=0,
        threads=1,
        memory_bytes=default_memory_limit(),
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    report = run_audit(job, required=("neural-cleanse",), on_progress=lambda *_: None)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return record(name, scheme, mode, report) | {"cpu_seconds": round(cpu, 1), "load": os.getloadavg()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=[*SPECS], action="append")
    options = parser.parse_args()
    lines = RECORDS.read_text(encoding="utf-8").splitlines() if RECORDS.exists() else []
    done = {(line["model"], line["scheme"], line["mode"]) for line in map(json.loads, lines)}
    RECORDS.parent.mkdir(exist_ok=True)
    for mode in options.mode or SPECS:
        for name, scheme in FILES:
            if (name, scheme, mode) in done:
                continue
            line = scan(name, scheme, mode)
            with RECORDS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True) + "\n")
            print(name, scheme, mode, *line["gate"]["reasons"], f"{line['cpu_seconds']} CPU s", flush=True)


if __name__ == "__main__":
    main()
