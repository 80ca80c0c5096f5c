"""What the evaluator makes of scores and decisions: plain functions of arrays, without onnx and torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qdefense.bench.records import Curve, DatasetMetrics, FilterMetrics, Rate
from qdefense.rates import auroc

MOST_CORNERS = 65
TOP_SHARE = 1.5
"""Spectral Signatures removes this many times the number of poisons (Tran et al. 2018, section 4)."""


def roc_curve(positive: ArrayLike, negative: ArrayLike) -> Curve:
    """``(FPR, TPR)`` where a score of at least t is an alarm, for falling t; ends are (0, 0) and (1, 1).

    At most 65 corners are kept, evenly among all. ``positive: (P,)``, ``negative: (N,)``, none empty, no NaN.
    """
    high, low = (np.sort(np.asarray(part, dtype=np.float64)) for part in (positive, negative))
    thresholds = np.unique(np.concatenate([high, low]))[::-1]
    tpr = np.concatenate([[0.0], 1 - np.searchsorted(high, thresholds, side="left") / len(high)])
    fpr = np.concatenate([[0.0], 1 - np.searchsorted(low, thresholds, side="left") / len(low)])
    kept = np.unique(np.linspace(0, len(tpr) - 1, min(len(tpr), MOST_CORNERS)).round().astype(np.int64))
    return Curve(fpr=tuple(map(float, fpr[kept])), tpr=tuple(map(float, tpr[kept])))


def dataset_metrics(
    scores: ArrayLike, flagged: ArrayLike, poisons: ArrayLike, labels: NDArray[np.int64]
) -> DatasetMetrics:
    """Rows of a training set, poisoned against clean.

    Args:
        scores: (N,) higher is more suspicious among rows of one label; NaN of a row that was not measured.
        flagged: row numbers that the defense takes for poison.
        poisons: row numbers that are.
        labels: (N,) the labels that the network was trained on.

    Raises:
        ValueError: there is not one score per row.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != labels.shape:
        raise ValueError(f"{values.shape} scores for {labels.shape} rows; each row needs one")
    measured, alarmed = np.isfinite(values), _mask(flagged, len(values))
    is_poison = _mask(poisons, len(values))
    poisoned, clean = is_poison & measured, ~is_poison & measured
    base = DatasetMetrics(fpr=_rate(alarmed[clean]), unmeasured=int((~measured).sum()))
    if not is_poison.any():
        return base
    targets = np.unique(labels[is_poison])
    mine = clean & np.isin(labels, targets)
    of_label = [(poisoned & (labels == label), clean & (labels == label)) for label in targets]
    top = np.concatenate([_top_rows(values, bad | good, round(TOP_SHARE * int(bad.sum()))) for bad, good in of_label])
    drawn = bool(poisoned.any() and mine.any()) and len(targets) == 1
    update = {
        "auroc": auroc(values[poisoned], values[clean]) if poisoned.any() and clean.any() else None,
        "within_auroc": _auroc_of_pairs([(values[bad], values[good]) for bad, good in of_label]),
        "tpr": _rate(alarmed[poisoned]),
        "within_fpr": _rate(alarmed[mine]),
        "top_recall": Rate(hits=int(is_poison[top].sum()), n=int(poisoned.sum())),
        "top_precision": _rate(is_poison[top]),
        "curve": roc_curve(values[poisoned], values[mine]) if drawn else None,
    }
    return base.model_copy(update=update)


def _auroc_of_pairs(groups: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> float | None:
    """Share of the pairs within groups in which the positive scores higher; ``None`` where no group has both."""
    whole = [(positive, negative) for positive, negative in groups if len(positive) and len(negative)]
    if len(whole) < 2:
        return auroc(*whole[0]) if whole else None
    pairs = [len(positive) * len(negative) for positive, negative in whole]
    return sum(auroc(*group) * count for group, count in zip(whole, pairs, strict=True)) / sum(pairs)


def _top_rows(values: NDArray[np.float64], within: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    rows = np.flatnonzero(within)
    return rows[np.argsort(-values[rows], kind="stable")[:count]]


def filter_metrics(
    clean_scores: NDArray[np.float64],
    clean_rejected: NDArray[np.bool_],
    stamped_scores: NDArray[np.float64],
    stamped_rejected: NDArray[np.bool_],
) -> FilterMetrics:
    """Inputs of a filter, stamped against clean; without stamped ones only the false rejections.

    Scores are lower for the more suspicious input, as the entropy of STRIP is; NaN where there is none, and such
    inputs are counted apart. ``*_rejected`` are booleans, one for each score.
    """
    clean, clean_alarm = _measured(clean_scores, clean_rejected)
    stamped, stamped_alarm = _measured(stamped_scores, stamped_rejected)
    unmeasured = len(clean_scores) + len(stamped_scores) - len(clean) - len(stamped)
    fpr = _rate(clean_alarm)
    if not len(stamped_scores):
        return FilterMetrics(fpr=fpr, unmeasured=unmeasured)
    whole = bool(len(clean) and len(stamped))
    return FilterMetrics(
        auroc=auroc(-stamped, -clean) if whole else None,
        tpr=_rate(stamped_alarm),
        fpr=fpr,
        unmeasured=unmeasured,
        curve=roc_curve(-stamped, -clean) if whole else None,
    )


def _measured(
    scores: NDArray[np.float64], rejected: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    there = np.isfinite(scores)
    return scores[there], rejected[there]


def _mask(rows: ArrayLike, count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=np.bool_)
    mask[np.asarray(rows, dtype=np.int64)] = True
    return mask


def _rate(hits: NDArray[np.bool_]) -> Rate:
    return Rate(hits=int(hits.sum()), n=len(hits))
