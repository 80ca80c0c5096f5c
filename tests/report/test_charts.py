from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from qdefense.findings import ScanResult, Threshold
from qdefense.report.charts import PANEL, ROW, SHOWN, norm_chart, score_chart, suspicion_limit

from .sample_reports import NORMS, PAPER, filter_result, scan_result


def chart_of(result: ScanResult, threshold: Threshold | None = PAPER) -> Any:
    chart = norm_chart(result, threshold)
    assert chart is not None
    return chart


def test_norm_chart_marks_suspects_classes_and_censored_ones_by_kind() -> None:
    chart = chart_of(scan_result(NORMS, suspects=1))
    assert [mark.kind for mark in chart.marks] == ["suspect", *["class"] * 9, "censored", "censored"]
    assert [mark.note for mark in chart.marks[:2]] == ["12.5 suspect", "70.0"]
    assert chart.marks[-1].note == "censored"
    assert chart.marks[0].name == "0 sign 0"


def test_norm_chart_places_norms_in_proportion_from_zero() -> None:
    chart = chart_of(scan_result([30.0, 60.0, 120.0, 240.0]))
    offsets = [mark.x - chart.left for mark in chart.marks]
    assert offsets == pytest.approx([offsets[0] * times for times in (1, 2, 4, 8)], abs=0.02)
    assert [text for _, text in chart.ticks] == ["0", "100", "200", "300"]
    assert chart.ticks[0][0] == chart.left
    assert chart.ticks[-1][0] == chart.right
    assert offsets[3] == pytest.approx((chart.right - chart.left) * 240 / 300, abs=0.01)


def test_norm_chart_draws_median_and_limit_at_their_norms() -> None:
    chart = chart_of(scan_result([60.0, 100.0, 300.0]))
    assert (chart.median.text, chart.limit.text) == ("median 100.0", "suspect below 60.0")
    assert (chart.limit.x, chart.median.x) == (chart.marks[0].x, chart.marks[1].x)


def test_norm_chart_keeps_no_room_for_lines_when_there_is_none() -> None:
    bare = chart_of(scan_result(NORMS).model_copy(update={"median_norm": None}))
    assert (bare.median, bare.limit) == (None, None)
    assert bare.head < chart_of(scan_result(NORMS)).head


def test_norm_chart_gives_each_class_its_own_row() -> None:
    chart = chart_of(scan_result(NORMS))
    rows = [mark.y for mark in chart.marks]
    assert [after - before for before, after in itertools.pairwise(rows)] == [ROW] * (len(NORMS) - 1)
    assert chart.head < rows[0] < rows[-1] < chart.bottom < chart.height


def test_norm_chart_shows_censored_classes_right_of_every_norm() -> None:
    chart = chart_of(scan_result([50.0, 400.0, None]))
    assert chart.marks[2].x > chart.right >= chart.marks[1].x


@pytest.mark.parametrize(("count", "shown", "hidden"), [(6, 6, 0), (SHOWN, SHOWN, 0), (SHOWN + 1, SHOWN, 1)])
def test_norm_chart_says_how_many_classes_it_leaves_out(count: int, shown: int, hidden: int) -> None:
    chart = chart_of(scan_result([*(10.0 + place for place in range(count - 1)), None]))
    assert (len(chart.marks), chart.hidden, chart.hidden_censored) == (shown, hidden, hidden)
    assert bool(chart.strip) == bool(hidden)


def test_norm_chart_ticks_every_class_in_the_strip_when_some_have_no_row() -> None:
    chart = chart_of(scan_result([*range(1, 201)]))
    assert len(chart.strip) == 200
    assert chart.strip[0] == pytest.approx(chart.marks[0].x, abs=0.06)
    assert max(chart.strip) > max(mark.x for mark in chart.marks)


def test_norm_chart_keeps_the_strip_small_when_there_are_thousands_of_classes() -> None:
    chart = chart_of(scan_result([1000 + place / 100 for place in range(20_000)]))
    assert 0 < len(chart.strip) <= 512


@pytest.mark.parametrize(
    ("norms", "threshold", "mad"),
    [([None, None], PAPER, 20.0), ([], PAPER, 20.0), ([math.nan, math.inf, -3.0, 1e300], PAPER, 20.0)],
)
def test_norm_chart_is_none_when_no_class_has_a_norm(
    norms: list[float | None], threshold: Threshold, mad: float
) -> None:
    assert norm_chart(scan_result(norms, mad=mad), threshold) is None


@pytest.mark.parametrize("odd", [math.nan, math.inf, -1.0, 1e300])
def test_norm_chart_takes_a_norm_for_censored_when_it_is_no_size(odd: float) -> None:
    chart = chart_of(scan_result([50.0, odd]))
    assert [mark.kind for mark in chart.marks] == ["class", "censored"]
    assert all(math.isfinite(mark.x) for mark in chart.marks)


@pytest.mark.parametrize("norm", [0.0, 1e-12, 1e-3, 0.7, 3.0, 999.96, 50_176.0, 9e11])
def test_norm_chart_holds_every_mark_within_the_axis(norm: float) -> None:
    result = scan_result([norm]).model_copy(update={"median_norm": norm})
    chart = chart_of(result)
    assert chart.left <= chart.marks[0].x <= chart.right
    assert 2 <= len(chart.ticks) <= 6
    assert len(chart.marks[0].note) <= len("999999999999")


def test_norm_chart_puts_words_before_the_mark_when_it_is_far_right() -> None:
    near, far = chart_of(scan_result([10.0, 200.0], suspects=2)).marks
    assert (near.anchor, far.anchor) == ("start", "end")
    assert [mark.anchor for mark in chart_of(scan_result([10.0, 200.0])).marks] == ["start", "start"]


def test_line_text_stands_on_the_side_with_more_room() -> None:
    chart = chart_of(scan_result([10.0, 60.0, 105.0]))
    assert chart.median.anchor == "end"
    assert chart.median.shift < 0
    low = chart_of(scan_result([10.0, 1000.0]))
    assert (low.median.anchor, low.limit.anchor) == ("start", "start")
    assert low.limit.shift > 0


def test_suspicion_limit_is_median_minus_threshold_times_mad() -> None:
    assert suspicion_limit(scan_result(NORMS), PAPER) == pytest.approx(100 - 2 * 20)
    assert suspicion_limit(scan_result(NORMS), Threshold(value=1.5, source="user")) == pytest.approx(70)


def test_norm_chart_draws_no_limit_when_it_is_below_zero() -> None:
    result = scan_result(NORMS, mad=60.0)
    assert suspicion_limit(result, PAPER) == pytest.approx(-20)
    assert chart_of(result).limit is None


@pytest.mark.parametrize(
    ("changes", "threshold"),
    [
        ({"mad": None}, PAPER),
        ({"mad": 0.0}, PAPER),
        ({"median_norm": None}, PAPER),
        ({"mad": math.nan}, PAPER),
        ({}, None),
    ],
)
def test_suspicion_limit_is_none_when_the_statistic_is_undefined(
    changes: dict[str, float | None], threshold: Threshold | None
) -> None:
    result = scan_result(NORMS).model_copy(update=changes)
    assert suspicion_limit(result, threshold) is None
    assert chart_of(result, threshold).limit is None


def test_suspicion_limit_is_none_when_the_threshold_is_not_finite() -> None:
    assert suspicion_limit(scan_result(NORMS), Threshold(value=math.inf, source="user")) is None


def histogram(*scores: float | None, value: float = 0.4) -> Any:
    chart = score_chart(filter_result(*scores, value=value))
    assert chart is not None
    return chart


def test_score_chart_sets_clean_images_above_inputs_on_one_axis() -> None:
    chart = histogram(0.1, 0.2, None, 3.0)
    clean, inputs = chart.panels
    assert (clean.name, inputs.name) == ("clean, held-out (100)", "inputs (3)")
    assert inputs.base - clean.base == PANEL
    assert [text for _, text in chart.ticks] == ["0", "1", "2", "3"]
    assert all(chart.left <= x <= chart.right for panel in chart.panels for x, _, _ in panel.bars)
    assert chart.boundary.text == "rejected below 0.4"
    assert chart.boundary.x == pytest.approx(chart.left + (chart.right - chart.left) * 0.4 / 3, abs=0.01)
    assert chart.head < clean.base < inputs.base <= chart.bottom < chart.height


def test_score_chart_gives_bars_the_heights_of_their_shares() -> None:
    chart = histogram(0.01, 0.01, 0.01, 2.4)
    (first, _, tallest), (last, _, lowest) = chart.panels[1].bars
    assert tallest == pytest.approx(3 * lowest, abs=0.2)
    assert (first, last) == (31.0, 71.5), "2.4 of 3 is in the 28th bin of 34, from 31 % to 82 %"
    assert max(height for _, _, height in chart.panels[0].bars) < lowest, "one scale for both"


def test_score_chart_stands_every_bar_on_its_base_line() -> None:
    for panel in histogram(*(0.05 * place for place in range(60))).panels:
        assert all(y + height == pytest.approx(panel.base) for _, y, height in panel.bars)
        assert all(panel.base - PANEL < y for _, y, _ in panel.bars)


@pytest.mark.parametrize("scores", [(), (None, None), (math.nan, math.inf, -1.0, 1e300)])
def test_score_chart_is_none_without_a_usable_score(scores: tuple[float | None, ...]) -> None:
    assert score_chart(filter_result(*scores)) is None


def test_score_chart_draws_inputs_alone_when_there_is_no_boundary() -> None:
    chart = score_chart(filter_result(0.5, 0.0).model_copy(update={"boundary": None}))
    assert chart is not None
    assert ([panel.name for panel in chart.panels], chart.boundary) == (["inputs (2)"], None)


@pytest.mark.parametrize("value", [-0.5, math.nan, 1e300])
def test_score_chart_draws_no_boundary_where_there_is_no_place_for_it(value: float) -> None:
    assert histogram(0.5, 1.0, value=value).boundary is None
