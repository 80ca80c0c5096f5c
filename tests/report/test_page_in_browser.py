"""The page as Chromium shows it: layout, contrast, hostile names, pictures, network, print."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qdefense.report.html import render

from . import sample_reports as samples
from .browser import Browser

PHONE, DESK, A4 = 360, 1200, 690
OPEN_ALL = "document.querySelectorAll('details').forEach(one => one.open = true)"

# Names of what reaches over the right edge: the page, a box outside the tables that scroll, a word of the chart.
OVERFLOW = """(() => {
  const wide = document.documentElement.clientWidth + 0.5, found = [];
  if (document.documentElement.scrollWidth > wide) found.push('page ' + document.documentElement.scrollWidth);
  for (const one of document.body.querySelectorAll('*')) {
    const box = one.getBoundingClientRect();
    const drawn = one.ownerSVGElement, inner = drawn && drawn.ownerSVGElement;
    if (!one.closest('.scroll') && !inner && box.width && (box.right > wide || box.left < -0.5))
      found.push(one.tagName + ' ' + one.className + ' ' + one.textContent.slice(0, 40));
    if (one.tagName === 'text' && !inner && box.right > drawn.getBoundingClientRect().right + 0.5)
      found.push('text ' + one.textContent);
  }
  return found;
})()"""

# Contrast ratio (WCAG 2) of every text against what is behind it; the chart's words also against its tinted zone.
CONTRAST = """(() => {
  const parse = text => {
    const parts = text.match(/[\\d.]+/g).map(Number);
    return {rgb: parts.slice(0, 3), alpha: parts.length > 3 ? parts[3] : 1};
  };
  const light = rgb => {
    const [r, g, b] = rgb.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const behind = one => {
    for (; one; one = one.parentElement) {
      const colour = parse(getComputedStyle(one).backgroundColor);
      if (colour.alpha === 1) return colour.rgb;
      if (colour.alpha !== 0) throw new Error('half-transparent background on ' + one.tagName);
    }
    throw new Error('no background');
  };
  const found = [], walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walk.nextNode()) {
    const one = walk.currentNode.parentElement;
    if (!walk.currentNode.data.trim() || ['title', 'desc', 'TITLE'].includes(one.tagName)) continue;
    const style = getComputedStyle(one), drawn = one.closest('figure.chart svg');
    const colour = parse(drawn ? style.fill : style.color);
    if (colour.alpha !== 1 || style.opacity !== '1') throw new Error('half-transparent text');
    const grounds = [behind(one)], zone = drawn && drawn.querySelector('.zone');
    if (zone) grounds.push(parse(getComputedStyle(zone).fill).rgb);
    for (const ground of grounds)
      found.push([ratio(colour.rgb, ground), one.tagName + ' ' + walk.currentNode.data.trim().slice(0, 40)]);
  }
  return found;
})()"""


def _chromium() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = _chromium()
    if program is None:
        reason = "no chromium on the path; apt-get install --no-install-recommends chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    with Browser(program, tmp_path_factory.mktemp("chromium")) as opened:
        yield opened


@pytest.fixture
def show(browser: Browser, tmp_path: Path) -> Callable[..., Browser]:
    """Open the page of a sample, all details open."""

    def opened(name: str, *, width: int = DESK, height: int = 800, dark: bool = False) -> Browser:
        page = tmp_path / "report.html"
        page.write_text(render(samples.SAMPLES[name]()), encoding="utf-8")
        browser.look(width=width, height=height, dark=dark)
        browser.open(page)
        browser.run(OPEN_ALL)
        return browser

    return opened


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_page_overflows_neither_a_phone_nor_a_desk(show: Callable[..., Browser], name: str) -> None:
    page = show(name, width=PHONE)
    assert page.run("innerWidth") == PHONE
    assert page.run(OVERFLOW) == []
    page.look(width=DESK)
    assert page.run("innerWidth") == DESK
    assert page.run(OVERFLOW) == []


def test_overflow_is_seen_when_there_is_some(show: Callable[..., Browser]) -> None:
    page = show("passed", width=PHONE)
    page.run("document.querySelector('h1').style.width = '400px'")
    assert "H1" in " ".join(page.run(OVERFLOW))


@pytest.mark.parametrize(("width", "height"), [(PHONE, 640), (DESK, 800)])
@pytest.mark.parametrize("name", ["passed", "failed", "killed", "refused"])
def test_page_shows_the_verdict_without_scrolling(
    show: Callable[..., Browser], name: str, width: int, height: int
) -> None:
    page = show(name, width=width, height=height)
    for part in ("h1", ".headline", ".subject"):
        box = page.run(f"document.querySelector('{part}').getBoundingClientRect().toJSON()")
        assert 0 <= box["top"] < box["bottom"] <= height
        assert box["height"] > 10
    assert samples.SAMPLES[name]().gate.outcome in page.run("document.querySelector('h1').innerText")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["failed", "calibrated", "not measured", "refused", "misread", "newer", "200 classes"])
def test_page_has_the_contrast_of_wcag_aa(show: Callable[..., Browser], name: str, dark: bool) -> None:
    page = show(name, dark=dark)
    ratios: list[tuple[float, str]] = page.run(CONTRAST)
    assert len(ratios) > 50
    assert [f"{ratio:.2f} {text}" for ratio, text in ratios if ratio < 4.5] == []
    background = page.run("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") != dark


def test_contrast_is_seen_when_it_is_low(show: Callable[..., Browser]) -> None:
    page = show("passed")
    page.run("document.querySelector('h1').style.color = '#9a9'")
    assert "PASSED" in " ".join(text for ratio, text in page.run(CONTRAST) if ratio < 4.5)


def test_page_takes_hostile_strings_for_text(show: Callable[..., Browser]) -> None:
    page = show("hostile")
    assert page.run("window.pwned") is None
    assert page.dialogs == []
    tags: list[str] = page.run("[...new Set([...document.querySelectorAll('*')].map(one => one.localName))]")
    assert not {"script", "b", "iframe", "object", "embed", "link", "form", "img"} & set(tags)
    handlers = "[...document.querySelectorAll('*')].flatMap(one => one.getAttributeNames()).filter(a => /^on/.test(a))"
    assert page.run(handlers) == []
    assert samples.SCRIPT[:60] in page.run("document.title")
    assert samples.SCRIPT in page.run("document.querySelector('.subject').innerText")


def test_policy_stops_a_script_when_one_is_injected(show: Callable[..., Browser], tmp_path: Path) -> None:
    """The second fence, were the first one broken."""
    browser = show("passed")
    page = tmp_path / "report.html"
    scripts = "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 2'><img src='http://127.0.0.1:9/x'>"
    page.write_text(page.read_text(encoding="utf-8").replace("</main>", f"{scripts}</main>"), encoding="utf-8")
    browser.open(page)
    assert browser.run("document.scripts.length") == 1
    assert browser.run("window.pwned") is None
    page.write_text(page.read_text(encoding="utf-8").replace("Content-Security-Policy", "x"), encoding="utf-8")
    browser.open(page)
    assert browser.run("window.pwned") is not None, "without the policy it would have run"


@pytest.mark.parametrize(("name", "count"), [("failed", 4), ("200 classes", 8), ("1.1-failed", 4), ("1.0-failed", 0)])
def test_page_loads_its_pictures_and_nothing_else(show: Callable[..., Browser], name: str, count: int) -> None:
    page = show(name)
    pictures: list[Any] = page.run(
        "[...document.images].map(one => [one.naturalWidth, one.width, getComputedStyle(one).imageRendering])"
    )
    assert len(pictures) == count
    natural = 16 if name == "1.1-failed" else 8
    assert all(picture == [natural, 192, "pixelated"] for picture in pictures)
    foreign = [url for url in page.requests if not url.startswith("data:image/png;base64,")]
    assert len(foreign) == 1
    assert foreign[0].startswith("file://")
    assert foreign[0].endswith("/report.html")


@pytest.mark.parametrize("name", ["failed", "1.1-failed", "misread"])
def test_page_fits_paper_where_nothing_scrolls(show: Callable[..., Browser], name: str) -> None:
    page = show(name)
    page.look(width=A4, media="print")
    edges = "[...document.querySelectorAll('table, img, pre, dl')].map(one => one.getBoundingClientRect().right)"
    assert 0 < max(page.run(edges)) <= A4
    assert page.run(OVERFLOW) == []


def test_page_prints_with_its_details_in_dark_letters(show: Callable[..., Browser]) -> None:
    page = show("failed", dark=True)
    page.run("document.querySelectorAll('details').forEach(one => one.open = false)")
    hidden = "[...document.querySelectorAll('details table')].map(one => one.checkVisibility())"
    assert page.run(hidden) == [False]
    pdf = page.print()
    assert pdf.startswith(b"%PDF-")
    assert 2 <= pdf.count(b"/Type /Page\n") <= 8
    page.look(width=DESK, dark=True, media="print")
    assert page.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.run("document.querySelector('details table').getBoundingClientRect().height") > 100
    assert page.run("getComputedStyle(document.querySelector('nav')).display") == "none"
