"""Defenses: one file per paper, in scans/ (the model), dataset/ (its training data), filters/ (inputs), repairs/."""

from qdefense.defenses.interfaces import (
    DatasetScan,
    Defense,
    FittedFilter,
    InputFilter,
    ModelScan,
    Need,
    Repair,
    Repaired,
)
from qdefense.defenses.registered import DEFENSES

__all__ = [
    "DEFENSES",
    "DatasetScan",
    "Defense",
    "FittedFilter",
    "InputFilter",
    "ModelScan",
    "Need",
    "Repair",
    "Repaired",
]
