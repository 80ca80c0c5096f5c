"""Finding: one defense's answer, in the form that the report stores."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class Verdict(StrEnum):
    """What a defense says of a file; of an audit, only CLEAN can lead to exit code 0.

    REPAIRED says that a repair made another file, not that a backdoor was there, nor that it is gone; NOT_REPAIRED that
    the file it made lost more clean accuracy than it tolerates, as was measured.
    """

    CLEAN = "CLEAN"
    BACKDOORED = "BACKDOORED"
    NOT_APPLICABLE = "NOT_APPLICABLE"
    NOT_MEASURED = "NOT_MEASURED"
    REPAIRED = "REPAIRED"
    NOT_REPAIRED = "NOT_REPAIRED"


Kind = Literal["scan", "dataset", "filter", "repair"]
"""What a defense judges: the model, its training set, its inputs; or, a repair, nothing."""


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
    cross_entropy: float | None = Field(
        default=None,
        description="mean of -log f of this class with the trigger, in nats, on the session and the images it was "
        "optimised on; null where a logit is not finite",
    )


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


class DatasetClass(_Record):
    """What a `DatasetScan` found in the images that carry one label."""

    target_class: int
    class_name: str
    n: int = Field(description="images with this label")
    score: float | None = Field(description="higher is more suspicious; null where it was not measured")
    suspicious: bool
    flagged: int = Field(description="images of it among the flagged")
    reason: str
    statistics: dict[str, float] = Field(default={}, description="by name: what the score rests on")


class DatasetResult(_Record):
    """Of a `DatasetScan`: one score per training sample, and the rows flagged, in the order of the data as read."""

    kind: Literal["dataset"] = "dataset"
    sample_scores: tuple[float | None, ...] = Field(
        description="within a class higher is more suspicious; null: its class was not measured, or it was set aside"
    )
    flagged: tuple[int, ...]
    score: float | None = Field(default=None, description="of the model: higher is more suspicious")
    classes: tuple[DatasetClass, ...] = Field(default=(), description="one of each label, in order")
    layer: str | None = Field(default=None, description="whose input the features are")


class FilterBoundary(_Record):
    """Where an `InputFilter` draws the line, and how often it rejects clean inputs; FRR is the false rejection rate."""

    value: float = Field(description="an input whose score is below it is rejected")
    nominal_frr: float = Field(description="the FRR that the boundary was set for")
    fitted_on: int = Field(description="clean images it was fitted on")
    mean: float = Field(description="of their scores")
    sd: float = Field(description="standard deviation of their scores")
    measured_frr: float = Field(description="the FRR on further clean images, which took no part in the fit")
    frr_interval: tuple[float, float] = Field(description="Wilson interval of the measured FRR, 95 %")
    held_out_scores: tuple[float, ...] = Field(description="scores of those images")
    lowest_score: float = Field(description="no score can be below it; nor is anything rejected by a boundary there")
    note: str | None = Field(default=None, description="what weakens the filter on this file")

    @property
    def null_rate(self) -> float:
        """How often clean inputs are taken to be rejected: the nominal FRR, or the upper bound of the measured one."""
        return max(self.nominal_frr, self.frr_interval[1])

    @property
    def can_reject(self) -> bool:
        """Whether there is a score that it would reject."""
        return self.value > self.lowest_score


class RejectionTest(_Record):
    """Whether more inputs were rejected than clean ones would be: a one-sided exact binomial test."""

    rejected: int
    measured: int = Field(description="inputs with a score")
    null_rate: float = Field(description="how often clean inputs are taken to be rejected")
    p_value: float
    level: float = Field(description="a p-value of at most this is an alarm")


class FilterResult(_Record):
    """Of an `InputFilter`: a decision and a score per input; an input without a score is not accepted."""

    kind: Literal["filter"] = "filter"
    decisions: tuple[Literal["accept", "reject", "purify", "unmeasured"], ...]
    scores: tuple[float | None, ...] = Field(description="null where the model's answers are no finite numbers")
    boundary: FilterBoundary | None = None
    test: RejectionTest | None = Field(default=None, description="of all inputs together, where an audit judged them")


class PrunedChannels(_Record):
    """Which channels of the last feature map a repair silenced, in that order."""

    tensor: str = Field(description="tensor whose mean activation per channel, on clean images, gave the order")
    measured_on: Literal["session", "shadow"]
    channels: int
    pruned: tuple[int, ...]
    accuracies: tuple[float, ...] = Field(
        description="clean accuracy on the images it pruned by: of the file as it was, then after each step, the last "
        "one of which may have been taken back; each on the session of that very file"
    )
    initializers: tuple[str, ...] = Field(description="where the entries of these channels are zero")


class RepairResult(_Record):
    """Of a `Repair`: the new file, and what it did to the figures, each measured on a session of the file itself."""

    kind: Literal["repair"] = "repair"
    new_digest: str
    before: dict[str, float]
    after: dict[str, float]
    images: int = Field(default=0, description="held-out clean images that before and after were measured on")
    training_agreement: float | None = Field(
        default=None, description="top-1 agreement of the shadow that was trained with the new file's session, on them"
    )
    pruning: PrunedChannels | None = None

    @property
    def accuracy_drop(self) -> float:
        """Percentage points of clean accuracy lost; below 0 where the new file is right more often."""
        # A difference of counts: 96 % less 94 % is a little more than 2 points in floats.
        before, after = (round(figures["clean_accuracy"] * self.images) for figures in (self.before, self.after))
        return 100 * (before - after) / self.images


Result = Annotated[ScanResult | DatasetResult | FilterResult | RepairResult, Field(discriminator="kind")]


class Finding(_Record):
    """One defense's answer about one file."""

    defense: str
    kind: Kind
    verdict: Verdict
    reason: str
    settings: dict[str, Any] = Field(default_factory=dict)
    threshold: Threshold | None = None
    seed: int
    cost: Cost = Cost()
    result: Result | None = None
