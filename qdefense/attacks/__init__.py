"""Attacks: one file per paper; each is registered by name and selectable as ``--attack NAME:key=value``."""

from qdefense.attacks.interfaces import Attack, BatchAttack, DataAttack, PoisonedSet, Trigger, TriggerState
from qdefense.attacks.registered import ATTACKS

__all__ = ["ATTACKS", "Attack", "BatchAttack", "DataAttack", "PoisonedSet", "Trigger", "TriggerState"]
