"""Calibration: scores of clean models, which give a scan's threshold a known false-alarm rate (conformal)."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from pydantic_core import to_jsonable_python

from qdefense.artifact import Artifact
from qdefense.converters.contract import InputContract
from qdefense.converters.fingerprint import graph_fingerprint
from qdefense.converters.precision import FileScheme, Granularity
from qdefense.findings import Threshold
from qdefense.rates import alarm_rank, conformal_p, models_needed, rounded_up
from qdefense.session import Runtime, SessionProfile

SCHEMA_VERSION = "1.0"
DEFAULT_RATE = 0.05
_SHIPPED = "calibrations"
_MAJOR = SCHEMA_VERSION.partition(".")[0]


class CalibrationError(ValueError):
    """A calibration that cannot be made, read or used as asked; the message says why and what to do."""


def _rising(values: tuple[float, ...]) -> tuple[float, ...]:
    if not all(map(math.isfinite, values)) or list(values) != sorted(values):
        raise ValueError("scores must be finite and in rising order")
    return values


def _distinct(values: tuple[str, ...]) -> tuple[str, ...]:
    if list(values) != sorted(set(values)):
        raise ValueError("digests must be in rising order, each once")
    return values


Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Settings = Annotated[dict[str, JsonValue], BeforeValidator(to_jsonable_python)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Population(BaseModel):
    """The files and images that a score is comparable on; two files of one population differ in their weights.

    Reads nothing it does not know: a newer version may have come to tell populations apart that look alike here.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: Sha256 = Field(description="weight-free digest of the graph as it ships")
    scheme: FileScheme
    granularity: Granularity | None
    classes: int
    contract: Settings = Field(description="what drives the input and reads the output, where it is not the default")
    data_sha256: Sha256


def population_of(artifact: Artifact, data_sha256: str) -> Population:
    """The population of a file that is judged on these images."""
    return Population(
        fingerprint=graph_fingerprint(artifact.data),
        scheme=artifact.inspection.scheme,
        granularity=artifact.inspection.granularity,
        classes=artifact.contract.classes,
        contract=driven(artifact.contract),
        data_sha256=data_sha256,
    )


def driven(contract: InputContract) -> dict[str, Any]:
    """What of a contract a score rests on: everything but names, where it is not the default."""
    return contract.model_dump(
        mode="json",
        exclude_defaults=True,
        exclude={"input_name", "output_name", "class_names", "numbers_stated", "source", "pixels_from"},
    )


def file_identity(sha256: str, external_files: Mapping[str, str]) -> str:
    """The digest of a file; with weights in other files, one over theirs, too."""
    if not external_files:
        return sha256
    return hashlib.sha256(json.dumps([sha256, *sorted(external_files.items())]).encode()).hexdigest()


class Conditions(_Record):
    """What a score was computed with; it moves a score a little (law 5), so a difference is told, not refused."""

    seed: int
    versions: dict[str, str]
    runtime: Runtime
    profile: SessionProfile | None
    saturating_operators: tuple[str, ...]

    def differences(self, here: Conditions, name_of_here: str = "here") -> list[str]:
        """What these conditions were where they are not the same as ``here``."""
        names = sorted({*self.versions, *here.versions})
        pairs = [(f"{name} ", self.versions.get(name, "none"), here.versions.get(name, "none")) for name in names]
        pairs += [
            ("machine ", _machine(self.runtime), _machine(here.runtime)),
            ("session ", _session(self), _session(here)),
            ("seed ", str(self.seed), str(here.seed)),
        ]
        return [f"{name}{there} ({name_of_here} {now})" for name, there, now in pairs if there != now]


def _machine(runtime: Runtime) -> str:
    return " ".join([runtime.system, runtime.machine, *runtime.isa])


def _session(conditions: Conditions) -> str:
    parts = [] if conditions.profile is None else _parts(conditions.profile)
    saturating = conditions.saturating_operators
    return ", ".join([*parts, f"saturating: {' '.join(saturating)}" if saturating else "no saturation"])


def _parts(profile: SessionProfile) -> list[str]:
    """What every profile says, and what it says otherwise than most."""
    parts = [profile.provider, profile.optimization, f"batch {profile.batch}", f"threads {profile.threads}"]
    usual = SessionProfile()
    if profile.arithmetic != usual.arithmetic:
        parts.append(f"{profile.arithmetic} arithmetic")
    if profile.matmulnbits_accuracy_level != usual.matmulnbits_accuracy_level:
        parts.append(f"MatMulNBits accuracy level {profile.matmulnbits_accuracy_level}")
    return parts


class CalibrationEntry(_Record):
    """The scores that one defense gave the clean models of one population.

    What follows from them holds for a further clean model that is made as these were, provided that the scan gives it a
    score.
    """

    defense: str
    settings: Settings = Field(description="those of the finding, without the threshold")
    population: Population
    conditions: Conditions
    scores: Annotated[tuple[float, ...], Field(min_length=1), AfterValidator(_rising)]
    artifacts: Annotated[tuple[Sha256, ...], Field(min_length=1), AfterValidator(_distinct)] = Field(
        description="digests of the n files that were scored; the entry judges none of them"
    )
    not_measured: int = Field(ge=0, description="further clean models, to which the scan gave no score")

    @model_validator(mode="after")
    def _check_counts(self) -> Self:
        if len(self.scores) != len(self.artifacts):
            raise ValueError(f"{len(self.scores)} scores of {len(self.artifacts)} files; expected one of each")
        return self

    @property
    def n(self) -> int:
        """Number of clean models with a score."""
        return len(self.scores)

    @property
    def smallest_rate(self) -> str:
        """What n models can promise at best, as a text that is not below it."""
        return rounded_up(1 / (self.n + 1))

    def differences(self, defense: str, settings: Mapping[str, JsonValue], population: Population) -> list[str]:
        """What keeps the entry from judging such a scan; nothing where it fits."""
        changed = sorted(name for name in {*self.settings, *settings} if self.settings.get(name) != settings.get(name))
        found = ["defense"] if self.defense != defense else []
        found += [f"settings ({', '.join(changed)})"] if changed and not found else []
        found += [
            word for name, word in _POPULATION_WORDS if getattr(self.population, name) != getattr(population, name)
        ]
        return found

    def threshold(self, rate: float) -> tuple[float, float]:
        """The threshold at this rate, and the rate that it promises, which is at most the one asked for.

        Raises:
            ValueError: n is too small for it.
        """
        rank = alarm_rank(rate, self.n)
        if rank == 0:
            raise ValueError(
                f"a false-alarm rate of {rate:g} needs {models_needed(rate)} clean models, there are {self.n}"
            )
        return self.scores[-rank], rank / (self.n + 1)


_POPULATION_WORDS = (
    ("fingerprint", "graph fingerprint"),
    ("scheme", "scheme"),
    ("granularity", "granularity"),
    ("classes", "class count"),
    ("contract", "input contract"),
    ("data_sha256", "data digest"),
)


def _unambiguous(entries: tuple[CalibrationEntry, ...]) -> tuple[CalibrationEntry, ...]:
    for index, entry in enumerate(entries):
        if any(not other.differences(entry.defense, entry.settings, entry.population) for other in entries[:index]):
            raise ValueError(
                f"two entries are about {entry.defense} with the same settings on the same population "
                f"({entry.population.scheme}, graph {entry.population.fingerprint[:12]}), and only one can hold"
            )
    return entries


class CalibrationBody(_Record):
    """A calibration file; equal inputs give equal bytes."""

    schema_version: str = SCHEMA_VERSION
    command: tuple[str, ...] = Field(description="what made it, without the names of the models and of the output")
    entries: Annotated[tuple[CalibrationEntry, ...], AfterValidator(_unambiguous)]

    def to_bytes(self) -> bytes:
        """What is written to a file."""
        return (json.dumps(self.model_dump(mode="json"), sort_keys=True, indent=2, allow_nan=False) + "\n").encode()


@dataclass(frozen=True, kw_only=True)
class CalibrationFile:
    """A calibration that was read, or ships with the package."""

    name: str
    sha256: str
    body: CalibrationBody
    shipped: bool = False


def read_calibration(path: Path) -> CalibrationFile:
    """Read a calibration file.

    Raises:
        OSError: it cannot be read.
        CalibrationError: it is no calibration that this version reads.
    """
    return parse_calibration(path.read_bytes(), path.name)


def parse_calibration(data: bytes, name: str, *, shipped: bool = False) -> CalibrationFile:
    """The same for bytes that are at hand."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{name}: no JSON ({error}); make it with qdefense calibrate") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, str) or version.partition(".")[0] != _MAJOR:
        raise CalibrationError(
            f"{name}: schema version {version!r}, this one reads {_MAJOR}.x; make it again with qdefense calibrate"
        )
    try:
        body = CalibrationBody.model_validate_json(data)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise CalibrationError(
            f"{name}: {where}: {problem['msg'].removeprefix('Value error, ')}; make it again with qdefense calibrate"
        ) from error
    return CalibrationFile(name=name, sha256=hashlib.sha256(data).hexdigest(), body=body, shipped=shipped)


def shipped_calibrations() -> tuple[CalibrationFile, ...]:
    """Those that come with the package."""
    folder = resources.files("qdefense") / _SHIPPED
    if not folder.is_dir():
        return ()
    files = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".json")), key=lambda entry: entry.name)
    return tuple(parse_calibration(entry.read_bytes(), entry.name, shipped=True) for entry in files)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Where a scan draws the line; the p-value comes with the score."""

    threshold: Threshold
    clean_scores: tuple[float, ...] = ()

    def judged(self, score: float | None) -> Threshold:
        """The threshold as the finding stores it."""
        if score is None or not self.clean_scores:
            return self.threshold
        return self.threshold.model_copy(update={"p_value": conformal_p(score, self.clean_scores)})


def draw_line(
    calibrations: Calibrations | None,
    defense: str,
    settings: Mapping[str, Any],
    *,
    user: float | None,
    paper: float,
) -> Line:
    """The user's own threshold, else that of a calibration that fits, else the paper's.

    Raises:
        CalibrationError: the calibration that fits has too few models for the rate asked for.
    """
    if user is None and calibrations is not None:
        return calibrations.line(defense, settings, paper=paper)
    if user is None:
        return Line(threshold=Threshold(value=paper, source="paper"))
    unused = [] if calibrations is None else [file.name for file in calibrations.files if not file.shipped]
    note = f"set by hand, so nothing of {', '.join(unused)} is used" if unused else None
    return Line(threshold=Threshold(value=user, source="user", note=note))


@dataclass(frozen=True, kw_only=True)
class Calibrations:
    """What an audit may be calibrated by: its own subject and conditions, and the files, the user's before the shipped.

    ``rate`` is the false-alarm rate that was asked for; without one it is the default's.
    A file that was among the clean models of an entry is not judged by it: thresholds are never fitted on what they
    score (law 3).
    """

    artifact: str
    population: Population
    conditions: Conditions
    files: tuple[CalibrationFile, ...]
    rate: float | None = None

    def line(self, defense: str, settings: Mapping[str, Any], *, paper: float) -> Line:
        """The lowest line of the entries that fit, else the paper's, with what kept the user's files from fitting.

        Entries of the user's files go before shipped ones, and those with too few models for the rate count for none.

        Raises:
            CalibrationError: every entry that fits has too few models for the rate asked for.
        """
        wanted = to_jsonable_python(dict(settings))
        notes: list[str] = []
        fitting: list[_Fitting] = []
        for file in self.files:
            entry, different = _nearest(file, defense, wanted, self.population)
            if entry is None or different:
                notes += [] if file.shipped else [_mismatch(file, different)]
            elif self.artifact in entry.artifacts:
                notes.append(f"this very file is one of the clean models of {file.name}, which can thus not judge it")
            else:
                fitting.append((file, entry))
        if fitting:
            return self._calibrated(fitting)
        if self.rate is not None:
            notes.append(f"no calibration fits, so nothing promises a false-alarm rate of {self.rate:g}")
        return Line(threshold=Threshold(value=paper, source="paper", note="; ".join(notes) or None))

    def _calibrated(self, fitting: list[_Fitting]) -> Line:
        wanted = DEFAULT_RATE if self.rate is None else self.rate
        enough = [pair for pair in fitting if pair[1].n >= models_needed(wanted)]
        largest = max(fitting, key=lambda pair: pair[1].n)
        usable = [pair for pair in enough if not pair[0].shipped] or enough or [largest]
        usable = list({pair[0].sha256: pair for pair in usable}.values())  # the same file named twice is one
        promises = [(*_promised(pair, wanted), pair) for pair in usable]
        value, _, (file, entry) = min(promises, key=lambda promise: promise[0])
        # A clean file raises an alarm if it passes any of the lines: at most as often as all of them together.
        rate = min(1.0, sum(promised for _, promised, _ in promises))
        notes = [
            f"{small.name} fits, too, but has too few clean models ({few.n}) for a false-alarm rate of {wanted:g}"
            for small, few in fitting
            if (small, few) not in enough and not small.shipped
        ]
        if len(usable) > 1:
            lowest = f"the lowest threshold of the {len(usable)} files that fit, {file.name}"
            notes.append(f"{lowest}: their false-alarm rates add up")
        different = entry.conditions.differences(self.conditions)
        notes += [f"calibrated with {', '.join(different)}"] if different else []
        threshold = Threshold(
            value=value,
            source="calibrated",
            n=entry.n,
            false_alarm_rate=rate,
            calibration_sha256=file.sha256,
            note="; ".join(notes) or None,
        )
        return Line(threshold=threshold, clean_scores=entry.scores)


_Fitting = tuple[CalibrationFile, CalibrationEntry]


def _promised(fitting: _Fitting, rate: float) -> tuple[float, float]:
    file, entry = fitting
    try:
        return entry.threshold(rate)
    except ValueError as error:
        raise CalibrationError(
            f"{file.name}: {error}; calibrate on more, or ask for --false-alarm-rate {entry.smallest_rate}"
        ) from error


def _nearest(
    file: CalibrationFile, defense: str, settings: Mapping[str, JsonValue], population: Population
) -> tuple[CalibrationEntry | None, list[str]]:
    pairs = [(entry, entry.differences(defense, settings, population)) for entry in file.body.entries]
    return min(pairs, key=lambda pair: len(pair[1]), default=(None, []))


def _mismatch(file: CalibrationFile, different: list[str]) -> str:
    if not different:
        return f"{file.name} has no entries"
    return f"no entry of {file.name} fits; the nearest has another {', another '.join(different)}"
