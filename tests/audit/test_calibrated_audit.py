from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from qdefense.audit import worker
from qdefense.audit.calibrating import read_models, scan_of
from qdefense.audit.events import Described, Event, Found, Job
from qdefense.audit.provenance import conditions_of, environment
from qdefense.audit.worker import _stopped
from qdefense.calibration import CalibrationBody, CalibrationEntry, CalibrationError, parse_calibration
from qdefense.data.images import ImageSet
from qdefense.evidence import Evidence
from qdefense.fidelity import uncertified
from qdefense.findings import Threshold
from qdefense.session import DeployedSession, profile_for

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

SPEC = "neural-cleanse:budget=quick"


@pytest.fixture(autouse=True)
def _no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """No shadow, so that every scan refuses at once; where its line would be is in its finding."""

    def gather(session: DeployedSession, clean: ImageSet, **options: Any) -> Evidence:
        options.pop("progress")
        return Evidence(session=session, shadow=None, certificate=uncertified("not asked for"), clean=clean, **options)

    monkeypatch.setattr(worker, "gather_evidence", gather)
    monkeypatch.setattr(worker, "shipped_calibrations", tuple)


def entry_for(toy: Toy, count: int = 20, **changes: Any) -> CalibrationEntry:
    """Of other files like the clean toy: its conditions are those of this machine."""
    (model,) = read_models([Job(model=str(toy.clean), data=str(toy.data))])
    artifact = worker.Artifact.read(toy.clean)
    values: dict[str, Any] = {
        "defense": "neural-cleanse",
        "settings": scan_of(SPEC).settings,
        "population": model.population,
        "conditions": conditions_of(environment(profile_for(artifact)), 0),
        "scores": tuple(index / 10 for index in range(count)),
        "artifacts": tuple(f"{index:064x}" for index in range(count)),
        "not_measured": 0,
    }
    return CalibrationEntry(**(values | changes))


def write(path: Path, *entries: CalibrationEntry) -> str:
    path.write_bytes(CalibrationBody(command=("made", "by hand"), entries=entries).to_bytes())
    return str(path)


def threshold_of(toy: Toy, spec: str = SPEC, **job: Any) -> Threshold:
    events: list[Event] = []
    worker.run(Job(model=str(toy.clean), data=str(toy.data), defenses=(spec,), **job), events.append)
    (found,) = [event for event in events if isinstance(event, Found)]
    assert found.finding.threshold is not None
    return found.finding.threshold


def test_run_draws_the_line_of_the_calibration_that_fits(toy: Toy, tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", entry_for(toy))
    threshold = threshold_of(toy, calibrations=(path,))
    assert (threshold.value, threshold.source, threshold.n) == (1.9, "calibrated", 20)
    assert (threshold.false_alarm_rate, threshold.p_value, threshold.note) == (1 / 21, None, None)
    assert threshold.calibration_sha256 == parse_calibration(Path(path).read_bytes(), "c.json").sha256
    assert threshold_of(toy, calibrations=(path,), false_alarm_rate=0.1).value == 1.8


def test_run_uses_what_ships_without_being_asked(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = CalibrationBody(command=(), entries=(entry_for(toy),))
    shipped = parse_calibration(body.to_bytes(), "shipped.json", shipped=True)
    monkeypatch.setattr(worker, "shipped_calibrations", lambda: (shipped,))
    assert threshold_of(toy).calibration_sha256 == shipped.sha256
    mine = write(tmp_path / "c.json", entry_for(toy, scores=tuple(index / 5 for index in range(20))))
    assert threshold_of(toy, calibrations=(mine,)).value == 3.8, "the user's own comes first"


def test_run_stays_with_the_paper_and_says_why_when_nothing_fits(toy: Toy, tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", entry_for(toy))
    threshold = threshold_of(toy, f"{SPEC},patience=3", calibrations=(path,), limit=300)
    assert (threshold.value, threshold.source, threshold.false_alarm_rate) == (2.0, "paper", None)
    assert threshold.note == "no entry of c.json fits; the nearest has another settings (patience), another data digest"
    assert threshold_of(toy) == Threshold(value=2.0, source="paper")


def test_run_does_not_judge_a_file_by_its_own_score(toy: Toy, tmp_path: Path) -> None:
    (model,) = read_models([Job(model=str(toy.clean), data=str(toy.data))])
    own = (*entry_for(toy).artifacts[:-1], model.identity)
    threshold = threshold_of(toy, calibrations=(write(tmp_path / "c.json", entry_for(toy, artifacts=own)),))
    assert (threshold.value, threshold.source) == (2.0, "paper")
    assert threshold.note == "this very file is one of the clean models of c.json, which can thus not judge it"


def test_run_lets_the_user_decide(toy: Toy, tmp_path: Path) -> None:
    path = write(tmp_path / "c.json", entry_for(toy))
    threshold = threshold_of(toy, f"{SPEC},threshold=3", calibrations=(path,))
    assert (threshold.value, threshold.source) == (3.0, "user")
    assert threshold.note == "set by hand, so nothing of c.json is used"


def test_run_tells_the_seed_that_the_calibration_was_made_with(toy: Toy, tmp_path: Path) -> None:
    threshold = threshold_of(toy, calibrations=(write(tmp_path / "c.json", entry_for(toy)),), seed=7)
    assert (threshold.source, threshold.note) == ("calibrated", "calibrated with seed 0 (here 7)")


@pytest.mark.parametrize(
    ("content", "rate", "message"),
    [
        (b"{}", None, "c.json: schema version None"),
        (None, 0.01, "c.json: a false-alarm rate of 0.01 needs 99 clean models, there are 20; calibrate on more, or"),
    ],
)
def test_run_stops_before_the_work_when_a_calibration_cannot_be_used(
    toy: Toy, tmp_path: Path, content: bytes | None, rate: float | None, message: str
) -> None:
    path = Path(write(tmp_path / "c.json", entry_for(toy)))
    path.write_bytes(content or path.read_bytes())
    job = Job(
        model=str(toy.clean), data=str(toy.data), defenses=(SPEC,), calibrations=(str(path),), false_alarm_rate=rate
    )
    events: list[Event] = []
    with pytest.raises(CalibrationError) as raised:
        worker.run(job, events.append)
    assert str(raised.value).startswith(message)
    assert not any(isinstance(event, Described) for event in events), "a stop after it would not be exit code 2"
    assert _stopped(raised.value).exit_code == 2


def test_run_counts_weights_in_other_files_to_what_is_judged(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of the same bytes, whose weights lie beside them, are two models."""
    artifact = replace(worker.Artifact.read(toy.clean), external_files=(("w.bin", "1" * 64),))
    entry = entry_for(toy)
    own = tuple(sorted((*entry.artifacts[:-1], artifact.sha256)))
    path = write(tmp_path / "c.json", entry_for(toy, artifacts=own))
    monkeypatch.setattr(worker, "_open", lambda _job, _emit: artifact)
    assert threshold_of(toy, calibrations=(path,)).source == "calibrated"
