"""How the figures of the tables are written: rates with counts and interval, means with their range."""

from __future__ import annotations

from math import floor, isfinite, log10

from qdefense.bench.tables import Difference, Proportion, Spread
from qdefense.profile import Runtime

NOTHING = "n/a"
_MANY = 20
_VERY_MANY = 200


def counted(rate: Proportion | None) -> str:
    """``3/3 [0.44, 1.00]``; of many, the rate as well: ``1,467/1,500 = 0.978 [0.969, 0.984]``.

    Rows and inputs of several networks: ``1,069/1,416 = 0.755 (0.689 to 0.811)``, lowest and highest network.
    """
    if rate is None:
        return NOTHING
    digits = 3 if rate.n > _VERY_MANY else 2
    value = f" = {rate.value:.{digits}f}" if rate.n > _MANY else ""
    low, high = (f"{margin:.{digits}f}" for margin in rate.margins)
    beside = f"[{low}, {high}]" if rate.networks == 1 else f"({low} to {high})"
    return f"{rate.hits:,}/{rate.n:,}{value} {beside}"


def percents(figure: Spread | None) -> str:
    """``97.9 % (97.1 to 98.5)``: mean and range over networks."""
    return NOTHING if figure is None else f"{100 * figure.mean:.1f} %{_range(figure, 100, 1)}"


def decimals(figure: Spread | None, digits: int = 3) -> str:
    """``0.985 (0.971 to 0.998)``: mean and range over networks."""
    return NOTHING if figure is None else f"{figure.mean:.{digits}f}{_range(figure, 1, digits)}"


def _range(figure: Spread, times: float, digits: int) -> str:
    low, high = (f"{times * value:.{digits}f}" for value in (figure.low, figure.high))
    return f" ({low} to {high})" if figure.n > 1 else ""


def single(value: float | None, digits: int = 3) -> str:
    """``0.985``."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def rounded(value: float, sign: str = "") -> str:
    """Three significant digits, more where they stand before the point: ``0.513``, ``64.9``, ``11,430``."""
    if not isfinite(value):
        return NOTHING
    before = floor(log10(abs(value))) + 1 if value else 1
    return f"{value:{sign},.{min(max(3 - before, 0), 9)}f}"


def kilobytes(figure: Spread | None) -> str:
    """Mean size of a file."""
    return NOTHING if figure is None else f"{figure.mean / 1000:,.1f} kB"


def changed(change: Difference | None, *, percent: bool = False) -> str:
    """``-0.3 [-1.1, +0.5]``, in percentage points where that is asked for; without spread, why there is no interval."""
    if change is None:
        return NOTHING
    times, digits, unit = (100, 1, " pp") if percent else (1, 3, "")

    def told(value: float) -> str:
        return f"{times * value + 0.0:+.{digits}f}"

    if change.low is None or change.high is None:
        why = "one network" if change.n == 1 else f"all {change.n} alike"
        return f"{told(change.mean)}{unit} ({why}: no interval)"
    return f"{told(change.mean)}{unit} [{told(change.low)}, {told(change.high)}]"


def told_runtime(runtime: Runtime) -> str:
    """``onnxruntime 1.24.1, Linux x86_64, avx2 fma``."""
    flags = " ".join(runtime.isa) or "no ISA flags known"
    return f"onnxruntime {runtime.onnxruntime}, {runtime.system} {runtime.machine}, {flags}"
