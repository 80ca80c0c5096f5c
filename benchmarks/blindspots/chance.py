"""What chance alone would give: the tables of RESULTS.md that the findings lean on, and their p-values.

    python benchmarks/blindspots/chance.py

Of every difference between a defense's figure on quantized files and on the FP32 files they were made of, with three
networks or more: those whose interval excludes 0, by p, and Holm's correction for looking at all of them. Then, of each
architecture and precision, Neural Cleanse's alarms on active files against those on clean ones, by Fisher's exact test:
of those that it has an answer for, and of all, where a file without an answer raises no alarm.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from qdefense.bench.cohort import Cohort
from qdefense.bench.contrasts import ContrastRow
from qdefense.bench.records import BehaviourRecord, DefenseRecord, Record, digest_of
from qdefense.bench.summary import BenchReport, read_results, summarise
from qdefense.bench.tables import Difference, Proportion, ScanRow

HERE = Path(__file__).parent
LEAST_NETWORKS, LEVEL = 3, 0.05
ASKED = {
    *("network", "precision", "calibration", "artifact_sha256", "arithmetic", "data_sha256"),
    *("defense", "settings", "access", "revision", "evaluation_revision"),
}
"""Fields of a record that are the same of the same trial on two CPUs."""


def p_value(difference: Difference) -> float:
    """Two-sided, of Student's t that the 95 % interval was made with."""
    assert difference.high is not None
    degrees = difference.n - 1
    error = (difference.high - difference.mean) / stats.t.ppf(1 - LEVEL / 2, degrees)
    return float(2 * stats.t.sf(abs(difference.mean) / error, degrees))


def holm(p_values: ArrayLike) -> NDArray[np.float64]:
    """Holm's step-down: the i-th smallest of m (i from 0) times m - i, never below one before it, at most 1."""
    found = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(found, kind="stable")
    adjusted = np.empty_like(found)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(found[order] * np.arange(len(found), 0, -1)))
    return adjusted


def compared(report: BenchReport) -> list[tuple[ContrastRow, Difference]]:
    """A defense's figures on the deployed session with an interval around their difference."""
    rows = [(row, row.difference) for row in report.contrasts if row.defense and row.access == "session"]
    return [
        (row, found) for row, found in rows if found is not None and found.n >= LEAST_NETWORKS and found.low is not None
    ]


def difference_lines(report: BenchReport) -> Iterator[str]:
    """The table of differences, the surest first."""
    rows = compared(report)
    chances = np.array([p_value(found) for _, found in rows])
    adjusted = holm(chances)
    apart = [number for number in np.argsort(chances) if chances[number] < LEVEL]
    yield f"{len(rows)} differences with an interval; {len(apart)} exclude 0, {LEVEL * len(rows):.1f} would by chance."
    yield ""
    yield "| defense | files | figure | FP32 | difference | p | Holm |"
    yield "| --- | --- | --- | ---: | ---: | ---: | ---: |"
    for number in apart:
        row, found = rows[number]
        place = f"{row.setting.data}, {row.setting.attack}, {row.setting.precision}"
        base = "" if row.fp32 is None else f"{row.fp32.mean:.4f}"
        moved = f"{found.mean:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        told = (row.defense, place, row.figure, base, moved, f"{chances[number]:.3f}", f"{adjusted[number]:.2f}")
        yield f"| {' | '.join(map(str, told))} |"


def alarm_lines(report: BenchReport) -> Iterator[str]:
    """Alarms on active files, and on clean ones, of every data set and attack together."""
    rows = [row for row in report.scans if row.defense == "neural-cleanse" and row.access == "session"]
    main = [row for row in rows if not row.setting.calibration or row.setting.calibration.startswith("clean256")]
    yield "| Neural Cleanse on | alarms on active files | on clean ones | Fisher's p | of all | on clean ones | p |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    for place in dict.fromkeys((row.setting.architecture, row.setting.precision) for row in main):
        mine = [row for row in main if (row.setting.architecture, row.setting.precision) == place]
        controls = [row for row in mine if row.setting.attack == "none"]
        attacked = [row for row in mine if row.setting.attack != "none"]
        active, clean = total(row.tpr for row in attacked), total(row.fpr for row in controls)
        everything = (active[0], trials(attacked)), (clean[0], trials(controls))
        told = (", ".join(place), *fisher(active, clean), *fisher(*everything))
        yield f"| {' | '.join(told)} |"


def fisher(active: tuple[int, int], clean: tuple[int, int]) -> tuple[str, str, str]:
    """Both counts as they are told, and the p-value that the shares are one."""
    table = [[hits, n - hits] for hits, n in (active, clean)]
    chance = stats.fisher_exact(table, alternative="two-sided").pvalue
    first, second = (f"{hits} of {n}" for hits, n in (active, clean))
    return first, second, f"{chance:.3f}"


def trials(rows: Iterable[ScanRow]) -> int:
    """Of active files, or of clean ones; with an answer and without."""
    return sum(sum(row.answers.model_dump().values()) for row in rows)


def total(shares: Iterable[Proportion | None]) -> tuple[int, int]:
    """Hits and trials of all that are there."""
    known = [share for share in shares if share is not None]
    return sum(share.hits for share in known), sum(share.n for share in known)


def first_answers(records: Iterable[Record]) -> Iterator[Record]:
    """Without what was measured again on another CPU (`bench --here`): one network is one trial, not two."""
    seen: set[str] = set()
    for record in records:
        if isinstance(record, BehaviourRecord | DefenseRecord):
            asked = digest_of(**record.model_dump(mode="json", include=ASKED))
            if asked in seen:
                continue
            seen.add(asked)
        yield record


def main() -> None:
    found = read_results(HERE / "results")
    report = summarise(found, Cohort(tuple(first_answers(found.records))))
    print("\n".join([*difference_lines(report), "", *alarm_lines(report)]))


if __name__ == "__main__":
    main()
