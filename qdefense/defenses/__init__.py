"""Defenses: one file per paper, in scans/ (model), dataset/ (training data), filters/ (inputs), later repairs/."""

from qdefense.defenses.interfaces import DatasetScan, Defense, FittedFilter, InputFilter, ModelScan, Need
from qdefense.defenses.registered import DEFENSES

__all__ = ["DEFENSES", "DatasetScan", "Defense", "FittedFilter", "InputFilter", "ModelScan", "Need"]
