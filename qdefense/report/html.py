"""The report as one page of HTML: no script, nothing from outside, every foreign string a harmless text."""

from __future__ import annotations

import base64
import binascii
import functools
import json
import math
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup, escape

from qdefense.fidelity import MAX_RELATIVE_RMS, MIN_GRADIENT_ROWS, MIN_TOP1_AGREEMENT
from qdefense.findings import (
    DatasetClass,
    DatasetResult,
    FilterResult,
    Finding,
    InvertedTrigger,
    ScanResult,
    TriggerPicture,
)
from qdefense.report import advice
from qdefense.report.charts import NormChart, ScoreChart, norm_chart, score_chart, suspicion_limit
from qdefense.report.datasets import describe_flagged, describe_statistics, ranked_classes
from qdefense.report.escaping import harmless
from qdefense.report.model import SCHEMA_VERSION, Report
from qdefense.report.text import (
    contract_rows,
    describe_boundary,
    describe_cost,
    describe_gradients,
    describe_restarts,
    describe_threshold,
    environment_rows,
    inspection_rows,
)

_LONGEST_TEXT = 600
_LONGEST_NAME = 80
_LONGEST_LABEL = 40
_PNG = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR"
_LONGEST_SIDE = 4096
_SHOWN_SIDE = 192
_ROWS = 2000
"""More rows than that would make a table that no browser scrolls well; report.json has them all."""


class _Whole(str):
    """A text that is not cut, however long."""

    __slots__ = ()


class Picture(NamedTuple):
    """A checked PNG as a data URI, and the size at which it is shown: a whole multiple of its own."""

    uri: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class TriggerView:
    """The pictures of one class's trigger; None where the report holds no PNG."""

    target_class: int
    class_name: str
    suspect: bool
    entry: InvertedTrigger | None
    mask: Picture | None
    alone: Picture | None
    example: Picture | None
    stamped: Picture | None


@dataclass(frozen=True, kw_only=True)
class ScanView:
    """A scan's finding with what the page draws of it."""

    finding: Finding
    result: ScanResult
    suspects: frozenset[int]
    chart: NormChart | None
    limit: float | None
    triggers: tuple[TriggerView, ...]


@dataclass(frozen=True, kw_only=True)
class DatasetView:
    """A dataset scan's finding: its labels by rank and what is flagged, never the scores of all images."""

    finding: Finding
    classes: tuple[DatasetClass, ...]
    flagged: str


@dataclass(frozen=True, kw_only=True)
class FilterView:
    """A filter's finding with what the page draws of it; ``listed`` are the rows that were not accepted."""

    finding: Finding
    result: FilterResult
    chart: ScoreChart | None
    listed: tuple[tuple[int, str, float | None], ...]


def render(report: Report) -> str:
    """The page: self-contained HTML without scripts, the same for equal reports."""
    page = page_environment().get_template("report.html")
    return page.render(
        report=report,
        newer=_is_newer(report.schema_version),
        advice=advice,
        next_steps=advice.next_steps(report),
        not_checked=advice.not_checked(report),
        checks=tuple(_checks(report)),
        scans=tuple(_scan_view(finding) for finding in report.findings if isinstance(finding.result, ScanResult)),
        datasets=tuple(
            _dataset_view(one, one.result) for one in report.findings if isinstance(one.result, DatasetResult)
        ),
        filters=tuple(_filter_view(finding) for finding in report.findings if isinstance(finding.result, FilterResult)),
        contract_rows=[] if report.subject.contract is None else contract_rows(report.subject.contract),
        inspection_rows=[]
        if report.subject.inspection is None
        else inspection_rows(report.subject.inspection, report.subject.runtime_facts),
        environment_rows=environment_rows(report.environment, report.subject.inspection, report.subject.runtime_facts),
        command=_command(report),
        marks={"top1": MIN_TOP1_AGREEMENT, "rms": MAX_RELATIVE_RMS, "gradients": MIN_GRADIENT_ROWS},
        most_rows=_ROWS,
    )


@functools.cache
def page_environment(*packages: str) -> jinja2.Environment:
    """What pages are made with: every ``{{ }}`` is cut, made harmless and escaped; templates of ``packages``, too."""
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in ("qdefense.report", *packages)]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": _percent,
        "number": _number,
        "name": lambda text: _cut(harmless(text), _LONGEST_NAME),
        "label": lambda text: _cut(harmless(text), _LONGEST_LABEL),
        "breakable": _breakable,
        "quoted": lambda word: _Whole(shlex.quote(word)),
        "boundary": describe_boundary,
        "cost": describe_cost,
        "statistics": describe_statistics,
        "restarts": describe_restarts,
        "threshold": describe_threshold,
        "gradients": describe_gradients,
        "settings": _settings,
        "sentence": lambda text: text[:1].upper() + text[1:],
        "whole": _Whole,
    }
    return environment


def _shown(value: Any) -> Any:
    """What every ``{{ }}`` gives: jinja escapes it next, unless a template made it."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    text = harmless(value)
    return text if isinstance(value, _Whole) else _cut(text, _LONGEST_TEXT)


def _breakable(text: str) -> Markup:
    """A text that may go on in another line after each comma: settings have no spaces."""
    return Markup(escape(_shown(text)).replace(",", Markup(",<wbr>")))  # noqa: S704 (escaped)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _percent(share: float | None, digits: int = 1) -> str:
    return "not measured" if share is None or not math.isfinite(share) else f"{share:.{digits}%}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None or not math.isfinite(value) else format(value, form)


def _settings(finding: Finding) -> list[tuple[str, str]]:
    return [
        (name, value if isinstance(value, str) else json.dumps(value, default=str))
        for name, value in finding.settings.items()
    ]


def _command(report: Report) -> tuple[str, ...]:
    """The words to type again; nothing where a report from elsewhere would have its reader run another program."""
    command = report.volatile.command
    return command if command[:1] == ("qdefense",) else ()


def _is_newer(version: str) -> bool:
    minor, ours = (text.partition(".")[2] for text in (version, SCHEMA_VERSION))
    return minor.isdecimal() and int(minor[:9]) > int(ours)


# --- parts of the page ------------------------------------------------------------------------------------------------


class Check(NamedTuple):
    """A row of the table of checks; ``finding`` is None where a required defense gave no answer."""

    name: str
    required: bool
    finding: Finding | None


def _checks(report: Report) -> Iterator[Check]:
    for finding in report.findings:
        yield Check(finding.defense, finding.defense in report.gate.required, finding)
    answered = {finding.defense for finding in report.findings}
    for name in dict.fromkeys(report.gate.required):
        if name not in answered:
            yield Check(name, required=True, finding=None)


def _scan_view(finding: Finding) -> ScanView:
    result = finding.result
    assert isinstance(result, ScanResult)  # noqa: S101 (the caller looked)
    return ScanView(
        finding=finding,
        result=result,
        suspects=frozenset(one.target_class for one in result.suspects),
        chart=norm_chart(result, finding.threshold),
        limit=suspicion_limit(result, finding.threshold),
        triggers=tuple(_trigger_view(picture, result) for picture in result.pictures),
    )


def _dataset_view(finding: Finding, result: DatasetResult) -> DatasetView:
    return DatasetView(finding=finding, classes=tuple(ranked_classes(result)), flagged=describe_flagged(result))


def _filter_view(finding: Finding) -> FilterView:
    result = finding.result
    assert isinstance(result, FilterResult)  # noqa: S101 (the caller looked)
    decided = zip(result.decisions, result.scores, strict=False)
    return FilterView(
        finding=finding,
        result=result,
        chart=score_chart(result),
        listed=tuple((row, decision, score) for row, (decision, score) in enumerate(decided) if decision != "accept"),
    )


def _trigger_view(picture: TriggerPicture, result: ScanResult) -> TriggerView:
    entry = next((one for one in result.classes if one.target_class == picture.target_class), None)
    return TriggerView(
        target_class=picture.target_class,
        class_name="" if entry is None else entry.class_name,
        suspect=any(one.target_class == picture.target_class for one in result.suspects),
        entry=entry,
        mask=read_picture(picture.mask_png),
        alone=read_picture(picture.trigger_png),
        example=read_picture(picture.example_png),
        stamped=read_picture(picture.stamped_png),
    )


def read_picture(text: str) -> Picture | None:
    """A base64 PNG as a data URI of its own bytes, encoded anew; None where it is anything else."""
    try:
        body = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    if not body.startswith(_PNG):
        return None
    width, height = (int.from_bytes(body[place : place + 4], "big") for place in (16, 20))
    if not (0 < width <= _LONGEST_SIDE and 0 < height <= _LONGEST_SIDE):
        return None
    times = max(1, _SHOWN_SIDE // max(width, height))
    uri = _Whole(f"data:image/png;base64,{base64.b64encode(body).decode()}")
    return Picture(uri, width * times, height * times)
