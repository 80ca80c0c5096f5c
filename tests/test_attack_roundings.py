"""What `benchmarks/attacks/roundings.py` draws and counts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.trial import Activity


@pytest.fixture
def roundings(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("roundings")


def test_another_grid_has_its_own_scale_in_each_channel_and_clips_nothing(roundings: ModuleType) -> None:
    weights = np.array([[7.0, 2.4, -2.6], [0.7, 0.24, 0.0]], dtype=np.float32)
    rng = np.random.default_rng(0)
    drawn = np.stack([roundings.on_another_grid(weights, rng) for _ in range(50)])
    scales = drawn[:, :, 0] / 7
    assert ((scales >= [0.9999, 0.09999]) & (scales <= [1.0701, 0.10701])).all()
    assert (np.ptp(scales / [1, 0.1], axis=1) > 0).all()
    codes = drawn / scales[:, :, None]
    assert codes == pytest.approx(np.round(codes), abs=1e-4)
    assert (np.abs(drawn - weights) <= 0.5 * scales[:, :, None] + 1e-5).all()


def test_a_row_counts_the_roundings_that_lose_and_gain(roundings: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of four images FP32 has two, the INT4 file one; the roundings have none, two and four of them in turn."""
    monkeypatch.setattr(roundings, "DRAWS", 6)
    drawn = iter([0, 2, 4] * 2)
    monkeypatch.setattr(roundings, "another_rounding", lambda _model, _rng: next(drawn))
    won = {"fp32": 2, "int4": 1}
    one = SimpleNamespace(
        asked=(None, None, np.zeros(4, dtype=np.int64)),
        model=lambda scheme: won[scheme],
        answers=lambda hits: np.where(np.arange(4)[:, None] < hits, [1.0, 0.0], [0.0, 1.0]),
    )
    assert list(roundings.rounding_row(one)) == ["4 | 0.500 | 0.250 | 0.000 | 0.500 | 1.000 | 2 | 2"]


@pytest.mark.parametrize(
    ("schemes", "activity", "asked"),
    [
        (("fp32", "int4"), Activity.ACTIVE, True),
        (("fp32", "int4"), Activity.ATTENUATED, True),
        (("fp32", "int4"), Activity.DORMANT, False),
        (("fp32", "int8-static"), Activity.ACTIVE, False),
    ],
)
def test_what_planted_nothing_is_not_asked(
    roundings: ModuleType, schemes: tuple[str, ...], activity: Activity, asked: bool
) -> None:
    files = {scheme: SimpleNamespace(activity=activity) for scheme in schemes}
    assert roundings.is_asked(SimpleNamespace(files=files)) is asked
