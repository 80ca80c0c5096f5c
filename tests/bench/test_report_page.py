"""The page and the Markdown of made-up results."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from qdefense.bench import facts, forms
from qdefense.bench.cohort import Cohort
from qdefense.bench.facts import omissions
from qdefense.bench.figures import changed, counted, decimals, percents, rounded
from qdefense.bench.markdown import escaped, render_markdown
from qdefense.bench.page import MOST_TRIGGERS, render_bench
from qdefense.bench.plots import SIDE, cost_charts, roc_panels, series_of
from qdefense.bench.records import BehaviourRecord, DefenseRecord, FilterMetrics, Rate, Record
from qdefense.bench.sheets import _memory, heat_of, sheets_of
from qdefense.bench.store import StoreError, read_latencies
from qdefense.bench.summary import BenchReport, read_results, summarise
from qdefense.bench.tables import Difference, Proportion, Spread, proportion
from qdefense.findings import Verdict

from ..report import sample_reports as reports  # noqa: TID252 (the made-up findings are there)
from ..report.test_html import Element, parse  # noqa: TID252 (the reader of pages is there)
from . import sample_records as samples


def made(folder: Path, name: str) -> tuple[BenchReport, Cohort]:
    results = read_results(samples.write_sample(folder / name.replace(" ", "-"), name))
    cohort = Cohort(results.records)
    return summarise(results, cohort), cohort


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchReport, Cohort]:
    return made(tmp_path_factory.mktemp("bench"), "whole")


@pytest.fixture(scope="module")
def tree(whole: tuple[BenchReport, Cohort]) -> Element:
    return parse(render_bench(*whole))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_counted_says_counts_and_interval() -> None:
    assert counted(proportion([Rate(hits=3, n=3)])) == "3/3 [0.44, 1.00]"
    assert counted(proportion([Rate(hits=0, n=3)])) == "0/3 [0.00, 0.56]"
    assert counted(Proportion(hits=1467, n=1500, low=0.9691, high=0.9844)) == "1,467/1,500 = 0.978 [0.969, 0.984]"
    assert counted(None) == "n/a"


def test_counted_says_the_range_of_networks_in_place_of_an_interval() -> None:
    told = counted(proportion([Rate(hits=382, n=500), Rate(hits=345, n=500)]))
    assert told == "727/1,000 = 0.727 (0.690 to 0.764)"


def test_matrix_says_what_its_aurocs_are_of(tree: Element) -> None:
    (table, *_) = (one for one in tree.all("table") if one.attributes.get("class") == "matrix")
    told = {kind: [cell.text for cell in table.all("td") if kind in cell.text] for kind in (" files", "AUROC within")}
    assert all(re.search(r"AUROC \d\.\d\d of \d and \d files", text) for text in told[" files"])
    assert all(told.values())


def test_means_say_their_range_where_there_is_one() -> None:
    assert percents(Spread(mean=0.979, low=0.971, high=0.985, n=3)) == "97.9 % (97.1 to 98.5)"
    assert decimals(Spread(mean=0.979, low=0.979, high=0.979, n=1)) == "0.979"
    assert (percents(None), decimals(None)) == ("n/a", "n/a")


def test_changed_says_why_there_is_no_interval() -> None:
    assert changed(Difference(mean=-0.003, low=-0.011, high=0.005, n=3), percent=True) == "-0.3 pp [-1.1, +0.5]"
    assert changed(Difference(mean=0.5, low=None, high=None, n=1)) == "+0.500 (one network: no interval)"
    assert changed(Difference(mean=0.0, low=None, high=None, n=3)) == "+0.000 (all 3 alike: no interval)"
    assert changed(None) == "n/a"


@pytest.mark.parametrize(
    ("value", "text"), [(0.5131, "0.513"), (64.94, "64.9"), (11430.0, "11,430"), (0.0, "0.00"), (float("inf"), "n/a")]
)
def test_rounded_has_three_digits_and_no_exponent(value: float, text: str) -> None:
    assert rounded(value) == text


@pytest.mark.parametrize(("area", "heat"), [(0.1, 0), (0.599, 0), (0.6, 1), (0.85, 3), (0.9, 4), (0.97, 5), (1.0, 5)])
def test_heat_rises_with_auroc(area: float, heat: int) -> None:
    assert heat_of(area) == heat


# --- the page ---------------------------------------------------------------------------------------------------------


def test_every_cell_of_the_matrix_links_to_its_records(tree: Element) -> None:
    ids = {element.attributes["id"]: element for element in tree if "id" in element.attributes}
    (table, *_) = (one for one in tree.all("table") if one.attributes.get("class") == "matrix")
    cells = [cell for cell in table.all("td") if cell.text.strip() != "no record"]
    assert len(cells) > 50
    for cell in cells:
        (link,) = cell.all("a")
        target = ids[link.attributes["href"].removeprefix("#")]
        lines = [json.loads(code.text) for code in target.all("code")]
        assert lines
        assert all(line["stage"] == "defense" for line in lines)


def test_links_resolve_and_ids_are_unique(tree: Element) -> None:
    ids = [element.attributes["id"] for element in tree if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    targets = {link.attributes["href"] for link in tree.all("a")}
    assert targets <= {f"#{name}" for name in ids}


def test_page_holds_every_record(whole: tuple[BenchReport, Cohort], tree: Element) -> None:
    (section,) = (one for one in tree.all("section") if one.attributes["id"] == "records")
    keys = {json.loads(code.text)["key"] for code in section.all("code")}
    assert len(keys) == whole[0].records


def test_page_asks_for_nothing_from_outside(tree: Element) -> None:
    for element in tree:
        assert element.tag not in {"script", "link", "iframe", "object", "form"}
        for name, value in element.attributes.items():
            assert not name.startswith("on")
            assert name != "style"
            if name == "src":
                assert value.startswith("data:image/png;base64,")
            if name == "href":
                assert value.startswith("#")
    (policy,) = (one.attributes["content"] for one in tree.all("meta") if "http-equiv" in one.attributes)
    assert "default-src 'none'" in policy


def test_page_is_the_same_for_equal_results(tmp_path: Path) -> None:
    pages = [render_bench(*made(tmp_path / part, "one network")) for part in ("first", "second")]
    assert pages[0] == pages[1]


def test_page_and_tables_do_not_depend_on_the_order_of_records(tmp_path: Path) -> None:
    records = samples.matrix(data=("gtsrb",), seeds=2)
    found = []
    for part, mine in (("forth", records), ("back", records[::-1])):
        results = read_results(samples.write(tmp_path / part / "same" / "results", mine))
        cohort = Cohort(results.records)
        report = summarise(results, cohort).model_copy(update={"digests": {}})
        found.append(render_bench(report, cohort))
    assert found[0] == found[1]


def test_page_shows_no_image_of_a_data_set(tmp_path: Path) -> None:
    """Were a record to hold one after all."""
    finding = reports.scan(reports.Verdict.BACKDOORED, reports.scan_result([5.0, 90.0, 100.0], suspects=1))
    trial = samples.defense(samples.network(), metrics=samples.scan_metrics(3.0), finding=finding)
    results = read_results(samples.write(tmp_path, [samples.behaviour(samples.network()), trial]))
    cohort = Cohort(results.records)
    page = render_bench(summarise(results, cohort), cohort)
    (picture,) = finding.result.pictures  # type: ignore[union-attr]
    assert picture.mask_png in page
    assert picture.trigger_png in page
    assert picture.example_png not in page
    assert picture.stamped_png not in page


def test_page_shows_triggers_of_attacked_networks_first(tree: Element) -> None:
    (section,) = (one for one in tree.all("section") if one.attributes["id"] == "triggers")
    captions = [caption.text for caption in section.all("figcaption")]
    assert 2 < len(captions) <= MOST_TRIGGERS
    assert "badnets" in captions[0]
    assert ", none, " in captions[-1]


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_page_of_every_sample_is_whole(tmp_path: Path, name: str) -> None:
    page = parse(render_bench(*made(tmp_path, name)))
    assert len(page.all("h1")) == 1
    levels = [int(element.tag[1]) for element in page if re.fullmatch("h[1-6]", element.tag)]
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_page_says_what_the_results_do_not_hold(tmp_path: Path, whole: tuple[BenchReport, Cohort]) -> None:
    told = " ".join(omissions(made(tmp_path, "no defense")[0]))
    assert "No defense was run" in told
    told = " ".join(omissions(made(tmp_path, "nothing measured")[0]))
    assert "No file was measured" in told
    assert "could not be trained: 1" in told
    told = " ".join(omissions(whole[0]))
    assert "without an answer: 84" in told


def test_page_says_that_rates_without_clean_networks_have_no_control(tmp_path: Path) -> None:
    made_ = samples.network()
    records = [samples.behaviour(made_), samples.defense(made_, metrics=samples.scan_metrics(3.0))]
    results = read_results(samples.write(tmp_path, records))
    _, told = omissions(summarise(results, Cohort(results.records)))
    assert "no clean network" in told


def test_page_says_what_a_filter_says_of_itself_and_where_it_has_no_line(tmp_path: Path) -> None:
    records: list[Record] = []
    for attack in (None, "badnets"):
        made_ = samples.network(attack)
        line = {"value": -0.1, "lowest_score": 0.0, "note": "the file cuts <pixels> at 1"}
        none = Rate(hits=0, n=10)
        metrics = FilterMetrics(tpr=none if attack else None, fpr=none, boundary=line)
        trial = samples.defense(made_, metrics=metrics, name="strip", kind="filter", verdict=None, settings={})
        records += [samples.behaviour(made_), trial]
    results = read_results(samples.write(tmp_path, records))
    cohort = Cohort(results.records)
    report = summarise(results, cohort)
    assert omissions(report)[1:] == ("strip, on 2 files: the file cuts <pixels> at 1.",)
    page = render_bench(report, cohort)
    assert "2 without a line" in page
    assert "cuts &lt;pixels&gt; at 1" in page
    assert "<pixels>" not in page


ELSEWHERE = samples.RUNTIME.model_copy(update={"isa": ("avx2",)})


@pytest.mark.parametrize(
    ("clean", "cause"),
    [
        ({"runtime": ELSEWHERE}, "clean networks were measured on another CPU or ONNX Runtime"),
        ({"revision": 2}, "clean networks were measured under other rules, revisions or test images"),
        (
            {"runtime": ELSEWHERE, "revision": 2},
            "clean networks were measured on another CPU or ONNX Runtime "
            "and under other rules, revisions or test images",
        ),
        ({"name": "other"}, "this defense was tried on no clean network at this precision"),
        ({}, None),
    ],
)
def test_page_says_which_rates_have_no_clean_twin_and_why(
    tmp_path: Path, clean: dict[str, object], cause: str | None
) -> None:
    attacked, spotless = samples.network(), samples.network(None)
    tried = samples.defense(attacked, metrics=samples.scan_metrics(3.0), revision=1)
    twin = samples.defense(spotless, metrics=samples.scan_metrics(1.0), **{"revision": 1, **clean})  # type: ignore[arg-type]
    files = [samples.behaviour(attacked), samples.behaviour(spotless)]
    results = read_results(samples.write(tmp_path, [*files, tried, twin]))
    every = omissions(summarise(results, Cohort(results.records)))
    told = [line for line in every if "without a clean twin: " in line]
    remedy = facts._MEASURED_HERE
    ends = [line.partition("without a clean twin: ")[2] for line in told]
    assert [end.replace(f"; {remedy}", "") for end in ends] == ([f"{cause}."] if cause else [])
    assert [remedy in end for end in ends] == (["another CPU" in cause] if cause else [])
    assert all(line.startswith("neural-cleanse on gtsrb, resnet8, width 16, ") for line in told)


def test_a_record_that_was_made_again_stands_where_its_last_line_is(tmp_path: Path) -> None:
    first, second = (samples.behaviour(samples.network(seed=seed)) for seed in range(2))
    failed = first.model_copy(update={"failed": True})
    assert read_results(samples.write(tmp_path, [failed, second, first])).records == (second, first)


# --- charts -----------------------------------------------------------------------------------------------------------


def test_roc_of_a_scan_is_over_files(tmp_path: Path) -> None:
    records = []
    for seed, score in enumerate([3.0, 1.0]):
        one = samples.network("badnets", seed)
        records += [samples.behaviour(one), samples.defense(one, metrics=samples.scan_metrics(score))]
    for seed, score in enumerate([0.0, 2.0]):
        one = samples.network(None, seed)
        records += [samples.behaviour(one), samples.defense(one, metrics=samples.scan_metrics(score))]
    (panel,) = roc_panels(Cohort(records))
    (line,) = panel.lines
    # Falling thresholds 3, 2, 1, 0: (0, .5), (.5, .5), (.5, 1), (1, 1).
    half = SIDE / 2
    corners = [(0, SIDE), (0, half), (half, half), (half, 0), (SIDE, 0)]
    assert line.points == " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    assert line.name == "fp32, 2 active and 2 clean files"
    unanswered = [
        one.model_copy(update={"verdict": Verdict.NOT_MEASURED}) if isinstance(one, DefenseRecord) else one
        for one in records
    ]
    assert roc_panels(Cohort(unanswered)) == (panel,), "a score ranks its file whatever the verdict"


def test_roc_needs_both_sides() -> None:
    one = samples.network()
    assert roc_panels(Cohort([samples.behaviour(one), samples.defense(one, metrics=samples.scan_metrics(3.0))])) == ()


def test_charts_set_size_and_latency_against_efficacy(whole: tuple[BenchReport, Cohort]) -> None:
    report, cohort = whole
    charts = cost_charts(report, series_of(cohort))
    titles = {(chart.up, chart.across.partition(" in ")[0]) for chart in charts}
    assert {
        ("clean accuracy", "file size"),
        ("ASR", "file size"),
        ("clean accuracy", "latency at batch 1, p50"),
        ("ASR", "latency at batch 1, p50"),
        ("AUROC", "added latency at batch 1, median"),
        ("TPR", "added latency at batch 1, median"),
    } == titles
    for dot in (dot for chart in charts for dot in chart.dots):
        assert 12 <= dot.x_range[0] <= dot.x <= dot.x_range[1] <= 96
        assert 0 <= dot.y_range[0] <= dot.y <= dot.y_range[1] <= 220


def test_latency_is_optional_and_joined_to_its_file(tmp_path: Path, whole: tuple[BenchReport, Cohort]) -> None:
    assert made(tmp_path, "one network")[0].latency == ()
    row = next(row for row in whole[0].latency if row.defense == "strip")
    assert row.added_ms is not None
    assert row.added_ms.value == pytest.approx(59 * 0.9)
    assert row.setting.precision == "fp32"
    assert row.offline_rows == 64
    plain = next(row for row in whole[0].latency if row.defense is None)
    assert _memory(plain) == "+60 to 150 MiB"
    assert _memory(plain.model_copy(update={"before_bytes": None})) == "150 MiB"
    assert _memory(row) == "n/a"


def paces(folder: Path, *yardsticks: float | None) -> str:
    """What is said of files that were timed beside these yardsticks."""
    records = [record for record in samples.matrix(data=("gtsrb",), seeds=1) if isinstance(record, BehaviourRecord)]
    timed = samples.latencies(records)[: len(yardsticks)]
    for line, value in zip(timed, yardsticks, strict=True):
        line["yardstick_ms"] = None if value is None else {"value": value, "low": value, "high": value}
    results = read_results(samples.write(folder, records, timed=timed))
    return " ".join(omissions(summarise(results, Cohort(results.records))))


def test_page_says_when_files_were_timed_at_different_paces(tmp_path: Path) -> None:
    assert "yardstick" not in paces(tmp_path, 0.25, 0.27)
    differ = (
        "files were timed while the machine ran at different paces (yardstick 0.250 to 0.280 ms): compare multiples of "
        "the yardstick, not milliseconds."
    )
    assert differ in paces(tmp_path, 0.25, 0.28)
    assert differ in paces(tmp_path, 0.28, None, 0.25)


def test_page_says_when_nobody_knows_the_pace(tmp_path: Path) -> None:
    told = paces(tmp_path, None, 0.25, None)
    assert "Files timed without a yardstick: 2. Whether the machine ran at one pace is unknown" in told
    assert "different paces" not in told


def test_latency_of_an_unknown_file_is_in_no_table(tmp_path: Path) -> None:
    record = samples.behaviour(samples.network())
    line = {**samples.latency(record, 1.0), "artifact_sha256": "0" * 64}
    results = read_results(samples.write(tmp_path, [record], timed=[line]))
    assert len(results.latencies) == 1
    report = summarise(results, Cohort(results.records))
    assert (report.latency, report.outdated_timings) == ((), 0)


def test_page_says_that_a_file_was_timed_by_older_code_than_it_was_measured_by(tmp_path: Path) -> None:
    record = samples.behaviour(samples.network()).model_copy(update={"evaluation_revision": 2})
    results = read_results(samples.write(tmp_path, [record], timed=[samples.latency(record, 1.0)]))
    report = summarise(results, Cohort(results.records))
    assert (report.latency, report.outdated_timings) == ((), 1)
    assert any(line.startswith("Latency records of files that newer code measured") for line in omissions(report))


def test_latency_line_that_is_none_is_refused_with_its_number(tmp_path: Path) -> None:
    path = tmp_path / "latency.jsonl"
    path.write_text('{"artifact_sha256": 1}\n')
    with pytest.raises(StoreError, match="line 1: no latency record"):
        list(read_latencies(path))


# --- Markdown ---------------------------------------------------------------------------------------------------------


def test_markdown_has_every_table_with_as_many_cells_in_each_row(whole: tuple[BenchReport, Cohort]) -> None:
    text = render_markdown(whole[0])
    for sheet in sheets_of(whole[0]):
        assert f"## {sheet.form.title}\n" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1


def test_the_behaviour_table_has_a_column_for_the_fpr_only_where_there_is_one(
    whole: tuple[BenchReport, Cohort],
) -> None:
    rows = whole[0].behaviour
    fpr = Spread(mean=0.125, low=0.125, high=0.125, n=1)
    control = Spread(mean=0.015, low=0.015, high=0.015, n=1)
    first = rows[0].model_copy(update={"fpr": fpr, "control_fpr": control})
    sourced = whole[0].model_copy(update={"behaviour": (first, *rows[1:])})
    plain, wider = (sheets_of(report)[1] for report in (whole[0], sourced))
    place = wider.form.columns.index("FPR")
    assert wider.form.columns[place + 1] == "FPR on clean twin"
    assert wider.form.columns[:place] + wider.form.columns[place + 2 :] == plain.form.columns
    told = [(row[place].lines, row[place + 1].lines) for block in wider.blocks for row in block.rows]
    assert (("12.5 %",), ("1.5 %",)) in told
    assert set(told) == {(("12.5 %",), ("1.5 %",)), (("n/a",), ("n/a",))}
    assert len(wider.form.notes) == len(plain.form.notes) + 1


def test_the_control_of_a_repair_stands_beside_the_asr_that_is_left(whole: tuple[BenchReport, Cohort]) -> None:
    told = {"asr_after": 0.125, "control": 0.015}
    spreads = {name: Spread(mean=value, low=value, high=value, n=1) for name, value in told.items()}
    rows = tuple(row.model_copy(update=spreads) for row in whole[0].repairs)
    (sheet,) = (one for one in sheets_of(whole[0].model_copy(update={"repairs": rows})) if one.form is forms.REPAIRS)
    place = sheet.form.columns.index("on clean twin")
    assert sheet.form.columns[place - 1] == "ASR after"
    cells = {(row[place - 1].lines, row[place].lines) for block in sheet.blocks for row in block.rows}
    assert cells == {(("12.5 %",), ("1.5 %",))}
    assert {len(row) for block in sheet.blocks for row in block.rows} == {len(sheet.form.columns)}


def test_markdown_takes_hostile_strings_for_text(tmp_path: Path) -> None:
    text = render_markdown(made(tmp_path, "hostile")[0])
    assert "<script" not in text.replace("\\<script", "")
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_escaped_leaves_no_markup() -> None:
    assert escaped("a|b*c_d<e>\n") == "a&#124;b\\*c\\_d\\<e\\>\\\\n"


@pytest.mark.parametrize(
    "hostile",
    [
        "@someone",
        "org/repo#123",
        "#123",
        "GH-123",
        "https://evil.example/?a=1|2",
        "HTTP://evil.example",
        "www.evil.example",
        "me@evil.example",
        "mailto:me@evil.example",
        "a\\|b",
        "a\\\\|b",
        "<img src=x onerror=alert(1)>",
        "![x](y)",
        "[x](javascript:alert(1))",
        "<https://evil.example>",
        "`<b>`",
        "$x$",
        "&lt;b&gt; &#64;someone",
    ],
)
def test_a_hostile_name_is_one_cell_of_plain_text_of_which_github_makes_nothing(hostile: str) -> None:
    """As CommonMark with tables reads it; GitHub then looks for mentions and addresses in each piece of text."""
    table = f"| a | b |\n| --- | --- |\n| {escaped(hostile)} | c |\n"
    (row,) = [token for token in _tokens(table) if token.type == "inline" and token.content not in ("a", "b", "c")]
    assert {child.type for child in row.children} <= {"text", "text_special", "html_inline"}
    texts = "".join(child.content if child.type != "html_inline" else "\0" for child in row.children)
    assert texts.replace("\0", "") == hostile
    assert {child.content for child in row.children if child.type == "html_inline"} <= {"<!-- -->"}
    assert not re.search(r"[@#]\w|://|www\.|GH-\d|mailto:", texts, re.IGNORECASE)


def _tokens(text: str) -> list[Any]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def test_json_reads_back(whole: tuple[BenchReport, Cohort]) -> None:
    assert BenchReport.model_validate_json(whole[0].model_dump_json()) == whole[0]
