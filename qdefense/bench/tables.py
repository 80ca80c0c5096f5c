"""Tables from records: what files do, what each kind of defense makes of them. The unit of replication is the network.

What was not measured has a column of its own and is never a miss; a rate of nothing is ``None``, never 0. TPR and AUROC
are of active files against clean ones; attenuated and dormant ones stand apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from math import isfinite
from typing import TypeGuard, TypeVar

from pydantic import BaseModel, ConfigDict

from qdefense.bench.cohort import NO_ATTACK, Cohort, Setting, Status, Subject, rank_of, row_rank, status_of
from qdefense.bench.paired import mean_difference
from qdefense.bench.records import (
    Access,
    BehaviourRecord,
    ControlRecord,
    DatasetMetrics,
    DefenseRecord,
    FilterMetrics,
    QuantizationRecord,
    Rate,
    RepairMetrics,
    ScanMetrics,
)
from qdefense.findings import Verdict
from qdefense.rates import auroc, wilson_interval
from qdefense.trial import Activity, held_against


class Row(BaseModel):
    """A row of a table, or a part of one."""

    model_config = ConfigDict(frozen=True)


class Proportion(Row):
    """``hits`` of ``n``, with Wilson's interval of 95 %, which takes them for independent.

    Rows and inputs of several networks are not: a network answers much alike, and its clean ones are the same images.
    """

    hits: int
    n: int
    low: float
    high: float
    networks: int = 1
    """Whose rows or inputs are pooled; 1 also of a rate of files."""
    lowest: float | None = None
    """The rate of one network, where several are pooled."""
    highest: float | None = None

    @property
    def value(self) -> float:
        """The rate."""
        return self.hits / self.n

    @property
    def margins(self) -> tuple[float, float]:
        """What to show beside the rate: the interval, or lowest and highest network where several are pooled."""
        if self.lowest is None or self.highest is None:
            return self.low, self.high
        return self.lowest, self.highest


class Spread(Row):
    """A figure of several networks: mean, lowest, highest."""

    mean: float
    low: float
    high: float
    n: int


class Difference(Row):
    """Mean over networks of a paired difference, and its interval by Student's t; none without spread."""

    mean: float
    low: float | None
    high: float | None
    n: int


class Answers(Row):
    """How many trials have an answer, and why the others have none."""

    measured: int = 0
    not_measured: int = 0
    not_applicable: int = 0
    failed: int = 0


class _SettingRow(Row):
    setting: Setting
    unrecorded: int
    """Networks of the same data, architecture and attack without a record here, whether one was asked for or not."""
    keys: tuple[str, ...]


class BehaviourRow(_SettingRow):
    """What the files of a setting do."""

    measured: int
    failed: int
    clean_accuracy: Spread | None
    asr: Spread | None
    base_confusion: Spread | None
    control: Spread | None = None
    """ASR of the same triggers on the clean twins."""
    uncontrolled: int = 0
    """Attacked files without it, whose activity is judged by the base confusion alone, or with none of their FPR."""
    fpr: Spread | None = None
    """Of source-specific triggers."""
    control_fpr: Spread | None = None
    """Of the same triggers on the clean twins."""
    activity: dict[Activity, int]
    size_bytes: Spread | None
    integer_mac_share: Spread | None


class _DefenseRow(_SettingRow):
    defense: str
    access: Access
    answers: Answers
    """Of active files; of clean ones where there is no attack."""
    inactive: Answers
    """Of attenuated and dormant files."""
    clean: Answers
    """Of the clean twins."""
    unknown_activity: int


class ScanRow(_DefenseRow):
    """A `ModelScan`; the unit of every rate is the file."""

    tpr: Proportion | None
    fpr: Proportion | None
    auroc: float | None
    scored: tuple[int, int]
    """Active and clean files that AUROC is of."""
    target_first: Proportion | None
    target_named: Proportion | None
    attenuated: Proportion | None
    dormant: Proportion | None


class DatasetRow(_DefenseRow):
    """A `DatasetScan`; AUROC per network, rates of rows pooled over networks."""

    auroc: Spread | None
    """Of all rows, whatever their label, though scores are made within a label."""
    within_auroc: Spread | None
    tpr: Proportion | None
    fpr: Proportion | None
    within_fpr: Proportion | None
    top_recall: Proportion | None
    top_precision: Proportion | None
    alarms: Proportion | None
    clean_alarms: Proportion | None
    clean_fpr: Proportion | None
    attenuated: Spread | None
    dormant: Spread | None


class FilterRow(_DefenseRow):
    """An `InputFilter`; AUROC per network, rates of inputs pooled over networks."""

    auroc: Spread | None
    tpr: Proportion | None
    fpr: Proportion | None
    clean_fpr: Proportion | None
    asr_after: Proportion | None
    unmeasured_inputs: int
    attenuated: Spread | None
    dormant: Spread | None
    without_line: int = 0
    """Of the measured files, the clean twins among them, those on which no score can be below the line."""
    weaknesses: dict[str, int] = {}
    """What weakens the filter, in its words, and on how many measured files of the row."""


class RepairRow(_DefenseRow):
    """A `Repair` of active files: clean accuracy and ASR before and after, and what the trigger does to clean twins."""

    accuracy_before: Spread | None
    accuracy_after: Spread | None
    accuracy_change: Difference | None
    asr_before: Spread | None
    asr_after: Spread | None
    asr_change: Difference | None
    control: Spread | None = None
    """ASR of the same triggers on the clean twins, which no repair can be expected to go below."""
    uncontrolled: int = 0
    """Attacked files, of every activity, without it: what became of the backdoor is as the file alone tells it."""
    transitions: dict[str, int]
    """``active to dormant``: how many files, of every activity."""
    refused: int = 0
    """Of the files that figures are of, those that lost more accuracy than the repair tolerates: NOT_REPAIRED."""


def is_known(value: float | None) -> TypeGuard[float]:
    """Whether there is a number; NaN and infinity, which JSON can carry, are none."""
    return value is not None and isfinite(value)


def proportion(rates: Iterable[Rate | None]) -> Proportion | None:
    """Counts pooled; ``None`` of nothing."""
    known = [rate for rate in rates if rate is not None and rate.n]
    if not known:
        return None
    hits, n = sum(rate.hits for rate in known), sum(rate.n for rate in known)
    low, high = wilson_interval(hits, n)
    found = Proportion(hits=hits, n=n, low=low, high=high, networks=len(known))
    if len(known) == 1:
        return found
    values = [rate.hits / rate.n for rate in known]
    return found.model_copy(update={"lowest": min(values), "highest": max(values)})


def _is_first(one: ScanMetrics) -> bool | None:
    """``None`` of an attack on every class, which has no target to be found or missed (all-to-all)."""
    return None if one.targets and one.target_found is None else one.target_rank == 1


def share(flags: Iterable[bool | None]) -> Proportion | None:
    """How many are true of those that are known."""
    known = [flag for flag in flags if flag is not None]
    return proportion([Rate(hits=sum(known), n=len(known))])


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and range of those that are known; ``None`` of nothing."""
    known = [value for value in values if is_known(value)]
    if not known:
        return None
    return Spread(mean=sum(known) / len(known), low=min(known), high=max(known), n=len(known))


def difference(pairs: Iterable[tuple[float | None, float | None]]) -> Difference | None:
    """After minus before, over the pairs in which both are known."""
    known = [(before, after) for before, after in pairs if is_known(before) and is_known(after)]
    if not known:
        return None
    mean, interval = mean_difference([before for before, _ in known], [after for _, after in known])
    low, high = interval or (None, None)
    return Difference(mean=mean, low=low, high=high, n=len(known))


def count_answers(records: Iterable[DefenseRecord]) -> Answers:
    """The trials by status."""
    counts: Counter[Status] = Counter(status_of(record) for record in records)
    return Answers(
        measured=counts["measured"],
        not_measured=counts["not measured"],
        not_applicable=counts["not applicable"],
        failed=counts["failed"],
    )


def behaviour_rows(cohort: Cohort) -> tuple[BehaviourRow, ...]:
    """One row per setting."""
    sizes = {one.artifact_sha256: one.size_bytes for one in cohort.makings}
    shares = {
        one.artifact_sha256: one.integer_mac_share for one in cohort.makings if isinstance(one, QuantizationRecord)
    }
    rows = []
    for setting in sorted(cohort.behaviours, key=rank_of):
        records = cohort.behaviours[setting]
        there = [one for one in records if not one.failed and one.clean_accuracy is not None]
        controls = [cohort.controls[one.key] for one in there if one.key in cohort.controls]
        rows.append(
            BehaviourRow(
                setting=setting,
                unrecorded=cohort.unrecorded(setting, records),
                keys=tuple(one.key for one in records),
                measured=len(there),
                failed=len(records) - len(there),
                clean_accuracy=spread(one.clean_accuracy for one in there),
                asr=spread(one.asr for one in there),
                base_confusion=spread(one.base_confusion for one in there),
                control=spread(one.asr for one in controls),
                uncontrolled=sum(_is_uncontrolled(one, cohort.controls.get(one.key)) for one in there),
                fpr=spread(one.fpr for one in there),
                control_fpr=spread(one.fpr for one in controls),
                activity=dict(Counter(one.activity for one in there if one.activity is not None)),
                size_bytes=spread(sizes.get(one.artifact_sha256) for one in there),
                integer_mac_share=spread(shares.get(one.artifact_sha256) for one in there),
            )
        )
    return tuple(rows)


def _is_uncontrolled(record: BehaviourRecord, control: ControlRecord | None) -> bool:
    if control is None:
        return record.asr is not None
    return record.fpr is not None and control.fpr is None


class Sides:
    """The trials of one row by what the backdoor does; ``measured`` ones alone, ``clean`` those of the clean twins."""

    def __init__(self, cohort: Cohort, subject: Subject) -> None:
        records, twins = cohort.defenses[subject], cohort.twins(subject)
        self.subject = subject
        clean_row = subject.setting.attack == NO_ATTACK
        self._of = {activity: [one for one in records if cohort.activity(one) is activity] for activity in Activity}
        mine = self._of[Activity.CLEAN if clean_row else Activity.ACTIVE]
        self.facts = {
            "setting": subject.setting,
            "defense": subject.defense,
            "access": subject.access,
            "unrecorded": cohort.unrecorded(subject.setting, records),
            "keys": tuple(one.key for one in records),
            "answers": count_answers(mine),
            "inactive": count_answers([*self._of[Activity.ATTENUATED], *self._of[Activity.DORMANT]]),
            "clean": count_answers(twins),
            "unknown_activity": sum(cohort.activity(one) is None for one in records),
        }
        self.all = _measured(records)
        self.clean = _measured(twins)
        self.scores, self.clean_scores = scores_of(self._of[Activity.ACTIVE]), scores_of(twins)

    def of(self, activity: Activity) -> list[DefenseRecord]:
        """The measured trials of files of this activity."""
        return _measured(self._of[activity])

    @property
    def main(self) -> list[DefenseRecord]:
        """Those that the figures of the row are of."""
        return self.of(Activity.CLEAN if self.subject.setting.attack == NO_ATTACK else Activity.ACTIVE)


def scan_rows(cohort: Cohort) -> tuple[ScanRow, ...]:
    """One row per setting, scan and access."""
    return tuple(_scan_row(Sides(cohort, subject)) for subject in subjects_of(cohort, "scan"))


def _scan_row(sides: Sides) -> ScanRow:
    active, scores, clean_scores = sides.of(Activity.ACTIVE), sides.scores, sides.clean_scores
    return ScanRow(
        **sides.facts,
        tpr=alarms(active),
        fpr=alarms(sides.clean),
        auroc=auroc(scores, clean_scores) if scores and clean_scores else None,
        scored=(len(scores), len(clean_scores)),
        target_first=share(_is_first(one) for one in _metrics(active, ScanMetrics)),
        target_named=share(one.target_found for one in _metrics(active, ScanMetrics)),
        attenuated=alarms(sides.of(Activity.ATTENUATED)),
        dormant=alarms(sides.of(Activity.DORMANT)),
    )


def dataset_rows(cohort: Cohort) -> tuple[DatasetRow, ...]:
    """One row per setting, dataset scan and access."""
    return tuple(_dataset_row(Sides(cohort, subject)) for subject in subjects_of(cohort, "dataset"))


def _dataset_row(sides: Sides) -> DatasetRow:
    active = sides.of(Activity.ACTIVE)
    found = _metrics(active, DatasetMetrics)
    return DatasetRow(
        **sides.facts,
        auroc=spread(one.auroc for one in found),
        within_auroc=spread(one.within_auroc for one in found),
        tpr=proportion(one.tpr for one in found),
        fpr=proportion(one.fpr for one in found),
        within_fpr=proportion(one.within_fpr for one in found),
        top_recall=proportion(one.top_recall for one in found),
        top_precision=proportion(one.top_precision for one in found),
        alarms=alarms(of_poisoned_sets(active)),
        clean_alarms=alarms(sides.clean),
        clean_fpr=proportion(one.fpr for one in _metrics(sides.clean, DatasetMetrics)),
        attenuated=spread(map(auroc_of, sides.of(Activity.ATTENUATED))),
        dormant=spread(map(auroc_of, sides.of(Activity.DORMANT))),
    )


def filter_rows(cohort: Cohort) -> tuple[FilterRow, ...]:
    """One row per setting, input filter and access."""
    return tuple(_filter_row(Sides(cohort, subject)) for subject in subjects_of(cohort, "filter"))


def _filter_row(sides: Sides) -> FilterRow:
    found, every = _metrics(sides.of(Activity.ACTIVE), FilterMetrics), _metrics(sides.all, FilterMetrics)
    twins = _metrics(sides.clean, FilterMetrics)
    rated = twins if sides.subject.setting.attack == NO_ATTACK else [*found, *twins]
    return FilterRow(
        **sides.facts,
        auroc=spread(one.auroc for one in found),
        tpr=proportion(one.tpr for one in found),
        fpr=proportion(one.fpr for one in found),
        clean_fpr=proportion(one.fpr for one in twins),
        asr_after=proportion(one.asr_after for one in found),
        unmeasured_inputs=sum(one.unmeasured for one in every),
        attenuated=spread(map(auroc_of, sides.of(Activity.ATTENUATED))),
        dormant=spread(map(auroc_of, sides.of(Activity.DORMANT))),
        without_line=sum(one.rejects_nothing for one in rated),
        weaknesses=dict(Counter(one.weakness for one in every if one.weakness is not None)),
    )


def repair_rows(cohort: Cohort) -> tuple[RepairRow, ...]:
    """One row per setting, repair and access."""
    return tuple(_repair_row(cohort, Sides(cohort, subject)) for subject in subjects_of(cohort, "repair"))


def _repair_row(cohort: Cohort, sides: Sides) -> RepairRow:
    found = _metrics(sides.main, RepairMetrics)
    controls = {one.key: cohort.control(one) for one in sides.all}
    moves = Counter(move for one in sides.all if (move := _move(one, controls[one.key])) is not None)
    known = (controls[one.key] for one in sides.main)
    return RepairRow(
        **sides.facts,
        accuracy_before=spread(one.accuracy_before for one in found),
        accuracy_after=spread(one.accuracy_after for one in found),
        accuracy_change=difference((one.accuracy_before, one.accuracy_after) for one in found),
        asr_before=spread(one.asr_before for one in found),
        asr_after=spread(one.asr_after for one in found),
        asr_change=difference((one.asr_before, one.asr_after) for one in found),
        control=spread(one.asr for one in known if one is not None),
        uncontrolled=sum(one is None for one in controls.values()) if sides.subject.setting.attack != NO_ATTACK else 0,
        transitions=dict(sorted(moves.items())),
        refused=sum(one.verdict is Verdict.NOT_REPAIRED for one in sides.main),
    )


def _move(record: DefenseRecord, control: ControlRecord | None) -> str | None:
    """What became of a backdoor, both sides held against its control."""
    found = record.metrics
    if not isinstance(found, RepairMetrics) or found.activity_after is None:
        return None
    alone = None if control is None else control.asr
    before = held_against(alone, found.activity_before, found.asr_before)
    return f"{before} to {held_against(alone, found.activity_after, found.asr_after)}"


def subjects_of(cohort: Cohort, kind: str) -> list[Subject]:
    """Every row of the defenses of a kind, in order."""
    mine = [subject for subject, records in cohort.defenses.items() if cohort.kind(records[0]) == kind]
    return sorted(mine, key=row_rank)


VERDICTS = frozenset({Verdict.CLEAN, Verdict.BACKDOORED})
"""What says something of a file."""


def alarms(records: Iterable[DefenseRecord]) -> Proportion | None:
    """How many were called backdoored, of the files that were called anything."""
    return share(one.verdict is Verdict.BACKDOORED for one in records if one.verdict in VERDICTS)


def of_poisoned_sets(records: Iterable[DefenseRecord]) -> Iterator[DefenseRecord]:
    """Those of dataset scans that had a poison to find: an attack in the training loop leaves the set as it is."""
    for one in records:
        found = one.metrics
        if not isinstance(found, DatasetMetrics) or found.tpr is not None or found.top_recall is not None:
            yield one


def auroc_of(record: DefenseRecord) -> float | None:
    """The AUROC of inputs, or of rows within their label, whose scores compare with no other label's."""
    if isinstance(record.metrics, DatasetMetrics):
        return record.metrics.within_auroc
    return record.metrics.auroc if isinstance(record.metrics, FilterMetrics) else None


def score_of(record: DefenseRecord) -> float | None:
    """The score of a scan."""
    return record.metrics.score if isinstance(record.metrics, ScanMetrics) else None


def scores_of(records: Iterable[DefenseRecord]) -> list[float]:
    """Of scans, those without an answer among them: no verdict without a line in reach, and yet a rank."""
    return [score for score in map(score_of, records) if is_known(score)]


def _measured(records: Sequence[DefenseRecord]) -> list[DefenseRecord]:
    return [record for record in records if status_of(record) == "measured"]


_Metrics = TypeVar("_Metrics", ScanMetrics, DatasetMetrics, FilterMetrics, RepairMetrics)


def _metrics(records: Iterable[DefenseRecord], kind: type[_Metrics]) -> list[_Metrics]:
    return [record.metrics for record in records if isinstance(record.metrics, kind)]
