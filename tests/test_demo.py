from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from qdefense.audit.gate import decide
from qdefense.data.opening import open_data
from qdefense.demo import ATTACK, SEEDS, DemoOutcome, DemoRow
from qdefense.demo_report import print_demo
from qdefense.findings import Finding, Verdict
from qdefense.report.model import Environment, Report, Subject, Volatile
from qdefense.session import Runtime
from qdefense.trial import Behaviour, Truth
from qdefense.zoo import trigger_of


def _finding(verdict: Verdict) -> Finding:
    return Finding(defense="neural-cleanse", kind="scan", verdict=verdict, reason="because", seed=0)


def _row(verdict: Verdict, asr: float | None) -> DemoRow:
    finding = _finding(verdict)
    report = Report(
        subject=Subject(file="second.onnx"),
        environment=Environment(
            versions={}, runtime=Runtime(onnxruntime="1", machine="x86_64", isa=(), system="Linux")
        ),
        findings=(finding,),
        gate=decide([finding], ["neural-cleanse"]),
        volatile=Volatile(started="", seconds=0, host="", load=()),
    )
    behaviour = Behaviour(
        clean_accuracy=0.9, images=100, asr=asr, base_confusion=None if asr is None else 0.01, eligible=90
    )
    return DemoRow(file="second.onnx", behaviour=behaviour, report=report)


def _shown(rows: tuple[DemoRow, ...], trap: Verdict) -> tuple[str, int]:
    outcome = DemoOutcome(rows=rows, trap=_finding(trap), folder=Path("demo"))
    console = Console(file=io.StringIO(), width=150)
    print_demo(outcome, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return text, outcome.exit_code


@pytest.mark.parametrize(
    ("verdict", "asr", "right"),
    [
        (Verdict.BACKDOORED, 0.95, True),
        (Verdict.CLEAN, 0.95, False),
        (Verdict.NOT_MEASURED, 0.95, False),
        (Verdict.CLEAN, None, True),
        (Verdict.BACKDOORED, None, False),
        (Verdict.NOT_MEASURED, None, False),
        (Verdict.CLEAN, 0.5, True),
        (Verdict.BACKDOORED, 0.02, True),
        (Verdict.NOT_MEASURED, 0.02, False),
    ],
)
def test_row_is_right_when_the_verdict_fits_the_files_own_activity(
    verdict: Verdict, asr: float | None, right: bool
) -> None:
    assert _row(verdict, asr).right is right


def test_demo_says_so_when_a_file_is_judged_wrongly() -> None:
    text, code = _shown((_row(Verdict.CLEAN, None), _row(Verdict.CLEAN, 0.95)), Verdict.NOT_MEASURED)
    assert code == 1
    assert "judged wrongly: second.onnx is active, the verdict is CLEAN" in text
    assert "every file was judged rightly" not in text


def test_demo_fails_when_the_trap_is_not_seen() -> None:
    text, code = _shown((_row(Verdict.CLEAN, None),), Verdict.CLEAN)
    assert code == 1
    assert "without gradients the scan said CLEAN" in text


def test_demo_passes_when_everything_is_judged_rightly() -> None:
    text, code = _shown((_row(Verdict.CLEAN, None), _row(Verdict.BACKDOORED, 0.95)), Verdict.NOT_MEASURED)
    assert code == 0
    assert "every file was judged rightly" in text


def test_seeds_are_those_of_the_first_demo() -> None:
    assert list(SEEDS.values()) == [0, 1]
    assert list(ATTACK.values()) == [None, "badnets:target-class=7"]


def test_trigger_of_is_the_attacks_trigger_when_the_truth_names_one() -> None:
    images = open_data("signs", limit=4)
    truth = Truth(
        attack="badnets",
        attack_settings={"size": 2, "target_class": 5},
        poison_indices=(),
        architecture="resnet8",
        recipe={},
        seed=0,
        data="",
        data_sha256="",
        artifact_sha256="",
        versions={},
    )
    trigger = trigger_of(truth, images)
    assert trigger is not None
    assert (trigger.stamp(images.pixels)[:, :, 29:31, 29:31] == 1).all()
    assert trigger.goal(images.labels).tolist() == [5] * 4
    assert trigger_of(truth.model_copy(update={"attack": None}), images) is None
