from __future__ import annotations

import itertools

import numpy as np
import pytest

from qdefense.defenses.scheduling import LEAST_RESTARTS, Plan, exhaustive_plan, least_restarts, lowest, screened_plan

INF = np.inf


def _total(plan: Plan, classes: int) -> int:
    return plan.steps * (classes * plan.compared + plan.promising * plan.further)


@pytest.mark.parametrize(
    ("classes", "steps", "restarts", "plan"),
    [
        (10, 60, 4, Plan(steps=60, compared=1, promising=1, further=3)),  # 800 would do for 13 starts of 61
        (43, 60, 4, Plan(steps=60, compared=1, promising=4, further=3)),  # 3,440 for 55 of 62
        (9, 60, 4, Plan(steps=60, compared=1, promising=1, further=3)),  # 720 for 12 of 60
        (8, 60, 4, Plan(steps=58, compared=1, promising=1, further=3)),  # 640 for 11 of 58
        (10, 200, 3, Plan(steps=166, compared=1, promising=1, further=2)),  # 2,000 for 12 of 166
        (43, 200, 1, Plan(steps=66, compared=1)),
        (10, 60, 8, Plan(steps=60, compared=1, promising=1, further=7)),
    ],
)
def test_screened_plan_equals_the_hand_computed(classes: int, steps: int, restarts: int, plan: Plan) -> None:
    assert screened_plan(classes, steps, restarts) == plan


@pytest.mark.parametrize("restarts", range(1, 13))
def test_screened_plan_takes_at_most_a_third_of_the_steps(restarts: int) -> None:
    for classes, steps in itertools.product(range(6, 300), (60, 200, 400)):
        plan = screened_plan(classes, steps, restarts)
        assert 3 * _total(plan, classes) <= _total(exhaustive_plan(steps, restarts), classes)
        assert plan.steps <= steps


def test_screened_plan_shortens_no_start_from_four_restarts_and_nine_classes_on() -> None:
    for classes, restarts in itertools.product(range(9, 300), range(4, 13)):
        assert screened_plan(classes, 60, restarts).steps == 60


def test_least_restarts_are_the_first_that_shorten_no_start() -> None:
    for classes in range(6, 300):
        least = least_restarts(classes)
        assert least == (5 if classes < 9 else LEAST_RESTARTS)
        assert screened_plan(classes, 200, least).steps == 200
        assert screened_plan(classes, 200, least - 1).steps < 200


def test_least_restarts_needs_room() -> None:
    with pytest.raises(ValueError, match="3 classes leave no room"):
        least_restarts(3)


def test_exhaustive_plan_starts_every_class_alike() -> None:
    plan = exhaustive_plan(400, 3)
    assert plan == Plan(steps=400, compared=3, promising=0, further=0)
    assert _total(plan, 10) == 12_000


@pytest.mark.parametrize(
    ("norms", "count", "classes"),
    [
        ([3.0, 1.0, 2.0], 2, [1, 2]),
        ([1.0, 1.0, 0.5], 2, [2, 0]),
        ([INF, 4.0, INF], 2, [1]),
        ([np.nan, 4.0, 5.0], 2, [1, 2]),
        ([INF, INF], 1, []),
        ([1.0, 2.0], 0, []),
    ],
)
def test_lowest_gives_the_smallest_and_no_censored_one(norms: list[float], count: int, classes: list[int]) -> None:
    assert lowest(np.array(norms), count) == classes
