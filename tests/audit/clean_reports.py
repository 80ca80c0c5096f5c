"""Reports as audits of clean models would have given them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdefense.artifact import Artifact
from qdefense.audit.events import Job
from qdefense.audit.provenance import environment
from qdefense.data.opening import open_data
from qdefense.findings import Finding, ScanResult, Verdict
from qdefense.report.model import DataFacts, Gate, Report, Subject, Volatile
from qdefense.session import SessionProfile

HERE = environment()


def report_on(job: Job, settings: dict[str, Any], score: float | None, **changes: Any) -> Report:
    """What a Neural Cleanse audit would have said that came to this score."""
    artifact = Artifact.read(Path(job.model), job.contract)
    assert job.data is not None
    images = open_data(job.data, split=job.split, limit=job.limit, seed=job.seed)
    classes = len(images.class_names)
    facts = DataFacts(source="noise", sha256=images.digest, images=len(images), classes=classes)
    verdict = Verdict.NOT_MEASURED if score is None else Verdict.CLEAN
    finding = Finding(
        defense="neural-cleanse",
        kind="scan",
        verdict=verdict,
        reason="too few classes converged" if score is None else "nothing stands out",
        settings={**settings, "threshold": 2.0},
        seed=job.seed,
        result=None if score is None else ScanResult(score=score),
    )
    report = Report(
        subject=Subject(file="any", sha256=artifact.sha256, contract=artifact.contract, data=facts),
        environment=HERE.model_copy(update={"profile": SessionProfile(batch=64)}),
        findings=(finding,),
        gate=Gate(outcome="INCOMPLETE", exit_code=3, reasons=("some reason",), required=()),
        volatile=Volatile(started="", seconds=0, host="", load=()),
    )
    return report.model_copy(update=changes)
