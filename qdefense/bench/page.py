"""The bench as one page of HTML: no script, nothing from outside, every foreign string a harmless text."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from qdefense.bench.budget_plots import HEIGHT, WIDTH, Panel, budget_panels
from qdefense.bench.cohort import NO_ATTACK, Cohort, Subject, rank_of, row_rank, status_of
from qdefense.bench.facts import environment_rows, network_rows, omissions
from qdefense.bench.forms import HEAT_MARKS
from qdefense.bench.plots import PLOT_HEIGHT, SIDE, RocPanel, cost_charts, roc_panels, series_of
from qdefense.bench.records import BehaviourRecord, DefenseRecord, Record, TrainingRecord
from qdefense.bench.sheets import Group, access_of, sheets_of
from qdefense.bench.summary import BenchReport
from qdefense.bench.trigger_pictures import picture_of
from qdefense.findings import ScanResult, TriggerPicture
from qdefense.report.html import Picture, page_environment, read_picture

MOST_TRIGGERS = 60
"""More pictures than that are in the records alone."""
_LEFT_OUT = "left out of the page; see records.jsonl"


@dataclass(frozen=True, kw_only=True)
class RecordView:
    """One record as a line of JSON, without what the page draws."""

    title: str
    line: str


@dataclass(frozen=True, kw_only=True)
class GroupView:
    """The records of one cell, where links lead."""

    anchor: str
    title: str
    records: tuple[RecordView, ...]


class TriggerView(NamedTuple):
    """An inverted trigger; of the pictures in a finding only these show no image of a data set."""

    title: str
    target: int
    norm: float | None
    mask: Picture | None
    alone: Picture | None


class StampedView(NamedTuple):
    """Generated images without and with the planted trigger of an attack."""

    title: str
    picture: Picture


def render_bench(report: BenchReport, cohort: Cohort, pictures: Mapping[str, str] | None = None) -> str:
    """The page: self-contained HTML without scripts, the same for equal folders of results.

    ``pictures``: base64 PNGs of planted triggers by file name, as `read_trigger_pictures` gives them.
    """
    looks = series_of(cohort)
    anchors: dict[Group, str] = {}
    groups = tuple(_groups(cohort, anchors))
    triggers = list(_triggers(cohort))
    return (
        page_environment("qdefense.bench")
        .get_template("bench.html")
        .render(
            report=report,
            omissions=omissions(report),
            sheets=sheets_of(report),
            network_rows=network_rows(report),
            environment_rows=environment_rows(report),
            anchors=anchors,
            groups=groups,
            heat_marks=HEAT_MARKS,
            looks=looks,
            rocs=_by_place(roc_panels(cohort)),
            side=SIDE,
            sweeps=_by_place(budget_panels(report.budgets, looks)),
            sweep_width=WIDTH,
            sweep_height=HEIGHT,
            charts=cost_charts(report, looks),
            plot_height=PLOT_HEIGHT,
            stamped=list(_stamped(cohort, pictures or {}))[:MOST_TRIGGERS],
            triggers=triggers[:MOST_TRIGGERS],
            more_triggers=len(triggers) - MOST_TRIGGERS,
        )
    )


_Panel = TypeVar("_Panel", RocPanel, Panel)


def _by_place(panels: Iterable[_Panel]) -> dict[str, list[_Panel]]:
    places: defaultdict[str, list[_Panel]] = defaultdict(list)
    for panel in panels:
        places[panel.place].append(panel)
    return dict(places)


# --- records ----------------------------------------------------------------------------------------------------------


def _groups(cohort: Cohort, anchors: dict[Group, str]) -> Iterator[GroupView]:
    """Every cell with its records, in the order of the tables; ``anchors`` learns where each is."""
    for setting in sorted(cohort.behaviours, key=rank_of):
        anchors[setting, "", "session"] = anchor = f"records-{len(anchors) + 1}"
        title = f"{setting.place}, {setting.attack}, {setting.file}: the files"
        files = cohort.behaviours[setting]
        yield _group(anchor, title, [one for file in files for one in _lines_of(cohort, file)])
    for subject in sorted(cohort.defenses, key=row_rank):
        setting = subject.setting
        anchors[setting, subject.defense, subject.access] = anchor = f"records-{len(anchors) + 1}"
        title = f"{setting.place}, {setting.attack}, {setting.file}: {subject.defense}{access_of(subject.access)}"
        yield _group(anchor, title, cohort.defenses[subject])
    failed = [one for one in cohort.makings if one.failed]
    if failed:
        yield _group("records-failed", "networks and files that could not be made", failed)


def _lines_of(cohort: Cohort, behaviour: BehaviourRecord) -> list[Record]:
    """As it was recorded, its control, and how its file was made."""
    control = cohort.controls.get(behaviour.key)
    makings = (one for one in cohort.makings if one.artifact_sha256 == behaviour.artifact_sha256)
    return [cohort.recorded(behaviour), *([] if control is None else [control]), *makings]


def _group(anchor: str, title: str, records: Sequence[Record]) -> GroupView:
    return GroupView(anchor=anchor, title=title, records=tuple(map(_record_view, records)))


def _record_view(record: Record) -> RecordView:
    state = "failed" if record.failed else ""
    if isinstance(record, DefenseRecord):
        state = status_of(record) if record.verdict is None else f"{record.verdict}"
    title = f"{record.stage}, seed {record.network.seed}{f': {state}' if state else ''}"
    return RecordView(title=title, line=json.dumps(_without_drawn(record), ensure_ascii=False))


def _without_drawn(record: Record) -> dict[str, Any]:
    """Curves and pictures are drawn above, or show images of a data set, which no page does."""
    body = record.model_dump(mode="json")
    metrics, result = body.get("metrics") or {}, (body.get("finding") or {}).get("result") or {}
    for part, name in ((metrics, "curve"), (result, "pictures")):
        if part.get(name):
            part[name] = _LEFT_OUT
    return body


# --- pictures ---------------------------------------------------------------------------------------------------------


def _stamped(cohort: Cohort, pictures: Mapping[str, str]) -> Iterator[StampedView]:
    """Of each attack, data and architecture the first network that has a picture."""
    networks = [one for one in cohort.makings if isinstance(one, TrainingRecord)]
    drawn: dict[tuple[str, str, str], StampedView] = {}
    for record in sorted(networks, key=lambda one: (one.network.seed, one.key)):
        made = record.network
        place = made.data, cohort.architecture(made), cohort.attack(made)
        picture = read_picture(picture_of(pictures, record.artifact_sha256) or "")
        if made.attack is not None and picture is not None and place not in drawn:
            drawn[place] = StampedView(f"{', '.join(place)}, seed {made.seed}", picture)
    yield from (drawn[place] for place in sorted(drawn))


def _triggers(cohort: Cohort) -> Iterator[TriggerView]:
    """Of the first network of each kind of file, attacked ones first."""
    subjects = [subject for subject in sorted(cohort.defenses, key=row_rank) if subject.access == "session"]
    for subject in sorted(subjects, key=lambda subject: subject.setting.attack == NO_ATTACK):
        record = cohort.defenses[subject][0]
        result = None if record.finding is None else record.finding.result
        if isinstance(result, ScanResult):
            yield from (_trigger(subject, record, result, picture) for picture in result.pictures)


def _trigger(subject: Subject, record: DefenseRecord, result: ScanResult, picture: TriggerPicture) -> TriggerView:
    entry = next((one for one in result.classes if one.target_class == picture.target_class), None)
    setting = subject.setting
    return TriggerView(
        title=f"{setting.place}, {setting.attack}, seed {record.network.seed}, {setting.file}",
        target=picture.target_class,
        norm=None if entry is None else entry.norm,
        mask=read_picture(picture.mask_png),
        alone=read_picture(picture.trigger_png),
    )
