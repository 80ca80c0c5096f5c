from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdefense.data.images import Pixels, on_grid
from qdefense.defenses.inversion import (
    CostController,
    Inversion,
    MaskedPattern,
    NoGradientError,
    Schedule,
    _mini_batches,
    invert_trigger,
)

if TYPE_CHECKING:
    from qdefense.converters.shadow import Shadow

SIZE, CLASSES = 6, 3
SHORTCUT = (2, 4)
TARGET = 1
SCHEDULE = Schedule(steps=300, batch_size=16)
Change = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """Stands for a shadow: class 0 wins on every clean image, and a white pixel at `SHORTCUT` makes it `TARGET`.

    ``change`` acts on the logits; the gradient hook of a test goes there.
    """

    def __init__(self, change: Change = lambda logits: logits) -> None:
        super().__init__()
        self.change = change
        weight = torch.zeros(CLASSES, 3, SIZE, SIZE)
        weight[TARGET] = 0.05
        weight[TARGET, :, SHORTCUT[0], SHORTCUT[1]] = 10.0
        self.weight = nn.Parameter(weight.reshape(CLASSES, -1))
        self.bias = nn.Parameter(torch.tensor([18.0, 0.0, 0.0]))

    def forward(self, x: Tensor, *, exact: bool = False, saturate: bool = False) -> Tensor:
        return self.change(x.flatten(1) @ self.weight.T + self.bias)


def _shadow(change: Change = lambda logits: logits) -> Shadow:
    return cast("Shadow", Linear(change))


def _images(count: int = 40) -> Pixels:
    return on_grid(np.random.default_rng(0).random((count, 3, SIZE, SIZE), dtype=np.float32) * 0.3)


def _invert(
    schedule: Schedule = SCHEDULE, seed: int = 0, shadow: Shadow | None = None, target: int = TARGET
) -> list[MaskedPattern]:
    return _whole(schedule, seed, shadow, target).candidates


def _whole(
    schedule: Schedule = SCHEDULE, seed: int = 0, shadow: Shadow | None = None, target: int = TARGET
) -> Inversion:
    return invert_trigger(shadow or _shadow(), _images(), target, schedule, np.random.default_rng(seed))


def _pattern(mask: float, pattern: float) -> MaskedPattern:
    return MaskedPattern(mask=np.full((1, 2, 2), mask, np.float32), pattern=np.full((3, 2, 2), pattern, np.float32))


def test_masked_pattern_norm_is_the_sum_of_the_mask() -> None:
    mask = np.array([[[0.25, 1.0], [0.0, 0.5]]], dtype=np.float32)
    assert MaskedPattern(mask=mask, pattern=np.ones((3, 2, 2), np.float32)).norm == 1.75


def test_masked_pattern_stamp_blends_and_rounds_to_the_grid() -> None:
    x = on_grid(np.random.default_rng(1).random((4, 3, 2, 2), dtype=np.float32))
    stamped = _pattern(0.3, 0.9).stamp(x)
    assert np.allclose(stamped, 0.7 * x + 0.27, atol=0.51 / 255)
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert stamped.dtype == np.float32
    assert _pattern(0.0, 0.9).stamp(x).tobytes() == x.tobytes()
    assert (_pattern(1.0, 1.0).stamp(x) == 1).all()


def test_masked_pattern_trigger_id_is_equal_when_mask_and_pattern_round_alike() -> None:
    assert _pattern(0.4, 0.4).trigger_id == _pattern(0.4 + 1e-4, 0.4 - 1e-4).trigger_id
    different = {_pattern(0.4, 0.4).trigger_id, _pattern(0.41, 0.4).trigger_id, _pattern(0.4, 0.41).trigger_id}
    assert len(different) == 3
    assert {len(name) for name in different} == {16}


def _costs(controller: CostController, success: list[float]) -> list[float]:
    costs = []
    for value in success:
        controller.update(value)
        costs.append(controller.cost)
    return costs


def test_cost_controller_follows_the_published_schedule_step_by_step() -> None:
    controller = CostController(Schedule(steps=1))
    assert controller.cost == 0
    assert _costs(controller, [0.99] * 5) == [0, 0, 0, 0, 1e-3]
    assert _costs(controller, [1.0] * 5) == [1e-3, 1e-3, 1e-3, 1e-3, 2e-3]
    assert _costs(controller, [1.0] * 5) == [2e-3, 2e-3, 2e-3, 2e-3, 4e-3]
    assert _costs(controller, [0.98] * 5) == [4e-3] * 4 + [pytest.approx(4e-3 / 2**1.5)]
    assert _costs(controller, [0.0] * 5)[-1] == pytest.approx(4e-3 / 2**3)
    assert _costs(controller, [1.0] * 5)[-1] == pytest.approx(1e-3)


def test_cost_controller_counts_anew_when_a_row_is_broken() -> None:
    controller = CostController(Schedule(steps=1))
    assert _costs(controller, [1, 1, 1, 1, 0, 1, 1, 1, 1]) == [0] * 9
    assert _costs(controller, [1]) == [1e-3]
    assert _costs(controller, [0, 0, 0, 0, 1, 0, 0, 0, 0]) == [1e-3] * 9
    assert _costs(controller, [0]) == [pytest.approx(1e-3 / 2**1.5)]


def test_cost_controller_stays_at_zero_when_nothing_succeeds() -> None:
    assert _costs(CostController(Schedule(steps=1)), [0.5] * 20) == [0] * 20


def test_cost_controller_obeys_its_schedule() -> None:
    schedule = Schedule(steps=1, initial_cost=0.5, multiplier=4.0, patience=2, attack_success=0.7)
    controller = CostController(schedule)
    assert _costs(controller, [0.7, 0.8, 0.9, 1.0, 0.69, 0.69]) == [0, 0.5, 0.5, 2.0, 2.0, 0.25]


def test_a_multiplier_of_one_holds_the_cost_fixed() -> None:
    controller = CostController(Schedule(steps=1, initial_cost=0.25, multiplier=1.0, patience=2))
    assert _costs(controller, [1.0] * 6 + [0.0] * 6) == [0] + [0.25] * 11


def test_invert_trigger_finds_the_planted_pixel() -> None:
    best = _invert()[0]
    row, column = SHORTCUT
    others = np.ones((SIZE, SIZE), dtype=bool)
    others[row, column] = False
    assert best.mask[0, row, column] > 0.5
    assert best.mask[0, row, column] > 0.7 * best.norm
    assert best.mask[0, others].max() < 0.1
    assert best.pattern[:, row, column].min() > 0.9


def test_invert_trigger_keeps_only_what_reached_the_wanted_success() -> None:
    x = _images()
    for trigger in _invert(replace(SCHEDULE, batch_size=len(x), attack_success=1.0)):
        stamped = torch.from_numpy((1 - trigger.mask) * x + trigger.mask * trigger.pattern)
        with torch.no_grad():
            assert (_shadow()(stamped).argmax(dim=1) == TARGET).all()


def test_invert_trigger_sorts_candidates_from_the_smallest_up() -> None:
    norms = [trigger.norm for trigger in _invert()]
    assert len(norms) > 10
    assert all(smaller < larger for smaller, larger in pairwise(norms))


def test_invert_trigger_found_the_larger_candidates_first() -> None:
    early, late = _invert(replace(SCHEDULE, steps=60)), _invert()
    found = {trigger.trigger_id for trigger in late[-len(early) :]}
    assert found == {trigger.trigger_id for trigger in early}
    assert early[0].norm > late[0].norm


def test_invert_trigger_gives_masks_and_patterns_between_0_and_1() -> None:
    for trigger in _invert():
        assert (trigger.mask.shape, trigger.pattern.shape) == ((1, SIZE, SIZE), (3, SIZE, SIZE))
        assert trigger.mask.dtype == trigger.pattern.dtype == np.float32
        assert 0 <= trigger.mask.min() <= trigger.mask.max() <= 1
        assert 0 <= trigger.pattern.min() <= trigger.pattern.max() <= 1


def test_invert_trigger_gives_the_same_bits_when_the_seed_is_the_same() -> None:
    def run(seed: int) -> list[bytes]:
        return [t.mask.tobytes() + t.pattern.tobytes() for t in _invert(replace(SCHEDULE, steps=60), seed)]

    torch.manual_seed(1)
    first = run(4)
    torch.manual_seed(2)
    assert run(4) == first != run(5)


def test_invert_trigger_leaves_no_gradient_in_the_shadow() -> None:
    shadow = Linear()
    _invert(replace(SCHEDULE, steps=5), shadow=cast("Shadow", shadow))
    assert all(parameter.grad is None for parameter in shadow.parameters())


def test_invert_trigger_gives_nothing_when_the_class_cannot_be_reached() -> None:
    found = _whole(target=2)
    assert found.candidates == []
    assert 0 < found.last.norm < SIZE * SIZE


def _nan_gradient(logits: Tensor) -> Tensor:
    return logits + torch.sqrt(logits - logits)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda logits: logits.detach(), "the shadow's logits do not depend on its input differentiably"),
        (_nan_gradient, "the gradient of the loss is not finite"),
        (lambda logits: logits * float("nan"), "the gradient of the loss is not finite"),
        (lambda logits: logits * 0, "the gradient of the loss is zero at every step"),
    ],
)
def test_invert_trigger_raises_when_there_is_no_gradient(change: Change, message: str) -> None:
    with pytest.raises(NoGradientError) as caught:
        _invert(replace(SCHEDULE, steps=5), shadow=_shadow(change))
    assert str(caught.value) == message


def test_invert_trigger_raises_when_only_the_parameters_have_a_gradient() -> None:
    class Cut(Linear):
        def forward(self, x: Tensor, *, exact: bool = False, saturate: bool = False) -> Tensor:
            return super().forward(x.detach())

    with pytest.raises(NoGradientError, match=r"^the shadow's logits do not depend on its input differentiably$"):
        _invert(replace(SCHEDULE, steps=5), shadow=cast("Shadow", Cut()))


@pytest.mark.parametrize("dead", [range(1, 5), range(290, 301)])
def test_invert_trigger_goes_on_when_the_gradient_is_zero_at_some_steps(dead: range) -> None:
    calls = 0

    def dies(logits: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return logits * (0 if calls in dead else 1)

    assert len(_invert(shadow=_shadow(dies))) > 1
    assert calls == SCHEDULE.steps


def test_schedule_defaults_are_the_published_ones() -> None:
    assert asdict(Schedule(steps=1)) == {
        "steps": 1,
        "learning_rate": 0.1,
        "betas": (0.5, 0.9),
        "batch_size": 32,
        "initial_cost": 1e-3,
        "multiplier": 2.0,
        "patience": 5,
        "attack_success": 0.99,
    }


@pytest.mark.parametrize(
    "change", [{"learning_rate": 0.05}, {"betas": (0.9, 0.999)}, {"batch_size": 8}, {"initial_cost": 1e-2}]
)
def test_invert_trigger_obeys_its_schedule(change: dict[str, Any]) -> None:
    usual, other = _invert()[0], _invert(replace(SCHEDULE, **change))[0]
    assert usual.trigger_id != other.trigger_id


def test_mini_batches_pass_over_all_images_before_one_comes_again() -> None:
    batches = _mini_batches(40, Schedule(steps=7, batch_size=16), np.random.default_rng(0))
    rows = np.concatenate(batches)
    assert [len(batch) for batch in batches] == [16] * 7
    assert sorted(rows[:40].tolist()) == sorted(rows[40:80].tolist()) == list(range(40))
    assert rows[:40].tolist() != rows[40:80].tolist()


def test_mini_batches_wrap_when_images_are_fewer_than_a_batch() -> None:
    (batch,) = _mini_batches(3, Schedule(steps=1, batch_size=8), np.random.default_rng(0))
    assert np.bincount(batch).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])
