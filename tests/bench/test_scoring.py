"""Metrics on hand-computed cases."""

from __future__ import annotations

import numpy as np
import pytest

from qdefense.bench.records import FilterMetrics, Rate
from qdefense.bench.scoring import MOST_CORNERS, dataset_metrics, filter_metrics, roc_curve


def test_roc_by_hand() -> None:
    """Falling thresholds 4, 3, 2, 1 over positives {4, 2} and negatives {3, 1}."""
    curve = roc_curve([4, 2], [3, 1])
    assert curve.fpr == (0, 0, 0.5, 0.5, 1)
    assert curve.tpr == (0, 0.5, 0.5, 1, 1)


def test_ties_are_one_corner() -> None:
    curve = roc_curve([1, 1], [1, 0])
    assert (curve.fpr, curve.tpr) == ((0, 0.5, 1), (0, 1, 1))


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    rng = np.random.default_rng(0)
    curve = roc_curve(rng.normal(1, 1, 500), rng.normal(0, 1, 500))
    assert len(curve.fpr) == len(curve.tpr) == MOST_CORNERS
    assert (curve.fpr[0], curve.tpr[0], curve.fpr[-1], curve.tpr[-1]) == (0, 0, 1, 1)
    assert list(curve.fpr) == sorted(curve.fpr)


def test_dataset_metrics_by_hand() -> None:
    """Rows 0 and 1 are poison with label 1; clean rows of label 1 are 2 and 3; 4 and 5 are of label 0.

    The top round(1.5 * 2) = 3 rows of label 1 are 0, 2 and 1.
    """
    labels = np.array([1, 1, 1, 1, 0, 0])
    scores = [9.0, 3.0, 5.0, 1.0, 7.0, 0.0]
    found = dataset_metrics(scores, flagged=[0, 2, 4], poisons=[0, 1], labels=labels)
    assert found.auroc == (4 + 2) / 8  # 9 beats all four; 3 beats 1 and 0
    assert found.within_auroc == (2 + 1) / 4
    assert (found.tpr, found.fpr, found.within_fpr) == (Rate(hits=1, n=2), Rate(hits=2, n=4), Rate(hits=1, n=2))
    assert (found.top_recall, found.top_precision) == (Rate(hits=2, n=2), Rate(hits=2, n=3))


def test_rows_are_compared_within_their_label_when_poisons_have_several() -> None:
    """Label 1: poison 5 against clean 4, 6. Label 0: poison 3 against clean 2. Scores of 0 and 1 are never compared.

    The top round(1.5 * 1) = 2 rows of each label are {6, 5} and {3, 2}.
    """
    labels = np.array([1, 1, 1, 0, 0])
    found = dataset_metrics([5.0, 4.0, 6.0, 3.0, 2.0], flagged=[], poisons=[0, 3], labels=labels)
    assert found.within_auroc == (1 + 1) / 3
    assert found.auroc == (2 + 1) / 6
    assert (found.top_recall, found.top_precision) == (Rate(hits=2, n=2), Rate(hits=2, n=4))
    assert found.curve is None


def test_of_a_clean_set_only_false_alarms_are_known() -> None:
    found = dataset_metrics([1.0, 2.0], flagged=[1], poisons=[], labels=np.array([0, 1]))
    assert found.fpr == Rate(hits=1, n=2)
    assert (found.auroc, found.tpr, found.top_recall, found.curve) == (None, None, None, None)


def test_a_label_that_only_poisons_have_has_no_auroc_within() -> None:
    found = dataset_metrics([1.0, 2.0], flagged=[], poisons=[1], labels=np.array([0, 1]))
    assert (found.within_auroc, found.within_fpr) == (None, Rate(hits=0, n=0))
    assert found.within_fpr is not None
    assert found.within_fpr.value is None


def test_each_row_needs_a_score() -> None:
    with pytest.raises(ValueError, match="each row needs one"):
        dataset_metrics([1.0], flagged=[], poisons=[0], labels=np.array([0, 1]))


def test_rows_of_a_class_that_was_not_measured_are_in_no_rate() -> None:
    """Row 1 is poison without a score, row 4 clean without one."""
    labels = np.array([1, 1, 1, 0, 0])
    found = dataset_metrics([3.0, np.nan, 1.0, 9.0, np.nan], flagged=[0], poisons=[0, 1], labels=labels)
    assert (found.auroc, found.within_auroc, found.unmeasured) == (0.5, 1.0, 2)
    assert (found.tpr, found.fpr) == (Rate(hits=1, n=1), Rate(hits=0, n=2))
    assert found.top_recall == Rate(hits=1, n=1)


def test_poisons_none_of_which_was_measured_give_no_rate() -> None:
    found = dataset_metrics([np.nan, 1.0], flagged=[], poisons=[0], labels=np.array([1, 0]))
    assert (found.auroc, found.within_auroc, found.curve, found.unmeasured) == (None, None, None, 1)
    assert (found.tpr, found.top_recall) == (Rate(hits=0, n=0), Rate(hits=0, n=0))


def metrics_of(clean: list[float], rejected: list[bool], stamped: list[float], caught: list[bool]) -> FilterMetrics:
    return filter_metrics(np.array(clean), np.array(rejected, np.bool_), np.array(stamped), np.array(caught, np.bool_))


def test_filter_metrics_by_hand() -> None:
    """A low score is suspicious: 0.1 is below both clean ones, 0.6 is between; an input without a score is no hit."""
    found = metrics_of([0.5, 0.9], [True, False], [0.1, 0.6, np.nan], [True, False, False])
    assert found.auroc == (2 + 1) / 4
    assert (found.tpr, found.fpr, found.unmeasured) == (Rate(hits=1, n=2), Rate(hits=1, n=2), 1)


def test_filter_metrics_of_a_clean_network() -> None:
    found = metrics_of([0.5, 0.9], [True, False], [], [])
    assert (found.auroc, found.tpr, found.fpr) == (None, None, Rate(hits=1, n=2))


def test_no_score_at_all_is_no_auroc() -> None:
    found = metrics_of([np.nan, np.nan], [False, False], [np.nan], [False])
    assert (found.auroc, found.tpr, found.fpr, found.unmeasured) == (None, Rate(hits=0, n=0), Rate(hits=0, n=0), 3)
