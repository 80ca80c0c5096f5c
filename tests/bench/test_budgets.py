"""Detectability against robustness by poison budget, on records few enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdefense.bench.budget_plots import HEIGHT, WIDTH, Panel, budget_panels
from qdefense.bench.budgets import BudgetRow, budget_rows
from qdefense.bench.cohort import Cohort
from qdefense.bench.markdown import render_markdown
from qdefense.bench.page import render_bench
from qdefense.bench.plots import series_of
from qdefense.bench.records import Record
from qdefense.bench.sheets import sheets_of
from qdefense.bench.summary import BenchReport, read_results, summarise
from qdefense.bench.tables import Answers

from ..report.test_html import parse  # noqa: TID252 (the reader of pages is there)
from . import sample_records as samples
from .sample_records import behaviour, defense, network, of_budget, scan_metrics

DATA = samples.manifest().data
"""9,000 training images of gtsrb."""


def rows_of(records: list[Record]) -> tuple[BudgetRow, ...]:
    return budget_rows(Cohort(records), DATA)


def panels_of(records: list[Record]) -> dict[tuple[str, str], Panel]:
    cohort = Cohort(records)
    panels = budget_panels(budget_rows(cohort, DATA), series_of(cohort))
    return {(panel.across, panel.up): panel for panel in panels}


def summary_of(folder: Path, records: list[Record]) -> tuple[BenchReport, Cohort]:
    results = read_results(samples.write(folder, records))
    cohort = Cohort(results.records)
    return summarise(results, cohort), cohort


# --- rows -------------------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_row_per_budget_and_file_few_poisons_first() -> None:
    rows = rows_of(samples.sweep())
    places = [(row.family, row.setting.precision, row.poisons) for row in rows]
    assert places == [("badnets", file, count) for file in ("fp32", "int8-static") for count in (50, 300, 900)]
    assert [row.rate for row in rows[:3]] == [pytest.approx(50 / 9000), pytest.approx(300 / 9000), 0.1]


def test_figures_are_means_over_networks_with_their_range() -> None:
    first, *_ = rows_of(samples.sweep())
    assert first.networks == 2
    assert first.asr is not None
    assert (first.asr.mean, first.asr.low, first.asr.high) == (pytest.approx(0.79), pytest.approx(0.78), 0.80)
    (repair,) = first.repairs
    assert repair.value is not None
    assert (repair.figure, repair.value.mean) == ("ASR after", pytest.approx(0.11))
    scan, rows = first.detections
    assert scan.value is not None
    assert rows.value is not None
    assert (scan.figure, scan.value.mean, scan.value.low, scan.value.high) == ("index of the target", 1.5, 1.0, 2.0)
    assert (rows.figure, rows.value.mean) == ("AUROC within", pytest.approx(0.59))


def test_what_was_not_measured_has_no_figure_and_is_counted() -> None:
    lost = next(row for row in rows_of(samples.sweep()) if (row.poisons, row.setting.precision) == (300, "int8-static"))
    (scan, _) = lost.detections
    assert scan.value is None
    assert scan.answers == Answers(not_measured=2)


def test_a_file_that_failed_is_none_of_the_networks_that_a_mean_is_of() -> None:
    made = [network(poison_count=count, seed=seed) for count in (50, 300) for seed in (0, 1, 2)]
    records: list[Record] = [behaviour(one, asr=0.9) for one in made[:4]]
    records += [behaviour(one, accuracy=None, asr=None, failed=True) for one in made[4:]]
    few, many = rows_of(records)
    assert (few.networks, few.failed, many.networks, many.failed) == (3, 0, 1, 2)
    assert many.asr is not None
    assert many.asr.n == 1


def test_a_filter_is_told_by_its_auroc() -> None:
    records: list[Record] = []
    for count in (50, 100):
        made = network(poison_count=count)
        metrics = samples.FilterMetrics(auroc=count / 200, fpr=samples.Rate(hits=1, n=100))
        records += [behaviour(made), defense(made, metrics=metrics, name="strip", kind="filter", verdict=None)]
    told = [row.detections[0] for row in rows_of(records)]
    assert [(one.figure, one.value and one.value.mean) for one in told] == [("AUROC", 0.25), ("AUROC", 0.5)]


def test_a_target_without_a_trigger_has_no_index_and_is_no_zero() -> None:
    records: list[Record] = []
    for count in (50, 100):
        made = network(poison_count=count)
        records += [behaviour(made), defense(made, metrics=scan_metrics(3.0, target=12, found=False))]
    figures = [row.detections[0] for row in rows_of(records)]
    assert [one.value for one in figures] == [None, None]
    assert [one.answers.measured for one in figures] == [1, 1]


@pytest.mark.parametrize(
    "other",
    [
        network(poison_count=50, seed=1),
        network("blended", poison_count=300),
        network(poison_count=300, size=5),
        network(poison_count=300, data="cifar10"),
        network(poison_count=300).model_copy(update={"width": 32}),
        network(None),
    ],
    ids=["seed", "attack", "setting", "data", "architecture", "clean"],
)
def test_one_budget_alone_is_no_sweep(other: object) -> None:
    assert rows_of([behaviour(network(poison_count=50, size=3)), behaviour(other)]) == ()  # type: ignore[arg-type]
    assert rows_of([behaviour(network(poison_count=50)), behaviour(network(poison_count=300))]) != ()


def test_a_family_is_named_by_what_it_differs_in_but_the_budget() -> None:
    made = [network(poison_count=count, size=size) for count in (50, 300) for size in (3, 5)]
    assert {row.family for row in rows_of([behaviour(one) for one in made])} == {"badnets (size=3)", "badnets (size=5)"}


def test_the_budget_of_a_host_counts_and_a_share_of_a_class_has_no_count() -> None:
    hosts = [network("lsp", **{"host": "badnets", "host.poison_count": count}) for count in (50, 300)]
    assert [row.poisons for row in rows_of([behaviour(one) for one in hosts])] == [50, 300]
    shares = [network("clean-label", class_rate=rate) for rate in (0.5, 0.01)]
    rows = rows_of([behaviour(one) for one in shares])
    assert [(row.budget, row.poisons, row.rate) for row in rows] == [
        ("class_rate=0.01", None, None),
        ("class_rate=0.5", None, None),
    ]


def test_a_share_of_images_that_no_manifest_counts_has_no_count() -> None:
    records = [behaviour(network(poison_rate=rate)) for rate in (0.1, 0.01)]
    assert [row.poisons for row in budget_rows(Cohort(records), ())] == [None, None]
    assert [row.rate for row in budget_rows(Cohort(records), ())] == [0.01, 0.1]


@pytest.mark.parametrize("odd", ["<b>", -5, 2.5, None, [50]])
def test_a_count_that_no_attack_could_have_is_none(odd: object) -> None:
    records = [behaviour(network(poison_count=count)) for count in (50, odd)]
    assert [row.poisons for row in rows_of(records)] == [50, None]  # type: ignore[arg-type]


def test_what_shadows_say_is_not_of_the_deployed_file() -> None:
    records: list[Record] = []
    for count in (50, 300):
        made = network(poison_count=count)
        metrics = scan_metrics(3.0).model_copy(update={"target_index": 3.0})
        records += [behaviour(made), defense(made, metrics=metrics, access="shadow")]
    assert [row.detections for row in rows_of(records)] == [(), ()]


# --- charts -----------------------------------------------------------------------------------------------------------


def test_charts_are_of_every_defense_against_every_repair_and_of_asr_by_count() -> None:
    scan, rows = "neural-cleanse: index of the target", "spectral-signatures: AUROC within"
    after = "ASR after fine-pruning"
    assert list(panels_of(samples.sweep())) == [
        ("poisons", "ASR"),
        ("poisons", after),
        (scan, after),
        (rows, after),
    ]


def test_where_only_asr_is_known_it_is_shown_by_count_on_a_logarithmic_axis() -> None:
    counts, rates = (10, 100, 1000), (0.5, 0.75, 1.0)
    pairs = zip(counts, rates, strict=True)
    records: list[Record] = [behaviour(network(poison_count=count), asr=asr) for count, asr in pairs]
    ((axes, panel),) = panels_of(records).items()
    assert axes == ("poisons", "ASR")
    (track,) = panel.tracks
    assert [point.x for point in track.points] == [14, WIDTH / 2, WIDTH - 14]
    assert [point.y for point in track.points] == [HEIGHT / 2, HEIGHT / 4, 0]
    assert track.paths == ("14,100 150,50 286,0",)
    assert [text for _, text in panel.x_ticks] == ["10", "100", "1,000"]
    assert [point.label for point in track.points] == ["10", "100", "1,000"]


def test_a_point_is_where_the_two_means_are_and_its_bars_are_their_ranges() -> None:
    panel = panels_of(samples.sweep())["spectral-signatures: AUROC within", "ASR after fine-pruning"]
    point = panel.tracks[0].points[0]
    assert (point.x, point.x_range) == (0.59 * WIDTH, (0.58 * WIDTH, 0.60 * WIDTH))
    assert (point.y, point.y_range) == (round(0.89 * HEIGHT, 1), (round(0.88 * HEIGHT, 1), round(0.90 * HEIGHT, 1)))
    assert point.name == "50, fp32: 0.59, 0.110"


def test_a_figure_that_was_not_measured_leaves_a_gap_that_is_told() -> None:
    panel = panels_of(samples.sweep())["neural-cleanse: index of the target", "ASR after fine-pruning"]
    whole, broken = panel.tracks
    assert (len(whole.points), len(whole.paths)) == (3, 1)
    assert ([point.label for point in broken.points], broken.paths) == (["50", "900"], ())
    (gap,) = panel.gaps
    assert gap.startswith("300, int8-static")
    assert gap.endswith("(2 not measured)")


def test_a_budget_without_a_count_is_in_no_chart_by_count_and_no_poison_on_no_logarithm() -> None:
    records: list[Record] = [behaviour(network(poison_count=count)) for count in (0, 50, 300)]
    (panel,) = panels_of(records).values()
    assert panel.gaps == ("0, fp32 (no poison: not on a logarithmic axis)",)
    shares: list[Record] = []
    for rate in (0.1, 0.5):
        made = network("clean-label", class_rate=rate)
        shares += of_budget(made, asr=0.95, after=rate, index=2.0, within=0.9)
    assert [across for across, _ in panels_of(shares)] == [
        "neural-cleanse: index of the target",
        "spectral-signatures: AUROC within",
    ]


# --- the page, Markdown, JSON -----------------------------------------------------------------------------------------


def test_the_table_holds_every_number(tmp_path: Path) -> None:
    report, _ = summary_of(tmp_path, samples.sweep())
    (sheet,) = (one for one in sheets_of(report) if one.form.id == "budgets")
    (block,) = sheet.blocks
    assert block.columns[6:] == (
        "fine-pruning: ASR after",
        "neural-cleanse: index of the target",
        "spectral-signatures: AUROC within",
    )
    first, lost = block.rows[0], block.rows[4]
    assert [cell.lines for cell in first] == [
        ("badnets",),
        ("50",),
        ("fp32",),
        ("0.556 %",),
        ("2",),
        ("79.0 % (78.0 to 80.0)",),
        ("11.0 % (10.0 to 12.0), n = 2",),
        ("1.500 (1.000 to 2.000), n = 2",),
        ("0.590 (0.580 to 0.600), n = 2",),
    ]
    assert lost[7].lines == ("n/a", "2 not measured")


def test_the_page_draws_and_tells_every_point_and_markdown_has_the_table(tmp_path: Path) -> None:
    report, cohort = summary_of(tmp_path, samples.sweep())
    page = parse(render_bench(report, cohort))
    (section,) = (one for one in page.all("section") if one.attributes["id"] == "budgets")
    charts = section.all("figure")
    assert len(charts) == 4
    labels = [text.text for text in charts[0].all("text") if text.attributes.get("class") == "mark"]
    assert labels == ["50", "300", "900"] * 2
    assert "50, fp32: 50, 0.790; 300, fp32: 300, 0.940" in charts[0].all("title")[0].text
    assert "Not drawn: 300, int8-static" in charts[2].text
    text = render_markdown(report)
    assert "## Detectability against robustness\n" in text
    assert "1.500 (1.000 to 2.000), n = 2" in text


def test_json_has_the_rows_and_older_ones_are_read(tmp_path: Path) -> None:
    report, _ = summary_of(tmp_path, samples.sweep())
    assert BenchReport.model_validate_json(report.model_dump_json()).budgets == report.budgets
    older = report.model_dump(mode="json", exclude={"budgets"})
    assert BenchReport.model_validate(older).budgets == ()


def test_results_without_a_sweep_say_so(tmp_path: Path) -> None:
    report, cohort = summary_of(tmp_path, [behaviour(network(poison_rate=0.1))])
    page = parse(render_bench(report, cohort))
    (section,) = (one for one in page.all("section") if one.attributes["id"] == "budgets")
    assert "No attack was measured at two poison budgets." in section.text
    assert not section.all("figure")
