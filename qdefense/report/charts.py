"""The geometry of the charts of trigger norms and of filter scores; ``templates/drawings.html`` draws them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeGuard

from qdefense.findings import FilterResult, InvertedTrigger, ScanResult, Threshold

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
PANEL = 64
"""Of one histogram, from its base line to the next."""
_BINS = 34
_TALLEST = 54.0
_LOWEST_BAR = 1.5

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
class _Chart:
    """One axis, between ``head`` and ``bottom``; horizontal places are percent of the width, which is free."""

    ticks: tuple[tuple[float, str], ...]
    head: int
    bottom: int
    left: float = _LEFT
    right: float = _RIGHT

    @property
    def height(self) -> int:
        """In pixels."""
        return self.bottom + FOOT


@dataclass(frozen=True, kw_only=True)
class NormChart(_Chart):
    """A row per class, the smallest norm first."""

    marks: tuple[Mark, ...]
    strip: tuple[float, ...]
    hidden: int
    hidden_censored: int
    median: Line | None
    limit: Line | None


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


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One histogram; each bar is its left side in percent, its top and its height in pixels."""

    name: str
    base: int
    bars: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True, kw_only=True)
class ScoreChart(_Chart):
    """Histograms of scores, one above the other, on one axis and one scale of shares."""

    panels: tuple[Panel, ...]
    bar_width: float
    boundary: Line | None


def score_chart(result: FilterResult) -> ScoreChart | None:
    """The scores of held-out clean images above those of the inputs; none where no input has a score."""
    held_out = () if result.boundary is None else result.boundary.held_out_scores
    named = [("clean, held-out", held_out), ("inputs", result.scores)]
    usable = [(name, [score for score in scores if _usable(score)]) for name, scores in named]
    if not usable[1][1]:
        return None
    limit = None if result.boundary is None else _usable_or_none(result.boundary.value)
    axis = _Axis(max([*usable[0][1], *usable[1][1], limit or 0.0]))
    shares = [(f"{name} ({len(scores):,})", _shares(scores, axis.end)) for name, scores in usable if scores]
    tallest = max(share for _, bins in shares for share in bins)
    head = NO_LINES if limit is None else TOP - 18
    return ScoreChart(
        panels=tuple(
            _panel(name, bins, tallest, head + PANEL * (place + 1), axis) for place, (name, bins) in enumerate(shares)
        ),
        bar_width=round((_RIGHT - _LEFT) / _BINS, 2),
        boundary=None if limit is None else Line(x=axis.place(limit), text=f"rejected below {limit:.3g}"),
        ticks=tuple((axis.place(value), f"{value:g}") for value in axis.ticks),
        head=head,
        bottom=head + PANEL * len(shares),
    )


def _shares(scores: Sequence[float], end: float) -> list[float]:
    counts = [0] * _BINS
    for score in scores:
        counts[min(int(score / end * _BINS), _BINS - 1)] += 1
    return [count / len(scores) for count in counts]


def _panel(name: str, shares: Sequence[float], tallest: float, base: int, axis: _Axis) -> Panel:
    heights = [max(share / tallest * _TALLEST, _LOWEST_BAR) if share else 0.0 for share in shares]
    bars = (
        (axis.place(axis.end * place / _BINS), round(base - height, 1), round(height, 1))
        for place, height in enumerate(heights)
        if height
    )
    return Panel(name=name, base=base, bars=tuple(bars))


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
