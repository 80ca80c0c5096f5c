"""Reports made up for the page: one for each thing that it must be able to show."""

from __future__ import annotations

import base64
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from qdefense.fidelity import FidelityCertificate, MismatchCause
from qdefense.findings import (
    DatasetClass,
    DatasetResult,
    FilterBoundary,
    FilterResult,
    Finding,
    InvertedTrigger,
    RejectionTest,
    ScanResult,
    Suspect,
    Threshold,
    TriggerPicture,
    Verdict,
)
from qdefense.report.model import Accuracy, CandidateContract, DataFacts, Gate, Report
from qdefense.report.reading import read_report

GOLDEN = Path(__file__).with_name("golden")
SCRIPT = "</title></style><script>alert(1);window.pwned=1</script><img src=x onerror=alert(2)>"
HOSTILE = f"{SCRIPT}\"'{{{{7*7}}}}{{% raw %}}\x1b[2J\u202eCLEAN\u2066\x00\n--><b>&amp;"
LONG = "Endlos" * 1667
"""10,002 characters without a place to break."""


def golden(name: str) -> Report:
    """A report that an audit wrote once."""
    return read_report((GOLDEN / f"{name}.json").read_bytes())


def png(side: int = 8, *, seed: int = 0, grey: bool = False) -> str:
    """A small picture of noise in base64."""
    shape = (side, side) if grey else (side, side, 3)
    body = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(body, format="PNG")
    return base64.b64encode(body.getvalue()).decode()


def picture(target: int) -> TriggerPicture:
    return TriggerPicture(
        target_class=target,
        trigger_id=f"{target:016x}",
        mask_png=png(seed=target, grey=True),
        trigger_png=png(seed=target + 1),
        example_png=png(seed=target + 2),
        stamped_png=png(seed=target + 3),
    )


def trigger(target: int, norm: float | None, *, rank: int = 1, name: str | None = None) -> InvertedTrigger:
    return InvertedTrigger(
        target_class=target,
        class_name=f"sign {target}" if name is None else name,
        rank=rank,
        norm=norm,
        index=None if norm is None else max(0.0, (100 - norm) / 20),
        optimised_asr=None if norm is None else 0.995,
        artifact_asr=None if norm is None else 0.9,
        restart_norms=(norm,),
        censored="no trigger reached an ASR of 0.99 on the session within the budget" if norm is None else None,
        trigger_id=f"{target:016x}",
    )


def scan_result(norms: list[float | None], *, suspects: int = 0, mad: float = 20.0) -> ScanResult:
    """Norms in rising order, None at the end; the first ``suspects`` classes are suspects."""
    classes = tuple(trigger(place, norm, rank=place + 1) for place, norm in enumerate(norms))
    named = tuple(
        Suspect(target_class=one.target_class, class_name=one.class_name, score=4.5, artifact_asr=0.9, trigger_id="a")
        for one in classes[:suspects]
    )
    shown = [one.target_class for one in classes[: suspects or 1] if one.norm is not None]
    return ScanResult(
        score=4.5 if suspects else 1.0,
        suspects=named,
        classes=classes,
        pictures=tuple(picture(target) for target in shown),
        median_norm=100.0,
        mad=mad,
        replay_agreement=1.0,
        replay_relative_rms=1e-7,
    )


PAPER = Threshold(value=2.0, source="paper")
CALIBRATED = Threshold(
    value=3.25, source="calibrated", n=40, false_alarm_rate=0.05, p_value=0.025, calibration_sha256="c" * 64
)


def scan(
    verdict: Verdict, result: ScanResult | None, *, reason: str = "as it is", threshold: Threshold | None = PAPER
) -> Finding:
    return Finding(
        defense="neural-cleanse",
        kind="scan",
        verdict=verdict,
        reason=reason,
        settings={"budget": "quick", "learning_rate": 0.1, "threshold": None},
        threshold=threshold,
        seed=3,
        result=result,
    )


def dataset_result(
    scores: list[float | None], *, suspicious: int = 0, images: int = 50, flagged: int | None = None
) -> DatasetResult:
    """One label for each score, the first ``suspicious`` of which are.

    Their first five images are flagged, or ``flagged`` of every label.
    """
    counts = [(5 if place < suspicious else 0) if flagged is None else flagged for place in range(len(scores))]
    classes = tuple(
        DatasetClass(
            target_class=place,
            class_name=f"sign {place}",
            n=images,
            score=score,
            suspicious=place < suspicious,
            flagged=counts[place],
            reason="49 images; at least 50 are needed" if score is None else "as it is",
            statistics={} if score is None else {"relative_size": 0.2, "silhouette": score},
        )
        for place, score in enumerate(scores)
    )
    rows = [images * place + row for place, count in enumerate(counts) for row in range(count)]
    values = [0.5 if score is None else score for score in scores for _ in range(images)]
    return DatasetResult(
        sample_scores=tuple(values),
        flagged=tuple(rows),
        score=max((score for score in scores if score is not None), default=None),
        classes=classes,
        layer="gemm",
    )


def dataset_finding(
    verdict: Verdict, result: DatasetResult | None, *, defense: str = "activation-clustering", reason: str = "as it is"
) -> Finding:
    return Finding(
        defense=defense,
        kind="dataset",
        verdict=verdict,
        reason=reason,
        settings={"rule": "silhouette"},
        threshold=Threshold(value=0.15, source="paper"),
        seed=3,
        result=result,
    )


TRAINING = DataFacts(
    source="npz training.npz", sha256="e" * 64, images=600, classes=12, detection="npz: it ends in .npz",
    notes=("class names differ",),
)  # fmt: skip


def poisoned() -> Report:
    """A training set with one suspicious label, one that was not measured, and ranks beside it."""
    scores: list[float | None] = [0.4, None, *np.linspace(0.05, 0.12, 10).tolist()]
    found = dataset_finding(Verdict.BACKDOORED, dataset_result(scores, suspicious=1), reason="class 0 falls in two")
    ranks = dataset_finding(
        Verdict.NOT_MEASURED,
        dataset_result(scores, flagged=8),
        defense="spectral-signatures",
        reason="ranks only",
    )
    base = report("FAILED", found, ranks)
    return base.model_copy(update={"subject": base.subject.model_copy(update={"training_data": TRAINING})})


def report(outcome: str, *findings: Finding, **changes: Any) -> Report:
    """A golden report with another outcome and other findings."""
    codes = {"PASSED": 0, "FAILED": 1, "INCOMPLETE": 3, "REFUSED": 4}
    reasons = tuple(f"{finding.defense}: {finding.reason}" for finding in findings) or ("the worker was killed",)
    gate = Gate(outcome=outcome, exit_code=codes[outcome], reasons=reasons, required=("neural-cleanse",))
    base = golden("1.2-failed")
    return base.model_copy(update={"gate": gate, "findings": findings, **changes})


NORMS: list[float | None] = [12.5, 70.0, 88.0, 95.0, 99.0, 101.0, 104.0, 120.0, 180.0, 260.0, None, None]


def failed() -> Report:
    return report("FAILED", scan(Verdict.BACKDOORED, scan_result(NORMS, suspects=1)))


def passed(threshold: Threshold = PAPER) -> Report:
    return report("PASSED", scan(Verdict.CLEAN, scan_result([80.0, *NORMS[2:]]), threshold=threshold))


def many_classes(count: int = 200) -> Report:
    norms: list[float | None] = [20.0, 25.0, *np.linspace(70, 240, count - 12), *[None] * 10]
    return report("FAILED", scan(Verdict.BACKDOORED, scan_result(norms, suspects=2)))


def unable_to_alarm() -> Report:
    """The norms scatter so widely that the threshold lies below zero."""
    return report("PASSED", scan(Verdict.CLEAN, scan_result([80.0, *NORMS[2:]], mad=60.0)))


def not_measured() -> Report:
    """Too many censored classes, and a shadow that is not certified."""
    result = scan_result([90.0, 95.0, None, None, None, None]).model_copy(
        update={"score": None, "median_norm": None, "mad": None, "replay_agreement": None}
    )
    cause = MismatchCause(kind="saturation", layers=("conv1", "conv2"), detail="int16 saturation in 'conv1'")
    certificate = FidelityCertificate(certified=False, reason="it saturates", source="optimized", cause=cause)
    finding = scan(Verdict.NOT_MEASURED, result, reason="4 of 6 classes are censored, more than 25%")
    return report("INCOMPLETE", finding, certificate=certificate)


def killed() -> Report:
    """No finding, no certificate, no data."""
    subject = golden("1.2-refused").subject.model_copy(update={"contract": golden("1.1-failed").subject.contract})
    return report("INCOMPLETE", subject=subject, certificate=None)


def refused() -> Report:
    return golden("1.2-refused")


def misread() -> Report:
    """The model is driven otherwise than it was trained."""
    base = golden("1.2-failed").subject
    subject = base.model_copy(
        update={
            "clean_accuracy": Accuracy(value=0.13, images=320),
            "candidates": (
                CandidateContract(
                    description="pixels in [0, 255] (--range 0,255)", accuracy=0.97, own_accuracy=0.13, images=320
                ),
                CandidateContract(
                    description="channels BGR (--channels bgr)", accuracy=0.2, own_accuracy=0.13, images=320
                ),
            ),
        }
    )
    return report("INCOMPLETE", subject=subject, certificate=None)


def unlabelled() -> Report:
    """An accuracy that the user stated, on images without labels."""
    data = DataFacts(
        source="folder images", sha256="d" * 64, images=300, classes=0, detection="folder: it holds PNGs",
        labelled=False, notes=("2 files are no pictures",),
    )  # fmt: skip
    subject = golden("1.2-failed").subject.model_copy(
        update={"data": data, "clean_accuracy": Accuracy(value=0.9, images=300, source="stated")}
    )
    return passed().model_copy(update={"subject": subject})


def filter_result(*scores: float | None, value: float = 0.4, note: str | None = None) -> FilterResult:
    """Scores with what a boundary makes of them; 100 held-out clean images score between 0.35 and 2.33."""
    held_out = tuple(0.35 + 0.02 * place for place in range(100))
    decisions: list[Literal["accept", "reject", "unmeasured"]] = [
        "unmeasured" if score is None else "reject" if score < value else "accept" for score in scores
    ]
    boundary = FilterBoundary(
        value=value, nominal_frr=0.01, fitted_on=120, mean=1.5, sd=0.47, measured_frr=0.03,
        frr_interval=(0.01, 0.085), held_out_scores=held_out, lowest_score=0.0, note=note,
    )  # fmt: skip
    test = RejectionTest(
        rejected=decisions.count("reject"), measured=len(scores), null_rate=0.085, p_value=2.5e-7, level=0.01
    )
    return FilterResult(decisions=tuple(decisions), scores=scores, boundary=boundary, test=test)


def filtered(verdict: Verdict = Verdict.BACKDOORED, result: FilterResult | None = None) -> Report:
    """Inputs of which some were rejected, and one has no score."""
    scores: list[float | None] = [*(0.004 * place for place in range(30)), None, *np.linspace(0.5, 2.6, 40)]
    finding = Finding(
        defense="strip",
        kind="filter",
        verdict=verdict,
        reason="30 of 70 inputs rejected",
        settings={"overlays": 100, "superimposition": "add", "false_rejection_rate": 0.01},
        seed=3,
        result=filter_result(*scores) if result is None else result,
    )
    inputs = DataFacts(
        source="npz inputs.npz", sha256="e" * 64, images=71, classes=0, detection="npz: it ends in .npz",
        labelled=False, notes=("a note on the inputs",),
    )  # fmt: skip
    subject = golden("1.2-failed").subject.model_copy(update={"inputs": inputs})
    return report("FAILED" if verdict is Verdict.BACKDOORED else "INCOMPLETE", finding, subject=subject)


def hostile_filter() -> Report:
    """Every string and number of a filter's finding, as the writer of a report.json may choose them."""
    body = json.loads(filtered().model_dump_json())
    body["subject"]["inputs"] |= {"source": HOSTILE, "detection": HOSTILE, "notes": [HOSTILE], "sha256": HOSTILE}
    finding = body["findings"][0]
    finding |= {"defense": HOSTILE, "reason": HOSTILE, "settings": {HOSTILE: [HOSTILE]}}
    finding["result"]["boundary"] |= {"note": HOSTILE, "value": 1e300, "frr_interval": [-1.0, 1e99], "sd": -1.0}
    finding["result"]["scores"] = [1e308, -5.0, None, 0.25]
    finding["result"]["test"] |= {"p_value": 1e300, "rejected": -4}
    return Report.model_validate(body)


def hostile(text: str = HOSTILE) -> Report:
    """Every string that a model file, a data set or the writer of a report.json chooses."""
    body = json.loads(failed().model_dump_json())
    poison = json.loads(poisoned().model_dump_json())
    body["findings"].append(poison["findings"][0])
    body["findings"][1]["result"]["classes"][0]["statistics"] = {text: 1.0}
    body["subject"]["training_data"] = poison["subject"]["training_data"]
    keep = {
        "gate.outcome", "subject.contract.layout", "subject.contract.channels", "subject.contract.dtype",
        "subject.contract.resize", "subject.contract.head", "subject.contract.source", "findings.0.kind",
        "subject.clean_accuracy.source", "findings.0.verdict", "findings.0.threshold.source",
        "findings.0.result.kind", "findings.1.kind", "findings.1.verdict", "findings.1.threshold.source",
        "findings.1.result.kind", "certificate.source", "environment.profile.provider",
        "environment.profile.optimization", "environment.profile.arithmetic", "subject.inspection.scheme",
        "schema_version",
    }  # fmt: skip
    for entry in body["certificate"]["sets"]:
        keep.add(f"certificate.sets.{body['certificate']['sets'].index(entry)}.name")
    for place in range(len(body["subject"]["inspection"]["layers"])):
        keep.add(f"subject.inspection.layers.{place}.scheme")
    for place in range(len(body["subject"]["runtime_facts"]["levels"])):
        keep.add(f"subject.runtime_facts.levels.{place}.level")
    body["subject"]["inspection"] |= {
        "structure_warnings": ["x"], "nonfinite_initializers": ["x"], "saturation_layers": ["x"],
        "gradient_blind_nodes": [{"name": "x", "operator": "x", "reason": "x"}],
    }  # fmt: skip
    body["subject"]["runtime_facts"] |= {
        "operators": {text: 1}, "float_layers": ["x"], "saturation_layers": ["x"],
    }  # fmt: skip
    body["subject"]["runtime_facts"]["levels"][1] |= {"added": {text: 1}, "removed": {text: 1}}
    reading = {"description": "x", "accuracy": 1, "own_accuracy": 1, "images": 1}
    body["subject"] |= {"external_files": {text: "x"}, "candidates": [reading]}
    body["subject"]["data"] |= {"detection": "x", "notes": ["x"]}
    body["subject"]["contract"]["fixed_inputs"] = {text: 1.0}
    body["environment"]["saturating_operators"] = ["x"]
    body["environment"]["versions"] = {text: text}
    body["certificate"]["cause"] = {"kind": "numerics", "layers": ["x"], "detail": "x"}
    body["findings"][0]["settings"] = {text: "x", "other": {text: [text]}}
    body["findings"][0]["threshold"] |= {"note": "x", "calibration_sha256": "x"}
    body["volatile"]["seconds_per_stage"] = {text: 1.0}
    keep |= {"certificate.cause.kind"}
    changed = _replaced(body, text, keep)
    names = changed["subject"]["contract"]["class_names"]
    changed["subject"]["contract"]["class_names"] = [f"{name}{place}" for place, name in enumerate(names)]
    return Report.model_validate(changed)


def _replaced(node: Any, text: str, keep: set[str], path: str = "") -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, text, keep, f"{path}.{key}".lstrip(".")) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, text, keep, f"{path}.{place}") for place, value in enumerate(node)]
    return text if isinstance(node, str) and path not in keep else node


def newer() -> Report:
    """As a later minor version may write it."""
    body = json.loads(failed().model_dump_json())
    body |= {"schema_version": "1.9", "watermark": {"found": True}}
    body["findings"][0] |= {"verdict": "PROBABLY_CLEAN", "confidence": 0.5}
    body["gate"]["outcome"] = "PASSED_WITH_WAIVERS"
    return read_report(json.dumps(body))


SAMPLES: dict[str, Callable[[], Report]] = {
    "failed": failed,
    "passed": passed,
    "calibrated": lambda: passed(CALIBRATED),
    "200 classes": many_classes,
    "unable to alarm": unable_to_alarm,
    "not measured": not_measured,
    "killed": killed,
    "refused": refused,
    "misread": misread,
    "poisoned": poisoned,
    "unlabelled": unlabelled,
    "filtered": filtered,
    "hostile filter": hostile_filter,
    "hostile": hostile,
    "long": lambda: hostile(LONG),
    "newer": newer,
    **{path.stem: functools.partial(golden, path.stem) for path in sorted(GOLDEN.glob("*.json"))},
}
"""Functions, so that a report that cannot be made fails its own test."""
