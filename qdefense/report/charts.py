"""The geometry of the chart of trigger norms; ``templates/chart.svg`` draws it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from qdefense.findings import InvertedTrigger, ScanResult, Threshold

SHOWN = 48
"""Classes that get a row of their own."""
ROW = 20
TOP, NO_LINES = 46, 4
"""Above the rows: the words of the two lines, where there are any."""
FOOT = 28
STRIP = 26
_LEFT, _RIGHT = 31.0, 82.0
_CENSORED = 88.0
_FAR = 60.0
_TICKS = 4

Kind = Literal["suspect", "class", "censored"]


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One class; ``x`` and ``y`` are the centre of its mark, in percent of the width and in pixels."""

    name: str
    kind: Kind
    x: float
    y: int
    note: str

    @property
    def anchor(self) -> str:
        """A word beside a number needs room: far to the right it stands before its mark."""
        return "end" if self.kind == "suspect" and self.x > _FAR else "start"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A vertical line; its text stands on the side that has more room."""

    x: float
    text: str

    @property
    def anchor(self) -> str:
        """``start`` or ``end``."""
        return "start" if self.x < (_LEFT + _RIGHT) / 2 else "end"

    @property
    def shift(self) -> int:
        """Pixels between the line and its text."""
        return 6 if self.anchor == "start" else -6


@dataclass(frozen=True, kw_only=True)
class NormChart:
    """A row per class, the smallest norm first. Horizontal places are percent of the width, which is free."""

    marks: tuple[Mark, ...]
    strip: tuple[float, ...]
    hidden: int
    hidden_censored: int
    median: Line | None
    limit: Line | None
    ticks: tuple[tuple[float, str], ...]
    head: int
    bottom: int
    left: float = _LEFT
    right: float = _RIGHT

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom + FOOT


def norm_chart(result: ScanResult, threshold: Threshold | None) -> NormChart | None:
    """The chart of a scan's norms on a linear axis from 0; none where no class has a norm."""
    norms = [norm for norm in (entry.norm for entry in result.classes) if _usable(norm)]
    if not norms:
        return None
    median, limit = _usable_or_none(result.median_norm), suspicion_limit(result, threshold)
    axis = _Axis(max([*norms, median or 0.0, limit or 0.0]))
    shown, hidden = result.classes[:SHOWN], result.classes[SHOWN:]
    head = NO_LINES if median is None else TOP
    top = head + (STRIP if hidden else 0)
    return NormChart(
        marks=tuple(_marks(shown, {one.target_class for one in result.suspects}, axis, top)),
        strip=tuple(sorted({round(axis.place(norm), 1) for norm in norms})) if hidden else (),
        hidden=len(hidden),
        hidden_censored=sum(not _usable(entry.norm) for entry in hidden),
        median=None if median is None else Line(x=axis.place(median), text=f"median {_short(median)}"),
        limit=None if limit is None or limit <= 0 else Line(x=axis.place(limit), text=f"suspect below {_short(limit)}"),
        ticks=tuple((axis.place(value), f"{value:g}") for value in axis.ticks),
        head=head,
        bottom=top + ROW * len(shown),
    )


def suspicion_limit(result: ScanResult, threshold: Threshold | None) -> float | None:
    """The norm below which a class's index exceeds the threshold, ``median - threshold * mad``; negative is none."""
    median, mad = result.median_norm, result.mad
    if threshold is None or not _usable(median) or not _usable(mad) or mad == 0:
        return None
    limit = median - threshold.value * mad
    return limit if math.isfinite(limit) else None


def _marks(classes: Sequence[InvertedTrigger], suspects: set[int], axis: _Axis, top: int) -> Iterable[Mark]:
    for row, entry in enumerate(classes):
        kind, x, note = _mark(entry, entry.target_class in suspects, axis)
        yield Mark(
            name=f"{entry.target_class} {entry.class_name}",
            kind=kind,
            x=x,
            y=top + ROW * row + ROW // 2,
            note=note,
        )


def _mark(entry: InvertedTrigger, suspect: bool, axis: _Axis) -> tuple[Kind, float, str]:
    if not _usable(entry.norm):
        return "censored", _CENSORED, "censored"
    if suspect:
        return "suspect", axis.place(entry.norm), f"{_short(entry.norm)} suspect"
    return "class", axis.place(entry.norm), _short(entry.norm)


class _Axis:
    """From 0 to a round number at or above ``largest``."""

    def __init__(self, largest: float) -> None:
        largest = max(largest, 1e-9)
        rough = largest / _TICKS
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
        count = math.ceil(largest / step - 1e-9)
        self.end = count * step
        self.ticks = tuple(round(step * place, 12) for place in range(count + 1))

    def place(self, value: float) -> float:
        return round(_LEFT + (_RIGHT - _LEFT) * min(max(value / self.end, 0.0), 1.0), 2)


def _short(norm: float) -> str:
    return f"{norm:.1f}" if norm < 1000 else f"{norm:.0f}"


def _usable(value: float | None) -> TypeGuard[float]:
    # A report may come from anywhere: JSON's NaN, infinity and numbers near the end of the range draw nothing.
    return value is not None and math.isfinite(value) and 0 <= value < 1e12


def _usable_or_none(value: float | None) -> float | None:
    return value if _usable(value) else None
