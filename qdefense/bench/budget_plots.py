"""The geometry of the charts of poison budgets: ASR by their number, and what is left after a repair by what is found.

One series is one kind of file, a point one budget. Budgets follow each other along a line, which breaks where a figure
in between was not measured: nothing is drawn for it, and `Panel.gaps` names it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qdefense.bench.budgets import BudgetFigure, BudgetRow
from qdefense.bench.tables import Answers, Spread

WIDTH, HEIGHT = 300, 200
"""Of a panel in pixels."""
_EDGE = 14.0
"""Pixels between the frame and the outermost points of a logarithmic axis."""
_QUARTERS = (0.0, 0.25, 0.5, 0.75, 1.0)
_CLOSEST = 34.0
"""Pixels between two labels of an axis."""
_RIGHTMOST = WIDTH - 40.0
"""From here on the label of a point stands to its left."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One budget, in pixels from the upper left corner; ranges are over networks."""

    name: str
    label: str
    x: float
    x_range: tuple[float, float]
    y: float
    y_range: tuple[float, float]

    @property
    def left(self) -> bool:
        """Whether the label stands to the left, for want of room."""
        return self.x > _RIGHTMOST


@dataclass(frozen=True, kw_only=True)
class Track:
    """The budgets of one kind of file, few poisons first; ``paths`` are the unbroken parts of its line."""

    series: int
    file: str
    points: tuple[Point, ...]
    paths: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One chart of a family: ASR upwards from 0 to 1."""

    place: str
    title: str
    across: str
    up: str
    tracks: tuple[Track, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    gaps: tuple[str, ...]


class _Read(NamedTuple):
    """A figure of a row, and why it has none."""

    value: Spread | None
    lacking: str


class _Quantity(NamedTuple):
    name: str
    read: Callable[[BudgetRow], _Read]


class _Scale(NamedTuple):
    place: Callable[[float], float]
    ticks: tuple[tuple[float, str], ...]


def budget_panels(rows: Sequence[BudgetRow], looks: Mapping[str, int]) -> tuple[Panel, ...]:
    """Of every family: ASR by number of poisons, before and after each repair; then each defense against each repair.

    A chart without a point is left out; the table says why.
    """
    families: dict[tuple[str, str], list[BudgetRow]] = {}
    for row in rows:
        families.setdefault((row.setting.place, row.family), []).append(row)
    panels = (panel for mine in families.values() for panel in _panels(mine, looks))
    return tuple(panel for panel in panels if panel is not None)


def _panels(rows: Sequence[BudgetRow], looks: Mapping[str, int]) -> Iterator[Panel | None]:
    repairs = _quantities(rows, lambda row: row.repairs, "ASR after {}")
    for up in (_Quantity("ASR", _asr), *repairs):
        yield _panel(rows, looks, _Quantity("poisons", _poisons), up, _logarithmic)
    for across in _quantities(rows, lambda row: row.detections, "{}: {}"):
        scale = _unit if "AUROC" in across.name.rpartition(": ")[2] else _from_zero
        for up in repairs:
            yield _panel(rows, looks, across, up, scale)


def _quantities(
    rows: Iterable[BudgetRow], figures: Callable[[BudgetRow], Iterable[BudgetFigure]], form: str
) -> tuple[_Quantity, ...]:
    names = dict.fromkeys((one.defense, one.figure) for row in rows for one in figures(row))

    def reader(name: tuple[str, str]) -> Callable[[BudgetRow], _Read]:
        def read(row: BudgetRow) -> _Read:
            found = next((one for one in figures(row) if (one.defense, one.figure) == name), None)
            return _Read(None, "no record") if found is None else _Read(found.value, _why(found.answers))

        return read

    return tuple(_Quantity(form.format(*name), reader(name)) for name in names)


def _why(answers: Answers) -> str:
    counts = (f"{count} {state.replace('_', ' ')}" for state, count in answers.model_dump().items() if count)
    return ", ".join(counts) or "no record"


def _asr(row: BudgetRow) -> _Read:
    return _Read(row.asr, "no record" if not row.keys else "not measured")


def _poisons(row: BudgetRow) -> _Read:
    """A logarithm needs at least one."""
    if not row.poisons:
        return _Read(None, "count not recorded" if row.poisons is None else "no poison: not on a logarithmic axis")
    return _Read(Spread(mean=row.poisons, low=row.poisons, high=row.poisons, n=1), "")


def _panel(
    rows: Sequence[BudgetRow],
    looks: Mapping[str, int],
    across: _Quantity,
    up: _Quantity,
    scaled: Callable[[Sequence[Spread]], _Scale],
) -> Panel | None:
    read = [(row, across.read(row), up.read(row)) for row in rows]
    known = [(row, x.value, y.value) for row, x, y in read if x.value is not None and y.value is not None]
    if not known:
        return None
    scale = scaled([x for _, x, _ in known])
    points = {id(row): _point(row, x, y, scale) for row, x, y in known}
    files = dict.fromkeys(row.setting.file for row in rows)
    return Panel(
        place=rows[0].setting.place,
        title=f"{rows[0].family}: {up.name} by {across.name}",
        across=across.name,
        up=up.name,
        tracks=tuple(
            _track(looks[file], file, [points.get(id(row)) for row in rows if row.setting.file == file])
            for file in files
            if any(id(row) in points for row in rows if row.setting.file == file)
        ),
        x_ticks=scale.ticks,
        y_ticks=tuple((_down(share), f"{share:g}") for share in _QUARTERS),
        gaps=tuple(
            f"{_label(row)}, {row.setting.file} ({(y if x.value is not None else x).lacking})"
            for row, x, y in read
            if id(row) not in points
        ),
    )


def _point(row: BudgetRow, x: Spread, y: Spread, scale: _Scale) -> Point:
    return Point(
        name=f"{_label(row)}, {row.setting.file}: {x.mean:.3g}, {y.mean:.3f}",
        label=_label(row),
        x=scale.place(x.mean),
        x_range=(scale.place(x.low), scale.place(x.high)),
        y=_down(y.mean),
        y_range=(_down(y.high), _down(y.low)),
    )


def _label(row: BudgetRow) -> str:
    return row.budget if row.poisons is None else f"{row.poisons:,}"


def _track(series: int, file: str, points: Sequence[Point | None]) -> Track:
    runs: list[list[Point]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    paths = (" ".join(f"{one.x:g},{one.y:g}" for one in run) for run in runs if len(run) > 1)
    return Track(
        series=series,
        file=file,
        points=tuple(point for point in points if point is not None),
        paths=tuple(paths),
    )


# --- axes -------------------------------------------------------------------------------------------------------------


def _down(share: float) -> float:
    return round(HEIGHT * (1 - min(max(share, 0.0), 1.0)), 1)


def _logarithmic(values: Sequence[Spread]) -> _Scale:
    """From the smallest to the largest, which are named, and of those between them as many as have room."""
    low, high = (math.log(end(value.mean for value in values)) for end in (min, max))

    def place(value: float) -> float:
        share = (math.log(value) - low) / (high - low) if high > low else 0.5
        return round(_EDGE + (WIDTH - 2 * _EDGE) * share, 1)

    return _Scale(place, _spaced([(place(value), f"{value:,.0f}") for value in {one.mean for one in values}]))


def _spaced(ticks: Iterable[tuple[float, str]]) -> tuple[tuple[float, str], ...]:
    first, *others = sorted(ticks)
    kept = [first]
    for tick in others:
        if tick[0] - kept[-1][0] >= _CLOSEST:
            kept.append(tick)
    return tuple(kept)


def _unit(_values: Sequence[Spread]) -> _Scale:
    """An AUROC: from 0 to 1."""

    def place(value: float) -> float:
        return round(WIDTH * min(max(value, 0.0), 1.0), 1)

    return _Scale(place, tuple((place(share), f"{share:g}") for share in _QUARTERS))


def _from_zero(values: Sequence[Spread]) -> _Scale:
    """From 0, or the lowest whole number where one is below it, to the first whole number above all."""
    low = min(0, math.floor(min(value.low for value in values)))
    high = max(math.ceil(max(value.high for value in values) * _ROOM), low + 1)

    def place(value: float) -> float:
        return round(WIDTH * (value - low) / (high - low), 1)

    step = max(1, math.ceil((high - low) / _TICKS))
    return _Scale(place, tuple((place(value), f"{value}") for value in range(low, high + 1, step)))


_ROOM = 1.06
_TICKS = 5
