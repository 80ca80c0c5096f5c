"""What quantization costs and what missing gradients cost: the same networks, told apart in columns.

Pairs are of one network: a quantized file and the very FP32 file that it was made of, or one file under two accesses.
A network that was trained again is another one.

``FP32 session -> shadow -> session -> no gradients``: the first two arrows are *signal loss* (the shadow of the
quantized file against the FP32 file, then the file against its shadow), the last is *API loss*: the same file, the same
signal, and no gradients to find it with.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from qdefense.bench.cohort import Cohort, Setting, Subject, lost_for_gradients, network_id, rank_of, row_rank, status_of
from qdefense.bench.records import FP32, Access, BehaviourRecord, DefenseRecord
from qdefense.bench.tables import (
    Answers,
    Difference,
    Proportion,
    Row,
    Spread,
    alarms,
    auroc_of,
    count_answers,
    difference,
    is_known,
    of_poisoned_sets,
    score_of,
    scores_of,
    share,
    spread,
    subjects_of,
)
from qdefense.findings import Verdict
from qdefense.rates import auroc
from qdefense.trial import Activity


class ContrastRow(Row):
    """One figure of the quantized files minus that of the FP32 files of the same networks."""

    setting: Setting
    defense: str | None
    access: Access
    figure: str
    fp32: Spread | None
    value: Spread | None
    difference: Difference | None
    """Null where no network has the figure on both files."""
    unpaired: int
    """Files that stand beside an FP32 file which they were not made of, as far as records say: in no figure."""
    alarms_lost: int | None
    """Networks whose FP32 file raised the alarm and whose quantized file was called clean; null where none is asked."""
    alarms_gained: int | None
    answers_lost: int | None = None
    """Networks that the defense has an answer for in FP32 and none once quantized: in no figure, and no alarm lost."""


class Step(Row):
    """One column of the decomposition."""

    answers: Answers
    alarms: Proportion | None
    auroc: float | None
    """Of a scan: active files against clean twins, of all that have a score."""
    figure: Spread | None
    """Of a scan: its score; of the others: AUROC of rows within their label, or of inputs."""


class GapRow(Row):
    """One defense on the active files of a setting, and where its signal goes."""

    setting: Setting
    defense: str
    figure: str
    """What the losses are of."""
    fp32: Step | None
    shadow: Step | None
    session: Step | None
    no_gradients: Step | None
    numeric_loss: Difference | None
    """FP32 session minus shadow of the quantized file."""
    runtime_loss: Difference | None
    """Shadow minus session."""
    signal_loss: Difference | None
    """FP32 session minus session: both together."""
    api_lost: Proportion | None
    """Files measured on the session and, the gradients withheld, no longer; null where that was not tried.

    What has no answer there for another reason is in neither number.
    """
    api_loss: Difference | None
    """Session minus no gradients, where both have a figure."""
    unpaired: int
    """Files of the session that stand beside an FP32 file which they were not made of."""


_FIGURES: dict[str, tuple[str, Callable[[DefenseRecord], float | None]]] = {
    "scan": ("score", score_of),
    "dataset": ("AUROC within the label", auroc_of),
    "filter": ("AUROC of inputs", auroc_of),
}


_VERDICTS = frozenset({Verdict.CLEAN, Verdict.BACKDOORED})
"""What can be an alarm or none: a method that only ranks loses none, and a filter judges inputs."""
_JUDGED = frozenset({Activity.ACTIVE, Activity.CLEAN})
"""A defense that misses a file whose backdoor quantization broke has lost nothing."""


def contrast_rows(cohort: Cohort) -> tuple[ContrastRow, ...]:
    """Behaviour, then every scan and filter; a network counts where both its files are there, and active or clean."""
    rows: list[ContrastRow | None] = []
    for setting in sorted(cohort.behaviours, key=rank_of):
        fp32, files = cohort.behaviours.get(cohort.baseline(setting), ()), cohort.behaviours[setting]
        pairs, lone = _descended(cohort, fp32, files), _unpaired(cohort, fp32, files)
        for name, figure in _BEHAVIOUR.items():
            figures = [(figure(one), figure(other)) for one, other in pairs]
            rows.append(_contrast(setting, None, "session", name, figures, lone))
    for kind, (name, of) in _FIGURES.items():
        rows += (_defense_contrast(cohort, subject, name, of) for subject in subjects_of(cohort, kind))
    return tuple(row for row in rows if row is not None)


_BEHAVIOUR: dict[str, Callable[[BehaviourRecord], float | None]] = {
    "clean accuracy": lambda record: record.clean_accuracy,
    "ASR": lambda record: record.asr,
}


def _defense_contrast(
    cohort: Cohort, subject: Subject, name: str, of: Callable[[DefenseRecord], float | None]
) -> ContrastRow | None:
    base = subject._replace(setting=cohort.baseline(subject.setting))
    fp32, files = cohort.defenses.get(base, ()), cohort.defenses[subject]
    there = [pair for pair in _descended(cohort, fp32, files) if {*map(cohort.activity, pair)} <= _JUDGED]
    answered = [(before, after) for before, after in there if status_of(before) == "measured"]
    pairs = [(before, after) for before, after in answered if status_of(after) == "measured"]
    flips = [
        (before.verdict is Verdict.BACKDOORED, after.verdict is Verdict.BACKDOORED)
        for before, after in pairs
        if {before.verdict, after.verdict} <= _VERDICTS
    ]
    figures = [(of(before), of(after)) for before, after in pairs]
    lone, lost = _unpaired(cohort, fp32, files), len(answered) - len(pairs)
    return _contrast(subject.setting, subject.defense, subject.access, name, figures, lone, flips, lost)


def _contrast(
    setting: Setting,
    defense: str | None,
    access: Access,
    name: str,
    figures: Sequence[tuple[float | None, float | None]],
    lone: int,
    flips: Sequence[tuple[bool, bool]] = (),
    answers_lost: int | None = None,
) -> ContrastRow | None:
    """``None`` of FP32 files, and where there is nothing to tell."""
    whole = [pair for pair in figures if is_known(pair[0]) and is_known(pair[1])]
    if setting.precision == FP32 or not (whole or answers_lost):
        return None
    return ContrastRow(
        setting=setting,
        defense=defense,
        access=access,
        figure=name,
        fp32=spread(one for one, _ in whole),
        value=spread(other for _, other in whole),
        difference=difference(whole),
        unpaired=lone,
        alarms_lost=sum(before and not after for before, after in flips) if flips else None,
        alarms_gained=sum(after and not before for before, after in flips) if flips else None,
        answers_lost=answers_lost,
    )


def gap_rows(cohort: Cohort) -> tuple[GapRow, ...]:
    """One row per quantized setting and defense that was tried with more than one access."""
    rows: dict[Subject, str] = {}
    for kind in _FIGURES:
        for subject in subjects_of(cohort, kind):
            if subject.setting.precision != FP32 and subject.access != "session":
                rows[subject._replace(access="session")] = kind
    return tuple(_gap_row(cohort, subject, rows[subject]) for subject in sorted(rows, key=row_rank))


def _gap_row(cohort: Cohort, subject: Subject, kind: str) -> GapRow:
    name, of = _FIGURES[kind]
    fp32 = subject._replace(setting=cohort.baseline(subject.setting))
    places = [fp32, *(subject._replace(access=access) for access in ("shadow", "session", "no-gradients"))]
    originals, shadow, session, blind = (_judged(cohort, place) for place in places)
    made = {digest for record in (*shadow, *session, *blind) for digest in cohort.sources(record)}
    base = [record for record in originals if record.artifact_sha256 in made]
    records = (base, shadow, session, blind)
    steps = [_step(cohort, place, mine, kind) for place, mine in zip(places, records, strict=True)]
    return GapRow(
        setting=subject.setting,
        defense=subject.defense,
        figure=name,
        fp32=steps[0],
        shadow=steps[1],
        session=steps[2],
        no_gradients=steps[3],
        numeric_loss=_loss(_descended(cohort, base, shadow), of),
        runtime_loss=_loss(_same_file(shadow, session), of),
        signal_loss=_loss(_descended(cohort, base, session), of),
        api_lost=_unmeasured_without_gradients(_same_file(session, blind)),
        api_loss=_loss(_same_file(session, blind), of),
        unpaired=_unpaired(cohort, cohort.defenses.get(fp32, ()), session),
    )


def _judged(cohort: Cohort, place: Subject) -> list[DefenseRecord]:
    """Trials of files that are active, or clean where there is no attack."""
    return [record for record in cohort.defenses.get(place, ()) if cohort.activity(record) in _JUDGED]


def _step(cohort: Cohort, place: Subject, records: Sequence[DefenseRecord], kind: str) -> Step | None:
    if not records:
        return None
    there = [record for record in records if status_of(record) == "measured"]
    figure = spread(map(_FIGURES[kind][1], there))
    told = there if records[0].network.attack is None else of_poisoned_sets(there)
    return Step(
        answers=count_answers(records),
        alarms=None if kind == "filter" else alarms(told),
        auroc=_scan_auroc(cohort, place, records) if kind == "scan" else None,
        figure=figure,
    )


def _scan_auroc(cohort: Cohort, place: Subject, records: Sequence[DefenseRecord]) -> float | None:
    active, clean = scores_of(records), scores_of(cohort.twins(place))
    attacked = records[0].network.attack is not None
    return auroc(active, clean) if attacked and active and clean else None


def _loss(pairs: Iterable[_Pair[DefenseRecord]], of: Callable[[DefenseRecord], float | None]) -> Difference | None:
    """What is lost on the way: positive where the figure falls."""
    both = [pair for pair in pairs if all(status_of(one) == "measured" for one in pair)]
    return difference((of(later), of(earlier)) for earlier, later in both)


def _unmeasured_without_gradients(pairs: Iterable[_Pair[DefenseRecord]]) -> Proportion | None:
    tried = [other for one, other in pairs if status_of(one) == "measured"]
    told = [other for other in tried if status_of(other) == "measured" or lost_for_gradients(other)]
    return share(map(lost_for_gradients, told))


_Trial = TypeVar("_Trial", BehaviourRecord, DefenseRecord)
_Pair = tuple[_Trial, _Trial]


def _descended(cohort: Cohort, fp32: Iterable[_Trial], files: Iterable[_Trial]) -> list[_Pair[_Trial]]:
    """Each file after the FP32 file that it was made of."""
    mine = {network_id(record.network): record for record in fp32}
    pairs = [(mine[name], one) for one in files if (name := network_id(one.network)) in mine]
    return [(before, after) for before, after in pairs if before.artifact_sha256 in cohort.sources(after)]


def _same_file(before: Iterable[_Trial], after: Iterable[_Trial]) -> list[_Pair[_Trial]]:
    mine = {record.artifact_sha256: record for record in before}
    return [(mine[record.artifact_sha256], record) for record in after if record.artifact_sha256 in mine]


def _unpaired(cohort: Cohort, fp32: Sequence[_Trial], files: Sequence[_Trial]) -> int:
    """How many files stand beside an FP32 file of their recipe without being made of it, as far as records say."""
    there = {network_id(record.network) for record in fp32}
    return sum(network_id(record.network) in there for record in files) - len(_descended(cohort, fp32, files))


def trials_apart(cohort: Cohort) -> int:
    """Trials of quantized files whose FP32 file has such a trial, but on other runtimes only: in no difference."""
    placed: list[tuple[tuple[str, str], Setting, Sequence[BehaviourRecord | DefenseRecord]]] = [
        *((("", ""), setting, mine) for setting, mine in cohort.behaviours.items()),
        *(((at.defense, at.access), at.setting, mine) for at, mine in cohort.defenses.items()),
    ]
    known: defaultdict[tuple[object, ...], set[str]] = defaultdict(set)
    asked: list[tuple[tuple[object, ...], str]] = []
    for what, setting, mine in placed:
        base = cohort.baseline(setting).model_copy(update={"runtime": ""})
        for record in mine:
            place = (*what, base, network_id(record.network))
            if setting.precision == FP32:
                known[place].add(setting.runtime)
            else:
                asked.append((place, setting.runtime))
    return sum(bool(known.get(place)) and runtime not in known[place] for place, runtime in asked)


def unpaired_trials(cohort: Cohort) -> int:
    """The same of all settings, whether or not they have a row."""
    files = (
        _unpaired(cohort, cohort.behaviours.get(cohort.baseline(setting), ()), mine)
        for setting, mine in cohort.behaviours.items()
    )
    trials = (
        _unpaired(cohort, cohort.defenses.get(subject._replace(setting=cohort.baseline(subject.setting)), ()), mine)
        for subject, mine in cohort.defenses.items()
    )
    return sum(files) + sum(trials)
