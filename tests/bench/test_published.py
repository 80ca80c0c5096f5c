from __future__ import annotations

import numpy as np
import pytest

from qdefense.bench.cohort import Cohort
from qdefense.bench.published import largest_own_fraction, norms_of, published_neural_cleanse, published_rows
from qdefense.bench.records import FilterMetrics, Rate
from qdefense.findings import Verdict

from ..report import sample_reports as reports  # noqa: TID252 (the made-up findings are there)
from .sample_records import behaviour, defense, network, scan_metrics


def test_published_rule_fires_on_the_figures_of_its_own_log() -> None:
    """papers.md, P1-LOG: median 231.448, MAD 9.161; class 0 with 172.037 has an index of 4.37."""
    printed = [172.037, 226.078, 199.892, 222.288, 247.572, 238.049, 228.816, 237.597, 237.019, 216.597, 248.505]
    assert published_neural_cleanse([*printed, 240.498])


def test_published_rule_calls_equal_norms_not_detected() -> None:
    """What missing gradients leave: the norm of every class is the same, and its MAD is 0."""
    assert not published_neural_cleanse([27.903867721557617] * 43)


def test_published_rule_looks_below_the_median_only() -> None:
    # Median 10, absolute deviations 0, 0.1, 0.1, 0.2, 90: MAD 0.1, scaled 0.148.
    assert not published_neural_cleanse([9.9, 10.0, 10.1, 9.8, 100.0])
    assert published_neural_cleanse([9.9, 10.0, 10.1, 9.6, 10.2])


def test_published_rule_has_nothing_to_detect_without_norms() -> None:
    assert not published_neural_cleanse([])


def test_published_rule_refuses_nan() -> None:
    with pytest.raises(ValueError, match="not finite"):
        published_neural_cleanse([1.0, float("nan")])


@pytest.mark.parametrize("n", [*range(2, 60), 500, 640, 10_000])
def test_own_fraction_bounds_every_sample(n: int) -> None:
    rng = np.random.default_rng(n)
    for values in (rng.normal(size=n), rng.integers(0, 3, n).astype(float), np.arange(n, dtype=float)):
        assert np.mean(values < np.percentile(values, 5)) <= largest_own_fraction(n) + 1e-12
        assert np.mean(values > np.percentile(values, 95)) <= largest_own_fraction(n) + 1e-12
    distinct = np.arange(n, dtype=float)
    assert np.mean(distinct < np.percentile(distinct, 5)) == pytest.approx(largest_own_fraction(n))


def test_own_fraction_never_passes_a_tenth_from_ten_values_on() -> None:
    assert all(largest_own_fraction(n) <= 0.1 for n in range(10, 5000))
    assert all(largest_own_fraction(n) > 0.1 for n in range(2, 10))


def scan(norms: list[float | None], verdict: Verdict = Verdict.CLEAN, seed: int = 0) -> object:
    finding = reports.scan(verdict, reports.scan_result(norms))
    return defense(network("badnets", seed), metrics=scan_metrics(1.0), verdict=verdict, finding=finding)


def test_norms_are_of_every_class_or_unknown() -> None:
    assert norms_of(scan([5.0, 80.0])) == [5.0, 80.0]  # type: ignore[arg-type]
    assert norms_of(scan([5.0, 80.0, None])) is None  # type: ignore[arg-type]
    assert norms_of(defense(network(), metrics=scan_metrics(1.0))) == []


def test_published_row_tells_the_norms_from_what_the_criterion_alone_decides() -> None:
    low = [5.0, 90.0, 95.0, 100.0, 105.0]
    answered = scan(low, Verdict.BACKDOORED)
    blind = [
        defense(network("badnets", seed), verdict=Verdict.NOT_MEASURED, access="no-gradients") for seed in range(2)
    ]
    session, cut = published_rows(Cohort([answered, *blind]))  # type: ignore[list-item]
    assert (session.detected, session.alarms, session.decided_by) == (1, 1, "the norms")
    assert (cut.files, cut.detected, cut.counted_as_missed) == (2, 0, 2)
    assert cut.decided_by == "the criterion alone"


def test_published_rule_is_unknown_where_a_norm_was_censored() -> None:
    """The published code censors none: with the one that is not in the records the rule may say otherwise."""
    whole, censored = [5.0, 90.0, 95.0, 100.0, 105.0], [5.0, 90.0, 95.0, 100.0, 105.0, None]
    (alone,) = published_rows(Cohort([scan(censored, Verdict.NOT_MEASURED)]))  # type: ignore[list-item]
    assert (alone.detected, alone.unknown, alone.counted_as_missed) == (None, 1, 0)
    assert alone.decided_by == "not in the records"
    (row,) = published_rows(Cohort([scan(whole), scan(censored, seed=1)]))  # type: ignore[list-item]
    assert (row.files, row.detected, row.unknown, row.decided_by) == (2, 1, 1, "the norms")


def test_published_row_in_part_decided_by_the_criterion() -> None:
    crashed = defense(network("badnets", 1), verdict=Verdict.NOT_MEASURED, failed=True)
    (row,) = published_rows(Cohort([scan([5.0, 90.0, 95.0, 100.0, 105.0]), crashed]))  # type: ignore[list-item]
    assert (row.detected, row.counted_as_missed) == (1, 1)
    assert row.decided_by == "the criterion alone, in part"


def test_published_rule_judges_norms_whatever_was_made_of_them_here() -> None:
    """A scan whose norms scatter is not measured here, and has them all: nothing is missed for want of an answer."""
    (row,) = published_rows(Cohort([scan([70.0, 90.0, 95.0, 120.0, 150.0], Verdict.NOT_MEASURED)]))  # type: ignore[list-item]
    assert (row.answers.not_measured, row.detected, row.counted_as_missed, row.decided_by) == (1, 0, 0, "the norms")


@pytest.mark.parametrize(
    ("n", "detected", "decider"), [(1000, 0, "the criterion alone"), (5, None, "not in the records")]
)
def test_published_strip_cannot_fire_where_the_proof_holds(n: int, detected: int | None, decider: str) -> None:
    metrics = FilterMetrics(auroc=1.0, fpr=Rate(hits=0, n=n))
    trial = defense(network(), metrics=metrics, name="strip", kind="filter", verdict=None)
    (row,) = published_rows(Cohort([behaviour(network()), trial]))
    assert (row.detected, row.decided_by, row.judges) == (detected, decider, False)


@pytest.mark.parametrize("name", ["spectral-signatures", "activation-clustering", "fine-pruning"])
def test_published_rule_is_unknown_where_records_do_not_hold_what_it_needs(name: str) -> None:
    metrics = FilterMetrics(fpr=Rate(hits=0, n=100))
    (row,) = published_rows(Cohort([defense(network(), metrics=metrics, name=name, kind="filter", verdict=None)]))
    assert (row.detected, row.decided_by) == (None, "not in the records")


def test_other_defenses_are_not_in_the_table() -> None:
    assert published_rows(Cohort([defense(network(), metrics=scan_metrics(1.0), name="another")])) == ()
