"""The bench's page as Chromium shows it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qdefense.bench.cohort import Cohort
from qdefense.bench.page import render_bench
from qdefense.bench.summary import read_results, summarise

from ..report import sample_reports as reports  # noqa: TID252 (what is hostile is there)
from ..report.browser import Browser  # noqa: TID252
from ..report.test_page_in_browser import (  # noqa: TID252
    A4,
    CONTRAST,
    DESK,
    OPEN_ALL,
    OVERFLOW,
    PHONE,
    browser,
)
from . import sample_records as samples

__all__ = ["browser"]
Show = Callable[..., Browser]


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Show:
    """Open the page of a sample."""

    def opened(name: str, *, width: int = DESK, dark: bool = False, unfolded: bool = True) -> Browser:
        results = read_results(samples.write_sample(tmp_path / "results", name))
        cohort = Cohort(results.records)
        page = tmp_path / "report.html"
        page.write_text(render_bench(summarise(results, cohort), cohort), encoding="utf-8")
        browser.look(width=width, dark=dark)
        browser.open(page)
        if unfolded:
            browser.run(OPEN_ALL)
        return browser

    return opened


@pytest.mark.parametrize("name", ["one network", "no defense", "nothing measured", "hostile", "sweep"])
def test_page_overflows_neither_a_phone_nor_a_desk(show: Show, name: str) -> None:
    page = show(name, width=PHONE)
    assert page.run("innerWidth") == PHONE
    assert page.run(OVERFLOW) == []
    page.look(width=DESK)
    assert page.run(OVERFLOW) == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["one network", "nothing measured", "sweep"])
def test_page_has_the_contrast_of_wcag_aa(show: Show, name: str, dark: bool) -> None:
    page = show(name, dark=dark)
    ratios: list[tuple[float, str]] = page.run(CONTRAST)
    assert len(ratios) > 50
    assert [f"{ratio:.2f} {text}" for ratio, text in ratios if ratio < 4.5] == []
    assert (page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)") != dark


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_tints_of_the_matrix_leave_its_words_readable(show: Show, dark: bool) -> None:
    page = show("one network", dark=dark)
    page.run(
        "document.querySelectorAll('table.matrix td').forEach((one, place) => one.className = 'heat-' + place % 6)"
    )
    ratios: list[tuple[float, str]] = page.run(CONTRAST)
    assert min(ratio for ratio, _ in ratios) >= 4.5


def test_link_of_a_cell_opens_its_records(show: Show) -> None:
    page = show("one network", unfolded=False)
    assert page.run("[...document.querySelectorAll('#records details')].some(one => one.open)") is False
    page.run("document.querySelector('table.matrix td a').click()")
    opened = "[...document.querySelectorAll('#records details')].filter(one => one.open).map(one => one.innerText)"
    (text,) = page.run(opened)
    assert '"stage": "defense"' in text


def test_links_lead_somewhere(show: Show) -> None:
    page = show("one network")
    script = "[...document.links].filter(one => !document.getElementById(one.hash.slice(1))).map(one => one.href)"
    assert page.run("document.links.length") > 50
    assert page.run(script) == []


def test_page_takes_hostile_strings_for_text(show: Show) -> None:
    page = show("hostile")
    assert page.run("window.pwned") is None
    assert page.dialogs == []
    tags: list[str] = page.run("[...new Set([...document.querySelectorAll('*')].map(one => one.localName))]")
    assert not {"script", "b", "iframe", "object", "embed", "link", "form"} & set(tags)
    handlers = "[...document.querySelectorAll('*')].flatMap(one => one.getAttributeNames()).filter(a => /^on/.test(a))"
    assert page.run(handlers) == []
    assert reports.SCRIPT in page.run("document.querySelector('table.matrix').innerText.replaceAll('\\n', '')")


def test_page_loads_its_pictures_and_nothing_else(show: Show) -> None:
    page = show("one network")
    natural = page.run("[...document.images].map(one => one.naturalWidth)")
    assert natural
    assert set(natural) == {8}
    foreign = [url for url in page.requests if not url.startswith("data:image/png;base64,")]
    assert len(foreign) == 1
    assert foreign[0].endswith("/report.html")


def test_page_fits_paper_and_leaves_the_records_out(show: Show) -> None:
    page = show("one network", dark=True)
    page.look(width=A4, media="print", dark=True)
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("document.querySelector('#records pre').checkVisibility()") is False
    assert page.print().startswith(b"%PDF-")
