"""Finding: one defense's answer, in the form that the report stores."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Verdict(StrEnum):
    """What a defense says of a file; only CLEAN can lead to exit code 0."""

    CLEAN = "CLEAN"
    BACKDOORED = "BACKDOORED"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    NOT_MEASURED = "NOT_MEASURED"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True)


class Threshold(_Record):
    """Where the line is, and who drew it; without calibration the false-alarm rate is unknown."""

    value: float
    source: Literal["paper", "calibrated", "user"]
    n: int | None = Field(default=None, description="clean models it was calibrated on")
    false_alarm_rate: float | None = None
    p_value: float | None = Field(
        default=None, description="calibrated: (1 + clean models that score at least as high) / (n + 1) of this file"
    )
    calibration_sha256: str | None = Field(default=None, description="digest of the calibration file")
    note: str | None = Field(
        default=None, description="why no calibration was used, or what it was made with otherwise"
    )


class Cost(_Record):
    """Work done: rows through the deployed session, and gradient steps through the shadow."""

    forwards: int = 0
    gradient_steps: int = 0


class Suspect(_Record):
    """A class that the scan takes for a backdoor's target."""

    target_class: int
    class_name: str
    score: float
    artifact_asr: float = Field(description="held-out ASR of the inverted trigger on the deployed session")
    trigger_id: str


class InvertedTrigger(_Record):
    """The best trigger found for one class, replayed on the deployed session."""

    target_class: int
    class_name: str
    rank: int = Field(description="1 is the smallest norm; censored classes rank after every converged one")
    norm: float | None = Field(description="L1 norm of the mask in pixels; null when the class is censored")
    index: float | None = Field(description="anomaly index on the low side; null when censored or undefined")
    optimised_asr: float | None = Field(description="ASR on the session, on the images it was optimised on")
    artifact_asr: float | None = Field(description="ASR on the session, on held-out images")
    restart_norms: tuple[float | None, ...] = Field(description="norm of each restart; null where it is censored")
    censored: str | None = Field(default=None, description="why the class has no norm")
    trigger_id: str | None = None


class Restart(_Record):
    """The statistic of one start alone; which start of a class comes first is chance, so the spread is its doubt."""

    score: float | None = Field(description="highest anomaly index of this start; null where none is defined")
    median_norm: float | None = Field(default=None, description="the first start's where few classes have this one")
    mad: float | None = Field(default=None, description="median absolute deviation times 1.4826")
    lowest_class: int | None = Field(
        default=None, description="smallest norm of the classes that were started so often; null where none has one"
    )


class TriggerPicture(_Record):
    """A trigger to look at: base64 PNGs, rounded to the uint8 grid as it was replayed."""

    target_class: int
    trigger_id: str
    mask_png: str = Field(description="grey-scale mask")
    trigger_png: str = Field(description="mask times pattern, on black")
    example_png: str = Field(description="a clean image of the audit's data")
    stamped_png: str = Field(description="the same image with the trigger")


class ScanResult(_Record):
    """Of a `ModelScan`: ``score`` is higher for a more suspicious model and present whatever the verdict."""

    kind: Literal["scan"] = "scan"
    score: float | None
    suspects: tuple[Suspect, ...] = ()
    classes: tuple[InvertedTrigger, ...] = ()
    pictures: tuple[TriggerPicture, ...] = Field(
        default=(), description="of every suspect; of the class with the smallest norm where there is none"
    )
    median_norm: float | None = None
    mad: float | None = Field(default=None, description="median absolute deviation times 1.4826")
    restarts: tuple[Restart, ...] = Field(
        default=(), description="the statistic of each start alone; empty where every class was started once"
    )
    replay_agreement: float | None = Field(
        default=None, description="top-1 agreement of shadow and session on the stamped optimised images"
    )
    replay_relative_rms: float | None = Field(
        default=None, description="RMS logit difference there, over the standard deviation of the logits"
    )


class DatasetResult(_Record):
    """Of a `DatasetScan`: one score per training sample, and the rows flagged."""

    kind: Literal["dataset"] = "dataset"
    sample_scores: tuple[float, ...]
    flagged: tuple[int, ...]


class FilterResult(_Record):
    """Of an `InputFilter`: a decision and a score per input."""

    kind: Literal["filter"] = "filter"
    decisions: tuple[Literal["accept", "reject", "purify"], ...]
    scores: tuple[float, ...]


class RepairResult(_Record):
    """Of a `Repair`: the new file, and what it did to the figures."""

    kind: Literal["repair"] = "repair"
    new_digest: str
    before: dict[str, float]
    after: dict[str, float]


Result = Annotated[ScanResult | DatasetResult | FilterResult | RepairResult, Field(discriminator="kind")]


class Finding(_Record):
    """One defense's answer about one file."""

    defense: str
    kind: Literal["scan", "dataset", "filter", "repair"]
    verdict: Verdict
    reason: str
    settings: dict[str, Any] = Field(default_factory=dict)
    threshold: Threshold | None = None
    seed: int
    cost: Cost = Cost()
    result: Result | None = None
