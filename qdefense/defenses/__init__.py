"""Defenses: one file per paper, in scans/ (the model), later dataset/, filters/ and repairs/."""

from qdefense.defenses.interfaces import ModelScan, Need
from qdefense.defenses.registered import DEFENSES

__all__ = ["DEFENSES", "ModelScan", "Need"]
