"""What a file must answer clean images with before any defense says something of it."""

from __future__ import annotations

from qdefense.rates import MIN_SKILL, skill

NOT_FINITE = "the session's logits on clean images are not finite (NaN or infinite weights?)"


def near_chance(accuracy: float, classes: int) -> str | None:
    """Why a file of this clean accuracy cannot be judged: it guesses, or is read wrongly; None where it can."""
    if skill(accuracy, classes) < MIN_SKILL:
        return f"clean accuracy {accuracy:.1%} is near chance ({1 / classes:.1%}): wrong labels, order or pixels?"
    return None
