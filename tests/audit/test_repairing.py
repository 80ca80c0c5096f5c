from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
import pytest

from qdefense.audit import repairing, worker
from qdefense.audit.events import EVENTS, Described, Finished, Found, Job, Rewritten
from qdefense.audit.provenance import environment
from qdefense.audit.repairing import run_repair
from qdefense.audit.supervisor import Judge
from qdefense.converters.contract import StatedContract
from qdefense.findings import Finding, RepairResult, Verdict
from qdefense.registry import SpecError
from qdefense.report.model import Report, Subject, Volatile

from .worker_events import done, of_kind

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

NEW = b"a new file"
SHORT = "fine-pruning:epochs=2"


def answer(*, after: float = 0.95, digest: str = hashlib.sha256(NEW).hexdigest()) -> Finding:
    result = RepairResult(
        new_digest=digest, before={"clean_accuracy": 0.96}, after={"clean_accuracy": after}, images=100
    )
    return Finding(
        defense="fine-pruning", kind="repair", verdict=Verdict.REPAIRED, reason="done", seed=0, result=result
    )


@pytest.fixture
def came_back(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``came_back(finding, data)``: what the worker is made to send."""

    def plan(finding: Finding, data: bytes | None) -> None:
        def job(_job: Job, judge: Judge, **_: Any) -> tuple[Report, bytes | None]:
            volatile = Volatile(started="", seconds=0, host="", load=())
            subject, gate = Subject(file="m.onnx"), judge([finding], [])
            return (
                Report(subject=subject, environment=environment(), findings=(finding,), gate=gate, volatile=volatile),
                data,
            )

        monkeypatch.setattr(repairing, "run_job", job)

    return plan


def repaired(max_drop: float = 2) -> tuple[Report, bytes | None]:
    return run_repair(Job(model="m.onnx", data="d", repair=SHORT), max_drop=max_drop, on_progress=lambda *_: None)


def test_the_file_is_handed_on_where_the_gate_passes(came_back: Any) -> None:
    came_back(answer(), NEW)
    report, data = repaired()
    assert (report.gate.exit_code, data) == (0, NEW)


def test_no_file_is_handed_on_where_it_costs_too_much(came_back: Any) -> None:
    came_back(answer(after=0.93), NEW)
    report, data = repaired()
    assert (report.gate.exit_code, data) == (1, None)


@pytest.mark.parametrize("data", [None, b"another file"])
def test_a_file_that_the_finding_is_not_about_is_incomplete(came_back: Any, data: bytes | None) -> None:
    came_back(answer(), data)
    report, handed = repaired()
    assert (report.gate.outcome, report.gate.exit_code, handed) == ("INCOMPLETE", 3, None)
    assert report.gate.reasons == ("fine-pruning: the file that came back is not the one that its finding is about",)


def test_a_job_without_a_repair_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="the job has no repair"):
        run_repair(Job(model="m.onnx", data="d"), max_drop=2, on_progress=lambda *_: None)


def test_bytes_survive_the_way_through_json() -> None:
    every = Rewritten(data=bytes(range(256)))
    assert EVENTS.validate_json(every.model_dump_json()) == every


# --- the worker's side ------------------------------------------------------------------------------------------------


def test_the_worker_sends_the_file_before_its_finding(toy: Toy) -> None:
    events = done(Job(model=str(toy.backdoored), data=str(toy.data), repair=SHORT))
    kinds = [event.event for event in events if event.event != "advanced"]
    assert kinds == ["opened", "described", "answered", "certified", "rewritten", "found", "finished"]
    finding = of_kind(events, Found).finding
    assert finding.result.new_digest == hashlib.sha256(of_kind(events, Rewritten).data).hexdigest()
    assert "fine-pruning" in of_kind(events, Finished).seconds_per_stage
    stages = {event.stage for event in events if event.event == "advanced"}
    assert stages == {"fine-pruning: prune", "fine-pruning: tune"}


def test_the_worker_sends_no_file_where_nothing_was_measured(toy: Toy) -> None:
    events = done(Job(model=str(toy.clean), data=str(toy.few), repair=SHORT))
    assert [event.event for event in events][-2:] == ["found", "finished"]
    assert of_kind(events, Found).finding.verdict is Verdict.NOT_MEASURED


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("neural-cleanse", "neural-cleanse is a scan, which makes no new file; see `qdefense defenses`"),
        ("fine-prunning", "there is no defense 'fine-prunning'; did you mean 'fine-pruning'?"),
        ("fine-pruning:epochs=x", "defense 'fine-pruning:epochs=x': epochs: Input should be a valid integer"),
    ],
)
def test_a_wrong_method_is_told_before_the_file_is_let_in(toy: Toy, spec: str, reason: str) -> None:
    events: list[Any] = []
    with pytest.raises(SpecError, match=reason):
        worker.run(Job(model=str(toy.clean), data=str(toy.data), repair=spec), events.append)
    assert not any(isinstance(event, Described) for event in events)


def test_a_repair_is_no_defense_of_an_audit(toy: Toy) -> None:
    with pytest.raises(SpecError, match="fine-pruning is a repair, which no audit runs"):
        done(Job(model=str(toy.clean), data=str(toy.data), defenses=(SHORT,)))


def test_a_multi_label_file_is_not_applicable(toy: Toy, tmp_path: Path) -> None:
    model = onnx.load(toy.clean)
    model.graph.node[-1].output[0] = "scores"
    model.graph.node.append(onnx.helper.make_node("Sigmoid", ["scores"], ["logits"], name="sigmoid"))
    onnx.save(model, path := tmp_path / "sigmoid.onnx")
    job = Job(model=str(path), data=str(toy.data), repair=SHORT, contract=StatedContract(head="sigmoid"))
    finding = of_kind(done(job), Found).finding
    assert (finding.verdict, finding.kind) == (Verdict.NOT_APPLICABLE, "repair")
    assert finding.reason.startswith("the file answers with a sigmoid per class")
