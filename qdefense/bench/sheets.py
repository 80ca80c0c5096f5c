"""Every table as text, block by block, for the page and for Markdown alike."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from qdefense.bench import forms
from qdefense.bench.budgets import AFTER_REPAIR, BudgetFigure, BudgetRow
from qdefense.bench.cohort import NO_ATTACK, Setting, access_rank, rank_of
from qdefense.bench.contrasts import ContrastRow, GapRow, Step
from qdefense.bench.figures import NOTHING, changed, counted, decimals, kilobytes, percents, rounded, single
from qdefense.bench.forms import HEAT_MARKS, Form
from qdefense.bench.published import PublishedRow
from qdefense.bench.summary import BenchReport
from qdefense.bench.tables import Answers, BehaviourRow, DatasetRow, FilterRow, RepairRow, ScanRow, Spread
from qdefense.bench.timing_records import Interval
from qdefense.bench.timings import LatencyRow
from qdefense.trial import Activity

_ACCESSES = {"session": "", "shadow": ", on the shadow alone", "no-gradients": ", without gradients"}
NO_RECORD = "no record"
DefenseRow = ScanRow | DatasetRow | FilterRow | RepairRow
Group = tuple[Setting, str, str]
"""The records of one cell: setting, defense ("" for what the files do) and access."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Lines of text, the most important first; ``heat`` runs from 0 (as chance) to 5, None where there is none."""

    lines: tuple[str, ...]
    group: Group | None = None
    heat: int | None = None


@dataclass(frozen=True, kw_only=True)
class Block:
    """One table under its heading; the columns may be those of the form and more."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Tables of one form."""

    form: Form
    blocks: tuple[Block, ...]


def sheets_of(report: BenchReport) -> tuple[Sheet, ...]:
    """All tables, in the order of the page."""
    return (
        matrix_sheet(report),
        _behaviour_sheet(report.behaviour),
        _sheet(forms.SCANS, report.scans, _scan_cells),
        _sheet(forms.DATASET_SCANS, report.dataset_scans, _dataset_cells),
        _sheet(forms.FILTERS, report.filters, _filter_cells),
        _sheet(forms.REPAIRS, report.repairs, _repair_cells),
        _budget_sheet(report.budgets),
        _sheet(forms.CONTRASTS, report.contrasts, _contrast_cells),
        _sheet(forms.GAPS, report.gaps, _gap_cells),
        _criteria_sheet(report),
        _sheet(forms.PUBLISHED, report.published, _published_cells),
        _sheet(forms.LATENCY, report.latency, _latency_cells),
        _unanswered_sheet(report),
    )


_Any = TypeVar(
    "_Any", BehaviourRow, ScanRow, DatasetRow, FilterRow, RepairRow, ContrastRow, GapRow, PublishedRow, LatencyRow
)


def _sheet(form: Form, rows: Iterable[_Any], cells: Callable[[_Any], list[Cell]]) -> Sheet:
    """A table for each data set and architecture."""
    places: dict[str, list[tuple[Cell, ...]]] = {}
    for row in rows:
        places.setdefault(row.setting.place, []).append(tuple(cells(row)))
    blocks = (Block(heading=place, columns=form.columns, rows=tuple(made)) for place, made in places.items())
    return Sheet(form=form, blocks=tuple(blocks))


def _text(*texts: str | int) -> list[Cell]:
    return [Cell(lines=(str(text),)) for text in texts]


def access_of(name: str) -> str:
    """What is added to the name of a defense."""
    return _ACCESSES.get(name, "")


def _named(row: DefenseRow | PublishedRow) -> list[Cell]:
    group = (row.setting, row.defense, row.access)
    names = _text(f"{row.defense}{access_of(row.access)}", row.setting.attack)
    return [*names, Cell(lines=(row.setting.file,), group=group)]


def _states(answers: Answers) -> list[Cell]:
    return _text(answers.measured, answers.not_measured, answers.not_applicable, answers.failed)


def _summed(answers: Answers) -> str:
    """``3 measured, 1 not``."""
    lacking = answers.not_measured + answers.not_applicable + answers.failed
    return f"{answers.measured} measured" + (f", {lacking} not" if lacking else "")


# --- the matrix -------------------------------------------------------------------------------------------------------


def matrix_sheet(report: BenchReport) -> Sheet:
    """Defense and attack by file, with intervals."""
    rows: list[DefenseRow] = [*report.scans, *report.dataset_scans, *report.filters, *report.repairs]
    places: dict[str, list[DefenseRow]] = {}
    for row in rows:
        places.setdefault(row.setting.place, []).append(row)
    return Sheet(form=forms.MATRIX, blocks=tuple(_matrix_block(place, places[place]) for place in sorted(places)))


def _matrix_block(place: str, rows: Sequence[DefenseRow]) -> Block:
    files = list(dict.fromkeys(row.setting.file for row in sorted(rows, key=lambda row: rank_of(row.setting)[-1])))
    lines: dict[tuple[str, str], dict[str, Cell]] = {}
    for row in sorted(rows, key=_matrix_rank):
        name = f"{row.defense}{access_of(row.access)}"
        lines.setdefault((name, row.setting.attack), {})[row.setting.file] = _matrix_cell(row)
    empty = Cell(lines=(NO_RECORD,))
    made = (
        (*_text(name, attack), *(cells.get(file, empty) for file in files)) for (name, attack), cells in lines.items()
    )
    return Block(heading=place, columns=(*forms.MATRIX.columns, *files), rows=tuple(made))


def _matrix_rank(row: DefenseRow) -> tuple[object, ...]:
    """The kinds of defenses as the page has them; the deployed file before its shadow."""
    kind = (ScanRow, DatasetRow, FilterRow, RepairRow).index(type(row))
    return kind, row.defense, access_rank(row.access), rank_of(row.setting)


def _matrix_cell(row: DefenseRow) -> Cell:
    group = (row.setting, row.defense, row.access)
    area: float | None = None
    if row.setting.attack == NO_ATTACK:
        lines = _harm(row)
    elif isinstance(row, RepairRow):
        lines = [
            _arrow("ASR", row.asr_before, row.asr_after),
            _arrow("accuracy", row.accuracy_before, row.accuracy_after),
        ]
    else:
        area, told = _area(row)
        lines = [told, f"TPR {counted(row.tpr)}", f"FPR {counted(row.fpr)}"]
    if isinstance(row, RepairRow) and row.refused:
        lines.append(f"{row.refused} NOT_REPAIRED")
    if isinstance(row, FilterRow) and row.without_line:
        lines.append(f"{row.without_line} without a line")
    if not row.answers.measured:
        lines, area = [_why_empty(row)], None
    return Cell(lines=(*lines, *_lacking(row.answers)), group=group, heat=None if area is None else heat_of(area))


def _why_empty(row: DefenseRow) -> str:
    if any(row.answers.model_dump().values()):
        return "no answer"
    return "activity unknown" if row.unknown_activity else "no active file"


def _harm(row: DefenseRow) -> list[str]:
    """What a defense does to clean networks: false alarms, or accuracy lost."""
    if isinstance(row, RepairRow):
        return [_arrow("accuracy", row.accuracy_before, row.accuracy_after)]
    return [f"FPR {counted(row.fpr if isinstance(row, ScanRow) else row.clean_fpr)}"]


def _arrow(name: str, before: Spread | None, after: Spread | None) -> str:
    if before is None or after is None:
        return f"{name} {NOTHING}"
    return f"{name} {100 * before.mean:.1f} \u2192 {percents(after)}"


def _area(row: ScanRow | DatasetRow | FilterRow) -> tuple[float | None, str]:
    """The AUROC that the tint is of, and how it is told: of a scan with its files, of rows within their label."""
    if isinstance(row, ScanRow):
        files = "" if row.auroc is None else " of {} and {} files".format(*row.scored)
        return row.auroc, f"AUROC {single(row.auroc, 2)}{files}"
    figure, where = (row.within_auroc, " within") if isinstance(row, DatasetRow) else (row.auroc, "")
    return None if figure is None else figure.mean, f"AUROC{where} {decimals(figure, 2)}"


def _lacking(answers: Answers) -> list[str]:
    counts = (
        (answers.not_measured, "not measured"),
        (answers.not_applicable, "not applicable"),
        (answers.failed, "failed"),
    )
    return [f"{count} {name}" for count, name in counts if count]


def heat_of(area: float) -> int:
    """0 for an AUROC below 0.6, 5 from 0.97 on."""
    return bisect_right(HEAT_MARKS, area)


# --- one sheet for each kind ------------------------------------------------------------------------------------------


def _behaviour_sheet(rows: Sequence[BehaviourRow]) -> Sheet:
    """With columns for the FPR and its control where any attack is source-specific."""
    sourced = any(row.fpr is not None for row in rows)
    form = forms.SOURCE_SPECIFIC if sourced else forms.BEHAVIOUR
    return _sheet(form, rows, partial(_behaviour_cells, sourced=sourced))


def _behaviour_cells(row: BehaviourRow, *, sourced: bool) -> list[Cell]:
    return [
        *_text(row.setting.attack),
        Cell(lines=(row.setting.file,), group=(row.setting, "", "session")),
        *_text(row.measured, percents(row.clean_accuracy), percents(row.asr), percents(row.base_confusion)),
        *_text(percents(row.control)),
        *(_text(percents(row.fpr), percents(row.control_fpr)) if sourced else ()),
        *_text(*(row.activity.get(activity, 0) for activity in Activity)),
        *_text(kilobytes(row.size_bytes), percents(row.integer_mac_share), row.failed, row.unrecorded),
    ]


def _scan_cells(row: ScanRow) -> list[Cell]:
    return [
        *_named(row),
        *_text(counted(row.tpr), counted(row.fpr), single(row.auroc), "{} and {}".format(*row.scored)),
        *_text(counted(row.target_first), counted(row.target_named)),
        *_states(row.answers),
        *_text(_summed(row.inactive)),
        *_text(_summed(row.clean), counted(row.attenuated), counted(row.dormant)),
        *_text(row.unknown_activity, row.unrecorded),
    ]


def _dataset_cells(row: DatasetRow) -> list[Cell]:
    return [
        *_named(row),
        *_text(decimals(row.auroc), decimals(row.within_auroc), counted(row.tpr), counted(row.fpr)),
        *_text(counted(row.within_fpr), counted(row.top_recall), counted(row.top_precision)),
        *_text(counted(row.alarms), counted(row.clean_alarms), counted(row.clean_fpr)),
        *_states(row.answers),
        *_text(_summed(row.inactive)),
        *_text(_summed(row.clean), decimals(row.attenuated), decimals(row.dormant)),
        *_text(row.unknown_activity, row.unrecorded),
    ]


def _filter_cells(row: FilterRow) -> list[Cell]:
    return [
        *_named(row),
        *_text(decimals(row.auroc), counted(row.tpr), counted(row.fpr), counted(row.clean_fpr)),
        *_text(row.without_line, counted(row.asr_after), f"{row.unmeasured_inputs:,}"),
        *_states(row.answers),
        *_text(_summed(row.inactive)),
        *_text(_summed(row.clean), decimals(row.attenuated), decimals(row.dormant)),
        *_text(row.unknown_activity, row.unrecorded),
    ]


def _repair_cells(row: RepairRow) -> list[Cell]:
    moves = tuple(f"{count} {move}" for move, count in row.transitions.items())
    return [
        *_named(row),
        *_text(percents(row.accuracy_before), percents(row.accuracy_after), changed(row.accuracy_change, percent=True)),
        *_text(percents(row.asr_before), percents(row.asr_after), percents(row.control)),
        *_text(changed(row.asr_change, percent=True)),
        Cell(lines=moves or (NOTHING,)),
        *_text(row.refused),
        *_states(row.answers),
        *_text(_summed(row.inactive)),
        *_text(row.unknown_activity, row.unrecorded),
    ]


# --- what a poison budget costs, and buys ----------------------------------------------------------------------------


def _budget_sheet(rows: Sequence[BudgetRow]) -> Sheet:
    """With a column for each defense that looked at any file of the place."""
    places: dict[str, list[BudgetRow]] = {}
    for row in rows:
        places.setdefault(row.setting.place, []).append(row)
    return Sheet(form=forms.BUDGETS, blocks=tuple(_budget_block(place, mine) for place, mine in places.items()))


def _budget_block(place: str, rows: Sequence[BudgetRow]) -> Block:
    figures = (one for row in rows for one in row.repairs), (one for row in rows for one in row.detections)
    names = list(dict.fromkeys(_figure_name(one) for group in figures for one in group))
    return Block(
        heading=place,
        columns=(*forms.BUDGETS.columns, *names),
        rows=tuple(tuple(_budget_cells(row, names)) for row in rows),
    )


def _figure_name(figure: BudgetFigure) -> str:
    return f"{figure.defense}: {figure.figure}"


def _budget_cells(row: BudgetRow, names: Sequence[str]) -> list[Cell]:
    mine = {_figure_name(one): _figure_cell(row, one) for one in (*row.repairs, *row.detections)}
    share = NOTHING if row.rate is None else f"{100 * row.rate:.3g} %"
    files = (row.setting, "", "session") if row.keys else None
    networks = (f"{row.networks}", *((f"{row.failed} failed",) if row.failed else ()))
    return [
        *_text(row.family, row.budget if row.poisons is None else f"{row.poisons:,}"),
        Cell(lines=(row.setting.file,), group=files),
        *_text(share),
        Cell(lines=networks),
        *_text(percents(row.asr)),
        *(mine.get(name, Cell(lines=(NO_RECORD,))) for name in names),
    ]


def _figure_cell(row: BudgetRow, figure: BudgetFigure) -> Cell:
    """A mean with how many networks it is of, and why others are not in it."""
    known = 0 if figure.value is None else figure.value.n
    told = percents(figure.value) if figure.figure == AFTER_REPAIR else decimals(figure.value)
    empty = figure.answers.measured - known
    lines = (f"{told}, n = {known}" if known else NOTHING, *_lacking(figure.answers))
    return Cell(
        lines=(*lines, *([f"{empty} without this figure"] if empty else ())),
        group=(row.setting, figure.defense, "session"),
    )


# --- what quantization and missing gradients cost ---------------------------------------------------------------------


def _contrast_cells(row: ContrastRow) -> list[Cell]:
    behaviour = row.defense is None
    written = percents if behaviour else decimals
    told = (
        NOTHING if count is None else str(count) for count in (row.alarms_lost, row.alarms_gained, row.answers_lost)
    )
    networks = 0 if row.difference is None else row.difference.n
    return [
        *_text("the file itself" if row.defense is None else f"{row.defense}{access_of(row.access)}"),
        *_text(row.setting.attack),
        Cell(lines=(row.setting.file,), group=(row.setting, row.defense or "", row.access)),
        *_text(row.figure, f"{networks}{_unpaired(row)}", written(row.fp32), written(row.value)),
        *_text(changed(row.difference, percent=behaviour), *told),
    ]


def _gap_cells(row: GapRow) -> list[Cell]:
    lost = "not tried" if row.api_lost is None else f"{row.api_lost.hits} of {row.api_lost.n} no longer measured"
    return [
        *_text(row.defense, row.setting.attack),
        Cell(lines=(row.setting.file,), group=(row.setting, row.defense, "session")),
        *(_step(step, row.figure) for step in (row.fp32, row.shadow, row.session, row.no_gradients)),
        *_text(changed(row.numeric_loss), changed(row.runtime_loss), f"{changed(row.signal_loss)}{_unpaired(row)}"),
        Cell(lines=(lost,) if row.api_loss is None else (lost, changed(row.api_loss))),
    ]


def _unpaired(row: ContrastRow | GapRow) -> str:
    return f", {row.unpaired} unpaired" if row.unpaired else ""


def _step(step: Step | None, name: str) -> Cell:
    if step is None:
        return Cell(lines=(NO_RECORD,))
    lines = [_summed(step.answers)]
    if step.alarms is not None:
        lines.append(f"alarms {step.alarms.hits}/{step.alarms.n}")
    if step.auroc is not None:
        lines.append(f"AUROC {single(step.auroc, 2)}")
    if step.figure is not None:
        lines.append(f"{name} {decimals(step.figure, 2)}")
    return Cell(lines=tuple(lines))


def _criteria_sheet(report: BenchReport) -> Sheet:
    rows = tuple(tuple(_text(one.defense, one.rule, one.says)) for one in report.criteria)
    return Sheet(form=forms.CRITERIA, blocks=(Block(heading="The rules", columns=forms.CRITERIA.columns, rows=rows),))


def _published_cells(row: PublishedRow) -> list[Cell]:
    told = [] if row.detected is None else [f"{row.detected} of {row.files - row.unknown}"]
    told += [f"{row.unknown} unknown"] * (row.unknown > 0)
    calm = row.calm if row.judges else NOTHING
    return [
        *_named(row),
        *_text(row.files, row.alarms if row.judges else NOTHING, calm),
        *_text(row.answers.not_measured, row.answers.not_applicable, row.answers.failed),
        *_text(", ".join(told), row.counted_as_missed, row.decided_by),
    ]


def _latency_cells(row: LatencyRow) -> list[Cell]:
    return [
        *_text(row.variant, row.setting.attack),
        Cell(lines=(row.setting.file,), group=(row.setting, "", "session")),
        *_text(row.seed, *map(rounded, (row.p50_ms, row.p90_ms, row.p99_ms)), _interval(row.added_ms, "+")),
        *_text(NOTHING if row.yardstick_ms is None else rounded(row.yardstick_ms)),
        *_text(_interval(row.rows_per_second), row.offline_rows, _memory(row)),
        *_text(NOTHING if row.load is None else f"{row.load[0]:.1f} to {row.load[1]:.1f}", row.runtime),
    ]


def _memory(row: LatencyRow) -> str:
    if row.peak_bytes is None:
        return NOTHING
    peak = f"{row.peak_bytes / 2**20:,.0f} MiB"
    return peak if row.before_bytes is None else f"+{(row.peak_bytes - row.before_bytes) / 2**20:,.0f} to {peak}"


def _interval(figure: Interval | None, sign: str = "") -> str:
    if figure is None:
        return NOTHING
    value, low, high = (rounded(one, sign) for one in (figure.value, figure.low, figure.high))
    return f"{value} [{low}, {high}]"


def _unanswered_sheet(report: BenchReport) -> Sheet:
    rows = tuple(
        tuple(_text(one.stage, f"{one.defense}{access_of(one.access)}", one.status, len(one.keys), one.reason))
        for one in report.unanswered
    )
    block = Block(heading="By reason", columns=forms.UNANSWERED.columns, rows=rows)
    return Sheet(form=forms.UNANSWERED, blocks=(block,) if rows else ())
