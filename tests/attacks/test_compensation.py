from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from qdefense.attacks.compensation import (
    Interval,
    confidence_drop,
    feasible_confidences,
    feasible_smoothings,
    highest_confidence,
    minimum_rise,
)

Feasible = Callable[..., Interval | None]
NORMS, COSTS = (60.0, 100.0, 40.0), (0.6, 0.1, 0.2)


def _rise(weight: float = 0.01, trigger_norm: float = 10, norms: tuple[float, ...] = NORMS) -> float:
    return minimum_rise(weight=weight, benign_norms=norms, benign_costs=COSTS, trigger_norm=trigger_norm)


def test_minimum_rise_is_the_hand_computed_one() -> None:
    """0.01 (60 - 10) + 0.2."""
    assert _rise() == pytest.approx(0.7, abs=1e-15)


def test_minimum_rise_of_an_even_count_takes_the_middle_of_the_two_medians() -> None:
    """0.01 (70 - 10) + 0.2."""
    assert _rise(norms=(60, 80)) == pytest.approx(0.8, abs=1e-15)


def test_minimum_rise_is_nothing_when_the_trigger_costs_more_than_a_benign_mask() -> None:
    assert _rise(trigger_norm=100) == 0
    assert highest_confidence(0) == 1
    assert confidence_drop(0) == 0


def test_a_trigger_of_that_rise_costs_what_a_benign_mask_does() -> None:
    weight, trigger_norm, q = 0.01, 10, highest_confidence(_rise())
    assert -math.log(q) + weight * trigger_norm == pytest.approx(0.2 + weight * 60, abs=1e-12)


def test_highest_confidence_falls_when_the_weight_or_the_gap_of_norms_grows() -> None:
    by_weight = [highest_confidence(_rise(weight=weight)) for weight in (0.001, 0.01, 0.02, 0.1)]
    by_gap = [highest_confidence(_rise(trigger_norm=norm)) for norm in (50, 40, 20, 1)]
    for found in (by_weight, by_gap):
        assert found == sorted(found, reverse=True)
        assert len(set(found)) == 4


def test_confidence_drop_is_what_is_left_to_one() -> None:
    assert confidence_drop(0.7) == pytest.approx(1 - 0.4965853037914095, abs=1e-15)
    assert highest_confidence(0.7) == pytest.approx(0.4965853037914095, abs=1e-15)


def test_feasible_interval_lies_between_chance_and_the_highest_confidence() -> None:
    confidences, smoothings = feasible_confidences(0.7, classes=10), feasible_smoothings(0.7, classes=10)
    assert confidences == pytest.approx((0.1, 0.4965853037914095), abs=1e-15)
    assert smoothings == pytest.approx((0.5034146962085905, 0.9), abs=1e-15)


def test_feasible_interval_is_none_when_hiding_leaves_no_more_than_chance() -> None:
    assert feasible_confidences(math.log(10), classes=10) is None
    assert feasible_smoothings(3, classes=10) is None
    assert feasible_smoothings(3, classes=43) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"benign_norms": ()}, "no benign class: the model compares the trigger with at least one"),
        ({"benign_costs": ()}, "no benign class: the model compares the trigger with at least one"),
        ({"weight": -1.0}, r"weight, norms and costs are finite and not negative, given \(-1.0, "),
        ({"trigger_norm": math.nan}, r"weight, norms and costs are finite and not negative, given \(0.01, nan, "),
        ({"benign_costs": (math.inf,)}, r"weight, norms and costs are finite and not negative, given .* inf\)"),
    ],
)
def test_minimum_rise_refuses_figures_that_mean_nothing(changes: dict[str, object], message: str) -> None:
    given = {"weight": 0.01, "benign_norms": NORMS, "benign_costs": COSTS, "trigger_norm": 10.0, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        minimum_rise(**given)  # type: ignore[arg-type]


@pytest.mark.parametrize("feasible", [feasible_confidences, feasible_smoothings])
def test_feasible_interval_needs_two_classes(feasible: Feasible) -> None:
    with pytest.raises(ValueError, match=r"^a backdoor needs at least 2 classes, given 1$"):
        feasible(0.1, classes=1)
