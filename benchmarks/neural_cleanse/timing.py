"""Time the gate on one static INT8 file of 43 and one of 10 classes: one start of every class, or four, screened.

    QDEFENSE_DATA=... python benchmarks/neural_cleanse/timing.py [--scheduler exhaustive|screened]

`results/timings.jsonl` gets wall and CPU seconds of the whole audit on two threads, certificate included, and the load.
A screened scan has 4 restarts, without which its starts would be shorter than the gate's 200 steps: it takes what one
start of every class takes and three more of the lowest ones, and never less than the gate's default of one start. No
estimate from shorter starts (66 steps) holds for it.

On a machine that others use the wall time says little: half of the CPU seconds is what two idle cores would need.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from typing import Any

from compare import CLEAN_IMAGES, DATA, HERE, make_file

from qdefense.audit.events import Job
from qdefense.audit.supervisor import default_memory_limit, run_audit

TIMINGS = HERE / "results" / "timings.jsonl"
FILES = (("cifar10-a0", "cifar10"), ("gtsrb-a0", "gtsrb"))
SPECS = {
    "exhaustive": "neural-cleanse:budget=gate",
    "screened": "neural-cleanse:budget=gate,restarts=4,scheduler=screened",
}


def measure(name: str, data: str, scheduler: str) -> dict[str, Any]:
    spec = SPECS[scheduler]
    job = Job(
        model=str(make_file(name, "int8-static", data)),
        data=str(DATA / data),
        limit=CLEAN_IMAGES,
        defenses=(spec,),
        seed=0,
        threads=2,
        memory_bytes=default_memory_limit(),
    )
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    report = run_audit(job, required=("neural-cleanse",), on_progress=lambda *_: None)
    wall, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    (finding,) = report.findings
    return {
        "model": name,
        "classes": 0 if report.subject.contract is None else report.subject.contract.classes,
        "spec": spec,
        "verdict": finding.verdict.value,
        "gradient_steps": finding.cost.gradient_steps,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "wall_seconds": round(wall, 1),
        "seconds_per_stage": report.volatile.model_dump(mode="json")["seconds_per_stage"],
        "load": os.getloadavg(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scheduler", choices=tuple(SPECS), action="append")
    parser.add_argument("--model", choices=[name for name, _ in FILES], action="append")
    options = parser.parse_args()
    for scheduler in options.scheduler or SPECS:
        for name, data in FILES:
            if options.model and name not in options.model:
                continue
            line = measure(name, data, scheduler)
            with TIMINGS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line, sort_keys=True) + "\n")
            print(line, flush=True)


if __name__ == "__main__":
    main()
