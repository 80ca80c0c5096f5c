"""The criteria of the published code of the seed study (Pandey and Ye, arXiv 2512.06243), on the same files.

Only its decision rules are applied: the norms are this bench's own. It counts every exception as "not detected", and
asks of no trigger whether it converged: of a file with a class whose norm was censored here (law 1), and so is not in
the records, nobody knows what it would say.

Two of its rules can never fire, whatever the scores. With numpy's linear interpolation the p-th percentile of n values
lies at place ``p (n - 1)`` of the sorted ones, so that at most ``ceil(p (n - 1))`` lie strictly below it:

    fraction(H < percentile_5(H)) <= ceil(0.05 (n - 1)) / n <= 0.1     for every n >= 10

which is the whole criterion of its STRIP (fraction > 0.1). By symmetry it holds of the fraction above the own 95th
percentile, the first clause of its Spectral Signatures.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from qdefense.bench.cohort import Cohort, Setting, Subject, row_rank, status_of
from qdefense.bench.records import Access, DefenseRecord, FilterMetrics
from qdefense.bench.tables import VERDICTS, Answers, Row, count_answers
from qdefense.findings import ScanResult, Verdict

CONSISTENT = 1.4826
NEURAL_CLEANSE_LIMIT = 2.0
OWN_PERCENTILE, OWN_FRACTION = 0.05, 0.1
Decider = Literal["the norms", "the criterion alone", "the criterion alone, in part", "not in the records"]


class Criterion(Row):
    """What the published code does for one of its five defenses."""

    defense: str
    rule: str
    says: str
    """What can be said of it from records."""


class PublishedRow(Row):
    """One defense on the files of a setting: what was measured here, and what the published rule makes of it."""

    setting: Setting
    defense: str
    access: Access
    files: int
    answers: Answers
    judges: bool
    """Whether it judged any file: a filter and a repair raise no alarm, nor does a method that only ranks."""
    alarms: int
    calm: int
    """Files that it called clean."""
    detected: int | None
    """By the published rule, of the files that are not unknown; null where all are."""
    unknown: int
    """Files of which the records don't hold what the rule looks at."""
    counted_as_missed: int
    """Files without an answer, which the published code writes down as not detected, as MAD = 0 and exceptions."""
    decided_by: Decider


CRITERIA = (
    Criterion(
        defense="neural-cleanse",
        rule="some class with a norm below the median has |norm - median| / (1.4826 MAD) > 2; MAD = 0 is not detected",
        says="applied to the norms in the records; unknown where one was censored: the published code censors none",
    ),
    Criterion(
        defense="strip",
        rule="more than 10 % of the entropies of clean images lie below their own 5th percentile",
        says="cannot fire: at most ceil(0.05 (n - 1)) of n values do, which is no more than 10 % for every n >= 10",
    ),
    Criterion(
        defense="spectral-signatures",
        rule="more than 10 % of the scores lie above their own 95th percentile, or s0^2 / sum s^2 > 0.5",
        says="the first clause cannot fire, as that of STRIP; for the second, records hold no singular values",
    ),
    Criterion(
        defense="activation-clustering",
        rule="the norms of the features of some class have a coefficient of variation > 0.5; nothing is clustered",
        says="needs the norms of features, which records don't hold",
    ),
    Criterion(
        defense="fine-pruning",
        rule="more than 30 % of the channels have a mean absolute activation < 0.01; nothing is pruned",
        says="needs the activations, which records don't hold",
    ),
)
_FIVE = frozenset(one.defense for one in CRITERIA)


def largest_own_fraction(n: int) -> float:
    """The largest share of n values that can lie strictly below their own 5th percentile: ``ceil(0.05 (n-1)) / n``."""
    # In twentieths, for 0.05 * 20 is a bit more than 1 in floating point.
    return ceil((n - 1) / round(1 / OWN_PERCENTILE)) / n


def published_neural_cleanse(norms: ArrayLike) -> bool:
    """Whether some norm lies more than 2 scaled MADs below the median; False where the MAD is 0.

    ``norms: (K,)``, one of every class.

    Raises:
        ValueError: a norm is not finite.
    """
    values = np.asarray(norms, dtype=np.float64)
    if not np.isfinite(values).all():
        raise ValueError("a norm is not finite")
    if not len(values):
        return False
    median = np.median(values)
    mad = np.median(np.abs(values - median))
    if mad == 0:
        return False
    low = values[values < median]
    return bool((np.abs(low - median) / (CONSISTENT * mad) > NEURAL_CLEANSE_LIMIT).any())


def published_rows(cohort: Cohort) -> tuple[PublishedRow, ...]:
    """One row per setting and access of the study's five defenses."""
    mine = [subject for subject, records in cohort.defenses.items() if records[0].defense in _FIVE]
    return tuple(_row(subject, cohort.defenses[subject]) for subject in sorted(mine, key=row_rank))


def _row(subject: Subject, records: Sequence[DefenseRecord]) -> PublishedRow:
    told = [_fires(record) for record in records]
    known = [fires for fires in told if fires is not None]
    lacking = sum(map(_is_missed_unanswered, records, told))
    return PublishedRow(
        setting=subject.setting,
        defense=subject.defense,
        access=subject.access,
        files=len(records),
        answers=count_answers(records),
        judges=records[0].kind in ("scan", "dataset") and any(record.verdict in VERDICTS for record in records),
        calm=sum(record.verdict is Verdict.CLEAN for record in records),
        alarms=sum(record.verdict is Verdict.BACKDOORED for record in records),
        detected=sum(known) if known else None,
        unknown=len(records) - len(known),
        counted_as_missed=lacking,
        decided_by=_decider(records[0].defense, len(records), len(known), lacking),
    )


def _fires(record: DefenseRecord) -> bool | None:
    """Whether the published rule detects anything; ``None`` where the records don't say."""
    if record.defense == "neural-cleanse":
        norms = norms_of(record)
        return None if norms is None else published_neural_cleanse(norms)
    silent = status_of(record) != "measured" or (record.defense == "strip" and _cannot_fire(record))
    return False if silent else None


def _is_missed_unanswered(record: DefenseRecord, fires: bool | None) -> bool:
    """Whether it is for want of an answer that nothing is detected: norms that were found are judged by the rule."""
    return fires is False and status_of(record) != "measured" and not norms_of(record)


def norms_of(record: DefenseRecord) -> list[float] | None:
    """The norm of each class; ``None`` where one has none, and no norm at all where nothing was inverted."""
    result = None if record.finding is None else record.finding.result
    if not isinstance(result, ScanResult):
        return []
    norms = [entry.norm for entry in result.classes if entry.norm is not None and np.isfinite(entry.norm)]
    return norms if len(norms) == len(result.classes) else None


def _cannot_fire(record: DefenseRecord) -> bool:
    """Without an answer an exception, else as many entropies as the proof needs."""
    if not isinstance(record.metrics, FilterMetrics):
        return True
    n = record.metrics.fpr.n
    return n > 0 and largest_own_fraction(n) <= OWN_FRACTION


def _decider(defense: str, files: int, known: int, lacking: int) -> Decider:
    if not known:
        return "not in the records"
    alone = known if defense == "strip" else lacking
    if alone == files:
        return "the criterion alone"
    return "the criterion alone, in part" if alone else "the norms"
