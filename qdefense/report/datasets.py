"""What table and page say of a dataset scan's result; nothing here is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping

from qdefense.data.images import first_few
from qdefense.findings import DatasetClass, DatasetResult

ROWS_SHOWN = 20
_NAMES = {
    "exre": "ExRe l / p",
    "reclassified_other": "to another class",
    "reclassified_own": "to its own class",
    "relative_size": "smaller cluster",
    "silhouette": "silhouette",
    "top_variance": "top variance",
    "top_variance_share": "of all variance",
}
_SHARES = frozenset({"relative_size", "top_variance_share"})


def ranked_classes(result: DatasetResult) -> list[DatasetClass]:
    """Suspicious labels, then the others with images, the highest score first; those without a score last."""
    present = [entry for entry in result.classes if entry.n]
    return sorted(present, key=lambda entry: (not entry.suspicious, math.inf if entry.score is None else -entry.score))


def describe_flagged(result: DatasetResult) -> str:
    """How many training images are flagged, and the first of them.

    Where labels that are not suspicious have some, they are what the method takes away from clean data as well.
    """
    total, rows = len(result.sample_scores), result.flagged
    if not rows:
        return f"no row of {total:,} training images is flagged"
    suspected = all(entry.suspicious for entry in result.classes if entry.flagged)
    kind = "flagged" if suspected else "ranked highest of their class, which by itself says nothing of poison"
    return f"{len(rows):,} of {total:,} training images {kind}: rows {first_few([*map(str, rows)], ROWS_SHOWN)}"


def describe_statistics(statistics: Mapping[str, float]) -> str:
    """The figures behind a score, in words."""
    return ", ".join(
        f"{_NAMES.get(name, name)} {value:{'.0%' if name in _SHARES else '.4g'}}" for name, value in statistics.items()
    )
