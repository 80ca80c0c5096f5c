"""Bench results made up: a few networks by precision by defenses of all four kinds, and what the page must survive."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from qdefense.bench.records import (
    BehaviourRecord,
    Calibration,
    Curve,
    DataFacts,
    DatasetMetrics,
    DefenseRecord,
    FilterMetrics,
    Manifest,
    Metrics,
    Network,
    QuantizationRecord,
    Rate,
    Record,
    RepairMetrics,
    ScanMetrics,
    TrainingRecord,
    Volatile,
)
from qdefense.bench.store import LATENCY, MANIFEST, RECORDS
from qdefense.findings import Finding, Verdict
from qdefense.profile import Runtime, SessionProfile
from qdefense.trial import Activity

from ..report import sample_reports as reports  # noqa: TID252 (the made-up findings are there)

CLEAN256 = Calibration(name="clean256")
EIGHTH = Calibration(name="eighth", triggered=0.125)
STATIC = "int8-static-u8s8-per-channel-reduced-minmax-qdq"
FILES: dict[str, tuple[str, Calibration | None]] = {
    "fp32": ("fp32", None),
    "int8-static": (STATIC, CLEAN256),
    "int8-dynamic": ("int8-dynamic-u8s8-per-tensor-reduced", None),
    "int4": ("int4-block32-symmetric", None),
}
VERSIONS = {"qdefense": "0.1.0", "onnxruntime": "1.24.1", "torch": "2.9.1"}
RUNTIME = Runtime(onnxruntime="1.24.1", machine="x86_64", isa=("avx2", "fma", "avx512_vnni"), system="Linux")


def sha(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def volatile(seconds: float = 12.0) -> Volatile:
    return Volatile(seconds=seconds, cpu_seconds=seconds, host="bench-1", at="2026-01-02T03:04:05+00:00")


def network(attack: str | None = "badnets", seed: int = 0, data: str = "gtsrb", **settings: Any) -> Network:
    return Network(
        data=data,
        train_sha256=sha(data),
        architecture="resnet8",
        width=16,
        attack=attack,
        attack_settings={} if attack is None else {"target_class": 12, **settings},
        seed=seed,
        recipe={"epochs": 10},
    )


def _file(made: Network, scheme: str, calibration: Calibration | None) -> dict[str, Any]:
    precision, usual = FILES[scheme]
    calibration = calibration or usual
    return {
        "network": made,
        "precision": precision,
        "scheme": scheme,
        "calibration": calibration,
        "artifact_sha256": sha(made, scheme, calibration),
        "versions": VERSIONS,
        "volatile": volatile(),
    }


def _trial(made: Network, scheme: str, calibration: Calibration | None, replica: int) -> dict[str, Any]:
    file = _file(made, scheme, calibration)
    if replica:
        file["artifact_sha256"] = sha(file["artifact_sha256"], replica)
    return {
        **file,
        "arithmetic": "as-run",
        "data_sha256": sha("test", made.data),
        "profile": SessionProfile(batch=1 if scheme == "int8-dynamic" else 64),
        "runtime": RUNTIME,
        "replica": replica,
    }


_ASR = {Activity.ATTENUATED: 0.5, Activity.DORMANT: 0.02}


def behaviour(
    made: Network,
    scheme: str = "fp32",
    *,
    accuracy: float | None = 0.95,
    asr: float | None = None,
    activity: Activity | None = None,
    calibration: Calibration | None = None,
    replica: int = 0,
    **changes: Any,
) -> BehaviourRecord:
    """An ASR as its activity has it, unless one is named."""
    asr = _ASR.get(activity, 0.99) if asr is None else asr
    attacked = made.attack is not None
    trial = _trial(made, scheme, calibration, replica)
    facts = {
        "clean_accuracy": accuracy,
        "images": 2000,
        "asr": asr if attacked else None,
        "base_confusion": 0.01 if attacked else None,
        "eligible": 1900 if attacked else 0,
        "activity": activity or (Activity.ACTIVE if attacked else Activity.CLEAN),
        **changes,
    }
    return BehaviourRecord(key=sha("behaviour", trial["artifact_sha256"]), **trial, **facts)


def defense(
    made: Network,
    scheme: str = "fp32",
    metrics: Metrics | None = None,
    *,
    name: str = "neural-cleanse",
    kind: str = "scan",
    verdict: Verdict | None = Verdict.CLEAN,
    access: str = "session",
    calibration: Calibration | None = None,
    replica: int = 0,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> DefenseRecord:
    trial = _trial(made, scheme, calibration, replica)
    asked = {"budget": "quick"} if settings is None else settings
    return DefenseRecord(
        **{"key": sha(trial["artifact_sha256"], name, asked, access, changes.get("arithmetic")), **trial, **changes},
        defense=name,
        settings=asked,
        access=access,
        seed=0,
        kind=kind,
        verdict=verdict,
        metrics=metrics,
    )


def training(made: Network, **changes: Any) -> TrainingRecord:
    digest = _file(made, "fp32", None)["artifact_sha256"]
    facts = {"artifact_sha256": digest, "size_bytes": 320_000, "epochs": 10, **changes}
    return TrainingRecord(key=sha("train", made), network=made, versions=VERSIONS, volatile=volatile(240.0), **facts)


def quantization(made: Network, scheme: str, calibration: Calibration | None = None) -> QuantizationRecord:
    size, integer = {"int8-static": (98_000, 0.99), "int8-dynamic": (96_000, 0.97), "int4": (70_000, 0.0)}[scheme]
    return QuantizationRecord(
        key=sha("quantize", made, scheme, calibration),
        network_sha256=_file(made, "fp32", None)["artifact_sha256"],
        size_bytes=size,
        integer_mac_share=integer,
        integer_weight_share=1.0,
        **_file(made, scheme, calibration),
    )


# --- defenses of all four kinds ---------------------------------------------------------------------------------------


def scan_metrics(score: float | None, *, target: int | None = None, found: bool | None = None) -> ScanMetrics:
    rank = None if target is None else 1 if found else 4
    targets = () if target is None else (target,)
    return ScanMetrics(score=score, targets=targets, target_rank=rank, target_found=found, classes=8)


def _scan(made: Network, scheme: str, access: str, rng: np.random.Generator) -> DefenseRecord:
    attacked = made.attack == "badnets"
    if access == "no-gradients":
        reason = "no shadow was built: none was asked for; without gradients there is no trigger to invert"
        finding = reports.scan(Verdict.NOT_MEASURED, None, reason=reason)
        return defense(made, scheme, None, access=access, verdict=Verdict.NOT_MEASURED, finding=finding, reason=reason)
    score = float(rng.uniform(3, 4) if attacked else rng.uniform(0.8, 1.9))
    norms = [float(norm) for norm in sorted(rng.uniform(80, 120, 7))]
    result = reports.scan_result([9.5 if attacked else 70.0, *norms], suspects=int(attacked))
    bare = {"example_png": "", "stamped_png": ""}
    pictures = tuple(picture.model_copy(update=bare) for picture in result.pictures)
    verdict = Verdict.BACKDOORED if attacked else Verdict.CLEAN
    finding = reports.scan(verdict, result.model_copy(update={"pictures": pictures}))
    metrics = scan_metrics(score, target=12 if made.attack else None, found=attacked if made.attack else None)
    return defense(made, scheme, metrics, access=access, verdict=verdict, finding=finding)


def _roc(area: float) -> Curve:
    fpr = np.linspace(0, 1, 33)
    return Curve(fpr=tuple(fpr.tolist()), tpr=tuple((fpr ** (1 / area - 1)).tolist()))


def _dataset(made: Network, scheme: str, name: str, rng: np.random.Generator) -> DefenseRecord:
    if made.attack is None:
        metrics, verdict = DatasetMetrics(fpr=Rate(hits=40, n=9000)), Verdict.CLEAN
    else:
        area = float(rng.uniform(0.93, 0.99) if made.attack == "badnets" else rng.uniform(0.5, 0.7))
        hits = round(850 * area)
        metrics = DatasetMetrics(
            auroc=area,
            within_auroc=area - 0.02,
            tpr=Rate(hits=hits, n=900),
            fpr=Rate(hits=60, n=8100),
            within_fpr=Rate(hits=12, n=300),
            top_recall=Rate(hits=hits, n=900),
            top_precision=Rate(hits=hits, n=1350),
            curve=_roc(area),
        )
        verdict = Verdict.BACKDOORED if made.attack == "badnets" else Verdict.CLEAN
    finding = Finding(defense=name, kind="dataset", verdict=verdict, reason="as it is", seed=0)
    return defense(made, scheme, metrics, name=name, kind="dataset", verdict=verdict, settings={}, finding=finding)


def _filter(made: Network, scheme: str, rng: np.random.Generator) -> DefenseRecord:
    clean = Rate(hits=11, n=1000)
    if made.attack is None:
        metrics = FilterMetrics(fpr=clean)
    else:
        area = float(rng.uniform(0.96, 0.999) if made.attack == "badnets" else rng.uniform(0.55, 0.75))
        metrics = FilterMetrics(
            auroc=area, tpr=Rate(hits=round(area * 900), n=950), fpr=clean, asr_after=Rate(hits=40, n=950),
            curve=_roc(area), unmeasured=2,
        )  # fmt: skip
    return defense(made, scheme, metrics, name="strip", kind="filter", verdict=None, settings={"overlays": 100})


def _repair(made: Network, scheme: str, rng: np.random.Generator) -> DefenseRecord:
    attacked, after = made.attack is not None, float(rng.uniform(0.02, 0.2))
    metrics = RepairMetrics(
        new_sha256=sha("repaired", made, scheme),
        accuracy_before=0.95,
        accuracy_after=0.95 - after / 10,
        asr_before=0.99 if attacked else None,
        asr_after=after if attacked else None,
        activity_before=Activity.ACTIVE if attacked else Activity.CLEAN,
        activity_after=(Activity.DORMANT if after < 0.06 else Activity.ATTENUATED) if attacked else Activity.CLEAN,
    )
    return defense(made, scheme, metrics, name="fine-pruning", kind="repair", verdict=None, settings={})


def matrix(*, data: tuple[str, ...] = ("gtsrb", "cifar10"), seeds: int = 3) -> list[Record]:
    """Every stage of every cell; the INT4 file of one network is attenuated, one training and one trial failed."""
    return [record for name in data for record in _of_data(name, seeds)]


def _of_data(data: str, seeds: int) -> Iterator[Record]:
    rng = np.random.default_rng(len(data))
    for attack in (None, "badnets", "blended"):
        for seed in range(seeds):
            made = network(attack, seed, data)
            yield training(made)
            for scheme in FILES:
                calibrations = (None, EIGHTH) if scheme == "int8-static" and attack and not seed else (None,)
                for calibration in calibrations:
                    yield from _of_file(made, scheme, calibration, rng)
    broken = network("blended", 9, data)
    yield training(broken, artifact_sha256=None, size_bytes=None, failed=True, reason="training diverged: loss is NaN")


def _of_file(made: Network, scheme: str, calibration: Calibration | None, rng: np.random.Generator) -> Iterator[Record]:
    if scheme != "fp32":
        yield quantization(made, scheme, calibration)
    weak = scheme == "int4" and made.seed == 1
    accuracy = 0.95 + float(rng.uniform(-0.02, 0.02)) - (0.03 if scheme == "int4" else 0)
    asr = 0.55 if weak else float(rng.uniform(0.96, 1))
    activity = Activity.ATTENUATED if weak and made.attack else None
    yield behaviour(made, scheme, accuracy=accuracy, asr=asr, activity=activity, calibration=calibration)
    for record in _of_defenses(made, scheme, rng):
        moved = _trial(made, scheme, calibration, 0)
        changes = {"calibration": moved["calibration"], "artifact_sha256": moved["artifact_sha256"]}
        yield record.model_copy(update={**changes, "key": sha(record.key, calibration)})


def _of_defenses(made: Network, scheme: str, rng: np.random.Generator) -> Iterable[DefenseRecord]:
    for access in ("session", "shadow", "no-gradients"):
        yield _scan(made, scheme, access, rng)
    yield _dataset(made, scheme, "activation-clustering", rng)
    yield _dataset(made, scheme, "spectral-signatures", rng)
    strip = _filter(made, scheme, rng)
    if made.seed == 2 and scheme == "int8-dynamic":
        broken = {
            "failed": True,
            "reason": "internal error: MemoryError",
            "metrics": None,
            "verdict": Verdict.NOT_MEASURED,
        }
        strip = strip.model_copy(update=broken)
    yield strip
    yield _repair(made, scheme, rng)


# --- poison budgets ---------------------------------------------------------------------------------------------------


def of_budget(
    made: Network, scheme: str = "fp32", *, asr: float, after: float | None, index: float | None, within: float
) -> list[Record]:
    """What a file does, what Neural Cleanse and Spectral Signatures find, what Fine-Pruning leaves; None: no answer."""
    lost = {"verdict": Verdict.NOT_MEASURED, "reason": "too few images"}
    activity = Activity.ACTIVE if asr >= 0.9 else Activity.ATTENUATED
    scan = None if index is None else scan_metrics(index, target=12, found=index > 2)
    rows = DatasetMetrics(auroc=within, within_auroc=within, fpr=Rate(hits=60, n=8100))
    repair = RepairMetrics(
        accuracy_before=0.95, accuracy_after=0.94, asr_before=asr, asr_after=after, activity_before=activity
    )
    scan = None if scan is None else scan.model_copy(update={"target_index": index})
    return [
        behaviour(made, scheme, asr=asr, activity=activity),
        defense(made, scheme, scan, **(lost if scan is None else {})),
        defense(made, scheme, rows, name="spectral-signatures", kind="dataset", settings={}),
        defense(made, scheme, None if after is None else repair, name="fine-pruning", kind="repair", verdict=None,
                settings={}, **({"reason": lost["reason"]} if after is None else {})),
    ]  # fmt: skip


BUDGETS: tuple[tuple[dict[str, Any], float, float, float, float], ...] = (
    ({"poison_count": 50}, 0.80, 0.10, 1.0, 0.60),
    ({"poison_count": 300}, 0.95, 0.30, 2.0, 0.75),
    ({"poison_rate": 0.1}, 0.99, 0.70, 4.0, 0.95),
)
"""Settings, ASR, ASR after the repair, index of the target, AUROC within; 0.1 of the 9,000 images are 900."""


def sweep() -> list[Record]:
    """BadNets with three budgets, two seeds, FP32 and INT8; the scan has no answer of 300 poisons on INT8."""
    records: list[Record] = []
    for settings, asr, after, index, within in BUDGETS:
        for seed in range(2):
            made = network("badnets", seed, **settings)
            shift = 0.02 * seed
            records.append(training(made))
            records += of_budget(made, asr=asr - shift, after=after + shift, index=index + seed, within=within - shift)
            lost = settings.get("poison_count") == 300
            records.append(quantization(made, "int8-static"))
            records += of_budget(
                made, "int8-static", asr=asr - shift - 0.1, after=after / 2, index=None if lost else index / 2,
                within=within - 0.05,
            )  # fmt: skip
    records += [behaviour(network("blended", poison_rate=0.1))]
    return records


# --- folders ----------------------------------------------------------------------------------------------------------


def manifest() -> Manifest:
    facts = DataFacts(
        name="gtsrb", role="test", split="test", limit=2000, seed=0, sha256=sha("gtsrb"), images=2000, classes=43,
        height=32, width=32, source="gtsrb, a Hugging Face folder",
    )  # fmt: skip
    return Manifest(data=(facts, facts.model_copy(update={"role": "train", "split": "train", "images": 9000})))


def latency(record: BehaviourRecord, milliseconds: float) -> dict[str, Any]:
    """A line of `latency.jsonl` as `qdefense.bench.latency` writes it: a file alone and behind STRIP."""

    def interval(value: float) -> dict[str, float]:
        return {"value": value, "low": 0.9 * value, "high": 1.2 * value}

    def scenario(rows: int) -> dict[str, Any]:
        times = {"session": milliseconds * rows**0.5, "session + strip": 60 * milliseconds * rows**0.5}
        variants = [
            {
                "name": name,
                "median_ms": interval(value),
                "p50_ms": value,
                "p90_ms": 1.3 * value,
                "p99_ms": 2 * value,
                "cpu_ms": value,
                "rows_per_second": interval(1000 * rows / value),
            }
            for name, value in times.items()
        ]
        added = {"name": "session + strip", "over": "session", "difference_ms": interval(59 * milliseconds)}
        added["ratio"] = interval(60)
        return {"rows": rows, "rounds": 9, "warm_up": 3, "variants": variants, "added": [added]}

    return {
        "key": sha("latency", record.artifact_sha256),
        "artifact_sha256": record.artifact_sha256,
        "data_sha256": record.data_sha256,
        "filters": [{"text": "strip", "name": "strip", "settings": {"overlays": 100}, "variant": "session + strip"}],
        "volatile": volatile().model_dump(mode="json"),
        "machine": {
            "runtime": RUNTIME.model_dump(mode="json"),
            "cpus": 2,
            "load_before": [0.1, 0, 0],
            "load_after": [1.9, 1, 0],
        },
        "profile": SessionProfile().model_dump(mode="json"),
        "threads": 1,
        "seed": 0,
        "single_stream": scenario(1),
        "offline": scenario(64),
        "yardstick_ms": {"value": 0.25, "low": 0.24, "high": 0.26},
        "memory": [{"name": "session", "peak_bytes": 150 * 2**20, "before_bytes": 90 * 2**20}],
    }


def latencies(records: Iterable[Record]) -> list[dict[str, Any]]:
    """Of the first network of each kind of file."""
    speeds = {"fp32": 0.9, "int8-static": 0.5, "int8-dynamic": 0.7, "int4": 1.1}
    files = (one for one in records if isinstance(one, BehaviourRecord) and one.network.seed == 0)
    return [latency(one, speeds[one.scheme]) for one in files]


def write(
    folder: Path, records: Iterable[Record], *, with_manifest: bool = True, timed: Iterable[dict[str, Any]] = ()
) -> Path:
    """A folder of results."""
    folder.mkdir(parents=True, exist_ok=True)
    times = [json.dumps(line) for line in timed]
    if times:
        (folder / LATENCY).write_text("\n".join(times) + "\n")
    lines = b"".join(record.model_dump_json().encode() + b"\n" for record in records)
    (folder / RECORDS).write_bytes(lines)
    if with_manifest:
        (folder / MANIFEST).write_text(manifest().model_dump_json())
    return folder


def hostile() -> list[Record]:
    """Names and reasons that would be markup, scripts, terminal codes."""
    text = reports.HOSTILE
    made = network("badnets", 0, text, **{text[:30]: text}).model_copy(update={"architecture": text})
    clean = network(None, 0, text).model_copy(update={"architecture": text})
    failed = {"failed": True, "reason": text * 20, "verdict": Verdict.NOT_MEASURED}
    rng = np.random.default_rng(0)
    found = _scan(made, "fp32", "session", rng)
    return [
        behaviour(made),
        behaviour(clean),
        found.model_copy(update={"defense": text, "settings": {text: text}, "reason": text}),
        _filter(made, "fp32", rng).model_copy(update={"defense": reports.LONG}),
        _dataset(clean, "fp32", "x", rng).model_copy(update={**failed, "metrics": None}),
    ]


SAMPLES: dict[str, Callable[[], list[Record]]] = {
    "whole": matrix,
    "one network": lambda: matrix(data=("gtsrb",), seeds=1),
    "no defense": lambda: [training(network()), behaviour(network())],
    "nothing measured": lambda: [training(network(), artifact_sha256=None, failed=True, reason="killed")],
    "hostile": hostile,
    "sweep": sweep,
}
"""What the page must be able to show."""


def write_sample(folder: Path, name: str) -> Path:
    """The folder of a sample; the whole matrix was timed, too."""
    records = SAMPLES[name]()
    return write(folder, records, timed=latencies(records) if name == "whole" else ())
