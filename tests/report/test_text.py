from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qdefense.arithmetic import ArithmeticAgreement
from qdefense.cli.options import output_console
from qdefense.converters.contract import InputContract
from qdefense.converters.inspection import Inspection
from qdefense.converters.precision import Granularity, file_granularity
from qdefense.findings import Restart, ScanResult, Threshold
from qdefense.report.escaping import harmless, harmless_lines, internal_error, shortened
from qdefense.report.model import Accuracy, Environment, ReferenceFile, Report
from qdefense.report.reading import read_report
from qdefense.report.text import (
    accuracy_text,
    certificate_table,
    contract_rows,
    describe_filter,
    describe_restarts,
    describe_threshold,
    environment_rows,
    inspection_rows,
    print_report,
)

from . import sample_reports as samples
from .sample_reports import trigger

GOLDEN = Path(__file__).with_name("golden")
HOSTILE = "\x1b[2J\x1b]0;title\x07\u202eCLEAN\u2066\r\nPASSED  (exit code 0)\x9b31m[red]x[/red][link=http://e]y"
ESCAPED = r"\x1b[2J\x1b]0;title\x07\u202eCLEAN\u2066\r\nPASSED  (exit code 0)\x9b31m[red]x[/red][link=http://e]y"


def shown(report: Report, width: int = 200, *, colours: bool = False) -> str:
    """The report as a terminal of that width gets it."""
    stream = io.StringIO()
    console = Console(
        file=stream, width=width, force_terminal=colours, color_system="standard" if colours else None, highlight=False
    )
    print_report(report, console)
    return stream.getvalue()


def golden(name: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads((GOLDEN / f"1.0-{name}.json").read_bytes())
    return body


# --- foreign text -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain name_1/Conv", "plain name_1/Conv"),
        ("größe 速度 é", "größe 速度 é"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x9b31m", r"\x9b31m"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202eevil\u2069", r"\u202eevil\u2069"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("\u2028line", r"\u2028line"),
        ("\ud800", r"\ud800"),
        ("\x00\x7f", r"\x00\x7f"),
        ("[red]x[/red]", "[red]x[/red]"),
        ("", ""),
    ],
)
def test_harmless_escapes_what_a_terminal_acts_on(text: str, expected: str) -> None:
    assert harmless(text) == expected


def test_harmless_lines_keeps_line_ends_but_nothing_else() -> None:
    assert harmless_lines("one\x1b[2J\n  two\u202e\n") == "one\\x1b[2J\n  two\\u202e\n"


def test_shortened_gives_one_line_of_600_characters_when_there_are_more() -> None:
    assert shortened("one\n  two\t\tthree ") == "one two three"
    assert shortened("x" * 600) == "x" * 600
    assert shortened("x" * 601) == "x" * 596 + " ..."


def test_internal_error_names_the_type_when_there_is_no_text() -> None:
    assert internal_error(MemoryError()) == "internal error: MemoryError"
    assert internal_error(KeyError("x")) == "internal error: KeyError: 'x'"


def hostile_report() -> Report:
    """Every string of the failed report that another may have chosen."""
    body = golden("failed")
    subject, finding, certificate = body["subject"], body["findings"][0], body["certificate"]
    subject["file"] = HOSTILE
    subject["data"]["source"] = HOSTILE
    subject["inspection"] |= {
        "structure_warnings": [HOSTILE],
        "nonfinite_initializers": [HOSTILE],
        "gradient_blind_nodes": [{"name": HOSTILE, "operator": HOSTILE, "reason": HOSTILE}],
    }
    body["environment"]["saturating_operators"] = [HOSTILE]
    body["environment"]["runtime"] |= {"onnxruntime": HOSTILE, "machine": HOSTILE, "isa": [HOSTILE]}
    certificate["reason"] = HOSTILE
    finding |= {"defense": HOSTILE, "reason": HOSTILE}
    finding["settings"]["budget"] = HOSTILE
    finding["result"]["classes"][0]["class_name"] = HOSTILE
    body["gate"]["reasons"] = [HOSTILE]
    return Report.model_validate(body)


def test_print_report_shows_names_as_text_when_they_are_hostile() -> None:
    text = shown(hostile_report(), width=2000)
    assert text.count(ESCAPED) == 16
    allowed = set(text) - {"\n"}
    assert all(char.isprintable() for char in allowed)
    assert [line for line in text.splitlines() if line.startswith("PASSED")] == []


def test_print_report_sends_no_escapes_but_its_own_when_names_are_hostile_and_colours_are_on() -> None:
    text = shown(hostile_report(), width=2000, colours=True)
    plain = shown(hostile_report(), width=2000)
    assert "\x1b[" in text, "colours are on"
    for foreign in ("\x1b[2J", "\x1b]0", "\x07", "\x9b", "\u202e", "\u2066", "\x1b]8"):
        assert foreign not in text
    stripped = "".join(part.partition("m")[2] if place else part for place, part in enumerate(text.split("\x1b[")))
    assert [line.rstrip() for line in stripped.splitlines()] == [line.rstrip() for line in plain.splitlines()]


def test_output_console_takes_no_markup_and_no_emoji(capsys: pytest.CaptureFixture[str]) -> None:
    output_console().print("[red]x[/red] :warning: 12")
    assert capsys.readouterr().out == "[red]x[/red] :warning: 12\n"


# --- what a report shows ----------------------------------------------------------------------------------------------


def test_print_report_begins_with_verdict_and_reason_when_failed() -> None:
    lines = shown(Report.model_validate(golden("failed"))).splitlines()
    assert lines[0].rstrip() == "FAILED  (exit code 1)"
    assert lines[1].startswith("  neural-cleanse: trigger norm far below the other classes': class 3 ('zone 3'")


def test_print_report_shows_what_the_verdict_rests_on_when_failed() -> None:
    text = shown(Report.model_validate(golden("failed")))
    for part in (
        "clean accuracy  100.00% of 320",
        "runtime         onnxruntime 1.32.0, x86_64 avx2 fma avx512f avx512_vnni",
        "this CPU        no operator saturates in int16",
        "shadow certified: all four input sets and the gradient checks pass",
        "threshold 2: paper, false-alarm rate unknown",
        "budget quick, 480 gradient steps",
    ):
        assert part in text


def test_print_report_names_the_reference_that_was_asked() -> None:
    report = Report.model_validate(golden("failed"))
    asked = ReferenceFile(file="without\x1b.onnx", sha256="0123456789abcdef" * 4)
    text = shown(report.model_copy(update={"subject": report.subject.model_copy(update={"reference": asked})}))
    assert "reference       without\\x1b.onnx, sha256 0123456789abcdef" in text


def test_print_report_shows_no_accuracy_and_no_numbers_when_logits_are_not_finite() -> None:
    text = shown(Report.model_validate(golden("incomplete")))
    assert text.startswith("INCOMPLETE  (exit code 3)\n  neural-cleanse: NOT_MEASURED: ")
    assert "clean accuracy  NOT_MEASURED  " in text
    assert "not finite" in text
    assert "n/a" in text
    assert "shadow NOT certified" in text


def test_print_report_shows_digest_and_reason_when_refused() -> None:
    text = shown(Report.model_validate(golden("refused")))
    assert text.startswith("REFUSED  (exit code 4)\n  the file (2220 bytes) is no ONNX model or is cut short")
    assert "sha256   1eb408c9" in text
    assert "memory" not in text


def test_print_report_says_unknown_when_shares_and_layers_are_unknown() -> None:
    body = golden("failed")
    body["subject"]["inspection"] |= {"integer_mac_share": None, "integer_weight_share": None}
    assert "integer share   unknown of MACs, unknown of weights" in shown(Report.model_validate(body))


def test_print_report_says_so_when_there_was_no_memory_limit() -> None:
    body = golden("failed")
    assert "memory" not in shown(Report.model_validate(body))
    body["environment"]["memory_limited"] = False
    assert "memory          the file ran without a memory limit" in shown(Report.model_validate(body))


def test_print_report_counts_what_it_leaves_out_when_lists_are_long() -> None:
    body = golden("failed")
    body["subject"]["inspection"]["nonfinite_initializers"] = [f"w{index}" for index in range(8)]
    result = body["findings"][0]["result"]
    result["classes"] = result["classes"] * 5
    text = shown(Report.model_validate(body))
    assert "not finite      w0, w1, w2, w3, w4 and 3 more" in text
    assert "and 28 more classes; --format json lists them all" in text


def test_print_report_shows_censored_classes_without_numbers() -> None:
    body = golden("failed")
    entry = body["findings"][0]["result"]["classes"][7]
    entry |= {"norm": None, "index": None, "optimised_asr": None, "artifact_asr": None, "censored": "no trigger"}
    (line,) = [line for line in shown(Report.model_validate(body)).splitlines() if "censored" in line]
    assert line.split() == ["8", str(entry["target_class"]), "zone", str(entry["target_class"]), "censored"]


def test_print_report_shows_a_part_that_could_not_be_read_as_missing() -> None:
    body = golden("failed")
    body["certificate"]["source"] = "guessed"
    body["findings"][0]["result"]["kind"] = "graph"
    text = shown(read_report(json.dumps(body)))
    assert "shadow" not in text
    assert "rank" not in text


# --- width ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 120])
def test_print_report_keeps_tables_whole_when_the_terminal_has_columns(width: int) -> None:
    text = shown(Report.model_validate(golden("failed")), width=width)
    assert max(len(line) for line in text.splitlines()) <= width
    for whole in (
        "  images            n   top-1  RMS/spread  max |diff|  bit-exact rows",
        "  rank  class     norm (px)  index  optimised ASR  held-out ASR",
        golden("failed")["subject"]["sha256"],
    ):
        assert whole in text
    assert "…" not in text


@pytest.mark.parametrize("width", [1, 30, 50])
def test_print_report_crops_no_number_when_the_terminal_is_narrow(width: int) -> None:
    body = golden("failed")
    body["findings"][0]["result"]["classes"][0]["class_name"] = "a very long name of a class " * 3
    narrow, wide = (shown(Report.model_validate(body), width=columns).splitlines() for columns in (width, 200))
    tails = [line.split()[-4:] for line in wide if line.startswith("     1  ")]
    assert tails == [["1.1", "6.42", "1.000", "1.000"]]
    assert [line.split()[-4:] for line in narrow if line.startswith("     1  ")] == tails
    (certified,) = (line for line in wide if line.startswith("  images "))
    place = wide.index(certified)
    assert wide[place + 1].split() in [line.split() for line in narrow]


def test_print_report_folds_only_the_class_when_its_name_is_long() -> None:
    body = golden("failed")
    body["findings"][0]["result"]["classes"][0]["class_name"] = "a very long name of a class " * 3
    lines = shown(Report.model_validate(body), width=80).splitlines()
    head = next(place for place, line in enumerate(lines) if line.startswith("  rank  class"))
    assert lines[head].split() == ["rank", "class", "norm", "(px)", "index", "optimised", "ASR", "held-out", "ASR"]
    assert lines[head + 1].split()[-4:] == ["1.1", "6.42", "1.000", "1.000"]
    assert "…" not in "".join(lines)


# --- thresholds -------------------------------------------------------------------------------------------------------

CALIBRATED = Threshold(value=1.8346, source="calibrated", n=20, false_alarm_rate=1 / 21)


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (Threshold(value=2, source="paper"), "threshold 2: paper, false-alarm rate unknown"),
        (Threshold(value=2.5, source="user"), "threshold 2.5: user, false-alarm rate unknown"),
        (
            Threshold(value=2, source="paper", note="no entry of c.json fits"),
            "threshold 2: paper, false-alarm rate unknown; no entry of c.json fits",
        ),
        (CALIBRATED, "threshold 1.8346: calibrated, n = 20, rate = 0.048"),
        (
            CALIBRATED.model_copy(update={"p_value": 1 / 21, "note": "calibrated with seed 0 (here 1)"}),
            "threshold 1.8346: calibrated, n = 20, rate = 0.048 (p = 0.048); calibrated with seed 0 (here 1)",
        ),
        (
            Threshold(value=3, source="calibrated", n=2000, false_alarm_rate=100 / 2001, p_value=1 / 2001),
            "threshold 3: calibrated, n = 2000, rate = 0.050 (p = 0.00050)",
        ),
        (
            CALIBRATED.model_copy(update={"p_value": 1.0}),
            "threshold 1.8346: calibrated, n = 20, rate = 0.048 (p = 1.0)",
        ),
    ],
)
def test_describe_threshold_says_who_drew_the_line_and_how_often_it_alarms(threshold: Threshold, expected: str) -> None:
    assert describe_threshold(threshold) == expected


RESTARTS = (
    Restart(score=3.5, median_norm=60.0, mad=12.0, lowest_class=0),
    Restart(score=2.0, median_norm=60.0, mad=12.0, lowest_class=4),
    Restart(score=4.25, median_norm=60.0, mad=12.0, lowest_class=0),
)


@pytest.mark.parametrize(
    ("restarts", "starts", "expected"),
    [
        (
            RESTARTS,
            {0: 3, 1: 3},
            "index of each start alone: 3.50, 2.00, 4.25; lowest 2.00, median 3.50, highest 4.25; class 0 has the "
            "smallest norm in 2 of 3",
        ),
        (
            RESTARTS[:2],
            {0: 2, 1: 1},
            "index of each start alone (from the second on 1 of 2 classes, by the first's median and MAD): 3.50, 2.00; "
            "lowest 2.00, median 2.75, highest 3.50",
        ),
        (
            (Restart(score=None), Restart(score=None)),
            {0: 2, 1: 2},
            "index of each start alone: undefined, undefined; class 0 has the smallest norm in 0 of 2",
        ),
    ],
)
def test_describe_restarts_gives_each_start_and_the_spread(
    restarts: tuple[Restart, ...], starts: dict[int, int], expected: str
) -> None:
    classes = tuple(
        trigger(target, 10.0 + target).model_copy(update={"restart_norms": (10.0,) * count})
        for target, count in starts.items()
    )
    assert describe_restarts(ScanResult(score=3.5, classes=classes, restarts=restarts)) == expected


def test_print_report_shows_the_restarts_and_the_scheduler() -> None:
    body = golden("failed")
    body["findings"][0]["settings"]["scheduler"] = "screened"
    assert "index of each start" not in shown(Report.model_validate(body))
    body["findings"][0]["result"]["restarts"] = [one.model_dump() for one in RESTARTS]
    text = " ".join(shown(Report.model_validate(body)).split())
    assert "index of each start alone" in text
    assert "lowest 2.00, median 3.50, highest 4.25" in text
    assert "budget quick, scheduler screened, 480 gradient steps" in text


def test_print_report_shows_the_calibration_and_makes_its_note_harmless() -> None:
    body = golden("failed")
    body["findings"][0]["threshold"] = CALIBRATED.model_copy(update={"p_value": 1 / 21, "note": HOSTILE}).model_dump()
    text = shown(read_report(json.dumps(body)), width=400)
    assert f"  threshold 1.8346: calibrated, n = 20, rate = 0.048 (p = 0.048); {ESCAPED}" in text


# --- how the file is driven -------------------------------------------------------------------------------------------

PLAIN = InputContract(input_name="x", output_name="y", height=16, width=24, class_names=("a", "b"), source="graph")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "x: float32 (N, 3, 16, 24), RGB in [0, 1]; contract from the graph"),
        (
            {"layout": "NHWC", "batch": 1, "dtype": "uint8", "range": (0, 255), "source": "sidecar"},
            "x: uint8 (1, 16, 24, 3), RGB in [0, 255]; contract from the sidecar",
        ),
        (
            {"mean": (0.5, 0.25, 0), "channels": "BGR", "source": "options"},
            "x: float32 (N, 3, 16, 24), BGR in [0, 1], minus (0.5, 0.25, 0), over (1, 1, 1); contract from the options",
        ),
        (
            {"std": (2, 2, 2), "range": (-1, 1), "resize": "crop", "dtype": "float16"},
            "x: float16 (N, 3, 16, 24), RGB in [-1, 1], minus (0, 0, 0), over (2, 2, 2), images resized: crop; "
            "contract from the graph",
        ),
    ],
)
def test_contract_rows_say_how_the_file_is_fed(changes: dict[str, Any], expected: str) -> None:
    rows = contract_rows(PLAIN.model_copy(update=changes))
    assert rows == [("input", expected), ("output", "y: logits, 2 classes")]


def test_contract_rows_show_fixed_inputs_and_the_head() -> None:
    fixed = {"training": 0.0, "factor": 0.125}
    rows = dict(contract_rows(PLAIN.model_copy(update={"fixed_inputs": fixed, "head": "softmax"})))
    assert rows["fixed inputs"] == "training = 0, factor = 0.125"
    assert rows["output"] == "y: softmax, 2 classes"


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [
        (None, "NOT_MEASURED"),
        (Accuracy(value=0.98765, images=320), "98.77% of 320"),
        (Accuracy(value=0.9, images=320, source="stated"), "90.00%, stated by the user, not measured"),
    ],
)
def test_accuracy_text_says_who_measured_it(accuracy: Accuracy | None, expected: str) -> None:
    assert accuracy_text(accuracy) == expected


def with_subject(**changes: Any) -> str:
    body = golden("failed")
    body["subject"] |= changes
    return shown(read_report(json.dumps(body)), width=400)


def test_print_report_names_external_files_and_the_best_other_contract() -> None:
    readings = [
        {"description": f"{HOSTILE} {place}", "accuracy": 0.9 - place / 10, "own_accuracy": 0.4, "images": 256}
        for place in range(3)
    ]
    text = with_subject(external_files={"weights.bin": "abc123"}, candidates=readings)
    assert "\nwith weights.bin  abc123  " in text
    assert f"90.00% of 256, where this one has 40.00%: {ESCAPED} 0\n" in text
    assert text.count("other contract") == 1


def test_print_report_shows_how_the_data_were_read_and_what_was_noticed() -> None:
    data = {
        **golden("failed")["subject"]["data"],
        "classes": 0,
        "labelled": False,
        "detection": f"folder: {HOSTILE}",
        "notes": ["a note", HOSTILE],
    }
    stated = {"value": 0.9, "images": 320, "source": "stated"}
    lines = [line.rstrip() for line in with_subject(data=data, clean_accuracy=stated).splitlines()]
    found = {line.split("  ")[0]: line for line in lines}
    assert found["data"].endswith(": 320 images, no labels")
    assert found["read as"].endswith(f"folder: {ESCAPED}")
    assert [line.split(maxsplit=1)[1] for line in lines if line.startswith("note ")] == ["a note", ESCAPED]
    assert found["clean accuracy"].endswith("90.00%, stated by the user, not measured")


@pytest.mark.parametrize(
    ("granularities", "expected"),
    [
        (("per-channel", "per-channel"), "int8-static, per-channel"),
        (("per-tensor", "per-channel"), "int8-static, per-channel in 1 of 2 layers"),
        (("per-channel", "per-block"), "int8-static, per-block of 16 in 1 of 2 layers"),
        ((None, None), "int8-static"),
    ],
)
def test_inspection_rows_say_in_how_many_layers_scales_are_as_fine(
    granularities: tuple[Granularity | None, ...], expected: str
) -> None:
    inspection = Report.model_validate(golden("failed")).subject.inspection
    assert inspection is not None
    layers = [
        layer.model_copy(update={"granularity": name, "block_size": 16 if name == "per-block" else None})
        for layer, name in zip(inspection.layers, granularities, strict=True)
    ]
    changes = {"scheme": "int8-static", "layers": tuple(layers), "granularity": file_granularity(layers)}
    assert ("scheme", expected) in inspection_rows(inspection.model_copy(update=changes))


# --- arithmetic -------------------------------------------------------------------------------------------------------


def _environment_text(operators: tuple[str, ...], inspection: Inspection | None = None, **profile: object) -> str:
    body = golden("failed")["environment"] | {"saturating_operators": operators}
    body["profile"] = body["profile"] | profile
    return "\n".join(": ".join(row) for row in environment_rows(Environment.model_validate(body), inspection))


@pytest.mark.parametrize(
    ("arithmetic", "operators", "line"),
    [
        ("as-run", (), "this CPU: no operator saturates in int16"),
        ("exact", (), "this CPU: no operator saturates in int16"),
        ("as-run", ("QGemm", "QLinearConv"), "this CPU: saturates in int16: QGemm, QLinearConv"),
        ("exact", ("QGemm",), "this CPU: saturates in int16: QGemm; the session does not, its arithmetic is exact"),
    ],
)
def test_environment_rows_say_which_arithmetic_was_used(arithmetic: str, operators: tuple[str, ...], line: str) -> None:
    lines = _environment_text(operators, arithmetic=arithmetic).splitlines()
    assert line in lines
    assert any(row.startswith(f"session: optimization all, {arithmetic} arithmetic, 1 thread, batch ") for row in lines)
    several = _environment_text((), threads=2).splitlines()
    assert any("arithmetic, 2 threads, batch " in row for row in several)


@pytest.mark.parametrize("level", [1, 4])
def test_environment_rows_state_the_accuracy_level_of_int4_products(level: int) -> None:
    inspection = Report.model_validate(golden("failed")).subject.inspection
    assert inspection is not None
    assert "INT4" not in _environment_text((), inspection)
    int4 = inspection.model_copy(update={"weight_types": ("int4",)})
    text = _environment_text((), int4, matmulnbits_accuracy_level=level)
    assert (
        f"INT4 products: accuracy level {level}; ONNX Runtime's own is 4 (INT8 activations), so deploy with "
        f"session.qdq_matmulnbits_accuracy_level={level}"
    ) in text


@pytest.mark.parametrize(
    ("shipped", "level", "expected"),
    [
        (False, None, ""),
        (True, 4, "INT4 products: 1 layer at accuracy level 4 (INT8 activations); the file says so"),
        (
            False,
            1,
            "INT4 products: 1 layer at accuracy level 1 (float32); ONNX Runtime's own is 4 (INT8 activations), so "
            "deploy with session.qdq_matmulnbits_accuracy_level=1",
        ),
    ],
)
def test_environment_rows_state_the_level_of_the_products_that_run(
    shipped: bool, level: int | None, expected: str
) -> None:
    body = json.loads((GOLDEN / "1.2-failed.json").read_bytes())
    inspected, facts = body["subject"]["inspection"], body["subject"]["runtime_facts"]
    inspected["weight_types"] = ["int4"]
    inspected["layers"][0]["operator"] = "MatMulNBits" if shipped else "MatMul"
    facts["layers"][0]["accuracy_level"] = level
    report = Report.model_validate(body)
    subject = report.subject
    rows = environment_rows(report.environment, subject.inspection, subject.runtime_facts)
    assert [": ".join(row) for row in rows if row[0] == "INT4 products"] == [expected] * bool(expected)


def test_certificate_table_says_whether_the_arithmetics_agree() -> None:
    certificate = Report.model_validate(golden("failed")).certificate
    assert certificate is not None
    same = ArithmeticAgreement(used="as-run", mixed_products=3, n=1024, bit_exact_rows=1.0)
    stream = io.StringIO()
    changed = certificate.model_copy(update={"arithmetic": same})
    Console(width=200, file=stream).print(certificate_table(changed))
    text = stream.getvalue()
    assert "as-run and exact arithmetic agree bit for bit on 1024 images (3 operators multiply u8 by s8 codes)" in text


# --- filters ----------------------------------------------------------------------------------------------------------


def test_print_report_tells_a_filters_boundary_and_the_rows_not_accepted() -> None:
    text = " ".join(shown(samples.filtered(), width=400).split())
    assert (
        "boundary 0.4: fitted on 120 clean images (mean 1.5, sd 0.47) to reject 1.0% of clean ones; of 100 held-out "
        "ones it rejects 3.0% (interval 1.0% to 8.5%) rejected: rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, "
        "15, 16, 17, 18, 19 and 10 more without a score: rows 30 0 gradient steps"
    ) in text
    assert "inputs npz inputs.npz: 71 images" in text
    assert "note a note on the inputs" in text


def test_describe_filter_tells_what_weakens_it_and_nothing_of_rows_that_are_fine() -> None:
    (line,) = describe_filter(samples.filter_result(0.5, 0.6, note="it cuts"))
    assert line.endswith("(interval 1.0% to 8.5%); it cuts")
    assert describe_filter(samples.filter_result(0.5).model_copy(update={"boundary": None})) == []


def test_print_report_makes_a_filters_strings_harmless() -> None:
    assert not any(not char.isprintable() for char in shown(samples.hostile_filter()).replace("\n", ""))


# --- training data ----------------------------------------------------------------------------------------------------


def test_print_report_shows_labels_and_flagged_rows_of_a_dataset_scan() -> None:
    text = shown(samples.poisoned(), width=120)
    assert "activation-clustering BACKDOORED: class 0 falls in two" in text
    assert "5 of 600 training images flagged: rows 0, 1, 2, 3, 4\n" in text
    assert "npz training.npz: 600 images, 12 classes" in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    head = lines.index("class images score flagged figures")
    assert lines[head + 1] == "0 sign 0 50 0.40 5 SUSPICIOUS: smaller cluster 20%, silhouette 0.4"
    assert lines[head + 12] == "1 sign 1 50 none 0 49 images; at least 50 are needed"


def test_print_report_says_that_ranks_say_nothing_of_poison() -> None:
    text = " ".join(shown(samples.poisoned(), width=200).split())
    assert (
        "96 of 600 training images ranked highest of their class, which by itself says nothing of poison: rows 0"
        in text
    )
    assert ", 103 and 76 more" in text


def test_print_report_shows_the_names_of_a_training_set_as_text_when_they_are_hostile() -> None:
    text = shown(samples.hostile(HOSTILE), width=3000)
    assert all(char.isprintable() for char in set(text) - {"\n"})
    assert "SUSPICIOUS" in text
