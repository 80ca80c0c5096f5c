"""Report: everything an audit found, in one versioned structure; equal inputs give equal bytes outside ``volatile``."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qdefense.converters.contract import InputContract
from qdefense.converters.inspection import Inspection
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import Finding
from qdefense.session import Runtime, SessionProfile

SCHEMA_VERSION = "1.0"


class _Record(BaseModel):
    # Readers ignore unknown fields: a newer minor version may add some.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Accuracy(_Record):
    """Clean accuracy of the deployed session."""

    value: float
    images: int


class DataFacts(_Record):
    """The labelled clean images that the audit used."""

    source: str
    sha256: str
    images: int
    classes: int


class Subject(_Record):
    """What was audited; a refused file has no contract and no inspection."""

    file: str
    sha256: str | None = None
    size_bytes: int | None = None
    contract: InputContract | None = None
    inspection: Inspection | None = None
    data: DataFacts | None = None
    clean_accuracy: Accuracy | None = None


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
