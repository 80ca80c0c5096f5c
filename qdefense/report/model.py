"""Report: everything an audit found, in one versioned structure; equal inputs give equal bytes outside ``volatile``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.contract import InputContract
from qdefense.converters.inspection import Inspection
from qdefense.converters.runtime_facts import RuntimeFacts
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import Finding
from qdefense.session import Runtime, SessionProfile

SCHEMA_VERSION = "1.6"
MISREAD_MARGIN = 0.02
"""A reading of the file that is better by more than this is taken for the right one."""


class _Record(BaseModel):
    # Readers ignore unknown fields: a newer minor version may add some.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Accuracy(_Record):
    """Clean accuracy of the deployed session; ``stated`` is the user's word for it, on unlabelled images."""

    value: float
    images: int
    source: Literal["measured", "stated"] = "measured"


class DataFacts(_Record):
    """Images that the audit used."""

    source: str
    sha256: str
    images: int
    classes: int
    detection: str = Field(default="", description="which loader read the data, and why that one")
    labelled: bool = True
    notes: tuple[str, ...] = Field(default=(), description="what the loader noticed, for people")


class CandidateContract(_Record):
    """Another reading of the file's input or classes, scored on the labelled images."""

    description: str = Field(description="what differs from the contract in use")
    accuracy: float
    own_accuracy: float = Field(description="of the contract in use, on the same images")
    images: int


class ReferenceFile(_Record):
    """Another network on the same images, which a dataset scan may ask."""

    file: str
    sha256: str


class Subject(_Record):
    """What was audited; a refused file has no contract and no inspection."""

    file: str
    sha256: str | None = None
    size_bytes: int | None = None
    external_files: dict[str, str] = Field(default={}, description="sha256 of every file with weights beside it")
    contract: InputContract | None = None
    inspection: Inspection | None = None
    runtime_facts: RuntimeFacts | None = Field(
        default=None, description="what ONNX Runtime makes of the file on this CPU; null where it was not loaded"
    )
    data: DataFacts | None = None
    inputs: DataFacts | None = Field(default=None, description="what the model was given, judged by the filters")
    training_data: DataFacts | None = Field(default=None, description="judged by the dataset scans")
    reference: ReferenceFile | None = Field(
        default=None, description="trained without the rows that a dataset scan flagged, asked what these are"
    )
    clean_accuracy: Accuracy | None = None
    candidates: tuple[CandidateContract, ...] = Field(
        default=(), description="other contracts that fit the graph, largest gain first, with their accuracy"
    )


class Environment(_Record):
    """Versions, runtime and CPU: with the file they decide every logit (law 5)."""

    versions: dict[str, str]
    runtime: Runtime
    profile: SessionProfile | None = None
    saturating_operators: tuple[str, ...] = Field(
        default=(), description="operators whose u8 x s8 kernels were measured to saturate in int16 on this CPU"
    )
    memory_limited: bool | None = Field(
        default=None, description="whether the file ran under a memory limit (Linux only); null when it did not run"
    )


class Gate(_Record):
    """The answer, and the exit code that says it."""

    outcome: Literal["PASSED", "FAILED", "INCOMPLETE", "REFUSED"]
    exit_code: int
    reasons: tuple[str, ...]
    required: tuple[str, ...] = Field(description="defenses that had to give a verdict")


class Volatile(_Record):
    """What differs from run to run."""

    started: str
    seconds: float
    seconds_per_stage: dict[str, float] = {}
    host: str
    load: tuple[float, ...]
    peak_memory_bytes: int | None = Field(default=None, description="largest resident size of the worker")
    command: tuple[str, ...] = ()


class Report(_Record):
    """One audit of one file."""

    schema_version: str = SCHEMA_VERSION
    subject: Subject
    environment: Environment
    certificate: FidelityCertificate | None = None
    findings: tuple[Finding, ...] = ()
    gate: Gate
    volatile: Volatile
