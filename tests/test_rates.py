from __future__ import annotations

from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from qdefense.rates import (
    alarm_rank,
    auroc,
    binomial_tail,
    chance_of,
    conformal_p,
    least_alarm,
    models_needed,
    rounded_up,
    skill,
    told_beside,
    wilson_interval,
)

SCORES = st.lists(st.integers(0, 6).map(float), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("score", "clean", "expected"),
    [
        (2.5, [1, 2, 3], 2 / 4),
        (2.0, [1, 2, 3], 3 / 4),
        (3.0, [3, 3, 3, 1], 4 / 5),
        (9.0, [1, 2, 3], 1 / 4),
        (0.0, [1, 2, 3], 1.0),
        (9.0, list(range(19)), 11 / 20),
        (99.0, list(range(20)), 1 / 21),
    ],
)
def test_conformal_p_counts_clean_scores_at_least_as_high(score: float, clean: list[float], expected: float) -> None:
    assert conformal_p(score, clean) == expected


@pytest.mark.parametrize(
    ("score", "clean", "message"),
    [
        (float("nan"), [1.0], "the score is NaN: it has no p-value"),
        (1.0, [], "clean: expected a row of at least one score, none of them NaN"),
        (1.0, [1.0, float("nan")], "clean: expected a row of at least one score, none of them NaN"),
        (1.0, [[1.0]], "clean: expected a row of at least one score, none of them NaN"),
    ],
)
def test_conformal_p_raises_when_there_is_nothing_to_compare(score: float, clean: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conformal_p(score, clean)


@pytest.mark.parametrize(
    ("rate", "n", "expected"),
    [
        (0.05, 18, 0), (0.05, 19, 1), (0.05, 20, 1), (0.05, 38, 1), (0.05, 39, 2),
        (0.1, 8, 0), (0.1, 9, 1), (0.1, 19, 2), (0.1, 20, 2), (0.1, 29, 3),
        (0.29, 99, 29), (0.57, 99, 57), (0.5, 0, 0), (0.999, 3, 3),
    ],
)  # fmt: skip
def test_alarm_rank_is_exact_in_decimals(rate: float, n: int, expected: int) -> None:
    """0.29 * 100 is 28.999999999999996 in floating point, and 0.57 * 100 is 56.99999999999999."""
    assert alarm_rank(rate, n) == expected


@pytest.mark.parametrize(("rate", "expected"), [(0.05, 19), (0.1, 9), (0.01, 99), (0.03, 33), (0.3, 3), (0.5, 1)])
def test_models_needed_is_the_smallest_number_with_a_rank(rate: float, expected: int) -> None:
    assert models_needed(rate) == expected
    assert (alarm_rank(rate, expected), alarm_rank(rate, expected - 1)) == (1, 0)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_alarm_rank_raises_when_the_rate_is_none(rate: float) -> None:
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        alarm_rank(rate, 20)
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        models_needed(rate)


def test_alarm_rank_raises_when_n_is_negative() -> None:
    with pytest.raises(ValueError, match="n is -1: a number of models is not negative"):
        alarm_rank(0.05, -1)


@given(SCORES, st.integers(-1, 7).map(float), st.integers(1, 99))
def test_score_is_above_the_ranked_one_exactly_when_its_p_value_is_at_most_the_rate(
    clean: list[float], score: float, percent: int
) -> None:
    rank = alarm_rank(percent / 100, len(clean))
    alarm = rank > 0 and score > sorted(clean, reverse=True)[rank - 1]
    hits = round(conformal_p(score, clean) * (len(clean) + 1))
    assert alarm == (hits * 100 <= percent * (len(clean) + 1))


@given(SCORES, st.integers(1, 99))
def test_clean_models_alarm_at_most_at_the_promised_rate_when_each_is_judged_by_the_others(
    scores: list[float], percent: int
) -> None:
    """Exchangeability, counted: whichever of the n + 1 comes last, at most k of them lie above the others' line."""
    alarms = 0
    for index, score in enumerate(scores):
        others = scores[:index] + scores[index + 1 :]
        rank = alarm_rank(percent / 100, len(others))
        alarms += rank > 0 and score > sorted(others, reverse=True)[rank - 1]
    assert alarms * 100 <= percent * len(scores)


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(1 / 21, "0.048"), (1 / 23, "0.044"), (0.05, "0.05"), (1.0, "1.0"), (1 / 2001, "0.00050"), (2 / 21, "0.096")],
)
def test_rounded_up_is_never_less_than_the_rate(rate: float, expected: str) -> None:
    assert rounded_up(rate) == expected
    assert float(expected) >= rate


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [(0, 20, 0.0, 0.16113), (20, 20, 0.83887, 1.0), (5, 10, 0.23659, 0.76341), (1, 10, 0.01788, 0.40415)],
)
def test_wilson_interval_gives_the_published_bounds(hits: int, n: int, low: float, high: float) -> None:
    assert wilson_interval(hits, n) == (pytest.approx(low, abs=1e-5), pytest.approx(high, abs=1e-5))


def test_wilson_interval_is_narrower_when_less_confidence_is_asked() -> None:
    low, high = wilson_interval(5, 10, confidence=0.5)
    assert (low, high) == (pytest.approx(0.39570, abs=1e-5), pytest.approx(0.60430, abs=1e-5))


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (-1, 3), (4, 3)])
def test_wilson_interval_raises_when_there_is_no_proportion(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match=f"{hits} of {n} is no proportion"):
        wilson_interval(hits, n)


def test_auroc_counts_pairs_and_half_of_ties() -> None:
    # pairs: 3>1, 3>2, 3=3, 2>1, 2=2, 2<3 -> 3 wins and 2 ties of 6
    assert auroc([3.0, 2.0], [1.0, 2.0, 3.0]) == pytest.approx(4 / 6)
    assert auroc([2.0], [1.0]) == 1
    assert auroc([1.0], [2.0]) == 0


@given(SCORES, SCORES)
def test_auroc_equals_sklearns(positive: list[float], negative: list[float]) -> None:
    labels = [1] * len(positive) + [0] * len(negative)
    assert auroc(positive, negative) == pytest.approx(roc_auc_score(labels, positive + negative))


def test_auroc_takes_infinite_scores() -> None:
    assert auroc(np.array([np.inf]), np.array([1.0, np.inf])) == 0.75


@pytest.mark.parametrize(("positive", "negative", "name"), [([], [1.0], "positive"), ([1.0], [np.nan], "negative")])
def test_auroc_raises_when_a_side_is_empty_or_nan(positive: list[float], negative: list[float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a row of at least one score"):
        auroc(positive, negative)


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (2.5, "2.50"),
        (2.003, "2.003"),
        (1.997, "1.997"),
        (2.0, "2.00"),
        (1.99500001, "1.995"),
        (2.0000004, "2.0000004"),
        (float("inf"), "inf"),
    ],
)
def test_a_figure_is_told_on_its_side_of_the_limit(value: float, told: str) -> None:
    assert told_beside(value, 2) == told


def test_skill_runs_from_guessing_to_perfect() -> None:
    assert [skill(accuracy, 1 / 4) for accuracy in (0.25, 0.4375, 1.0, 0.0)] == [0.0, 0.25, 1.0, -1 / 3]
    assert skill(1.0, 1.0) == 0.0


def test_chance_is_what_the_commonest_label_alone_gives() -> None:
    assert chance_of(4) == chance_of(4, []) == 0.25
    assert chance_of(4, [0, 1, 2, 3]) == 0.25
    assert chance_of(4, [2, 2, 2, 3]) == 0.75
    assert chance_of(2, [1, 1]) == 1.0


@pytest.mark.parametrize(
    ("hits", "n", "rate", "expected"),
    [
        (0, 5, 0.3, 1.0),
        (0, 0, 0.3, 1.0),
        (1, 1, 0.3, 0.3),
        (1, 2, 0.5, 0.75),
        (2, 2, 0.01, 1e-4),
        (3, 4, 0.5, 5 / 16),
        (8, 10, 0.5, 56 / 1024),
        (100, 100, 0.1, 1e-100),
    ],
)
def test_binomial_tail_equals_the_hand_computed(hits: int, n: int, rate: float, expected: float) -> None:
    assert binomial_tail(hits, n, rate) == pytest.approx(expected, rel=1e-12)


@given(st.integers(0, 40), st.integers(1, 40), st.fractions(0, 1).filter(lambda rate: 1e-6 < rate < 1 - 1e-6))
def test_binomial_tail_equals_the_exact_sum(hits: int, n: int, rate: Fraction) -> None:
    hits = min(hits, n)
    exact = sum(comb(n, i) * rate**i * (1 - rate) ** (n - i) for i in range(hits, n + 1))
    assert binomial_tail(hits, n, float(rate)) == pytest.approx(float(exact), rel=1e-9)


def test_binomial_tail_of_what_always_happens_is_1() -> None:
    assert [binomial_tail(hits, 3, 1.0) for hits in range(4)] == [1.0] * 4


@pytest.mark.parametrize(
    ("n", "rate", "least"),
    [(20, 0.05, 5), (2, 0.05, 2), (1, 0.05, None), (0, 0.05, None), (1000, 0.01, 19), (5, 1.0, None)],
)
def test_least_alarm_is_the_first_count_that_chance_does_not_explain(n: int, rate: float, least: int | None) -> None:
    """Of 20 at .05: P(X >= 5) = .0026, P(X >= 4) = .0159."""
    assert least_alarm(n, rate, 0.01) == least
    if least is not None:
        assert binomial_tail(least, n, rate) <= 0.01 < binomial_tail(least - 1, n, rate)


def test_binomial_tail_holds_where_its_coefficients_are_larger_than_any_float() -> None:
    assert binomial_tail(5000, 10_000, 0.5) == pytest.approx(0.5, abs=0.005)
    assert binomial_tail(1, 10**5, 1e-9) == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("hits", "n", "rate", "message"),
    [
        (-1, 3, 0.5, "-1 of 3 is no proportion"),
        (4, 3, 0.5, "4 of 3 is no proportion"),
        (1, 3, 0.0, "rate is 0.0: expected a number between 0 and 1"),
        (1, 3, 1.5, "rate is 1.5: expected a number between 0 and 1"),
        (0, 3, float("nan"), "rate is nan: expected a number between 0 and 1"),
    ],
)
def test_binomial_tail_raises_when_there_is_no_such_count_or_rate(hits: int, n: int, rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        binomial_tail(hits, n, rate)
