from __future__ import annotations

from typing import Any

import pytest

from qdefense.defenses import DEFENSES
from qdefense.defenses.filters.strip import Strip
from qdefense.defenses.scans.neural_cleanse import NeuralCleanse
from qdefense.fidelity import GradientCheck, MismatchCause, uncertified
from qdefense.findings import Finding, Verdict
from qdefense.rates import MIN_SKILL
from qdefense.report import advice
from qdefense.report.model import Accuracy, Report

from . import sample_reports as samples


def steps(report: Report) -> str:
    return " ".join(f"{step.text} [{' '.join(step.command)}]" for step in advice.next_steps(report))


def gaps(report: Report) -> str:
    return " ".join(f"{gap.what}. {gap.why}" for gap in advice.not_checked(report))


def with_subject(report: Report, **changes: Any) -> Report:
    return report.model_copy(update={"subject": report.subject.model_copy(update=changes)})


def open_scan(**changes: Any) -> Report:
    """INCOMPLETE, with a scan that gave no verdict."""
    result = samples.scan_result([90.0, 95.0, 99.0]).model_copy(update=changes)
    return samples.report("INCOMPLETE", samples.scan(Verdict.NOT_MEASURED, result))


def test_advice_has_words_for_every_outcome() -> None:
    outcomes = {"PASSED", "FAILED", "INCOMPLETE", "REFUSED"}
    assert set(advice.HEADLINES) == set(advice.MEANINGS) == outcomes
    assert all("o not ship" in advice.HEADLINES[outcome] for outcome in outcomes - {"PASSED"})


def test_advice_knows_the_limits_of_every_scan() -> None:
    """A new scan says in `advice._LIMITS` what it cannot see."""
    audited = {name for name in DEFENSES.names() if DEFENSES.create(name).kind in {"scan", "filter"}}
    assert {NeuralCleanse.name, Strip.name} <= audited
    assert audited <= advice.known_limits()


# --- what to do next --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("off", "told"), [(-1e-6, True), (1e-6, False)])
def test_next_steps_call_accuracy_near_chance_below_the_mark_that_scans_go_by(off: float, told: bool) -> None:
    data = open_scan().subject.data
    assert data is not None
    chance = 1 / data.classes
    accuracy = Accuracy(value=chance + MIN_SKILL * (1 - chance) + off, images=100, source="measured")
    assert ("hardly better than chance" in steps(with_subject(open_scan(), clean_accuracy=accuracy))) is told


def test_next_steps_name_the_suspects_and_more_work_when_failed() -> None:
    text = steps(samples.failed())
    for part in (
        "Stop the release, and keep the file and report.json",
        "Look at the trigger of class 0 (sign 0) below.",
        "[--defense neural-cleanse:budget=exhaustive --seed 4]",
        "[qdefense calibrate --help]",
        "Train again on data that you trust",
    ):
        assert part in text


def test_next_steps_count_the_suspects_when_there_are_many() -> None:
    report = samples.report(
        "FAILED", samples.scan(Verdict.BACKDOORED, samples.scan_result([*range(1, 21)], suspects=8))
    )
    assert "4 (sign 4) and 3 more below." in steps(report)


def test_next_steps_ask_for_no_more_work_when_the_budget_was_the_largest() -> None:
    (finding,) = samples.failed().findings
    most = finding.model_copy(update={"settings": {"budget": "exhaustive"}})
    assert "exhaustive" not in steps(samples.report("FAILED", most))


def test_next_steps_name_what_was_not_measured_when_failed_too() -> None:
    report = samples.failed()
    gate = report.gate.model_copy(update={"required": ("neural-cleanse", "another")})
    assert "The audit ended before another gave an answer." in steps(report.model_copy(update={"gate": gate}))


def test_next_steps_bind_the_pass_to_the_very_file_when_passed() -> None:
    text = steps(samples.passed())
    assert "Ship this very file, by its sha256 and those of any files beside it." in text
    assert "[qdefense calibrate --help]" in text


def test_next_steps_ask_for_no_calibration_when_the_threshold_is_calibrated() -> None:
    assert "calibrate" not in steps(samples.passed(samples.CALIBRATED))


def test_next_steps_compare_the_digest_when_refused() -> None:
    assert steps(samples.refused()).startswith("Compare the file's size and sha256 with what was exported")


def gradients(**changes: Any) -> GradientCheck:
    fields = {"rows": 256, "finite_rows": 1.0, "nonzero_rows": 0.0, "passes": False, **changes}
    return GradientCheck.model_validate(fields)


HINTS = {
    "ended": "The audit ended before neural-cleanse gave an answer.",
    "images": "Give more clean images: 50 were there, 256 are needed, and 500 or more are better.",
    "numbers": "The file answers clean images with values that are no numbers",
    "chance": "The model is hardly better than chance on these images.",
    "misread": "right more often (97.0%) when it is driven otherwise: pixels in [0, 255] (--range 0,255).",
    "blind": "Have someone explain the gradient-blind nodes under The file",
    "censored": "For 4 of 6 classes neural-cleanse found no trigger that works on the file. Give it more work; more "
    "clean images help too. [--defense neural-cleanse:budget=exhaustive --seed 4]",
    "equal": "At least half of the classes have the same norm, so none can stand out.",
    "replay": "does not follow the file on the stamped images",
    "applicable": "cannot judge this file with what was given. Require a check that can.",
    "gradients": "The shadow has no usable gradients",
    "saturation": "Quantize it again with --reduce-range",
    "unknown": "Put right what the reasons name.",
}
INCOMPLETE: dict[str, tuple[Report, list[str]]] = {
    "the worker was killed": (samples.killed(), ["ended"]),
    "images are few": (samples.golden("1.1-incomplete"), ["images"]),
    "logits are no numbers": (with_subject(open_scan(), clean_accuracy=None), ["numbers"]),
    "accuracy is near chance": (
        with_subject(open_scan(), clean_accuracy=Accuracy(value=0.2, images=320)),
        ["chance"],
    ),
    "another contract is better": (samples.misread(), ["misread", "ended", "chance"]),
    "nodes are gradient-blind": (
        with_subject(open_scan(), inspection=samples.hostile("if").subject.inspection),
        ["blind"],
    ),
    "classes are censored": (samples.not_measured(), ["saturation", "censored"]),
    "norms are equal": (open_scan(mad=0.0), ["equal"]),
    "the replay disagrees in top-1": (open_scan(replay_agreement=0.9), ["replay"]),
    "the replay disagrees in RMS": (open_scan(replay_relative_rms=0.2), ["replay"]),
    "the replay has no RMS": (open_scan(replay_relative_rms=None), ["replay"]),
    "nothing applies": (samples.report("INCOMPLETE", samples.scan(Verdict.NOT_APPLICABLE, None)), ["applicable"]),
    "gradients are zero": (
        open_scan().model_copy(
            update={"certificate": uncertified("zero gradients").model_copy(update={"gradients": gradients()})}
        ),
        ["gradients"],
    ),
    "the accuracy was stated": (with_subject(samples.killed(), data=samples.unlabelled().subject.data), ["ended"]),
    "the reason is not known here": (open_scan(), ["unknown"]),
}


@pytest.mark.parametrize(("report", "expected"), INCOMPLETE.values(), ids=list(INCOMPLETE))
def test_next_steps_say_what_to_get_and_no_more_when(report: Report, expected: list[str]) -> None:
    text = steps(report)
    assert {name for name, hint in HINTS.items() if hint in text} == set(expected)
    assert text.endswith("Audit again. Only PASSED, exit code 0, is a pass. []")


def test_hints_are_each_told_by_some_report() -> None:
    assert {name for _, names in INCOMPLETE.values() for name in names} == set(HINTS)


CAUSES = {
    "saturation": "Quantize it again with --reduce-range",
    "batch": "Export it with a dynamic batch or a batch of 1",
    "optimization-level": "ONNX Runtime rewrites this graph",
    "unsupported-operator": "The shadow does not know an operator of this file.",
    "numerics": "Shadow and file disagree for a reason that is not known.",
}


@pytest.mark.parametrize("kind", CAUSES)
def test_next_steps_name_the_remedy_when_the_shadow_is_not_certified(kind: str) -> None:
    cause = MismatchCause.model_validate({"kind": kind, "layers": (), "detail": "d"})
    report = open_scan().model_copy(update={"certificate": uncertified("it differs", cause)})
    told = [name for name, text in CAUSES.items() if text in steps(report)]
    assert told == [kind]


def test_causes_are_all_known_to_the_advice() -> None:
    known = MismatchCause.model_json_schema()["properties"]["kind"]["enum"]
    assert sorted(known) == sorted(CAUSES)


@pytest.mark.parametrize("name", ["failed", "passed", "calibrated", "unlabelled"])
def test_next_steps_give_no_hint_when_nothing_is_missing(name: str) -> None:
    text = steps(samples.SAMPLES[name]())
    assert not any(part in text for part in ("ended before", "more clean images", "chance", "shadow", "gradient-blind"))


# --- what was not checked ---------------------------------------------------------------------------------------------


def test_not_checked_names_what_neural_cleanse_cannot_see() -> None:
    text = gaps(samples.passed())
    for part in ("Blended", "warps", "dynamic", "source-specific", "clean-label", "no gradient can reach"):
        assert part in text
    for part in ("The training data", "The inputs in production", "Other runtimes and CPUs", "ONNX Runtime 1.32.0"):
        assert part in text


def test_not_checked_says_that_the_pixels_range_is_the_files_own_word() -> None:
    passed = samples.passed()
    contract = passed.subject.contract
    assert contract is not None
    told = {
        source: "Whether your product feeds the file as it says" in gaps(with_subject(passed, contract=stated))
        for source in ("metadata", "options", "sidecar", "graph")
        for stated in (contract.model_copy(update={"source": source}),)
    }
    assert told == {"metadata": True, "options": False, "sidecar": False, "graph": False}
    named = contract.model_copy(update={"source": "options", "pixels_from": "metadata"})
    assert "Whether your product feeds the file as it says" in gaps(with_subject(passed, contract=named))
    whole = contract.model_copy(update={"source": "options", "pixels_from": "options"})
    assert "Whether your product feeds the file as it says" not in gaps(with_subject(passed, contract=whole))


def test_not_checked_counts_the_classes_without_a_trigger_of_a_clean_scan() -> None:
    passed = samples.passed()
    told = "2 of 11 classes as targets. neural-cleanse found no trigger for them that works on the file, so that none "
    assert told in gaps(passed)
    whole = samples.scan_result([10.0, 11.0, 12.0, 13.0, 14.0, 15.0, 16.0])
    findings = tuple(finding.model_copy(update={"result": whole}) for finding in passed.findings)
    assert "classes as targets" not in gaps(passed.model_copy(update={"findings": findings}))


def test_not_checked_says_that_the_false_alarm_rate_is_unknown_unless_calibrated() -> None:
    assert "so its false-alarm rate is unknown" in gaps(samples.passed())
    assert "false-alarm rate" not in gaps(samples.passed(samples.CALIBRATED))


@pytest.mark.parametrize("name", ["killed", "not measured", "newer"])
def test_not_checked_names_the_defense_when_it_gave_no_verdict(name: str) -> None:
    text = gaps(samples.SAMPLES[name]())
    assert "Whatever neural-cleanse looks for. It gave no verdict on this file." in text
    assert "Blended" not in text
    assert "false-alarm rate" not in text


def test_not_checked_is_everything_when_refused() -> None:
    assert gaps(samples.refused()) == "Everything. No check ran on this file."


def test_not_checked_says_so_when_a_defense_has_no_description() -> None:
    finding = Finding(defense="other", kind="dataset", verdict=Verdict.CLEAN, reason="r", seed=0)
    text = gaps(samples.report("PASSED", finding))
    assert "What is beyond the reach of other. This version has no description of it." in text
    assert "The training data" not in text


# --- training data ----------------------------------------------------------------------------------------------------


def test_next_steps_say_where_the_flagged_images_are_and_not_to_calibrate_what_cannot_be() -> None:
    text = steps(samples.poisoned())
    assert "Look at the flagged training images of activation-clustering: report.json lists their rows" in text
    assert "spectral-signatures" not in text
    assert "Calibrate" not in text
    assert "flagged training images" not in steps(samples.failed())


def test_not_checked_names_what_dataset_scans_cannot_see() -> None:
    text = gaps(samples.poisoned())
    assert "Poison that activation-clustering does not tell apart." in text
    assert "How often activation-clustering is wrong." in text
    assert "Whatever spectral-signatures looks for. It gave no verdict on this file." in text
    assert "The training data. No check of it ran." not in text
