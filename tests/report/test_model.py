from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from qdefense.findings import Verdict
from qdefense.report.model import SCHEMA_VERSION, Report
from qdefense.report.reading import ReportError, read_report

GOLDEN = sorted(Path(__file__).with_name("golden").glob("*.json"))
"""Reports as versions wrote them once. They are never written again: every later version must read them."""
Json = dict[str, Any]


def leaves(node: object, path: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from leaves(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, node


@pytest.fixture
def body() -> Json:
    """A golden report that failed, as JSON."""
    path = Path(__file__).with_name("golden") / "1.0-failed.json"
    found: Json = json.loads(path.read_bytes())
    return found


# --- golden files -----------------------------------------------------------------------------------------------------


def test_golden_files_are_there_for_each_outcome() -> None:
    outcomes = ("failed", "incomplete", "refused")
    names = [
        f"{version}-{outcome}.json"
        for version in ("1.0", "1.1", "1.2", "1.3", "1.4", "1.5", "1.6")
        for outcome in outcomes
    ]
    assert [path.name for path in GOLDEN] == names


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_read_report_keeps_every_value_when_the_file_is_golden(path: Path) -> None:
    golden = dict(leaves(json.loads(path.read_bytes())))
    read = dict(leaves(json.loads(read_report(path.read_bytes()).model_dump_json())))
    assert {place: read.get(place, "lost") for place in golden} == golden


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_schema_accepts_the_file_when_it_is_golden(path: Path) -> None:
    schema = Report.model_json_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    validator(schema).validate(json.loads(path.read_bytes()))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_report_is_written_as_the_golden_file_when_nothing_was_added_since(path: Path) -> None:
    golden = json.loads(path.read_bytes())
    if golden["schema_version"] == SCHEMA_VERSION:
        written = json.loads(Report.model_validate(golden).model_dump_json())
        assert list(leaves(written)) == list(leaves(golden)), (
            "a change of the report needs a new minor version and a new golden file"
        )


def test_report_has_the_parts_the_design_names(body: Json) -> None:
    parts = ["schema_version", "subject", "environment", "certificate", "findings", "gate", "volatile"]
    assert list(Report.model_fields) == parts
    assert list(body) == parts


BROKEN: dict[str, Callable[[Json], object]] = {
    "a verdict is unknown": lambda body: body["findings"][0].update(verdict="FINE"),
    "the outcome is unknown": lambda body: body["gate"].update(outcome="OK"),
    "the exit code is a text": lambda body: body["gate"].update(exit_code="0"),
    "the gate is missing": lambda body: body.pop("gate"),
    "a finding has no reason": lambda body: body["findings"][0].pop("reason"),
    "the accuracy is null": lambda body: body["subject"]["clean_accuracy"].update(value=None),
}


@pytest.mark.parametrize("spoil", BROKEN.values(), ids=list(BROKEN))
def test_schema_rejects_the_report_when(body: Json, spoil: Callable[[Json], object]) -> None:
    spoil(body)
    schema = Report.model_json_schema()
    assert not jsonschema.validators.validator_for(schema)(schema).is_valid(body)


# --- newer minor versions ---------------------------------------------------------------------------------------------


def read(body: Json) -> Report:
    return read_report(json.dumps(body))


def with_new_fields(node: Any) -> Any:
    if isinstance(node, dict):
        return {**{key: with_new_fields(value) for key, value in node.items()}, "new_field": {"verdict": "CLEAN"}}
    return [with_new_fields(value) for value in node] if isinstance(node, list) else node


def test_read_report_ignores_fields_when_they_are_unknown_anywhere(body: Json) -> None:
    newer = with_new_fields({**body, "schema_version": "1.9"})
    for mapping in (newer["environment"]["versions"], newer["volatile"]["seconds_per_stage"]):
        del mapping["new_field"]  # keys of these are data, not fields
    for mapping in (newer["subject"]["inspection"]["opsets"], newer["subject"]["inspection"]["operators"]):
        del mapping["new_field"]
    del newer["findings"][0]["settings"]["new_field"]
    assert read(newer) == read({**body, "schema_version": "1.9"})


def test_read_report_takes_a_verdict_for_not_measured_when_it_is_unknown(body: Json) -> None:
    body["findings"][0]["verdict"] = "PROBABLY_CLEAN"
    (finding,) = read(body).findings
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.startswith("verdict 'PROBABLY_CLEAN' is not known to this version: trigger norm")
    assert finding.result is not None


def test_read_report_takes_a_finding_for_not_measured_when_its_kind_is_unknown(body: Json) -> None:
    body["findings"][0] |= {"kind": "watermark", "verdict": "CLEAN", "result": {"kind": "watermark"}}
    (finding,) = read(body).findings
    assert (finding.verdict, finding.result) == (Verdict.NOT_MEASURED, None)
    assert finding.reason.startswith("kind 'watermark' is not known to this version: ")


def test_read_report_names_one_unknown_thing_when_kind_and_verdict_are_unknown(body: Json) -> None:
    body["findings"][0] |= {"kind": "watermark", "verdict": "FINE"}
    (finding,) = read(body).findings
    assert finding.verdict is Verdict.NOT_MEASURED
    assert finding.reason.count("not known to this version") == 1


@pytest.mark.parametrize("code", [0, 1, 7])
def test_read_report_takes_the_gate_for_incomplete_when_its_outcome_is_unknown(body: Json, code: int) -> None:
    body["gate"] |= {"outcome": "PASSED_WITH_WAIVERS", "exit_code": code}
    gate = read(body).gate
    assert (gate.outcome, gate.exit_code) == ("INCOMPLETE", 3)
    assert gate.required == ("neural-cleanse",)


def test_read_report_takes_a_scheme_for_other_when_it_is_unknown(body: Json) -> None:
    body["subject"]["inspection"]["scheme"] = "fp4"
    body["subject"]["inspection"]["layers"][1]["scheme"] = "fp4"
    inspection = read(body).subject.inspection
    assert inspection is not None
    assert (inspection.scheme, [layer.scheme for layer in inspection.layers]) == ("other", ["fp32", "other"])


UNKNOWN: dict[str, tuple[Callable[[Json], object], Callable[[Report], object]]] = {
    "a granularity": (
        lambda body: body["subject"]["inspection"].update(granularity="per-bit"),
        lambda report: report.subject.inspection and report.subject.inspection.granularity,
    ),
    "the head": (
        lambda body: body["subject"]["contract"].update(head="boxes", layout="NWHC"),
        lambda report: report.subject.contract,
    ),
    "the provider": (
        lambda body: body["environment"]["profile"].update(provider="NpuExecutionProvider", optimization="layout"),
        lambda report: report.environment.profile,
    ),
    "the source of the shadow": (
        lambda body: body["certificate"].update(source="guessed"),
        lambda report: report.certificate,
    ),
    "an input set": (
        lambda body: body["certificate"]["sets"][2].update(name="corrupted"),
        lambda report: report.certificate,
    ),
    "the source of a threshold": (
        lambda body: body["findings"][0]["threshold"].update(source="oracle"),
        lambda report: report.findings[0].threshold,
    ),
    "the kind of a result": (
        lambda body: body["findings"][0]["result"].update(kind="graph"),
        lambda report: report.findings[0].result,
    ),
    "a decision of a filter": (
        lambda body: body["findings"][0].update(
            result={"kind": "filter", "decisions": ["accept", "escalate"], "scores": [0.1, 0.2]}
        ),
        lambda report: report.findings[0].result,
    ),
}


@pytest.mark.parametrize(("change", "look"), UNKNOWN.values(), ids=list(UNKNOWN))
def test_read_report_leaves_out_the_smallest_part_when_it_holds_an_unknown_value(
    body: Json, change: Callable[[Json], object], look: Callable[[Report], object]
) -> None:
    before = read(body)
    change(body)
    report = read(body)
    assert look(report) is None
    assert (report.gate, report.volatile) == (before.gate, before.volatile)
    assert report.findings[0].verdict is before.findings[0].verdict


def test_read_report_changes_nothing_when_all_is_known(body: Json) -> None:
    assert read(body) == Report.model_validate(body)


# --- no reports -------------------------------------------------------------------------------------------------------

NO_REPORTS: dict[str, tuple[str | bytes, str]] = {
    "nothing": ("", "not a report: no JSON: "),
    "not JSON": ("{'gate'}", "not a report: no JSON: "),
    "not UTF-8": (b"\xff\xfe\x00", "not a report: no JSON: "),
    "too deep": ("[" * 200_000, "not a report: no JSON: "),
    "a list": ("[]", "schema version None, this one reads 1.x; use the qdefense that wrote the report"),
    "another JSON": ("{}", "schema version None, this one reads 1.x"),
    "a newer major": ('{"schema_version": "2.0"}', "schema version '2.0', this one reads 1.x"),
    "a version like ours": ('{"schema_version": "10.0"}', "schema version '10.0', this one reads 1.x"),
    "a number for a version": ('{"schema_version": 1.0}', "schema version 1.0, this one reads 1.x"),
    "an empty report": ('{"schema_version": "1.0"}', "not a report: subject: Field required; write it again"),
}


@pytest.mark.parametrize(("text", "message"), NO_REPORTS.values(), ids=list(NO_REPORTS))
def test_read_report_says_why_when_the_text_is(text: str | bytes, message: str) -> None:
    with pytest.raises(ReportError) as caught:
        read_report(text)
    assert str(caught.value).startswith(message)
    assert len(str(caught.value)) <= 600


SPOILED: dict[str, tuple[Callable[[Json], object], str]] = {
    "the gate is missing": (lambda body: body.pop("gate"), "not a report: gate: Field required"),
    "an exit code is a text": (lambda body: body["gate"].update(exit_code="zero"), "not a report: gate.exit_code: "),
    "a finding has no reason": (
        lambda body: body["findings"][0].pop("reason"),
        "not a report: findings.0.reason: Field required",
    ),
    "a result has no score": (
        lambda body: body["findings"][0]["result"].pop("score"),
        "not a report: findings.0.result.score: Field required",
    ),
    "findings are a text": (lambda body: body.update(findings="none"), "not a report: findings: "),
}


@pytest.mark.parametrize(("spoil", "message"), SPOILED.values(), ids=list(SPOILED))
def test_read_report_names_the_place_when(body: Json, spoil: Callable[[Json], object], message: str) -> None:
    spoil(body)
    with pytest.raises(ReportError) as caught:
        read(body)
    assert str(caught.value).startswith(message)
