"""Spectral Signatures (Tran et al. 2018, arXiv 1811.00636): poison stands out along one direction of its class.

Per training label (classes are never pooled) the penultimate features of the deployed session are centred, ``v`` is the
top right singular vector, and a sample scores ``((x - mean) . v)^2`` (algorithm 1). The method removes the ``1.5 *
epsilon`` of every label with the highest scores, where ``epsilon`` is the expected share of poison in its class, and
trains again. The reference configuration has 500 poisons among 5,000 and removes 15 %: ``epsilon = 0.1`` here. (IBM's
ART expects .33.) The rows removed are the flagged ones: as many in a clean class as in any other.

So the scan ranks rows and, as published, draws no line between poisoned and clean data: the verdict is NOT_MEASURED
with the ranks beside it. What can be compared between classes is the top variance (the paper looks at top singular
values): its anomaly index is ``(variance - median) / (1.4826 * MAD)`` over the labels, on the high side, and the
highest index is the model's score. Only with a ``threshold`` of the user's on it is there a verdict: BACKDOORED where
an index is above, CLEAN where none is and every label with images was measured. No false-alarm rate is known. The index
needs six labels and a MAD other than 0; without it there is no score.

Deviations from the paper, and limits:
- The scores are of centred features, as in the paper; its code projects uncentred ones on the direction of the centred.
- Nothing is removed and no network trained again: that is the user's to do, with the flagged rows.
- Where poison is the larger part of its class the clean samples lie farther from the mean and rank first.
- Blended and warping triggers are known to hide from it.
- Fewer than 50 images of a label, features that do not differ, or values that are no numbers are NOT_MEASURED.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from threadpoolctl import threadpool_limits

from qdefense.defenses.dataset_findings import (
    Scored,
    describe,
    finding_of,
    gather,
    judge,
    too_few,
    unmeasured,
)
from qdefense.defenses.interfaces import Need
from qdefense.defenses.outliers import high_side_indices
from qdefense.defenses.registered import DEFENSES
from qdefense.defenses.spectra import FlatFeaturesError, removed_rows, spectral_scores
from qdefense.defenses.training_features import NoFeaturesError, TrainingFeatures, read_training_set
from qdefense.evidence import Evidence
from qdefense.findings import DatasetClass, DatasetResult, Finding, Threshold, Verdict
from qdefense.rates import told_beside

MIN_CLASSES = 6
REMOVED = 1.5
"""Times the expected share of poison: how much of each label is removed."""


@DEFENSES.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SpectralSignatures:
    """Ranks the training samples of each label by their spectral score; a verdict only with a threshold."""

    name: ClassVar[str] = "spectral-signatures"
    kind: ClassVar[Literal["dataset"]] = "dataset"
    paper: ClassVar[str] = "Tran et al. 2018, arXiv 1811.00636"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ACTIVATIONS, Need.LOGITS, Need.TRAINING_SET})
    revision: ClassVar[int] = 1

    expected_poison_share: Annotated[float, Field(gt=0, le=1 / REMOVED)] = 0.1
    threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def scan(self, evidence: Evidence) -> Finding:
        """Rank the training set, class by class; the reason of anything but a verdict is in the finding."""
        try:
            training = read_training_set(evidence, self.name)
        except NoFeaturesError as error:
            return finding_of(self, evidence, error.verdict, str(error), threshold=self._line)
        with threadpool_limits(1):  # the order of sums, and so the report, must not depend on the threads
            scored = [self._scored(training, label, rows) for label, rows in training.by_class()]
        scored, problem = self._indexed(scored)
        result = gather(training, scored)
        verdict, reason = self._verdict(result, problem)
        return finding_of(self, evidence, verdict, reason, threshold=self._line, training=training, result=result)

    @property
    def _line(self) -> Threshold | None:
        return None if self.threshold is None else Threshold(value=self.threshold, source="user")

    def _scored(self, training: TrainingFeatures, label: int, rows: NDArray[np.int64]) -> Scored:
        problem = too_few(rows)
        if problem is not None:
            return unmeasured(training, label, rows, problem)
        try:
            found = spectral_scores(training.features[rows])
        except FlatFeaturesError as error:
            return unmeasured(training, label, rows, str(error))
        flagged = rows[removed_rows(found.scores, REMOVED * self.expected_poison_share)]
        entry = DatasetClass(
            target_class=label,
            class_name=training.class_names[label],
            n=len(rows),
            score=None,
            suspicious=False,
            flagged=len(flagged),
            reason=f"top variance {found.top_variance:.4g}, {found.top_share:.0%} of all",
            statistics={"top_variance": found.top_variance, "top_variance_share": found.top_share},
        )
        return Scored(rows=rows, entry=entry, scores=found.scores, flagged=flagged)

    def _indexed(self, scored: Sequence[Scored]) -> tuple[list[Scored], str | None]:
        """The same with the index of each measured label for its score, or why there is none."""
        measured = [one for one in scored if one.scores is not None]
        if len(measured) < MIN_CLASSES:
            return list(scored), f"{len(measured)} measured classes; an outlier among them needs at least {MIN_CLASSES}"
        try:
            indices = high_side_indices(np.array([one.entry.statistics["top_variance"] for one in measured]))
        except ValueError as error:
            return list(scored), str(error)
        index_of = {one.entry.target_class: float(index) for one, index in zip(measured, indices, strict=True)}
        return [self._with_index(one, index_of.get(one.entry.target_class)) for one in scored], None

    def _with_index(self, one: Scored, index: float | None) -> Scored:
        if index is None:
            return one
        suspicious = self.threshold is not None and index > self.threshold
        reason = f"{one.entry.reason}, index {index:.2f}"
        return replace(
            one, entry=one.entry.model_copy(update={"score": index, "suspicious": suspicious, "reason": reason})
        )

    def _verdict(self, result: DatasetResult, problem: str | None) -> tuple[Verdict, str]:
        if problem is not None:
            return Verdict.NOT_MEASURED, f"ranks only: {problem}"
        if self.threshold is not None:
            assert result.score is not None  # noqa: S101 (there is an index, or a problem)
            highest = told_beside(result.score, self.threshold)
            return judge(result.classes, f"no class has an index above {self.threshold:g}; highest {highest}")
        foremost = next(entry for entry in result.classes if entry.score == result.score)
        return Verdict.NOT_MEASURED, (
            f"ranks only: the method removes the top {100 * REMOVED * self.expected_poison_share:.3g}% of every class, "
            "whatever it holds, and has no rule to tell poison by; "
            f"highest index {result.score:.2f}, class {describe(foremost)}"
        )
