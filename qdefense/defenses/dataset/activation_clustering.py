"""Activation Clustering (Chen et al. 2018, arXiv 1811.03728): a class that falls in two parts may hold poison.

Per training label, over the whole class at once: the penultimate activations of the deployed session are reduced to 10
dimensions by ICA and split by k-means with k = 2 (section 4). Three rules judge the smaller cluster (section 5):
- silhouette: the two clusters fit the class (silhouette above 0.15);
- relative size: it holds less than 35 % of the class;
- exclusionary reclassification (ExRe): it does, and a network trained anew without such clusters gives its samples to
  one other class more often (p) than to their own (l): ``l / p < 1``. That network is the evidence's reference session;
  without one the rule is NOT_APPLICABLE. The other rules ask none.

A class is suspicious under the chosen rule; one suspicious class makes the model BACKDOORED, and the rows of its
smaller cluster are flagged. CLEAN needs every label that has images to be measured. The score of a class is what the
rule compares, so that ``score > threshold`` and "suspicious" are one: silhouette, 1 - relative size, or
``p / (l + p)``, whose line is ``1 / (1 + T)``. The model's is the highest.

What is known of the rules: the paper calls silhouettes of .10 to .15 a fair line; IBM's ART takes .10, and asks for a
size below 35 % as well. No false-alarm rate is published. On ICA coordinates data without any structure scores about
.07, but a clean class that has parts of its own (the 30 frames of each sign in GTSRB) passes any of these lines. What
ICA scales to variance 1 bounds the silhouette: a part that stands out in one direction, however far, reaches .23 if it
is a tenth of its class, .15 if a fifth, .10 if a half. CLEAN says no more than that.

Deviations from the paper, and limits:
- ICA is the whitening alone: its last step is a rotation, which no distance and so no k-means and no silhouette sees.
  ``reduction=pca`` keeps the variances (ART's default); silhouettes are then far higher on clean classes, too.
- The default rule is the silhouette's, its line the upper end of the paper's range.
- Nothing is trained here, so ExRe needs the reference. Cheap stand-ins were measured and left out: see decision 0014.
- A copy of the audited file, in whatever precision, learned from the very rows and clears them all. A reference that
  gives the audited file's class to at least 99 % of the small clusters' rows, the training set and the clean images
  is taken for one: NOT_MEASURED. So is a network that was trained anew where all of these are that easy; a coarse copy
  that disagrees more often (some INT4 files) is not seen.
- k-means starts 100 times. Its best split is what separates poison, and whitened data has many others nearly as good:
  with 10 starts it depended on the seed whether it was found.
- A sample's score is how much nearer it is to the smaller cluster's centre; the paper gives members only.
- The method takes poison for the smaller part of its class: where it is the larger, the clean rows are flagged.
- Fewer than 50 images of a label (5 for each dimension), features that do not differ, or values that are no numbers
  are NOT_MEASURED. So are features of a label that span fewer dimensions than asked for: the fewer there are, the
  higher the silhouette of data without any structure (.16 of 4 dimensions, .56 of 1), which no line was drawn for.
- A smaller cluster of fewer than 5 rows is outliers, no part of the class: they are set aside without a score, told
  in the text of the class, and the rest is reduced and split again, up to 5 times; after that it is NOT_MEASURED.
  CLEAN says nothing of rows that were set aside.
- A class so small that 5 rows are no less than the size threshold has no cluster that the last two rules could call
  small: NOT_MEASURED. Of a class without a small cluster, where there could be one, ExRe asks nothing and passes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from threadpoolctl import threadpool_limits

from qdefense.defenses.admission import answers_near_chance
from qdefense.defenses.clustering import (
    Clusters,
    Reclassified,
    Reduction,
    count_reclassified,
    reduced,
    two_clusters,
)
from qdefense.defenses.dataset_findings import MIN_ROWS, Scored, finding_of, gather, judge, too_few, unmeasured
from qdefense.defenses.interfaces import Need
from qdefense.defenses.registered import DEFENSES
from qdefense.defenses.spectra import FlatFeaturesError
from qdefense.defenses.training_features import NoFeaturesError, TrainingFeatures, read_training_set
from qdefense.evidence import Evidence
from qdefense.findings import DatasetClass, DatasetResult, Finding, Threshold, Verdict
from qdefense.rates import told_beside

Rule = Literal["silhouette", "relative-size", "exclusionary-reclassification"]
ROWS_PER_DIMENSION = 5
"""Fewer are not to be split in so many dimensions."""
LEAST_CLUSTER = 5
"""Rows of a cluster: a tenth of the fewest images that a label may have."""
MOST_SPLITS = 5
COPY_AGREEMENT = 0.99
"""Top-1, with the audited file; it was chosen before any result was looked at."""
_NO_REFERENCE = (
    "exclusionary reclassification asks a network that was trained anew without the small clusters, and no such "
    "reference was given; the rules silhouette and relative-size need none"
)


@dataclass(frozen=True, kw_only=True)
class _Split:
    """The two clusters of one label; ``small`` where one is below the size threshold, what ExRe asks for.

    ``aside`` outliers of the label are not among the ``rows``.
    """

    label: int
    rows: NDArray[np.int64]
    aside: int
    clusters: Clusters
    small: bool
    reclassified: Reclassified | None = None

    @property
    def flagged(self) -> NDArray[np.int64]:
        """The rows of the smaller cluster."""
        return self.rows[self.clusters.smaller]


@DEFENSES.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ActivationClustering:
    """Two clusters per training label, judged by size, silhouette or reclassification; defaults as published."""

    name: ClassVar[str] = "activation-clustering"
    kind: ClassVar[Literal["dataset"]] = "dataset"
    paper: ClassVar[str] = "Chen et al. 2018, arXiv 1811.03728"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ACTIVATIONS, Need.LOGITS, Need.TRAINING_SET})
    revision: ClassVar[int] = 1

    rule: Rule = "silhouette"
    reduction: Reduction = "ica"
    dimensions: Annotated[int, Field(ge=1)] = 10
    starts: Annotated[int, Field(ge=1)] = 100
    size_threshold: Annotated[float, Field(gt=0, le=0.5)] = 0.35
    silhouette_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.15
    exre_threshold: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    def scan(self, evidence: Evidence) -> Finding:
        """Judge the training set, class by class; the reason of anything but a verdict is in the finding."""
        if self.asks_reference and evidence.reference is None:
            return finding_of(self, evidence, Verdict.NOT_APPLICABLE, _NO_REFERENCE, threshold=self.threshold)
        try:
            if self.asks_reference:
                _check_reference(evidence)
            training = read_training_set(evidence, self.name)
            import sklearn.cluster  # noqa: F401, PLC0415 (a limit holds for the libraries that are loaded)

            with threadpool_limits(1):  # the order of sums, and so the report, must not depend on the threads
                scored = self._score_classes(training, evidence)
        except NoFeaturesError as error:
            return finding_of(self, evidence, error.verdict, str(error), threshold=self.threshold)
        result, line = gather(training, scored), self.threshold
        verdict, reason = judge(result.classes, self._clean(result))
        return finding_of(self, evidence, verdict, reason, threshold=line, training=training, result=result)

    def _clean(self, result: DatasetResult) -> str:
        """The reason of CLEAN."""
        line = self.threshold.value
        told = f"no class scores above {line:.2f} by {self.rule}; highest {told_beside(result.score or 0, line)}"
        if self.asks_reference and not any("reclassified_own" in entry.statistics for entry in result.classes):
            size = _percent(self.size_threshold)
            told += f"; the reference was asked about no cluster: none is below {size} of its class"
        if unjudged := sum(score is None for score in result.sample_scores):
            told += f"; {unjudged} outlying images were set aside, and nothing is said of them"
        return told

    @property
    def asks_reference(self) -> bool:
        """Whether the rule is exclusionary reclassification."""
        return self.rule == "exclusionary-reclassification"

    @property
    def threshold(self) -> Threshold:
        """The line through the score of the chosen rule."""
        setting, line = {
            "silhouette": ("silhouette_threshold", self.silhouette_threshold),
            "relative-size": ("size_threshold", 1 - self.size_threshold),
            "exclusionary-reclassification": ("exre_threshold", _exre_line(self.exre_threshold)),
        }[self.rule]
        published = getattr(self, setting) == getattr(ActivationClustering(), setting)
        return Threshold(value=line, source="paper" if published else "user")

    def _score_classes(self, training: TrainingFeatures, evidence: Evidence) -> list[Scored]:
        found = [self._split(training, label, rows, evidence.seed) for label, rows in training.by_class()]
        if self.asks_reference:
            found = _reclassified(evidence, training, found)
        return [self._scored(training, one) if isinstance(one, _Split) else one for one in found]

    def _split(self, training: TrainingFeatures, label: int, rows: NDArray[np.int64], seed: int) -> _Split | Scored:
        kept = rows
        for _ in range(MOST_SPLITS):
            clusters = self._clusters(training, kept, seed)
            if isinstance(clusters, str):
                return unmeasured(training, label, rows, f"{clusters}{_told_aside(len(rows) - len(kept))}")
            few = int(clusters.smaller.sum())
            if few >= LEAST_CLUSTER:
                small = clusters.relative_size < self.size_threshold
                return _Split(label=label, rows=kept, aside=len(rows) - len(kept), clusters=clusters, small=small)
            kept = kept[~clusters.smaller]
        again = (
            f"{MOST_SPLITS} times the smaller of its two clusters held fewer than {LEAST_CLUSTER} of {len(rows)} images"
        )
        return unmeasured(training, label, rows, f"{again}; look for outliers in it")

    def _clusters(self, training: TrainingFeatures, rows: NDArray[np.int64], seed: int) -> Clusters | str:
        """The two of these rows, or why there are none."""
        problem = too_few(rows, max(MIN_ROWS, ROWS_PER_DIMENSION * self.dimensions)) or self._never_small(len(rows))
        if problem is not None:
            return problem
        try:
            points = reduced(training.features[rows], self.dimensions, self.reduction)
        except FlatFeaturesError as error:
            return str(error)
        if points.shape[1] < self.dimensions:
            spanned = f"the features of its {len(rows)} images span {points.shape[1]} dimensions"
            return f"{spanned}; {self.dimensions} are needed"
        return two_clusters(points, starts=self.starts, seed=seed)

    def _never_small(self, rows: int) -> str | None:
        """Why no cluster of a class with so many rows could be below the size threshold, if so."""
        if self.rule == "silhouette" or 1 - LEAST_CLUSTER / rows > 1 - self.size_threshold:
            return None
        return (
            f"a cluster holds at least {LEAST_CLUSTER} of its {rows} images, so that none could be smaller than the "
            f"size threshold of {_percent(self.size_threshold)}: set a higher size-threshold"
        )

    def _scored(self, training: TrainingFeatures, split: _Split) -> Scored:
        score = self._score(split)
        suspicious = score > self.threshold.value
        flagged = split.flagged if suspicious else split.rows[:0]
        entry = DatasetClass(
            target_class=split.label,
            class_name=training.class_names[split.label],
            n=len(split.rows) + split.aside,
            score=score,
            suspicious=suspicious,
            flagged=len(flagged),
            reason=_describe(split, training.class_names),
            statistics=_statistics(split),
        )
        return Scored(rows=split.rows, entry=entry, scores=split.clusters.margin, flagged=flagged)

    def _score(self, split: _Split) -> float:
        match self.rule:
            case "relative-size":
                return 1 - split.clusters.relative_size
            case "silhouette":
                return split.clusters.silhouette
            case "exclusionary-reclassification":
                own, other = (0, 0) if split.reclassified is None else split.reclassified[:2]
                return other / (own + other) if other else 0.0


def _exre_line(threshold: float) -> float:
    """``1 / (1 + T)``, of a tiny T the float below 1: the score of a cluster that loses all is above any line."""
    return min(1 / (1 + threshold), math.nextafter(1, 0))


def _percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def _check_reference(evidence: Evidence) -> None:
    """Before the training set is read; clean images without labels tell of no accuracy.

    Raises:
        NoFeaturesError: it answers no numbers, or hardly better than chance.
    """
    if evidence.reference is not None and evidence.clean.labelled:
        _refuse_guesses(evidence.reference.logits_of(evidence.clean), evidence.clean.labels, on="the clean images")


def _refuse_guesses(logits: NDArray[np.float32], labels: NDArray[np.int64], *, on: str) -> None:
    """A reference that guesses clears or accuses any cluster.

    Raises:
        NoFeaturesError: it answers no numbers, or hardly better than chance.
    """
    if not np.isfinite(logits).all():
        raise NoFeaturesError(Verdict.NOT_MEASURED, "the reference answers with values that are not finite")
    problem = answers_near_chance(logits, labels)
    if problem is not None:
        raise NoFeaturesError(Verdict.NOT_MEASURED, f"the reference guesses on {on}: {problem}")


def _reclassified(
    evidence: Evidence, training: TrainingFeatures, found: list[_Split | Scored]
) -> list[_Split | Scored]:
    """ExRe of the small clusters, by the reference."""
    rows = [one.flagged for one in found if isinstance(one, _Split) and one.small]
    if evidence.reference is None or evidence.training_set is None or not rows:
        return found
    logits = evidence.reference.logits_of(evidence.training_set)
    _refuse_guesses(logits, evidence.training_set.labels, on="the training set")
    answers = logits.argmax(axis=1)
    _check_copy(evidence, answers == training.answers, np.concatenate(rows))
    return [
        replace(one, reclassified=count_reclassified(answers[one.flagged], one.label))
        if isinstance(one, _Split) and one.small
        else one
        for one in found
    ]


def _check_copy(evidence: Evidence, same: NDArray[np.bool_], rows: NDArray[np.int64]) -> None:
    """``same: (N,)``, which training rows the reference and the audited file answer alike.

    Raises:
        NoFeaturesError: the two are as good as one network.
    """
    sessions = [session for session in (evidence.session, evidence.reference) if session is not None]
    mine, its = (session.logits_of(evidence.clean).argmax(axis=1) for session in sessions)
    shares = (float(same[rows].mean()), float(same.mean()), float(np.mean(mine == its)))
    if min(shares) >= COPY_AGREEMENT:
        of_rows, of_set, of_clean = shares
        raise NoFeaturesError(
            Verdict.NOT_MEASURED,
            f"the reference answers as the audited file does: {of_rows:.1%} of the small clusters, {of_set:.1%} of the "
            f"training set and {of_clean:.1%} of the clean images alike; a copy of it, of whatever precision, learned "
            "from the rows in question and proves nothing: give one that was trained anew without them",
        )


def _statistics(split: _Split) -> dict[str, float]:
    found = {"relative_size": split.clusters.relative_size, "silhouette": split.clusters.silhouette}
    if split.reclassified is not None:
        found |= {"reclassified_own": split.reclassified.own, "reclassified_other": split.reclassified.other}
        if split.reclassified.other:
            found["exre"] = split.reclassified.own / split.reclassified.other
    return found


def _describe(split: _Split, class_names: Sequence[str]) -> str:
    clusters = split.clusters
    text = f"the smaller cluster holds {clusters.relative_size:.0%} of it, silhouette {clusters.silhouette:.2f}"
    text += _told_aside(split.aside)
    if split.reclassified is None:
        return text
    own, other, number = split.reclassified
    elsewhere = f", {other} to class {number} ({class_names[number]!r})" if other else ""
    return f"{text}; without it {own} of its images go to their own class{elsewhere}"


def _told_aside(rows: int) -> str:
    return f" ({rows} outlying images were set aside)" if rows else ""
