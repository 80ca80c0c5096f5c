"""The geometry of the bench's charts: ROC curves, and points of cost against efficacy. ``templates/bench.html`` draws.

One series is one kind of file (precision, calibration, arithmetic); it has the same colour and dashes everywhere.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qdefense.bench.cohort import NO_ATTACK, Cohort, Setting, Subject, rank_of, row_rank, status_of
from qdefense.bench.records import Curve, DatasetMetrics, DefenseRecord, FilterMetrics
from qdefense.bench.scoring import roc_curve
from qdefense.bench.summary import BenchReport
from qdefense.bench.tables import is_known, score_of
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
    """Cost to the right, efficacy upwards from 0 to 1."""

    title: str
    across: str
    up: str
    dots: tuple[Dot, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]


@dataclass(frozen=True, kw_only=True)
class _Point:
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
    active = [one for one in _measured(cohort.defenses[subject]) if cohort.activity(one) is Activity.ACTIVE]
    for record in active:
        if isinstance(record.metrics, DatasetMetrics | FilterMetrics) and record.metrics.curve is not None:
            yield f", seed {record.network.seed}", record.metrics.curve
    clean = _measured(cohort.twins(subject))
    high, low = ([score for score in map(score_of, side) if is_known(score)] for side in (active, clean))
    if high and low:
        yield f", {len(high)} active and {len(low)} clean files", roc_curve(high, low)


def _measured(records: Iterable[DefenseRecord]) -> list[DefenseRecord]:
    return [record for record in records if status_of(record) == "measured"]


def _path(curve: Curve) -> str:
    places = (
        f"{SIDE * min(max(x, 0.0), 1.0):.1f},{SIDE * (1 - min(max(y, 0.0), 1.0)):.1f}"
        for x, y in zip(curve.fpr, curve.tpr, strict=False)
        if math.isfinite(x) and math.isfinite(y)
    )
    return " ".join(places)


# --- cost against efficacy --------------------------------------------------------------------------------------------


def cost_charts(report: BenchReport, latencies: Sequence[LatencyRow], looks: dict[str, int]) -> tuple[Scatter, ...]:
    """File size and latency against clean accuracy and ASR; added latency of filters against AUROC and TPR."""
    sizes = {row.setting: row.size_bytes.mean / 1000 for row in report.behaviour if row.size_bytes is not None}
    speeds = _means(latencies, lambda row: None if row.defense else row.p50_ms)
    charts = []
    for across, costs in (("file size in kB", sizes), ("latency at batch 1, p50 in ms", speeds)):
        for up, points in _behaviour_points(report, costs).items():
            charts.append(_scatter(f"{up} against {across}", across, up, points, looks))
    for up, points in _filter_points(report, latencies).items():
        across = "added latency at batch 1, median in ms"
        charts.append(_scatter(f"{up} of filters against added latency", across, up, points, looks))
    return tuple(chart for chart in charts if chart is not None)


def _behaviour_points(report: BenchReport, costs: dict[Setting, float]) -> dict[str, list[_Point]]:
    points: dict[str, list[_Point]] = {"clean accuracy": [], "ASR": []}
    for row in report.behaviour:
        cost = costs.get(row.setting)
        for up, figure in (("clean accuracy", row.clean_accuracy), ("ASR", row.asr)):
            if cost is not None and figure is not None:
                name = f"{row.setting.place}, {row.setting.attack}, {row.setting.file}"
                y = (figure.mean, figure.low, figure.high)
                points[up].append(_Point(file=row.setting.file, name=name, x=(cost, cost, cost), y=y))
    return points


def _filter_points(report: BenchReport, latencies: Sequence[LatencyRow]) -> dict[str, list[_Point]]:
    """The latency of a filter does not depend on the attack: that of any network of the setting counts."""
    points: dict[str, list[_Point]] = {"AUROC": [], "TPR": []}
    for row in report.filters:
        added = [
            one.added_ms
            for one in latencies
            if one.added_ms is not None
            and one.defense == row.defense.partition(" (")[0]
            and (one.setting.place, one.setting.file) == (row.setting.place, row.setting.file)
        ]
        if not added:
            continue
        x = tuple(sum(getattr(one, part) for one in added) / len(added) for part in ("value", "low", "high"))
        name = f"{row.setting.place}, {row.defense} against {row.setting.attack}, {row.setting.file}"
        if row.auroc is not None:
            y = (row.auroc.mean, row.auroc.low, row.auroc.high)
            points["AUROC"].append(_Point(file=row.setting.file, name=name, x=(x[0], x[1], x[2]), y=y))
        if row.tpr is not None:
            y = (row.tpr.value, row.tpr.low, row.tpr.high)
            points["TPR"].append(_Point(file=row.setting.file, name=name, x=(x[0], x[1], x[2]), y=y))
    return points


def _means(latencies: Iterable[LatencyRow], of: Callable[[LatencyRow], float | None]) -> dict[Setting, float]:
    found: defaultdict[Setting, list[float]] = defaultdict(list)
    for row in latencies:
        value = of(row)
        if is_known(value):
            found[row.setting].append(value)
    return {setting: sum(values) / len(values) for setting, values in found.items()}


def _scatter(title: str, across: str, up: str, points: Sequence[_Point], looks: dict[str, int]) -> Scatter | None:
    usable = [point for point in points if all(math.isfinite(value) for value in (*point.x, *point.y))]
    if not usable:
        return None
    end, ticks = _axis(max(point.x[2] for point in usable))

    def right(value: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * min(max(value / end, 0.0), 1.0), 2)

    def down(value: float) -> float:
        return round(PLOT_HEIGHT * (1 - min(max(value, 0.0), 1.0)), 1)

    dots = (
        Dot(
            series=looks[point.file],
            name=f"{point.name}: {point.x[0]:.3g}, {point.y[0]:.3f}",
            x=right(point.x[0]),
            x_range=(right(point.x[1]), right(point.x[2])),
            y=down(point.y[0]),
            y_range=(down(point.y[2]), down(point.y[1])),
        )
        for point in usable
    )
    return Scatter(
        title=title,
        across=across,
        up=up,
        dots=tuple(dots),
        x_ticks=tuple((right(value), f"{value:g}") for value in ticks),
        y_ticks=tuple((down(value / _TICKS), f"{value / _TICKS:g}") for value in range(_TICKS + 1)),
    )


def _axis(largest: float) -> tuple[float, tuple[float, ...]]:
    """The end of an axis from 0, and round numbers on it."""
    end = max(largest * _ROOM, 1e-6)
    power = 10.0 ** math.floor(math.log10(end / _TICKS))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= end / _TICKS)
    return end, tuple(round(step * place, 12) for place in range(int(end / step) + 1))
