"""What a file must answer clean images with before any defense says something of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from qdefense.data.images import Labels
from qdefense.rates import MIN_SKILL, chance_of, skill
from qdefense.session import Logits

NOT_FINITE = "the session's logits on clean images are not finite (NaN or infinite weights?)"


def near_chance(accuracy: float, classes: int, labels: ArrayLike | None = None) -> str | None:
    """Why a file of this clean accuracy cannot be judged: it guesses, or is read wrongly; None where it can.

    ``labels: (N,)`` are those that the accuracy is of, None where somebody vouches for it.
    """
    chance = chance_of(classes, labels)
    if skill(accuracy, chance) >= MIN_SKILL:
        return None
    if chance > 1 / classes and skill(accuracy, 1 / classes) >= MIN_SKILL:
        return (
            f"clean accuracy {accuracy:.1%} is little more than answering the commonest class alone gives "
            f"({chance:.1%}): give images of all classes"
        )
    return f"clean accuracy {accuracy:.1%} is near chance ({1 / classes:.1%}): wrong labels, order or pixels?"


def answers_near_chance(logits: Logits, labels: Labels, *, stated: float | None = None) -> str | None:
    """The same of ``logits: (N, K)``, finite, on images with ``labels: (N,)``.

    ``stated`` is the accuracy that somebody vouches for where the labels are the file's own answers.
    """
    if stated is not None:
        return near_chance(stated, logits.shape[1])
    return near_chance(float(np.mean(logits.argmax(axis=1) == labels)), logits.shape[1], labels)
