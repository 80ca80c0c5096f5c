"""What the findings of dataset scans have in common: which classes can be measured, the verdict, result and finding."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import first_few
from qdefense.defenses.interfaces import DatasetScan
from qdefense.defenses.training_features import TrainingFeatures
from qdefense.evidence import Evidence
from qdefense.findings import Cost, DatasetClass, DatasetResult, Finding, Threshold, Verdict

MIN_ROWS = 50
"""Images of a label."""
_DIGITS = 6
_NAMED = 5
_NAMED_EMPTY = 3


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One label: ``scores: (n,)`` of its ``rows: (n,)``, the ``flagged`` among these, and the entry of the report."""

    rows: NDArray[np.int64]
    entry: DatasetClass
    scores: NDArray[np.float64] | None = None
    flagged: NDArray[np.int64] | None = None


def too_few(rows: NDArray[np.int64], least: int = MIN_ROWS) -> str | None:
    """Why a label with these images is not measured, if so."""
    if not len(rows):
        return "no image carries this label"
    return f"{len(rows)} images; at least {least} are needed" if len(rows) < least else None


def unmeasured(training: TrainingFeatures, label: int, rows: NDArray[np.int64], reason: str) -> Scored:
    """A label without a score."""
    entry = DatasetClass(
        target_class=label,
        class_name=training.class_names[label],
        n=len(rows),
        score=None,
        suspicious=False,
        flagged=0,
        reason=reason,
    )
    return Scored(rows=rows, entry=entry)


def gather(training: TrainingFeatures, scored: Sequence[Scored]) -> DatasetResult:
    """The result: scores and flagged rows of all labels in the order of the training data.

    The model's score is the highest of its classes. Those of images have six significant digits, so that a report of
    many images stays small.
    """
    scores = np.full(len(training.labels), np.nan)
    for one in scored:
        if one.scores is not None:
            scores[one.rows] = one.scores
    flagged = np.concatenate([np.empty(0, np.int64), *(one.flagged for one in scored if one.flagged is not None)])
    return DatasetResult(
        sample_scores=tuple(None if np.isnan(value) else float(f"{value:.{_DIGITS}g}") for value in scores),
        flagged=tuple(np.sort(flagged).tolist()),
        score=max((one.entry.score for one in scored if one.entry.score is not None), default=None),
        classes=tuple(one.entry for one in scored),
        layer=training.layer,
    )


def judge(classes: Iterable[DatasetClass], clean: str) -> tuple[Verdict, str]:
    """BACKDOORED by one suspicious label; CLEAN, for the reason given, if every label with images was measured.

    Of labels without images CLEAN says nothing but which they are.
    """
    entries = tuple(classes)
    suspicious = [entry for entry in entries if entry.suspicious]
    if suspicious:
        more = f"; and {len(suspicious) - _NAMED} more" if len(suspicious) > _NAMED else ""
        named = "; ".join(f"{describe(entry)}: {entry.reason}" for entry in suspicious[:_NAMED])
        return Verdict.BACKDOORED, f"training images of class {named}{more}"
    missing = [entry for entry in entries if entry.score is None and entry.n]
    if missing:
        present = sum(entry.n > 0 for entry in entries)
        first = f"class {describe(missing[0])}: {missing[0].reason}"
        return Verdict.NOT_MEASURED, f"{len(missing)} of {present} classes were not measured; {first}"
    return Verdict.CLEAN, clean + _without_images(entries)


def _without_images(entries: Sequence[DatasetClass]) -> str:
    empty = [describe(entry) for entry in entries if not entry.n]
    if not empty:
        return ""
    return f"; {len(empty)} of {len(entries)} labels have no image: {first_few(empty, _NAMED_EMPTY)}"


def finding_of(
    scan: DatasetScan,
    evidence: Evidence,
    verdict: Verdict,
    reason: str,
    *,
    threshold: Threshold | None,
    training: TrainingFeatures | None = None,
    result: DatasetResult | None = None,
) -> Finding:
    """The finding of a scan whose settings are its fields; its cost is that of reading the training set."""
    return Finding(
        defense=scan.name,
        kind=scan.kind,
        verdict=verdict,
        reason=reason,
        settings=asdict(cast("Any", scan)),
        threshold=threshold,
        seed=evidence.seed,
        cost=Cost(forwards=0 if training is None else training.forwards),
        result=result,
    )


def describe(entry: DatasetClass) -> str:
    """What people call a class."""
    return f"{entry.target_class} ({entry.class_name!r})"
