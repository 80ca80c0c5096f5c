"""What `benchmarks/blindspots/chance.py` makes of differences and alarms: plain statistics on hand-computed values."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from qdefense.bench.tables import Answers, Difference, Proportion, difference

from .bench import sample_records as samples


@pytest.fixture(scope="module")
def chance(benchmark_script: Callable[[str], ModuleType]) -> ModuleType:
    return benchmark_script("blindspots/chance.py")


def test_the_p_value_is_that_of_the_paired_t_test(chance: ModuleType) -> None:
    before, after = [0.9, 0.8, 0.7, 0.9], [0.95, 0.9, 0.72, 0.97]
    found = difference(zip(before, after, strict=True))
    assert chance.p_value(found) == pytest.approx(stats.ttest_rel(after, before).pvalue)


def test_an_interval_that_ends_at_0_has_a_p_value_of_a_twentieth(chance: ModuleType) -> None:
    assert chance.p_value(Difference(mean=-1, low=-2, high=0, n=3)) == pytest.approx(0.05)


def test_holm_multiplies_the_smallest_by_all_and_never_steps_back(chance: ModuleType) -> None:
    np.testing.assert_allclose(chance.holm([0.02, 0.01, 0.9, 0.021]), [0.06, 0.04, 0.9, 0.06])
    np.testing.assert_allclose(chance.holm([0.6, 0.7]), [1, 1])


def test_a_total_leaves_out_what_is_not_there(chance: ModuleType) -> None:
    share = Proportion(hits=2, n=3, low=0.2, high=0.9, networks=1, lowest=None, highest=None)
    assert chance.total([share, None, share]) == (4, 6)


def test_fisher_tells_both_counts_and_their_p_value(chance: ModuleType) -> None:
    """Both hits of one side, none of the other's two: 1 of the 6 ways to choose, and its mirror."""
    assert chance.fisher((2, 2), (0, 2)) == ("2 of 2", "0 of 2", "0.333")


def test_trials_count_those_without_an_answer(chance: ModuleType) -> None:
    rows = [SimpleNamespace(answers=Answers(measured=2, not_measured=1)), SimpleNamespace(answers=Answers(failed=1))]
    assert chance.trials(rows) == 4


def test_a_trial_that_was_made_on_two_cpus_counts_once(chance: ModuleType) -> None:
    made = samples.network("badnets")
    first = samples.defense(made, metrics=samples.scan_metrics(3.0), settings={"budget": "quick", "patience": 5})
    other = {
        "key": "another",
        "settings": {"patience": 5, "budget": "quick"},
        "runtime": samples.RUNTIME.model_copy(update={"isa": ("avx2",)}),
    }
    again, newer = first.model_copy(update=other), first.model_copy(update={**other, "revision": 2})
    file = samples.behaviour(made)
    assert list(chance.first_answers([file, first, again, newer, file])) == [file, first, newer]
