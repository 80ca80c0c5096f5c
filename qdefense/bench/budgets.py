"""What a poison budget costs the attacker in detectability, and buys in robustness to a repair.

An attack must be judged by both at once, say Lukas and Kerschbaum (*Pick your Poison*, arXiv 2305.09671): few poisons
would be hard to find and easy to repair, many the other way round. A family is one attack on one data set and
architecture whose networks differ in nothing but seed and budget; it is told where at least two budgets have records.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from qdefense.bench.cohort import NO_ATTACK, Cohort, Setting, Subject, rank_of, row_rank, status_of
from qdefense.bench.records import (
    DataFacts,
    DefenseRecord,
    Network,
    RepairMetrics,
    ScanMetrics,
)
from qdefense.bench.tables import Answers, Row, Spread, auroc_of, count_answers, spread

AFTER_REPAIR = "ASR after"


class BudgetFigure(Row):
    """What one defense on the deployed session makes of the files of a budget, of every activity."""

    defense: str
    figure: str
    """``index of the target``, ``AUROC within``, ``AUROC`` or ``ASR after``."""
    value: Spread | None
    answers: Answers
    keys: tuple[str, ...]


class BudgetRow(Row):
    """The files of one budget of a family."""

    setting: Setting
    family: str
    """The attack without its budget."""
    budget: str
    """As it was asked for: ``poison_count=50``."""
    poisons: int | None
    """Poisoned images; ``None`` where a share was asked for, and of how many images no manifest says."""
    rate: float | None
    """Poisons by clean training images."""
    networks: int
    """Those whose file was measured."""
    asr: Spread | None
    repairs: tuple[BudgetFigure, ...]
    detections: tuple[BudgetFigure, ...]
    keys: tuple[str, ...]
    failed: int = 0
    """Networks whose file could not be measured."""


class _Budget(NamedTuple):
    text: str
    poisons: int | None
    rate: float | None


def budget_rows(cohort: Cohort, data: Iterable[DataFacts]) -> tuple[BudgetRow, ...]:
    """One row per setting of a family with at least two budgets; by family and file, few poisons first."""
    images = {one.sha256: one.images for one in data if one.role == "train"}
    networks = _networks(cohort)
    families: defaultdict[tuple[str, str, str], list[BudgetRow]] = defaultdict(list)
    for setting, network in networks.items():
        row = _row(cohort, setting, network, _budget_of(network, images.get(network.train_sha256)))
        families[setting.data, setting.architecture, row.family].append(row)
    swept = [row for rows in families.values() if len({row.budget for row in rows}) > 1 for row in rows]
    return tuple(sorted(swept, key=_rank))


def _networks(cohort: Cohort) -> dict[Setting, Network]:
    """Every setting with an attack, and one of its networks: they differ in their seed alone."""
    trials = [
        *cohort.behaviours.items(),
        *((subject.setting, records) for subject, records in cohort.defenses.items() if subject.access == "session"),
    ]
    found = {setting: records[0].network for setting, records in trials}
    return {
        setting: network for setting, network in found.items() if setting.attack != NO_ATTACK and _budget_keys(network)
    }


def _budget_keys(network: Network) -> list[str]:
    return sorted(filter(is_budget, network.attack_settings))


def is_budget(setting: str) -> bool:
    """Whether a setting of an attack, or of its host, says how many images are poisoned."""
    return setting.rpartition(".")[2] in _SETTINGS


_COUNT, _RATE, _CLASS_RATE = "poison_count", "poison_rate", "class_rate"
_SETTINGS = frozenset({_COUNT, _RATE, _CLASS_RATE})


def _budget_of(network: Network, images: int | None) -> _Budget:
    """A share of a class is no count: how large the class is stands in no record.

    Nor is what no attack could be asked for, as a line that was edited may hold it.
    """
    asked = {key.rpartition(".")[2]: network.attack_settings[key] for key in _budget_keys(network)}
    text = ", ".join(f"{key}={value}" for key, value in asked.items())
    count, rate = asked.get(_COUNT), asked.get(_RATE)
    count = count if isinstance(count, int) and count >= 0 else None
    rate = rate if isinstance(rate, int | float) and 0 <= rate <= 1 else None
    if count is None and rate is not None and images is not None:
        count = round(rate * images)
    if rate is None and count is not None and images:
        rate = count / images
    return _Budget(text, count, rate)


def _row(cohort: Cohort, setting: Setting, network: Network, budget: _Budget) -> BudgetRow:
    files = cohort.behaviours.get(setting, ())
    failed = sum(one.failed for one in files)
    subjects = [one for one in cohort.defenses if one.setting == setting and one.access == "session"]
    figures = {one: _figure(one, cohort.defenses[one], cohort) for one in sorted(subjects, key=row_rank)}
    return BudgetRow(
        setting=setting,
        family=cohort.family(network, without=is_budget),
        budget=budget.text,
        poisons=budget.poisons,
        rate=budget.rate,
        networks=len(files) - failed,
        failed=failed,
        asr=spread(one.asr for one in files if not one.failed),
        repairs=tuple(one for one in figures.values() if one is not None and one.figure == AFTER_REPAIR),
        detections=tuple(one for one in figures.values() if one is not None and one.figure != AFTER_REPAIR),
        keys=tuple(one.key for one in files),
    )


def _figure(subject: Subject, records: Sequence[DefenseRecord], cohort: Cohort) -> BudgetFigure | None:
    """``None`` of a defense whose trials all failed and whose kind no other trial names."""
    kind = cohort.kind(records[0])
    if kind is None:
        return None
    name, read = _FIGURES[kind]
    return BudgetFigure(
        defense=subject.defense,
        figure=name,
        value=spread(read(one) for one in records if status_of(one) == "measured"),
        answers=count_answers(records),
        keys=tuple(one.key for one in records),
    )


def _index_of_target(record: DefenseRecord) -> float | None:
    return record.metrics.target_index if isinstance(record.metrics, ScanMetrics) else None


def _asr_after(record: DefenseRecord) -> float | None:
    return record.metrics.asr_after if isinstance(record.metrics, RepairMetrics) else None


_FIGURES: Mapping[str, tuple[str, Callable[[DefenseRecord], float | None]]] = {
    "scan": ("index of the target", _index_of_target),
    "dataset": ("AUROC within", auroc_of),
    "filter": ("AUROC", auroc_of),
    "repair": (AFTER_REPAIR, _asr_after),
}


def _rank(row: BudgetRow) -> tuple[Any, ...]:
    """Unknown counts last, by what was asked for."""
    data, place, _attack, file = rank_of(row.setting)
    return data, place, row.family, file, row.poisons is None, row.poisons or 0, row.budget
