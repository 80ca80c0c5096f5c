"""What goes between supervisor and worker: one job, then events as JSON lines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from qdefense.converters.contract import StatedContract
from qdefense.converters.runtime_graph import Arithmetic
from qdefense.fidelity import FidelityCertificate
from qdefense.findings import Finding
from qdefense.report.model import Accuracy, CandidateContract, Environment, Subject


class _Message(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Job(_Message):
    """What the worker is to do: describe the file; with data also its certificate and these defenses."""

    model: str
    data: str | None = None
    split: str | None = None
    limit: int | None = None
    training_data: str | None = Field(default=None, description="judged by the dataset scans, read whole")
    training_split: str | None = None
    reference: str | None = Field(default=None, description="a network trained without the rows that a scan flagged")
    inputs: str | None = Field(default=None, description="what the model was given, judged by the filters")
    inputs_split: str | None = None
    defenses: tuple[str, ...] = ()
    repair: str | None = Field(default=None, description="a repair; what it makes comes back as an event")
    seed: int = 0
    threads: int = 1
    memory_bytes: int | None = None
    calibrations: tuple[str, ...] = Field(default=(), description="calibration files, asked before those that ship")
    false_alarm_rate: float | None = Field(default=None, gt=0, lt=1, description="of a calibrated threshold")
    contract: StatedContract | None = None
    expected_accuracy: float | None = None
    arithmetic: Arithmetic = "as-run"


class Opened(_Message):
    """The bytes of the file were read: their digest is known; to `inspect`, later, also what they hold."""

    event: Literal["opened"] = "opened"
    subject: Subject


class Described(_Message):
    """The runtime loaded the file, and the data fit: from here on nothing is refused, only left unmeasured."""

    event: Literal["described"] = "described"
    subject: Subject
    environment: Environment


class Answered(_Message):
    """The session's accuracy on the clean images, none where it was not measured; and that of other contracts."""

    event: Literal["answered"] = "answered"
    clean_accuracy: Accuracy | None
    candidates: tuple[CandidateContract, ...] = ()


class Certified(_Message):
    """The certificate is there, whatever it says."""

    event: Literal["certified"] = "certified"
    certificate: FidelityCertificate


class Found(_Message):
    """A defense gave its answer."""

    event: Literal["found"] = "found"
    finding: Finding


class Rewritten(_Message):
    """A repair made a new file; the finding that follows is about it."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_bytes="base64", val_json_bytes="base64")

    event: Literal["rewritten"] = "rewritten"
    data: bytes


class Advanced(_Message):
    """Progress within a stage."""

    event: Literal["advanced"] = "advanced"
    stage: str
    done: int
    total: int


class Stopped(_Message):
    """The worker cannot go on: bad usage or data (2), an error of its own (3), or a file it refuses (4)."""

    event: Literal["stopped"] = "stopped"
    exit_code: Literal[2, 3, 4]
    message: str


class Finished(_Message):
    """Everything in the job was done."""

    event: Literal["finished"] = "finished"
    seconds_per_stage: dict[str, float]
    peak_memory_bytes: int | None = None


Event = Annotated[
    Opened | Described | Answered | Certified | Found | Rewritten | Advanced | Stopped | Finished,
    Field(discriminator="event"),
]
EVENTS: TypeAdapter[Event] = TypeAdapter(Event)
