from __future__ import annotations

import itertools

import pytest

from qdefense.audit import gate
from qdefense.findings import Finding, RepairResult, Verdict

CLEAN, BACKDOORED = Verdict.CLEAN, Verdict.BACKDOORED
NOT_MEASURED, NOT_APPLICABLE = Verdict.NOT_MEASURED, Verdict.NOT_APPLICABLE


def finding(verdict: Verdict, defense: str = "scan-a", kind: str = "scan") -> Finding:
    body = {"defense": defense, "kind": kind, "verdict": verdict, "reason": f"because {verdict}", "seed": 0}
    return Finding.model_validate(body)


def test_codes_are_those_of_the_command_line() -> None:
    from qdefense import cli  # noqa: PLC0415

    codes = [gate.PASSED, gate.FAILED, gate.USAGE, gate.INCOMPLETE, gate.REFUSED, gate.INTERRUPTED]
    assert codes == [0, 1, 2, 3, 4, 130]
    copies = [cli.PASSED, cli.USAGE, cli.INCOMPLETE, cli.INTERRUPTED]
    assert copies == [gate.PASSED, gate.USAGE, gate.INCOMPLETE, gate.INTERRUPTED]


ONE, TWO = ("scan-a",), ("scan-a", "scan-b")
CASES = {
    "the required scan is clean": ([finding(CLEAN)], ONE, (), 0, ["scan-a: because CLEAN"]),
    "both required scans are clean": (
        [finding(CLEAN), finding(CLEAN, "scan-b")],
        *(TWO, (), 0),
        ["scan-a: because CLEAN", "scan-b: because CLEAN"],
    ),
    "one required scan gave no answer": ([finding(CLEAN)], TWO, (), 3, ["scan-b: gave no answer"]),
    "no scan gave an answer": ([], ONE, (), 3, ["scan-a: gave no answer"]),
    "nothing was required and nothing ran": ([], (), (), 3, ["no model scan among the checks that ran"]),
    "an answer is NOT_MEASURED": ([finding(NOT_MEASURED)], ONE, (), 3, ["scan-a: NOT_MEASURED: because NOT_MEASURED"]),
    "an answer is NOT_APPLICABLE": (
        [finding(NOT_APPLICABLE)],
        *(ONE, (), 3),
        ["scan-a: NOT_APPLICABLE: because NOT_APPLICABLE"],
    ),
    "one of two answers of a scan is NOT_MEASURED": (
        [finding(CLEAN), finding(NOT_MEASURED)],
        *(ONE, (), 3),
        ["scan-a: NOT_MEASURED: because NOT_MEASURED"],
    ),
    "only an optional scan was not measured": (
        [finding(CLEAN), finding(NOT_MEASURED, "scan-b")],
        *(ONE, (), 0),
        ["scan-a: because CLEAN", "scan-b: because NOT_MEASURED"],
    ),
    "only a dataset scan is clean": (
        [finding(CLEAN, kind="dataset")],
        *(ONE, (), 3),
        ["no model scan among the checks that ran"],
    ),
    "only a filter is clean": (
        [finding(CLEAN, kind="filter")],
        *(ONE, (), 3),
        ["no model scan among the checks that ran"],
    ),
    "a dataset scan and a model scan are clean": (
        [finding(CLEAN, "scan-b", "dataset"), finding(CLEAN)],
        *(TWO, (), 0),
        ["scan-b: because CLEAN", "scan-a: because CLEAN"],
    ),
    "all is clean but the worker died": ([finding(CLEAN)], ONE, ("it died",), 3, ["it died"]),
    "the worker died early": ([], ONE, ("it died",), 3, ["it died", "scan-a: gave no answer"]),
    "a scan has an alarm": ([finding(BACKDOORED)], ONE, (), 1, ["scan-a: because BACKDOORED"]),
    "an optional scan has an alarm": (
        [finding(CLEAN), finding(BACKDOORED, "scan-b")],
        *(ONE, (), 1),
        ["scan-b: because BACKDOORED"],
    ),
    "a dataset scan has an alarm": (
        [finding(CLEAN), finding(BACKDOORED, "scan-b", "dataset")],
        *(TWO, (), 1),
        ["scan-b: because BACKDOORED"],
    ),
    "an alarm comes with a death and a missing answer": (
        [finding(BACKDOORED)],
        *(TWO, ("it died",), 1),
        ["scan-a: because BACKDOORED", "it died", "scan-b: gave no answer"],
    ),
}


@pytest.mark.parametrize(("findings", "required", "interruptions", "code", "reasons"), CASES.values(), ids=list(CASES))
def test_decide_gives_the_code_when(
    findings: list[Finding],
    required: tuple[str, ...],
    interruptions: tuple[str, ...],
    code: int,
    reasons: list[str],
) -> None:
    judged = gate.decide(findings, required, interruptions)
    outcome = {0: "PASSED", 1: "FAILED", 3: "INCOMPLETE"}[code]
    assert (judged.exit_code, judged.outcome, list(judged.reasons)) == (code, outcome, reasons)
    assert judged.required == required


def test_decide_passes_only_what_law_two_allows_when_all_combinations_are_tried() -> None:
    answers: list[Verdict | None] = [None, *Verdict]
    for first, second, died in itertools.product(answers, answers, [False, True]):
        findings = [finding(v, name) for v, name in ((first, "scan-a"), (second, "scan-b")) if v is not None]
        code = gate.decide(findings, TWO, ("it died",) if died else ()).exit_code
        alarm = BACKDOORED in (first, second)
        passes = (first, second, died) == (CLEAN, CLEAN, False)
        assert code == (1 if alarm else 0 if passes else 3), (first, second, died)


def test_refuse_gives_4_and_the_reason() -> None:
    judged = gate.refuse("the file is empty", ONE)
    assert (judged.outcome, judged.exit_code) == ("REFUSED", 4)
    assert (judged.reasons, judged.required) == (("the file is empty",), ONE)


# --- repairs ----------------------------------------------------------------------------------------------------------


def repair(
    *, before: float = 0.96, after: float = 0.94, images: int = 100, verdict: Verdict = Verdict.REPAIRED
) -> Finding:
    result = RepairResult(
        new_digest="d", before={"clean_accuracy": before}, after={"clean_accuracy": after}, images=images
    )
    return finding(verdict, "mender", "repair").model_copy(update={"result": result})


REPAIRS = {
    "it costs just what it may": ([repair()], (), 0, ["mender: because REPAIRED"]),
    "it gains": ([repair(after=0.99)], (), 0, ["mender: because REPAIRED"]),
    "it costs more": (
        [repair(after=0.93)],
        *((), 1),
        [
            "mender is refused: clean accuracy falls by 3.00 points on 100 held-out images, at most 2 were allowed",
            "because REPAIRED",
        ],
    ),
    "it costs more and the worker died": (
        *([repair(after=0.5)], ("killed",), 1),
        [
            "mender is refused: clean accuracy falls by 46.00 points on 100 held-out images, at most 2 were allowed",
            *("because REPAIRED", "killed"),
        ],
    ),
    "it says itself that it costs too much": (
        [repair(verdict=Verdict.NOT_REPAIRED)],
        *((), 1, ["mender is refused: because NOT_REPAIRED"]),
    ),
    "it says so and the worker died": (
        [repair(verdict=Verdict.NOT_REPAIRED)],
        *(("killed",), 1, ["mender is refused: because NOT_REPAIRED", "killed"]),
    ),
    "the worker died after it": ([repair()], ("killed",), 3, ["killed"]),
    "it gave no answer": ([], (), 3, ["mender: gave no answer"]),
    "another one answered": ([finding(CLEAN)], (), 3, ["mender: gave no answer"]),
    "nothing was measured": (
        [finding(NOT_MEASURED, "mender", "repair")],
        *((), 3, ["mender: NOT_MEASURED: because NOT_MEASURED"]),
    ),
    "it does not apply": (
        [finding(NOT_APPLICABLE, "mender", "repair")],
        *((), 3, ["mender: NOT_APPLICABLE: because NOT_APPLICABLE"]),
    ),
    "a scan answers in its name": ([finding(CLEAN, "mender")], (), 3, ["mender: CLEAN: because CLEAN"]),
    "it has no accuracies": ([repair(images=0)], (), 3, ["mender: the clean accuracy was not measured"]),
}


@pytest.mark.parametrize(("findings", "stops", "code", "reasons"), REPAIRS.values(), ids=list(REPAIRS))
def test_decide_repair_when(findings: list[Finding], stops: tuple[str, ...], code: int, reasons: list[str]) -> None:
    judged = gate.decide_repair(findings, "mender", 2.0, stops)
    outcomes = {0: "PASSED", 1: "FAILED", 3: "INCOMPLETE"}
    assert (judged.exit_code, judged.outcome, list(judged.reasons)) == (code, outcomes[code], reasons)
    assert judged.required == ("mender",)


def test_a_repair_never_passes_an_audit() -> None:
    judged = gate.decide([repair()], ("mender",))
    assert judged.exit_code == 3
