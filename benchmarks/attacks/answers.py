"""What files answer, in figures and in cells of tables."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import Labels
from qdefense.session import Logits

Margins = NDArray[np.float64]


def margins(logits: Logits, goal: Labels) -> Margins:
    """``logits[n, goal[n]] - max over other k of logits[n, k]``: ``(N,)``."""
    others = logits.astype(np.float64)
    rows = np.arange(len(goal))
    wanted = others[rows, goal]
    others[rows, goal] = -np.inf
    found: Margins = wanted - others.max(axis=1)
    return found


def mean_confidence(logits: Logits, goal: Labels) -> float:
    """Mean softmax probability of ``goal``."""
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    return float((powers[np.arange(len(goal)), goal] / powers.sum(axis=1)).mean())


def success(logits: Logits, target: int) -> tuple[float, float]:
    """ASR, and the mean confidence (softmax) in the target."""
    goal = np.full(len(logits), target)
    return float(np.mean(logits.argmax(axis=1) == goal)), mean_confidence(logits, goal)


def told(logits: Logits, target: int) -> str:
    """A cell of a table: ASR, and the mean confidence in brackets."""
    return "{:.3f} ({:.3f})".format(*success(logits, target))


def table(names: Iterable[str], rows: Iterable[str]) -> str:
    head = f"| {' | '.join(names)} |"
    return "\n".join((head, "|" + "---|" * (head.count("|") - 1), *rows))
