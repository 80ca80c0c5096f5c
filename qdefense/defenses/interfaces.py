"""The four protocols of a defense, and what each may say it needs.

``revision`` is 1 at first, and raised by one in each change after which a defense may answer the same file, evidence,
settings and seed otherwise, be the change in its own code or in what it computes with. `qdefense bench` keeps answers
by it: those of an older revision are asked for again.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

from qdefense.artifact import Artifact
from qdefense.calibration import Calibrations, Line
from qdefense.data.images import Pixels
from qdefense.evidence import Evidence
from qdefense.findings import FilterBoundary, FilterResult, Finding


class Need(StrEnum):
    """What a defense draws on."""

    LOGITS = "logits"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    WEIGHTS = "weights"
    CLEAN_SET = "clean set"
    TRAINING_SET = "training set"


class ModelScan(Protocol):
    """Judges the file from clean images."""

    name: ClassVar[str]
    kind: ClassVar[Literal["scan"]]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    revision: ClassVar[int]

    def scan(self, evidence: Evidence) -> Finding:
        """Judge the model."""
        ...


@runtime_checkable
class Calibratable(Protocol):
    """A `ModelScan` with one line through its score, which clean models can draw."""

    @property
    def calibrated_settings(self) -> dict[str, Any]:
        """What the score depends on: the settings of the finding without the threshold."""
        ...

    def line(self, calibrations: Calibrations | None) -> Line:
        """Where the line is; no work is done yet.

        Raises:
            CalibrationError: the calibration that fits has too few models for the rate asked for.
        """
        ...


class DatasetScan(Protocol):
    """Judges the training set through the file.

    A finding names its threshold whatever the verdict; one without draws no line, and its answer is the order of rows.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["dataset"]]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    revision: ClassVar[int]

    def scan(self, evidence: Evidence) -> Finding:
        """Judge the training set."""
        ...


@runtime_checkable
class AsksReference(Protocol):
    """A dataset scan that may ask the evidence's reference network."""

    @property
    def asks_reference(self) -> bool:
        """Whether it does with these settings."""
        ...


class FittedFilter(Protocol):
    """An `InputFilter` with its boundary, ready to decide.

    ``most_held_out`` is how many clean images it measures its false rejections on at most; ``remedy`` what spec of the
    filter is not weakened by what the boundary's ``note`` tells of this file.
    """

    most_held_out: ClassVar[int]
    remedy: ClassVar[str]

    @property
    def boundary(self) -> FilterBoundary:
        """Where the line is, and how often it rejects clean inputs."""
        ...

    def decide(self, x: Pixels) -> FilterResult:
        """Decide on ``x: (N, 3, H, W) float32 in [0, 1]``; an input's score does not depend on the others."""
        ...


class InputFilter(Protocol):
    """Accepts, rejects or purifies inputs, at a latency."""

    name: ClassVar[str]
    kind: ClassVar[Literal["filter"]]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    revision: ClassVar[int]

    @property
    def settings(self) -> dict[str, Any]:
        """As the finding stores them."""
        ...

    def fit(self, evidence: Evidence) -> FittedFilter | Finding:
        """Set the boundary on clean images; a finding, NOT_APPLICABLE or NOT_MEASURED, where that cannot be done."""
        ...


@dataclass(frozen=True, kw_only=True)
class Repaired:
    """What a repair gives: the new file, and the finding that reports store of it.

    Both, because a finding holds no bytes, and a missing file could not say why it is missing. ``artifact`` is there
    exactly where the verdict is REPAIRED, or NOT_REPAIRED: whoever has the trigger may want to see what became of it.
    It is a file like any other: nothing known of the old one holds for it.
    """

    artifact: Artifact | None
    finding: Finding


@runtime_checkable
class Repair(Protocol):
    """Makes a new file; judged by clean accuracy and ASR before and after, never called detection."""

    name: ClassVar[str]
    kind: ClassVar[Literal["repair"]]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    revision: ClassVar[int]

    def repair(self, evidence: Evidence) -> Repaired:
        """Repair the file."""
        ...


Defense = ModelScan | DatasetScan | InputFilter | Repair
"""Any of the four; ``kind`` tells which."""
