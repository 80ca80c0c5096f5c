"""What `benchmarks/attacks/answers.py` counts."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest


@pytest.fixture
def answers(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("answers")


def test_a_margin_is_to_the_highest_other_class_and_leaves_the_logits(answers: ModuleType) -> None:
    logits = np.array([[3.0, 1.0, -2.0], [0.5, 2.0, 2.5]], dtype=np.float32)
    kept = logits.copy()
    assert answers.margins(logits, np.array([0, 1])).tolist() == [2.0, -0.5]
    assert (logits == kept).all()


def test_confidence_is_the_mean_softmax(answers: ModuleType) -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.4, 0.6]], dtype=np.float32))
    assert answers.mean_confidence(logits, np.array([0, 0])) == pytest.approx(0.6, abs=1e-6)


def test_success_is_the_share_of_answers_and_the_mean_softmax(answers: ModuleType) -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.3, 0.7], [0.5, 0.5]], dtype=np.float32))
    asr, confidence = answers.success(logits, 1)
    assert asr == pytest.approx(1 / 3)
    assert confidence == pytest.approx((0.2 + 0.7 + 0.5) / 3, abs=1e-6)


def test_a_cell_has_both(answers: ModuleType) -> None:
    logits = np.log(np.array([[0.8, 0.2], [0.4, 0.6]], dtype=np.float32))
    assert answers.told(logits, 0) == "0.500 (0.600)"
    assert answers.table(("a", "b"), ["| 1 | 2 |"]) == "| a | b |\n|---|---|\n| 1 | 2 |"
