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
        scores: (N,) finite, higher is more suspicious.
        flagged: row numbers that the defense takes for poison.
        poisons: row numbers that are.
        labels: (N,) the labels that the network was trained on.

    Raises:
        ValueError: there is not one finite score per row.
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.shape != labels.shape or not np.isfinite(values).all():
        raise ValueError(f"{values.shape} scores for {labels.shape} rows, or some not finite; each row needs one")
    poisoned, alarmed = _mask(poisons, len(values)), _mask(flagged, len(values))
    fpr = _rate(alarmed[~poisoned])
    if not poisoned.any():
        return DatasetMetrics(fpr=fpr)
    within = np.isin(labels, labels[poisoned])
    clean_within = within & ~poisoned
    top = _top_rows(values, within, round(TOP_SHARE * int(poisoned.sum())))
    return DatasetMetrics(
        auroc=auroc(values[poisoned], values[~poisoned]),
        within_auroc=auroc(values[poisoned], values[clean_within]) if clean_within.any() else None,
        tpr=_rate(alarmed[poisoned]),
        fpr=fpr,
        within_fpr=_rate(alarmed[clean_within]),
        top_recall=Rate(hits=int(poisoned[top].sum()), n=int(poisoned.sum())),
        top_precision=_rate(poisoned[top]),
        curve=roc_curve(values[poisoned], values[~poisoned]),
    )


def _top_rows(values: NDArray[np.float64], within: NDArray[np.bool_], count: int) -> NDArray[np.int64]:
    rows = np.flatnonzero(within)
    return rows[np.argsort(-values[rows], kind="stable")[:count]]


def filter_metrics(
    clean_scores: Sequence[float | None],
    clean_rejected: ArrayLike,
    stamped_scores: Sequence[float | None],
    stamped_rejected: ArrayLike,
) -> FilterMetrics:
    """Inputs of a filter, stamped against clean; without stamped ones only the false rejections.

    Scores are lower for the more suspicious input, as the entropy of STRIP is; ``None`` where there is none, and such
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


def _measured(scores: Sequence[float | None], rejected: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    values = np.array([np.nan if score is None else score for score in scores], dtype=np.float64)
    there = np.isfinite(values)
    return values[there], np.asarray(rejected, dtype=np.bool_)[there]


def _mask(rows: ArrayLike, count: int) -> NDArray[np.bool_]:
    mask = np.zeros(count, dtype=np.bool_)
    mask[np.asarray(rows, dtype=np.int64)] = True
    return mask


def _rate(hits: NDArray[np.bool_]) -> Rate:
    return Rate(hits=int(hits.sum()), n=len(hits))
