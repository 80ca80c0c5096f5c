"""What `bench` writes: one JSON line per work item in ``records.jsonl``, and the manifest that names the files.

``latency.jsonl``, which ``bench --latency`` writes beside them, is described in `timing_records`.

Stages lead to a cell of the table, and each leaves a record, told apart by ``stage``:

============== ========================================================== =============================================
stage          one record per                                             says
============== ========================================================== =============================================
``train``      network: data, architecture, attack, seed                  digest and size of the FP32 file
``quantize``   network and precision (and calibration, where it counts)   digest and size, how much of it is integer
``behaviour``  file and arithmetic                                        clean accuracy, ASR, base confusion, activity
``control``    clean file, arithmetic and attacked network                ASR (and FPR) of its trigger on this file
``defense``    file, arithmetic, defense and access                       the finding, and the evaluator's metrics of it
============== ========================================================== =============================================

Records of one file are joined by ``artifact_sha256`` and, of the last three stages, ``arithmetic``. Every record says
the whole path that led to it (``network``, ``precision``, ``calibration``), so that no join is needed to label it.

``key`` is a sha256 over what the answer depends on: the digests of artifact, settings, data and session profile, the
seed, and the revisions of attack, defense and evaluator; and over what the record says of the file, since two recipes
may give equal bytes. The CPU and the library versions are no part of it, so that a run resumes on any machine; they
stand in ``runtime`` and ``versions``, and there under ``qdefense-sources`` a digest of the code (`source_digest`). A
later line of the same key replaces an earlier one. ``volatile`` holds all that differs between two equal runs, and is
left out of comparisons (`stable`).
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from qdefense.converters.runtime_graph import Arithmetic
from qdefense.findings import Finding, Verdict
from qdefense.profile import Runtime, SessionProfile
from qdefense.trial import Activity

SCHEMA_VERSION = "1.3"
FP32 = "fp32"
Access = Literal["session", "shadow", "no-gradients"]
"""What a defense works on: the deployed session; its shadow alone; the session without any shadow.

A column each, so that what the missing gradients cost (API loss) is told from what quantization costs (signal loss).
"""

GRADIENTS_WITHHELD = "no shadow was built: none was asked for"
"""In the reason of a defense that needs gradients and was given none."""


class _Record(BaseModel):
    # Readers ignore unknown fields: a newer minor version may add some.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Network(_Record):
    """How a network is made: whatever decides its weights but for the libraries that compute them."""

    data: str = Field(description="name of the data set in the matrix")
    train_sha256: str = Field(description="digest of the clean training images")
    architecture: str
    width: int = Field(description="channels of the first stage")
    attack: str | None
    attack_settings: dict[str, Any] = Field(
        default_factory=dict,
        description="every default filled in; without settings of no account, and without a mode that is younger than "
        "records of the attack",
    )
    attack_data: dict[str, str] = Field(
        default_factory=dict,
        description="digests of the images that the attack reads besides, by their names in the matrix; left out where "
        "there are none",
        exclude_if=lambda given: not given,
    )
    attack_revisions: dict[str, int] = Field(
        default_factory=dict,
        description="of the code of the attack and of its host, by their names; left out where it is the first",
        exclude_if=lambda given: not given,
    )
    seed: int
    recipe: dict[str, Any]

    @property
    def all_to_all(self) -> bool:
        """Whether the attack, or its host, wants another class of each class."""
        settings = self.attack_settings.items()
        return any(key.rpartition(".")[2] == "mode" and value == "all-to-all" for key, value in settings)

    @property
    def title(self) -> str:
        """``gtsrb/resnet8/badnets/seed 0``: without settings, so that several networks may share it."""
        return f"{self.data}/{self.architecture}/{self.attack or 'none'}/seed {self.seed}"


class Calibration(_Record):
    """The images that ranges of activations are read off."""

    name: str
    images: int = Field(default=256, description="how many there were, where the matrix asks for more")
    split: str | None = Field(default=None, description="null: the training split")
    triggered: float = Field(default=0.0, description="share of the images that carry the trigger of the attack")
    seed: int = 0


class Volatile(_Record):
    """What may differ between two runs that are equal."""

    seconds: float
    cpu_seconds: float
    host: str
    load: tuple[float, ...] = ()
    at: str = Field(description="end of the work, UTC")
    origin: Literal["trained", "adopted"] | None = Field(default=None, description="of a training record")


class _Made(_Record):
    """What every record has."""

    schema_version: str = SCHEMA_VERSION
    key: str
    network: Network
    failed: bool = Field(default=False, description="an exception or a crash, not an answer; `reason` says which")
    reason: str = ""
    versions: dict[str, str] = Field(default_factory=dict)
    volatile: Volatile


class TrainingRecord(_Made):
    """A network was trained, or a trained one was found."""

    stage: Literal["train"] = "train"
    artifact_sha256: str | None
    size_bytes: int | None = None
    epochs: int


class _OfFile(_Made):
    precision: str = Field(description="'fp32', or the full name of the quantization")
    scheme: str = Field(description="'fp32', 'int8-static', 'int8-dynamic', 'int4', 'int4-a8'")
    calibration: Calibration | None = Field(default=None, description="null where no ranges are read off images")


class QuantizationRecord(_OfFile):
    """A file was quantized; FP32 files have no such record."""

    stage: Literal["quantize"] = "quantize"
    network_sha256: str = Field(description="digest of the FP32 file")
    artifact_sha256: str | None
    size_bytes: int | None = None
    integer_mac_share: float | None = None
    integer_weight_share: float | None = None


class EvaluationRules(_Record):
    """The part of ``[bench]`` that a defense's answer depends on; answers under other rules are not comparable."""

    seed: int = Field(description="of the evaluation's draws and of the defense")
    clean_images: int = Field(description="clean test images that the defense was given, at most")
    held_out_images: int | None = Field(description="others that a filter decided on, at most; null of other kinds")


class _Trial(_OfFile):
    artifact_sha256: str
    arithmetic: Arithmetic
    data_sha256: str = Field(
        description="digest of the images that it was measured on, and of those of a defense of how many it was given"
    )
    test_sha256: str | None = Field(
        default=None,
        description="digest of the test split: of one file, joins defenses and behaviour; null in old lines",
    )
    evaluation: EvaluationRules | None = Field(
        default=None, description="null of a behaviour, which depends on no rules, and in lines older than the field"
    )
    profile: SessionProfile | None = Field(default=None, description="null where the file could not be opened")
    runtime: Runtime | None = None
    evaluation_revision: int | None = Field(
        default=None, description="of the evaluator's code (`EVALUATION_REVISION`); null in lines older than the field"
    )
    replica: int = Field(default=0, description="0 is the first network of its recipe, 1 one that was trained again")


class BehaviourRecord(_Trial):
    """What a file does on the whole test split; rates in [0, 1]."""

    stage: Literal["behaviour"] = "behaviour"
    clean_accuracy: float | None = None
    images: int | None = None
    asr: float | None = None
    base_confusion: float | None = None
    eligible: int | None = Field(default=None, description="images that ASR and base confusion are shares of")
    fpr: float | None = Field(
        default=None,
        description="of a source-specific trigger: share of bystanders that answer with a target once they are "
        "stamped, and do not without the stamp",
    )
    bystanders: int | None = Field(default=None, description="images that the FPR is a share of; null in old lines")
    activity: Activity | None = Field(
        default=None,
        description="as this file alone told it when it was measured, without a control; reports judge it anew",
    )


class ControlRecord(_Trial):
    """What the trigger of an attacked network does to its clean twin; ``network`` and the file are the clean one."""

    stage: Literal["control"] = "control"
    attacked: Network
    attacked_sha256: str = Field(description="digest of the FP32 file of the attacked network, whose trigger it is")
    asr: float | None = None
    eligible: int | None = Field(default=None, description="images that the ASR is a share of")
    fpr: float | None = Field(default=None, description="of a source-specific trigger, as of a behaviour")
    bystanders: int | None = Field(default=None, description="images that the FPR is a share of; null in old lines")


class Curve(_Record):
    """ROC of sample or input scores: at most 65 corners of it, from (0, 0) to (1, 1); for drawing only."""

    fpr: tuple[float, ...]
    tpr: tuple[float, ...]


class Rate(_Record):
    """``hits`` of ``n``; the Wilson interval follows from them (`qdefense.rates.wilson_interval`)."""

    hits: int
    n: int

    @property
    def value(self) -> float | None:
        """The rate; ``None`` of nothing."""
        return self.hits / self.n if self.n else None


class ScanMetrics(_Record):
    """Of a `ModelScan`: what it said of the true target. The unit of AUROC and TPR is the file: see `score`."""

    kind: Literal["scan"] = "scan"
    score: float | None = Field(description="higher is more suspicious")
    suspects: tuple[int, ...] = ()
    targets: tuple[int, ...] = Field(default=(), description="the true target classes; empty of a clean network")
    target_rank: int | None = Field(
        default=None,
        description="best rank among the targets; 1 is the smallest norm; null where every class is a target",
    )
    target_index: float | None = None
    target_norm: float | None = None
    target_found: bool | None = Field(
        default=None,
        description="a target is among the suspects; null of a clean one, and where every class is a target",
    )
    classes: int | None = None
    censored: int | None = None


class DatasetMetrics(_Record):
    """Of a `DatasetScan`: rows of the training set, poisoned against clean. AUROC and TPR are null of a clean set.

    Scores are comparable among rows of one label. So ``within_*`` and ``curve`` look only at rows with a label that
    poisons have, and where they have several (all-to-all) ``within_auroc`` is over pairs of rows of one label, ``top``
    is drawn up label by label, and there is no curve; ``auroc`` and ``fpr`` are of all rows. Rows without a score are
    in no rate.
    ``top`` are the ``round(1.5 * poisons)`` rows of these with the highest scores: ``top_recall`` is the share of all
    poisons that they hold, ``top_precision`` the share of poison among them: 2/3 at most, but for rounding and for a
    label with fewer rows than that. Where poison is most of its label, any order scores high: a random one has a recall
    of ``top_precision.n / (tpr.n + within_fpr.n)``.
    """

    kind: Literal["dataset"] = "dataset"
    auroc: float | None = None
    within_auroc: float | None = None
    tpr: Rate | None = None
    fpr: Rate
    within_fpr: Rate | None = None
    top_recall: Rate | None = None
    top_precision: Rate | None = None
    unmeasured: int = Field(default=0, description="rows without a score, which no rate counts")
    curve: Curve | None = None


class FilterMetrics(_Record):
    """Of an `InputFilter`: decisions on stamped against clean held-out test images, none of which it was fitted on.

    ``asr_after`` is the share of eligible stamped images that were let in and did what the attacker wants.
    """

    kind: Literal["filter"] = "filter"
    auroc: float | None = None
    tpr: Rate | None = None
    fpr: Rate
    unmeasured: int = Field(default=0, description="inputs without a score, which no rate counts")
    boundary: dict[str, Any] | None = Field(default=None, description="where the filter drew its line")
    asr_after: Rate | None = None
    curve: Curve | None = None

    @property
    def rejects_nothing(self) -> bool:
        """Whether no score can be below the line, so that every rate of rejections is 0 whatever the inputs."""
        line, lowest = ((self.boundary or {}).get(name) for name in ("value", "lowest_score"))
        return isinstance(line, int | float) and isinstance(lowest, int | float) and line <= lowest

    @property
    def weakness(self) -> str | None:
        """What weakens the filter on the file, in its own words."""
        note = (self.boundary or {}).get("note")
        return note if isinstance(note, str) else None


class RepairMetrics(_Record):
    """Of a `Repair`: the file before and after, never called detection; rates in [0, 1].

    Both files are measured on the test images that the defense did not see.
    """

    kind: Literal["repair"] = "repair"
    new_sha256: str | None = None
    accuracy_before: float
    accuracy_after: float | None = None
    asr_before: float | None = None
    asr_after: float | None = None
    activity_before: Activity
    activity_after: Activity | None = None


Metrics = Annotated[ScanMetrics | DatasetMetrics | FilterMetrics | RepairMetrics, Field(discriminator="kind")]


class DefenseRecord(_Trial):
    """What one defense said of one file, and what the evaluator makes of it.

    ``finding`` is the defense's own, without what would fill the store (sample scores) or show an image of a data set;
    ``scores_sha256`` is the digest of the scores left out, as little-endian float64.
    """

    stage: Literal["defense"] = "defense"
    defense: str
    settings: dict[str, Any] = Field(description="every default filled in")
    revision: int | None = Field(default=None, description="of the defense's code; null in lines older than the field")
    access: Access = "session"
    seed: int
    kind: Literal["scan", "dataset", "filter", "repair"] | None = None
    verdict: Verdict | None = Field(description="null of a filter that was measured: it judges inputs, not the file")
    finding: Finding | None = None
    scores_sha256: str | None = None
    metrics: Metrics | None = None


Record = Annotated[
    TrainingRecord | QuantizationRecord | BehaviourRecord | ControlRecord | DefenseRecord, Field(discriminator="stage")
]
RECORD: TypeAdapter[Record] = TypeAdapter(Record)


def digest_of(**parts: Any) -> str:
    """sha256 of the parts as JSON with sorted keys: the same on every machine."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def stable(record: Record) -> dict[str, Any]:
    """The record without what may differ between equal runs."""
    return record.model_dump(mode="json", exclude={"volatile"})


class Replica(_Record):
    """One file that a recipe gave; another digest is another replica, kept beside the first."""

    artifact_sha256: str
    size_bytes: int
    batch: int = Field(description="rows per run that its session profile has")
    versions: dict[str, str] = Field(default_factory=dict, description="the libraries that made it")


class ManifestEntry(_Record):
    """A recipe and the files it gave, oldest first."""

    recipe_sha256: str
    recipe: dict[str, Any]
    replicas: tuple[Replica, ...]
    measured: str | None = Field(default=None, description="digest of the one that is measured; null: the last one")


class DataFacts(_Record):
    """A set of images as it was first read; other images under the same name are refused."""

    name: str
    role: Literal["train", "test"] = Field(description="decides the split where none is named")
    split: str | None
    limit: int | None
    seed: int
    sha256: str
    images: int
    classes: int
    height: int
    width: int
    source: str


class Manifest(_Record):
    """Which file each recipe gave; committed, with the small files beside it."""

    schema_version: str = SCHEMA_VERSION
    data: tuple[DataFacts, ...] = ()
    entries: tuple[ManifestEntry, ...] = ()
