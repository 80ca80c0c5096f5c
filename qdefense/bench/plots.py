"""The geometry of the bench's charts: ROC curves, and points of cost against efficacy. ``templates/bench.html`` draws.

One series is one kind of file (precision, calibration, arithmetic); it has the same colour and dashes everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from qdefense.bench.cohort import NO_ATTACK, Cohort, Setting, Subject, rank_of, row_rank, status_of
from qdefense.bench.records import Curve, DatasetMetrics, FilterMetrics
from qdefense.bench.scoring import roc_curve
from qdefense.bench.summary import BenchReport
from qdefense.bench.tables import FilterRow, is_known, scores_of
from qdefense.bench.timings import LatencyRow
from qdefense.trial import Activity

SERIES = 6
"""Looks that a series can have; the seventh looks as the first."""
SIDE = 200
"""Of the square of a ROC panel."""
PLOT_HEIGHT = 220
LEFT, RIGHT = 12.0, 96.0
_ROOM = 1.06
_TICKS = 4
_HIGHEST_FLOOR = 0.8


@dataclass(frozen=True, kw_only=True)
class Line:
    """A polyline in pixels from the upper left corner of the panel."""

    series: int
    name: str
    points: str


@dataclass(frozen=True, kw_only=True)
class RocPanel:
    """The ROC of one defense against one attack."""

    place: str
    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point with its ranges: ``x`` in percent of the width, ``y`` in pixels."""

    series: int
    name: str
    x: float
    x_range: tuple[float, float]
    y: float
    y_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Cost to the right from 0, efficacy upwards to 1 from what is lowest."""

    place: str
    title: str
    across: str
    up: str
    dots: tuple[Dot, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Point:
    place: str
    file: str
    name: str
    x: tuple[float, float, float]
    """Value, lower and upper end of its range."""
    y: tuple[float, float, float]


def series_of(cohort: Cohort) -> dict[str, int]:
    """Which look each kind of file has."""
    settings = [*cohort.behaviours, *(subject.setting for subject in cohort.defenses)]
    files = dict.fromkeys(setting.file for setting in sorted(settings, key=lambda one: rank_of(one)[-1]))
    return {file: place % SERIES for place, file in enumerate(files)}


# --- ROC --------------------------------------------------------------------------------------------------------------


def roc_panels(cohort: Cohort) -> tuple[RocPanel, ...]:
    """Every defense on the deployed session against every attack; a line per network, or of a scan per kind of file."""
    looks = series_of(cohort)
    lines: defaultdict[tuple[str, str], list[Line]] = defaultdict(list)
    for subject in sorted(cohort.defenses, key=row_rank):
        if subject.access == "session" and subject.setting.attack != NO_ATTACK:
            panel = subject.setting.place, f"{subject.defense} against {subject.setting.attack}"
            lines[panel] += [
                Line(series=looks[subject.setting.file], name=f"{subject.setting.file}{name}", points=_path(curve))
                for name, curve in _curves(cohort, subject)
            ]
    return tuple(
        RocPanel(place=place, title=title, lines=tuple(mine)) for (place, title), mine in lines.items() if mine
    )


def _curves(cohort: Cohort, subject: Subject) -> Iterable[tuple[str, Curve]]:
    active = [one for one in cohort.defenses[subject] if cohort.activity(one) is Activity.ACTIVE]
    for record in active:
        measured = record.metrics if status_of(record) == "measured" else None
        if isinstance(measured, DatasetMetrics | FilterMetrics) and measured.curve is not None:
            yield f", seed {record.network.seed}", measured.curve
    high, low = scores_of(active), scores_of(cohort.twins(subject))
    if high and low:
        yield f", {len(high)} active and {len(low)} clean files", roc_curve(high, low)


def _path(curve: Curve) -> str:
    places = (
        f"{SIDE * min(max(x, 0.0), 1.0):.1f},{SIDE * (1 - min(max(y, 0.0), 1.0)):.1f}"
        for x, y in zip(curve.fpr, curve.tpr, strict=False)
        if math.isfinite(x) and math.isfinite(y)
    )
    return " ".join(places)


# --- cost against efficacy --------------------------------------------------------------------------------------------


def cost_charts(report: BenchReport, looks: dict[str, int]) -> tuple[Scatter, ...]:
    """File size and latency against clean accuracy and ASR; added latency of filters against AUROC and TPR."""
    sizes = {row.setting: row.size_bytes.mean / 1000 for row in report.behaviour if row.size_bytes is not None}
    kinds = {
        "file size in kB": _behaviour_points(report, sizes),
        "latency at batch 1, p50 in ms": _behaviour_points(report, _latency_of_settings(report)),
        "added latency at batch 1, median in ms": _filter_points(report),
    }
    charts: list[Scatter | None] = []
    for across, figures in kinds.items():
        for up, points in figures.items():
            places = sorted({point.place for point in points})
            charts += [_scatter(across, up, [one for one in points if one.place == place], looks) for place in places]
    return tuple(chart for chart in charts if chart is not None)


def _behaviour_points(report: BenchReport, costs: dict[Setting, float]) -> dict[str, list[_Point]]:
    points: dict[str, list[_Point]] = {"clean accuracy": [], "ASR": []}
    for row in report.behaviour:
        cost = costs.get(row.setting)
        for up, figure in (("clean accuracy", row.clean_accuracy), ("ASR", row.asr)):
            if cost is not None and figure is not None:
                y = (figure.mean, figure.low, figure.high)
                points[up].append(_point(row.setting, row.setting.attack, (cost, cost, cost), y))
    return points


def _filter_points(report: BenchReport) -> dict[str, list[_Point]]:
    """The latency of a filter does not depend on the attack: that of any network of the setting counts."""
    points: dict[str, list[_Point]] = {"AUROC": [], "TPR": []}
    for row in report.filters:
        added = _added_latency(report.latency, row)
        name = f"{row.defense} against {row.setting.attack}"
        if added is not None and row.access == "session" and row.auroc is not None:
            y = (row.auroc.mean, row.auroc.low, row.auroc.high)
            points["AUROC"].append(_point(row.setting, name, added, y))
        if added is not None and row.access == "session" and row.tpr is not None:
            points["TPR"].append(_point(row.setting, name, added, (row.tpr.value, *row.tpr.margins)))
    return points


def _point(setting: Setting, name: str, x: tuple[float, float, float], y: tuple[float, float, float]) -> _Point:
    return _Point(place=setting.place, file=setting.file, name=f"{name}, {setting.file}", x=x, y=y)


def _added_latency(latencies: Sequence[LatencyRow], row: FilterRow) -> tuple[float, float, float] | None:
    """Mean over the files that were timed, of value and interval."""
    mine = [
        one.added_ms
        for one in latencies
        if one.added_ms is not None and one.defense == row.defense and _timed_as(one.setting) == _timed_as(row.setting)
    ]
    if not mine:
        return None
    value, low, high = (sum(getattr(one, part) for one in mine) / len(mine) for part in ("value", "low", "high"))
    return value, low, high


def _latency_of_settings(report: BenchReport) -> dict[Setting, float]:
    """Nor does that of a file depend on the attack: the mean over the files of its kind that were timed."""
    found: defaultdict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in report.latency:
        if row.defense is None and is_known(row.p50_ms):
            found[_timed_as(row.setting)].append(row.p50_ms)
    settings = ((row.setting, found[_timed_as(row.setting)]) for row in report.behaviour)
    return {setting: sum(values) / len(values) for setting, values in settings if values}


def _timed_as(setting: Setting) -> tuple[str, ...]:
    """No time depends on what was asked of the file."""
    return setting.data, setting.architecture, setting.file


def _scatter(across: str, up: str, points: Sequence[_Point], looks: dict[str, int]) -> Scatter | None:
    usable = [point for point in points if all(math.isfinite(value) for value in (*point.x, *point.y))]
    if not usable:
        return None
    end, ticks = _axis(max(point.x[2] for point in usable))
    lowest = min(max(math.floor(min(point.y[1] for point in usable) * 10) / 10, 0.0), _HIGHEST_FLOOR)
    shares = [lowest + (1 - lowest) * step / _TICKS for step in range(_TICKS + 1)]
    return Scatter(
        place=points[0].place,
        title=f"{up} against {across}",
        across=across,
        up=up,
        dots=tuple(_dot(point, end, lowest, looks[point.file]) for point in usable),
        x_ticks=tuple((_right(value, end), f"{value:g}") for value in ticks),
        y_ticks=tuple((_down(share, lowest), f"{share:.3g}") for share in shares),
    )


def _dot(point: _Point, end: float, lowest: float, look: int) -> Dot:
    return Dot(
        series=look,
        name=f"{point.name}: {point.x[0]:.3g}, {point.y[0]:.3f}",
        x=_right(point.x[0], end),
        x_range=(_right(point.x[1], end), _right(point.x[2], end)),
        y=_down(point.y[0], lowest),
        y_range=(_down(point.y[2], lowest), _down(point.y[1], lowest)),
    )


def _right(value: float, end: float) -> float:
    return round(LEFT + (RIGHT - LEFT) * min(max(value / end, 0.0), 1.0), 2)


def _down(value: float, lowest: float) -> float:
    return round(PLOT_HEIGHT * (1 - min(max((value - lowest) / (1 - lowest), 0.0), 1.0)), 1)


def _axis(largest: float) -> tuple[float, tuple[float, ...]]:
    """The end of an axis from 0, and round numbers on it."""
    end = max(largest * _ROOM, 1e-6)
    power = 10.0 ** math.floor(math.log10(end / _TICKS))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= end / _TICKS)
    return end, tuple(round(step * place, 12) for place in range(int(end / step) + 1))
