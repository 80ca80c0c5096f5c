from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from qdefense.arithmetic import ArithmeticAgreement
from qdefense.cli import run
from qdefense.findings import Restart, Threshold, Verdict
from qdefense.report import html
from qdefense.report.html import read_picture, render
from qdefense.report.model import Report

from . import sample_reports as samples

_VOID = {"meta", "br", "wbr", "img"}
_ALLOWED = {
    "html", "head", "meta", "title", "style", "body", "header", "main", "footer", "section", "nav", "div", "p", "span",
    "h1", "h2", "h3", "ul", "ol", "li", "dl", "dt", "dd", "a", "bdi", "strong", "br", "wbr", "code", "pre", "table",
    "caption",
    "thead", "tbody", "tr", "th", "td", "details", "summary", "figure", "figcaption", "img",
    "svg", "desc", "defs", "lineargradient", "stop", "g", "line", "rect", "circle", "path", "text",
}  # fmt: skip


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parent: Element | None
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def __iter__(self) -> Iterator[Element]:
        for child in self.children:
            if isinstance(child, Element):
                yield child
                yield from child

    def all(self, tag: str) -> list[Element]:
        return [element for element in self if element.tag == tag]


class _Reader(HTMLParser):
    """A tree; a tag that is not closed, or closed elsewhere, is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.open = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs}, self.open)
        self.open.children.append(element)
        if tag not in _VOID:
            self.open = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert tag == self.open.tag, f"</{tag}> closes <{self.open.tag}>"
        assert self.open.parent is not None
        self.open = self.open.parent

    def handle_data(self, data: str) -> None:
        self.open.children.append(data)


def parse(page: str) -> Element:
    reader = _Reader()
    reader.feed(page)
    reader.close()
    assert reader.open is reader.root, f"<{reader.open.tag}> is not closed"
    return reader.root


@pytest.fixture(scope="module", params=samples.SAMPLES, name="tree")
def _tree(request: pytest.FixtureRequest) -> Element:
    return parse(render(samples.SAMPLES[request.param]()))


def shown(report: Report) -> str:
    """The words of the page on one line."""
    (body,) = parse(render(report).replace("</dd>", "</dd> ")).all("body")
    return " ".join(body.text.split())


# --- what holds for every page ----------------------------------------------------------------------------------------


def test_render_gives_a_page_of_known_elements_that_are_all_closed(tree: Element) -> None:
    assert {element.tag for element in tree} <= _ALLOWED


def test_render_gives_language_title_and_one_main_heading(tree: Element) -> None:
    (page,) = tree.all("html")
    assert page.attributes["lang"] == "en"
    (title,) = tree.all("head")[0].all("title")
    assert title.text.split(":")[0] in {"PASSED", "FAILED", "INCOMPLETE", "REFUSED"}
    (heading,) = tree.all("h1")
    assert title.text.split(":")[0] in heading.text
    assert len(tree.all("main")) == 1


def test_render_skips_no_level_of_headings(tree: Element) -> None:
    levels = [int(element.tag[1]) for element in tree if re.fullmatch("h[1-6]", element.tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_render_asks_for_nothing_from_outside(tree: Element) -> None:
    for element in tree:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), f"<{element.tag} {name}>"
            if name in {"src", "srcset", "poster", "data", "action"}:
                assert value.startswith("data:image/png;base64,")
            if name in {"href", "xlink:href"}:
                assert value.startswith("#")
            if name == "style":
                raise AssertionError("styles belong to the style sheet")
    (style,) = tree.all("style")
    assert "@import" not in style.text
    assert "url(" not in style.text


def test_render_forbids_everything_but_its_own_styles_and_pictures(tree: Element) -> None:
    metas = [meta.attributes for meta in tree.all("meta")]
    (policy,) = [meta["content"] for meta in metas if meta.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == "'none'"
    assert rules["img-src"] == "data:"
    assert rules["style-src"] == "'unsafe-inline'"
    assert not {"script-src", "connect-src", "font-src", "frame-src", "object-src"} & set(rules)
    head = tree.all("head")[0]
    first = [element.tag for element in head][:2]
    assert first == ["meta", "meta"], "the policy comes before anything that it governs"


def test_render_gives_every_link_a_target_and_every_id_once(tree: Element) -> None:
    ids = [element.attributes["id"] for element in tree if "id" in element.attributes]
    assert len(set(ids)) == len(ids)
    links = [link.attributes["href"][1:] for link in tree.all("a")]
    named = [one for element in tree for one in element.attributes.get("aria-labelledby", "").split()]
    assert set(links + named) <= set(ids)
    assert len(links) >= 5


def test_render_gives_tables_captions_and_headers_with_a_scope(tree: Element) -> None:
    for table in tree.all("table"):
        assert len(table.all("caption")) == 1
        assert all(header.attributes.get("scope") in {"col", "row"} for header in table.all("th"))
        columns = len(table.all("thead")[0].all("th"))
        rows = table.all("tbody")[0].all("tr")
        assert rows
        assert all(len(row.all("td")) + len(row.all("th")) == columns for row in rows)
        box = table.parent
        assert box is not None
        assert (box.attributes["class"], box.attributes["tabindex"], box.attributes["role"]) == (
            "scroll",
            "0",
            "region",
        )


def test_render_describes_every_picture(tree: Element) -> None:
    assert all(image.attributes["alt"] for image in tree.all("img"))
    for drawing in tree.all("svg"):
        if drawing.attributes.get("role") == "img":
            assert (
                len([child for child in drawing.children if isinstance(child, Element) and child.tag == "title"]) == 1
            )
            assert len(drawing.all("desc")) == 1
        elif "aria-hidden" not in drawing.attributes:
            assert drawing.parent is not None
            assert drawing.parent.tag == "g", "only parts of a drawing have no description of their own"


def test_render_begins_with_verdict_reasons_and_steps(tree: Element) -> None:
    headings = [element.text.strip() for element in tree if element.tag in {"h1", "h2"}]
    assert headings[1:4] == ["Why", "What to do next", "What was checked, and what was not"]
    assert headings[-5:] == ["Clean accuracy", "The file", "Data", "Environment", "Repeat it"]


def test_render_leaves_no_trace_of_a_template_or_of_none(tree: Element) -> None:
    (body,) = tree.all("body")
    for trace in ("{%", "Markup(", "Undefined", "<bound", " None", "None ", "nan", "inf%"):
        if trace not in samples.HOSTILE:
            assert trace not in body.text


@pytest.mark.parametrize("name", samples.SAMPLES)
def test_render_gives_the_same_page_when_the_report_is_the_same(name: str) -> None:
    assert render(samples.SAMPLES[name]()) == render(samples.SAMPLES[name]())


# --- foreign text -----------------------------------------------------------------------------------------------------


def test_hostile_report_is_hostile_in_every_string() -> None:
    report = samples.hostile()
    strings = [report.subject.file, report.gate.reasons[0], report.volatile.host, report.findings[0].reason]
    assert set(strings) == {samples.HOSTILE}


def test_render_shows_hostile_strings_as_text() -> None:
    page = render(samples.hostile())
    tree = parse(page)
    assert "<script" not in page
    assert "<b>" not in page
    assert tree.all("img") == []  # no base64 is a PNG there
    (title,) = tree.all("head")[0].all("title")
    assert "</title></style><script>alert(1)" in title.text
    body = tree.all("body")[0].text
    assert body.count("window.pwned=1") > 40
    assert "{{7*7}}" in body.replace("{{{{7*7}}}}", "{{7*7}}")
    assert "49" not in re.sub(r"\d{3,}|[\d.]*49[\d.]+|[\d.]+49", "", body)


def test_render_shows_no_control_and_no_direction_characters() -> None:
    page = render(samples.hostile())
    assert r"\x1b[2J\u202eCLEAN\u2066\x00\n" in page
    assert {char for char in page if not char.isprintable()} == {"\n"}


def test_render_cuts_strings_when_they_are_endless_but_never_the_command_or_a_digest() -> None:
    page = render(samples.hostile(samples.LONG))
    words = re.findall(r"(?:Endlos)+", page)
    assert len([word for word in words if len(word) > 600]) == 1, "the option in a step"
    assert len(page) < 400_000
    digest = "ab" * 32
    report = samples.failed()
    subject = report.subject.model_copy(update={"sha256": digest})
    volatile = report.volatile.model_copy(update={"command": ("qdefense", "audit", samples.LONG)})
    page = render(report.model_copy(update={"subject": subject, "volatile": volatile}))
    assert page.count(digest) == 3
    assert f"<span>{samples.LONG}</span>" in page


def test_render_isolates_names_whose_letters_run_from_right_to_left() -> None:
    name = "שלום.onnx"
    report = samples.failed()
    changed = report.model_copy(update={"subject": report.subject.model_copy(update={"file": name})})
    assert [element.text for element in parse(render(changed)).all("bdi")].count(name) == 2


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_render_shows_four_pictures_of_each_suspect() -> None:
    report = samples.report("FAILED", samples.scan(Verdict.BACKDOORED, samples.scan_result(samples.NORMS, suspects=2)))
    images = parse(render(report)).all("img")
    assert [image.attributes["alt"] for image in images[:4]] == [
        "Mask of the trigger for class 0 (sign 0)",
        "The trigger for class 0 (sign 0) alone, on black",
        "A clean image of another class",
        "The same image with the trigger for class 0 (sign 0)",
    ]
    assert len(images) == 8
    sources = [image.attributes["src"].removeprefix("data:image/png;base64,") for image in images[:4]]
    shown = samples.picture(0)
    assert sources == [shown.mask_png, shown.trigger_png, shown.example_png, shown.stamped_png]
    assert {(image.attributes["width"], image.attributes["height"]) for image in images} == {("192", "192")}


def test_render_says_that_a_trigger_is_natural_when_there_is_no_suspect() -> None:
    text = shown(samples.passed())
    assert "The smallest trigger, of a class that is no suspect" in text
    assert "Networks without a backdoor have such triggers too." in text
    assert "The trigger of each suspect" not in text


@pytest.mark.parametrize(("side", "expected"), [(1, 192), (8, 192), (32, 192), (50, 150), (192, 192), (224, 224)])
def test_read_picture_enlarges_by_whole_numbers(side: int, expected: int) -> None:
    picture = read_picture(samples.png(side))
    assert picture is not None
    assert (picture.width, picture.height) == (expected, expected)
    assert picture.uri == f"data:image/png;base64,{samples.png(side)}"


def _sized(width: int, height: int) -> str:
    body = base64.b64decode(samples.png())
    return base64.b64encode(body[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + body[24:]).decode()


NO_PICTURES = {
    "nothing": "",
    "a script": "javascript:alert(1)",
    "an attribute": f'{samples.png()}" onerror="alert(1)',
    "another address": "https://example.org/x.png",
    "with line ends": f"{samples.png()[:60]}\n{samples.png()[60:]}",
    "cut base64": samples.png()[:41],
    "an SVG": base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'/>").decode(),
    "only the signature": base64.b64encode(b"\x89PNG\r\n\x1a\n").decode(),
    "no letters": "ёёё",
    "without width": _sized(0, 8),
    "huge": _sized(8, 4097),
}


@pytest.mark.parametrize("text", NO_PICTURES.values(), ids=list(NO_PICTURES))
def test_read_picture_is_none_when_the_text_is(text: str) -> None:
    assert read_picture(text) is None


@pytest.mark.parametrize("text", NO_PICTURES.values(), ids=list(NO_PICTURES))
def test_render_shows_a_word_in_place_of_a_picture_when_the_text_is(text: str) -> None:
    result = samples.scan_result(samples.NORMS, suspects=1)
    broken = result.pictures[0].model_copy(update={"stamped_png": text})
    report = samples.report(
        "FAILED", samples.scan(Verdict.BACKDOORED, result.model_copy(update={"pictures": (broken,)}))
    )
    tree = parse(render(report))
    assert len(tree.all("img")) == 3
    assert "The report holds no picture here." in tree.all("body")[0].text


def test_render_says_so_when_a_suspect_has_no_picture() -> None:
    assert "This report holds no pictures of the suspects' triggers." in shown(samples.golden("1.0-failed"))


# --- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "outcome", "code"),
    [("passed", "PASSED", 0), ("failed", "FAILED", 1), ("not measured", "INCOMPLETE", 3), ("refused", "REFUSED", 4)],
)
def test_render_says_outcome_and_exit_code_first(name: str, outcome: str, code: int) -> None:
    report = samples.SAMPLES[name]()
    text = shown(report)
    assert f"{outcome} exit code {code} " in text[:120]
    for reason in report.gate.reasons:
        assert reason in text[: text.index("What was checked, and what was not")]


def test_render_says_where_the_line_is() -> None:
    text = shown(samples.failed())
    assert "Threshold 2: paper, false-alarm rate unknown." in text
    assert "With these norms a class is a suspect below 60.0 pixels (median 100.0, scaled MAD 20.0)." in text
    assert "suspect below 60.0" in text[text.index("Trigger norm per class") :]
    assert "So many clean models" not in text


def test_render_explains_a_calibrated_threshold() -> None:
    text = shown(samples.passed(samples.CALIBRATED))
    assert "Threshold 3.25: calibrated, n = 40, rate = 0.05 (p = 0.025)." in text
    assert "So many clean models (n) were scored to draw it" in text
    assert f"calibration sha256 {'c' * 64}" in text


def test_render_shows_the_restarts_where_there_were_any() -> None:
    assert "Index of each start" not in shown(samples.passed())
    restarts = (Restart(score=1.5, lowest_class=0), Restart(score=0.5, lowest_class=2))
    result = samples.scan_result(samples.NORMS).model_copy(update={"restarts": restarts})
    text = shown(samples.report("PASSED", samples.scan(Verdict.CLEAN, result)))
    assert "by the first's median and MAD): 1.50, 0.50; lowest 0.50, median 1.00, highest 1.50. Where a start" in text
    empty = result.model_copy(update={"classes": (), "pictures": ()})
    assert "Index of each start" not in shown(samples.report("INCOMPLETE", samples.scan(Verdict.NOT_MEASURED, empty)))


def test_render_says_so_when_no_class_could_have_been_a_suspect() -> None:
    text = shown(samples.unable_to_alarm())
    assert "With these norms no class could have been a suspect, however small its trigger" in text
    assert "no class could have been" not in shown(samples.passed())


def test_render_says_so_when_a_finding_names_no_threshold() -> None:
    finding = samples.scan(Verdict.CLEAN, samples.scan_result(samples.NORMS), threshold=None)
    assert "The report names no threshold." in shown(samples.report("PASSED", finding))


def test_render_draws_the_lowest_classes_and_lists_all() -> None:
    report = samples.many_classes()
    tree = parse(render(report))
    (chart,) = [drawing for drawing in tree.all("svg") if drawing.attributes.get("role") == "img"]
    kinds = [group.attributes.get("class") for group in chart.all("g")]
    assert (kinds.count("suspect"), kinds.count("class")) == (2, 46)
    assert [text.text for text in chart.all("text") if "suspect" in text.text] == [
        "suspect below 60.0", "20.0 suspect", "25.0 suspect",
    ]  # fmt: skip
    text = " ".join(tree.all("body")[0].text.split())
    assert "The 48 lowest of 200 classes; 152 more are in the table, 10 of them censored." in text
    (table,) = [table for table in tree.all("table") if len(table.all("tr")) == 201]
    assert table.all("tr")[200].text.endswith(
        "censored: no trigger reached an ASR of 0.99 on the session within the budget"
    )


def test_render_lists_the_first_classes_when_there_are_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "_ROWS", 20)
    assert "report.json has the other 180." in shown(samples.many_classes())


def test_render_says_what_censored_classes_are_without_numbers() -> None:
    tree = parse(render(samples.failed()))
    rows = [row for row in tree.all("tr") if "censored" in row.text]
    assert [cell.text for cell in rows[0].all("td")][2:6] == ["–", "–", "–", "–"]


@pytest.mark.parametrize(
    ("norms", "words"),
    [([None] * 6, "No class has a norm to draw: see the table."), ([], "The scan ended before it had a norm for any")],
)
def test_render_says_so_when_there_is_no_chart(norms: list[float | None], words: str) -> None:
    finding = samples.scan(Verdict.NOT_MEASURED, samples.scan_result(norms))
    assert words in shown(samples.report("INCOMPLETE", finding))


def test_render_says_which_required_check_gave_no_answer() -> None:
    text = shown(samples.killed())
    assert "neural-cleanse NO ANSWER required It did not run, or did not come to its end." in text


def test_render_says_whether_the_arithmetics_agree() -> None:
    report = samples.golden("1.1-failed")
    assert report.certificate is not None
    same = ArithmeticAgreement(used="exact", mixed_products=3, n=1024, bit_exact_rows=1.0)
    changed = report.model_copy(update={"certificate": report.certificate.model_copy(update={"arithmetic": same})})
    words = "As-run and exact arithmetic agree bit for bit on 1024 images (3 operators multiply u8 by s8 codes)."
    assert words in shown(changed)
    assert words not in shown(report)


def test_render_shows_the_certificate_and_the_cause_of_a_mismatch() -> None:
    text = shown(samples.not_measured())
    assert "NOT certified: it saturates" in text
    assert "Cause of the difference: saturation. int16 saturation in 'conv1'" in text
    assert "Layers named (2)" in text
    whole = shown(samples.golden("1.1-failed"))
    assert "Certified: all four input sets and the gradient checks pass" in whole
    assert "A set passes at a top-1 agreement of 0.995 and an RMS difference of 5% of the logits' spread." in whole
    assert "Gradients: finite on 100.0%, non-zero on 100.0% of rows" in whole


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("failed", "100.00% of 320 images, measured on the deployed session."),
        ("unlabelled", "90.00%, stated by the user and not measured: the 300 images have no labels."),
        ("killed", "Clean accuracy Not measured."),
    ],
)
def test_render_says_where_the_accuracy_comes_from(name: str, words: str) -> None:
    assert words in shown(samples.SAMPLES[name]())


def test_render_lists_other_contracts_with_their_accuracy() -> None:
    tree = parse(render(samples.misread()))
    (table,) = [table for table in tree.all("table") if "Other contracts" in table.text]
    assert [cell.text for cell in table.all("tr")[1].all("td")] == ["97.00%", "13.00%", "320"]
    assert table.all("tr")[1].all("th")[0].text == "pixels in [0, 255] (--range 0,255)"
    assert "Other contracts" not in shown(samples.passed())


def test_render_shows_data_without_labels_with_its_notes() -> None:
    text = shown(samples.unlabelled())
    assert "source folder images read as folder: it holds PNGs images 300, without labels sha256" in text
    assert "note 2 files are no pictures" in text


def test_render_shows_every_file_with_weights() -> None:
    report = samples.failed()
    subject = report.subject.model_copy(update={"external_files": {"weights.bin": "e" * 64}})
    assert f"with weights.bin sha256 {'e' * 64}" in shown(report.model_copy(update={"subject": subject}))


def test_render_quotes_the_command_for_a_shell() -> None:
    report = samples.failed()
    volatile = report.volatile.model_copy(
        update={"command": ("qdefense", "audit", "my model.onnx", "--data", "$(rm x)")}
    )
    (block,) = parse(render(report.model_copy(update={"volatile": volatile}))).all("pre")
    assert block.text == "qdefense audit 'my model.onnx' --data '$(rm x)'"


def test_render_says_so_when_there_is_no_command() -> None:
    report = samples.failed()
    volatile = report.volatile.model_copy(update={"command": ()})
    assert "The report names no command of qdefense." in shown(report.model_copy(update={"volatile": volatile}))


@pytest.mark.parametrize("command", [("rm", "-rf", "."), ("sh", "-c", "qdefense audit"), ("qdefense;rm", "x")])
def test_render_shows_no_command_of_another_program(command: tuple[str, ...]) -> None:
    report = samples.failed()
    volatile = report.volatile.model_copy(update={"command": command})
    assert parse(render(report.model_copy(update={"volatile": volatile}))).all("pre") == []


def test_render_quotes_what_it_tells_to_type_when_a_defense_has_a_hostile_name() -> None:
    (finding,) = samples.failed().findings
    report = samples.report("FAILED", finding.model_copy(update={"defense": "x  `id`; rm -rf ."}))
    (steps,) = parse(render(report)).all("ol")
    assert "--defense 'x  `id`; rm -rf .:budget=exhaustive' --seed 4" in [code.text for code in steps.all("code")]


def test_render_says_so_when_the_report_is_of_a_newer_version() -> None:
    text = shown(samples.newer())
    assert "This report is of schema 1.9, newer than this qdefense knows." in text
    assert text.startswith("qdefense audit")
    assert "INCOMPLETE exit code 3" in text
    assert "verdict 'PROBABLY_CLEAN' is not known to this version" in text
    assert "newer than this qdefense" not in shown(samples.failed())


@pytest.mark.parametrize("version", ["1", "1.", "1.x", "1.-3", "1.²", f"1.{'9' * 5000}"])
def test_render_takes_any_text_for_a_version(version: str) -> None:
    report = samples.failed().model_copy(update={"schema_version": version})
    assert ("newer than" in shown(report)) == (len(version) > 100)


def test_render_shows_figures_that_are_no_numbers_as_such() -> None:
    threshold = Threshold(value=2.0, source="paper")
    nan = float("nan")
    result = samples.scan_result([nan, 50.0, float("inf")])
    changed = result.model_copy(update={"replay_agreement": nan, "replay_relative_rms": nan, "median_norm": nan})
    text = shown(samples.report("FAILED", samples.scan(Verdict.BACKDOORED, changed, threshold=threshold)))
    assert "nan" not in text
    assert "inf " not in text


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def _audited(monkeypatch: pytest.MonkeyPatch) -> None:
    def audit(*_arguments: object, **_options: object) -> Report:
        return samples.failed()

    monkeypatch.setattr("qdefense.cli.audit.run_audit", audit)


def audit(toy: Any, *options: str) -> int:
    return run(["audit", str(toy.clean), "--data", str(toy.data), *options])


@pytest.mark.usefixtures("_audited")
def test_audit_writes_the_page_beside_the_report_when_asked(
    toy: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert audit(toy, "--format", "html", "--output-dir", str(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render(samples.failed())
    output, errors = capfd.readouterr()
    assert output.startswith("FAILED  (exit code 1)\n  neural-cleanse: ")
    assert (output.count("\n"), errors) == (1 + len(samples.failed().gate.reasons), "")


@pytest.mark.usefixtures("_audited")
def test_audit_prints_the_table_too_when_both_are_asked(
    toy: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert audit(toy, "--format", "html", "--format", "table", "--output-dir", str(tmp_path)) == 1
    assert (tmp_path / "report.html").exists()
    assert capfd.readouterr().out.startswith("FAILED  (exit code 1)")


@pytest.mark.usefixtures("_audited")
def test_audit_writes_no_page_when_it_is_not_asked(toy: Any, tmp_path: Path) -> None:
    assert audit(toy, "--output-dir", str(tmp_path)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]


@pytest.mark.usefixtures("_audited")
def test_audit_removes_the_page_of_an_earlier_report_when_it_writes_none(toy: Any, tmp_path: Path) -> None:
    """An old page beside a new report would be taken for the new one's."""
    (tmp_path / "other.html").touch()
    assert audit(toy, "--format", "html", "--output-dir", str(tmp_path)) == 1
    assert (tmp_path / "report.html").exists()
    assert audit(toy, "--output-dir", str(tmp_path)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.html", "report.json"]
    (tmp_path / "report.html").mkdir()
    assert audit(toy, "--output-dir", str(tmp_path)) == 1, "a folder is none of this tool's"


@pytest.fixture
def _no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_arguments: object, **_options: object) -> None:
        raise AssertionError("the long work has begun")

    monkeypatch.setattr("qdefense.cli.audit.run_audit", fail)


@pytest.mark.usefixtures("_no_worker")
def test_audit_exits_2_before_any_work_when_the_page_has_no_folder(toy: Any, capfd: pytest.CaptureFixture[str]) -> None:
    assert audit(toy, "--format", "html") == 2
    message = "Error: html and several formats need --output-dir; one text format alone goes to stdout\n"
    assert capfd.readouterr().err.endswith(message)


@pytest.mark.usefixtures("_no_worker")
def test_audit_exits_2_before_any_work_when_the_page_cannot_be_written(
    toy: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "report.html").mkdir()
    assert audit(toy, "--format", "html", "--output-dir", str(tmp_path)) == 2
    assert capfd.readouterr().err == (
        f"error: {tmp_path}/report.html: Is a directory; check the path and its permissions\n"
    )


# --- filters ----------------------------------------------------------------------------------------------------------


def test_render_shows_what_a_filter_said_of_the_inputs() -> None:
    text = shown(samples.filtered())
    assert "strip: score per input" in text
    assert "30 of 71 inputs with a score were rejected" in text
    assert (
        "with a probability of at most 8.50% (with 97.5% confidence), and at that rate so many by chance with "
        "p = 2.5e-07; at most 0.01 is an alarm" in text
    )
    assert "Boundary 0.4: fitted on 120 clean images" in text
    assert "The 31 inputs that were not accepted" in text
    assert "30unmeasured–" in text
    assert "npz inputs.npz" in text
    assert "Look at the inputs that strip rejected" in text


def test_render_says_when_no_input_could_have_been_rejected() -> None:
    result = samples.filter_result(0.5, 0.6, value=-0.2)
    text = shown(samples.filtered(Verdict.NOT_MEASURED, result))
    assert "No score can be below this boundary, so that no input could have been rejected." in text
    assert "Look at the inputs that strip rejected" not in text


def test_render_draws_no_chart_when_no_input_has_a_score() -> None:
    page = render(samples.filtered(Verdict.NOT_MEASURED, samples.filter_result(None, None)))
    assert "No input has a score to draw." in page
    assert "scores-1-title" not in page


def test_render_lists_2000_rejected_inputs_at_most() -> None:
    page = render(samples.filtered(result=samples.filter_result(*[0.1] * 2100)))
    assert page.count("<td>reject</td>") == 2000
    assert "report.json has the other 100." in page


# --- training data ----------------------------------------------------------------------------------------------------


def test_render_shows_labels_and_flagged_rows_of_a_dataset_scan() -> None:
    text = shown(samples.poisoned())
    assert "activation-clustering: training images per label" in text
    assert "5 of 600 training images flagged: rows 0, 1, 2, 3, 4." in text
    assert "0sign 0500.405 smaller cluster 20%, silhouette 0.4suspicious 11sign 11" in text
    assert "49 images; at least 50 are needed" in text
    assert "96 of 600 training images ranked highest of their class, which by itself says nothing of poison" in text
    assert "npz training.npz" in text


def test_render_leaves_the_scores_of_images_out() -> None:
    few, many = (
        samples.report("FAILED", samples.dataset_finding(Verdict.BACKDOORED, samples.dataset_result([0.4], images=n)))
        for n in (50, 50_000)
    )
    assert abs(len(render(many)) - len(render(few))) < 200
    assert len(many.model_dump_json(indent=2)) < 2_000_000


def test_render_says_so_when_a_dataset_scan_has_no_result() -> None:
    report = samples.report("INCOMPLETE", samples.dataset_finding(Verdict.NOT_APPLICABLE, None, reason="no labels"))
    assert "training images per label" not in render(report)
    assert "no labels" in shown(report)
