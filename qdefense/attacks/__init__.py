"""Attacks: one file per paper; each is registered by name and selectable as ``--attack NAME:key=value``."""

from qdefense.attacks.interfaces import DataAttack, PoisonedSet, Trigger
from qdefense.attacks.registered import ATTACKS

__all__ = ["ATTACKS", "DataAttack", "PoisonedSet", "Trigger"]
