"""What STRIP costs per input, on one network as FP32, static INT8 and dynamic INT8.

    QDEFENSE_DATA=DIR python benchmarks/strip_latency.py [--inputs 1000]

The network is `first_verdict/results/gtsrb-a0.onnx` (ResNet-8, 32x32, 43 classes), the images GTSRB's. First the
throughput that the project promises: 100 overlays for 1,000 inputs, 100,000 forwards, in wall-clock and CPU-seconds;
then latency, session alone and session behind STRIP, taking turns in every round. Prints the page that it writes to
`strip_latency.md`, with the records in `strip_latency.json`; exits with 1 where the FP32 or the static file misses the
60 seconds, taking half of its CPU-seconds for what two idle CPUs would need.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qdefense.artifact import Artifact
from qdefense.attacks.badnets import BadNets
from qdefense.bench.latency import deployed_variants, measure_latency, peak_memory
from qdefense.bench.timing_records import LatencyRecord, PeakMemory, Rounds
from qdefense.converters.quantize import Scheme, quantize
from qdefense.data.images import ImageSet, Pixels
from qdefense.data.opening import open_data
from qdefense.defenses.filters.strip import FittedStrip, Strip, Superimposition
from qdefense.evidence import Evidence
from qdefense.fidelity import uncertified
from qdefense.rates import auroc
from qdefense.session import DeployedSession, profile_for

HERE = Path(__file__).parent
MODEL = HERE / "first_verdict" / "results" / "gtsrb-a0.onnx"
TRUTH = MODEL.with_suffix(".truth.json")
Precision = Literal["fp32"] | Scheme
FORMS: tuple[Precision, ...] = ("fp32", "int8-static", "int8-dynamic")
SUPERIMPOSITIONS: tuple[Superimposition, ...] = ("add", "blend")
THREADS, SEED = 2, 0
CLEAN_IMAGES, CALIBRATION_IMAGES, SCORED = 300, 256, 200
LIMIT_SECONDS = 60.0
OFFLINE_ROWS = 64
ROUNDS = Rounds(single_stream=60, offline=5, warm_up=2)


def form_of(name: Precision, train: ImageSet) -> bytes:
    plain = MODEL.read_bytes()
    if name == "fp32":
        return plain
    calibration = train.pixels if name == "int8-static" else None
    return quantize(plain, name, calibration=calibration)


def fit(
    data: bytes, clean: ImageSet, *, superimposition: Superimposition = "add"
) -> tuple[DeployedSession, FittedStrip]:
    artifact = Artifact.from_bytes(data)
    session = DeployedSession(artifact, profile_for(artifact))
    evidence = Evidence(
        session=session,
        shadow=None,
        certificate=uncertified("a filter looks at no shadow"),
        clean=clean,
        seed=SEED,
        threads=THREADS,
    )
    fitted = Strip(superimposition=superimposition).fit(evidence)
    if not isinstance(fitted, FittedStrip):
        raise SystemExit(f"strip could not be fitted: {fitted.reason}")
    return session, fitted


def throughput(fitted: FittedStrip, x: Pixels) -> dict[str, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    fitted.decide(x)
    return {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def efficacy(data: bytes, clean: ImageSet, inputs: ImageSet) -> dict[str, dict[str, Any]]:
    """AUROC, and how many are rejected with and without the trigger, beside what the boundary was set for."""
    truth = json.loads(TRUTH.read_text(encoding="utf-8"))
    trigger = BadNets(**truth["attack_settings"]).trigger(*inputs.images.shape[1:3])
    victims = inputs.take(np.flatnonzero(trigger.eligible(inputs.labels))[:SCORED])
    found: dict[str, dict[str, Any]] = {}
    for superimposition in SUPERIMPOSITIONS:
        session, fitted = fit(data, clean, superimposition=superimposition)
        stamped = trigger.stamp(victims.pixels)
        scores = [np.array(fitted.decide(x).scores, dtype=float) for x in (stamped, victims.pixels)]
        found[superimposition] = {
            "auroc": auroc(-scores[0], -scores[1]),
            "tpr": float(np.mean(scores[0] < fitted.boundary.value)),
            "fpr": float(np.mean(scores[1] < fitted.boundary.value)),
            "boundary": fitted.boundary.value,
            "sums_cut_at_1": fitted.boundary.note is not None,
            "asr": float(np.mean(session.logits(stamped).argmax(axis=1) == trigger.target_class)),
        }
    return found


def running(data: bytes, clean: ImageSet, x: Pixels, *, filtered: bool) -> Callable[[], object]:
    """What a fresh process runs for its peak memory; the filter's fit takes part."""
    if not filtered:
        artifact = Artifact.from_bytes(data)
        return functools.partial(DeployedSession(artifact, profile_for(artifact)).logits, x)
    return functools.partial(fit(data, clean)[1].decide, x)


def memories(data: bytes, clean: ImageSet, x: Pixels) -> tuple[PeakMemory, ...]:
    found = (
        peak_memory(name, functools.partial(running, data, clean, x, filtered=filtered))
        for name, filtered in (("session", False), ("session + strip", True))
    )
    return tuple(entry for entry in found if entry is not None)


def measure(name: Precision, clean: ImageSet, inputs: ImageSet, train: ImageSet) -> dict[str, Any]:
    data = form_of(name, train)
    session, fitted = fit(data, clean)
    x = inputs.pixels
    load = os.getloadavg()
    done = throughput(fitted, x)
    record = measure_latency(
        session,
        deployed_variants(session, {"strip": fitted}),
        x,
        batch=OFFLINE_ROWS,
        rounds=ROUNDS,
        seed=SEED,
        threads=THREADS,
    )
    record = record.model_copy(update={"memory": memories(data, clean, x[:OFFLINE_ROWS])})
    return {
        "form": name,
        "bytes": len(data),
        "inputs": len(x),
        **done,
        "load": load,
        "efficacy": efficacy(data, clean, inputs),
        "latency": record.model_dump(mode="json"),
    }


def page(results: dict[str, Any]) -> str:
    forms = results["forms"]
    machine = forms[0]["latency"]["machine"]
    lines = [
        "# What STRIP costs per input",
        "",
        f"`{results['command']}`: ResNet-8 on GTSRB (gtsrb-a0, BadNets), {THREADS} threads, seed {SEED}.",
        f"Machine: {machine['runtime']['machine']} {' '.join(machine['runtime']['isa'])}, {machine['cpus']} CPUs,",
        f"onnxruntime {machine['runtime']['onnxruntime']}; it had other work, so read CPU-seconds beside wall clock.",
        "",
        f"## 100 overlays for {forms[0]['inputs']:,} inputs",
        "",
        "| form | wall s | CPU s | forwards per CPU s | load at the start |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {form['form']} | {form['seconds']:.1f} | {form['cpu_seconds']:.1f} "
            f"| {100 * form['inputs'] / form['cpu_seconds']:,.0f} | {', '.join(f'{one:.1f}' for one in form['load'])} |"
            for form in forms
        ),
        "",
        "## Latency, one image a call, ms (median with 95 % bootstrap interval)",
        "",
        "| form | variant | p50 | p90 | p99 | CPU | added, median | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row for form in forms for row in latency_rows(form, "single_stream")),
        "",
        f"## Offline, {OFFLINE_ROWS} images a call (dynamic INT8 is run one row at a time: its rows share a scale)",
        "",
        "| form | variant | images/s | interval | ms a call | added, median | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(row for form in forms for row in offline_rows(form)),
        "",
        f"## Efficacy on {SCORED} test images with and without the trigger; memory (peak of a fresh process, MiB)",
        "",
        "| form | ASR | superimposition | AUROC | TPR | FPR | boundary | session | with STRIP and its fit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row for form in forms for row in efficacy_rows(form)),
        "",
        "The boundary is set for a false rejection rate of 1 %; TPR and FPR are shares below it.",
        *(f"{form['form']}, {name}: the file cuts every sum at 1." for form, name in cutting(forms)),
        "",
    ]
    return "\n".join(lines)


def cutting(forms: list[dict[str, Any]]) -> list[tuple[dict[str, Any], str]]:
    return [(form, name) for form in forms for name, found in form["efficacy"].items() if found["sums_cut_at_1"]]


def _interval(entry: dict[str, float], digits: int = 2) -> str:
    return f"{entry['value']:.{digits}f} [{entry['low']:.{digits}f}, {entry['high']:.{digits}f}]"


def latency_rows(form: dict[str, Any], scenario: str) -> list[str]:
    found = form["latency"][scenario]
    added = {entry["name"]: entry for entry in found["added"]}
    return [
        f"| {form['form']} | {timing['name']} | {timing['p50_ms']:.2f} | {timing['p90_ms']:.2f} "
        f"| {timing['p99_ms']:.2f} | {timing['cpu_ms']:.2f} | {_added(added.get(timing['name']))} |"
        for timing in found["variants"]
    ]


def offline_rows(form: dict[str, Any]) -> list[str]:
    found = form["latency"]["offline"]
    added = {entry["name"]: entry for entry in found["added"]}
    return [
        f"| {form['form']} | {timing['name']} | {timing['rows_per_second']['value']:,.0f} "
        f"| [{timing['rows_per_second']['low']:,.0f}, {timing['rows_per_second']['high']:,.0f}] "
        f"| {timing['median_ms']['value']:.1f} | {_added(added.get(timing['name']))} |"
        for timing in found["variants"]
    ]


def _added(entry: dict[str, Any] | None) -> str:
    return " | " if entry is None else f"{_interval(entry['difference_ms'])} | {_interval(entry['ratio'], 1)}"


def efficacy_rows(form: dict[str, Any]) -> list[str]:
    memory = " | ".join(f"{entry['peak_bytes'] / 2**20:.0f}" for entry in form["latency"]["memory"]) or " | "
    return [
        f"| {form['form']} | {found['asr']:.3f} | {name} | {found['auroc']:.3f} | {found['tpr']:.3f} "
        f"| {found['fpr']:.3f} | {found['boundary']:.3f} | {memory} |"
        for name, found in form["efficacy"].items()
    ]


def holds(forms: list[dict[str, Any]]) -> bool:
    """CPU-seconds over the CPUs in use stand for an idle machine; dynamic INT8, one row a time, has no limit."""
    return all(form["cpu_seconds"] / THREADS <= LIMIT_SECONDS for form in forms if form["form"] != "int8-dynamic")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1000)
    options = parser.parse_args()
    folder = str(Path(os.environ.get("QDEFENSE_DATA", HERE.parents[1] / "shared" / "data")) / "gtsrb")
    test = open_data(folder, split="test", limit=CLEAN_IMAGES + options.inputs, seed=SEED)
    train = open_data(folder, split="train", limit=CALIBRATION_IMAGES, seed=SEED)
    clean, inputs = (test.take(rows) for rows in np.split(np.arange(len(test)), [CLEAN_IMAGES]))
    forms = [measure(name, clean, inputs, train) for name in FORMS]
    results = {"command": f"python benchmarks/strip_latency.py --inputs {options.inputs}", "forms": forms}
    for form in forms:
        LatencyRecord.model_validate(form["latency"])
    (HERE / "strip_latency.json").write_text(json.dumps(results, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    text = page(results)
    (HERE / "strip_latency.md").write_text(text, encoding="utf-8")
    print(text)
    return 0 if holds(forms) else 1


if __name__ == "__main__":
    sys.exit(main())
