"""What stands at the head of the tables: where the records come from, and in sentences what they do not hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator

from qdefense.bench.cohort import NO_ATTACK
from qdefense.bench.figures import rounded
from qdefense.bench.records import SCHEMA_VERSION
from qdefense.bench.summary import BenchReport
from qdefense.bench.tables import DatasetRow, FilterRow, RepairRow, ScanRow
from qdefense.bench.timing_records import PLAIN


def omissions(report: BenchReport) -> tuple[str, ...]:
    """One sentence each; none where nothing is known to be missing."""
    return tuple(_sentences(report))


def _sentences(report: BenchReport) -> Iterator[str]:
    rows = _defense_rows(report)
    if not report.behaviour:
        yield "No file was measured: there is no clean accuracy, no ASR, and no telling which files are active."
    if not rows:
        yield "No defense was run."
    yield from (text.format(count) for count, text in _counts(report, rows) if count)
    yield from _without_twins(report, rows)
    yield from _weaknesses(report)
    yield from _paces(report)
    majors = {version.partition(".")[0] for version in report.environment.schema_versions}
    if majors - {SCHEMA_VERSION.partition(".")[0]}:
        yield "Some records are of another major version of the schema, and may say other things than they seem to."


def _counts(report: BenchReport, rows: _Rows) -> tuple[tuple[int, str], ...]:
    return (
        (
            len(report.missing or ()),
            "Work items of the matrix without a record: {}; 'qdefense bench' goes on where it stopped.",
        ),
        (sum(row.failed for row in report.networks), "Networks that could not be trained: {}."),
        (
            sum(len(one.keys) for one in report.unanswered),
            "Work items without an answer: {}. They are in no rate, and listed with their reasons.",
        ),
        (
            sum(row.unknown_activity for row in rows),
            "Trials of files whose activity was not measured: {}. They are in no rate.",
        ),
        (
            sum(row.uncontrolled for row in report.behaviour),
            "Behaviours of attacked files without a control, the same trigger on their clean twin, of ASR or FPR: {}. "
            "There a trigger that fools any network passes for a backdoor.",
        ),
        (
            sum(row.uncontrolled for row in report.repairs),
            "Repairs of attacked files without a control: {}. What became of the backdoor is as the file alone tells.",
        ),
        (
            report.unpaired,
            "Trials of quantized files that were not made of the FP32 file beside them, as far as records say: {}. "
            "They are in no difference to FP32.",
        ),
        (
            report.apart,
            "Trials of quantized files whose FP32 file was measured on another CPU or ONNX Runtime only: {}. They are "
            "in no difference to FP32.",
        ),
        (
            report.outdated_timings,
            "Latency records of files that newer code measured since, left out: {}; 'qdefense bench --latency' times "
            "them again.",
        ),
        (
            report.superseded,
            "Trials that another network, file or revision of the code replaced, or that failed where another one has "
            "an answer, left out of the tables: {}.",
        ),
    )


_Rows = list[ScanRow | DatasetRow | FilterRow | RepairRow]


def _defense_rows(report: BenchReport) -> _Rows:
    return [*report.scans, *report.dataset_scans, *report.filters, *report.repairs]


def _without_twins(report: BenchReport, rows: _Rows) -> Iterator[str]:
    """A detection rate without its control is no result."""
    places = {f"{row.setting.data}, {row.setting.architecture}" for row in rows}
    clean = {f"{row.data}, {row.architecture}" for row in report.networks if row.attack == NO_ATTACK}
    for place in sorted(places - clean):
        yield f"{place}: there is no clean network, so that nobody knows how often its alarms are false."
    causes: defaultdict[str, list[str]] = defaultdict(list)
    for row in rows:
        if f"{row.setting.data}, {row.setting.architecture}" in clean and _lacks_twin(row):
            causes[_cause(row, rows)].append(f"{row.defense} on {row.setting.place}, {row.setting.file}")
    for cause, names in causes.items():
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        yield f"{names[0]}{more}: rates of attacked files without a clean twin: {cause}."


def _lacks_twin(row: ScanRow | DatasetRow | FilterRow | RepairRow) -> bool:
    """Whether there are active files and no clean one, measured or not; a repair is no detector, and needs none."""
    alone = not any(row.clean.model_dump().values()) and any(row.answers.model_dump().values())
    return alone and row.setting.attack != NO_ATTACK and not isinstance(row, RepairRow)


def _cause(row: ScanRow | DatasetRow | FilterRow | RepairRow, rows: _Rows) -> str:
    """What parts it from the nearest clean row of the same defense at the same precision."""
    mine = row.setting
    near = [
        {name for name in _PARTS if getattr(other.setting, name) != getattr(mine, name)}
        for other in rows
        if other.setting.attack == NO_ATTACK
        and (other.defense, other.access) == (row.defense, row.access)
        and (other.setting.data, other.setting.architecture) == (mine.data, mine.architecture)
        and (other.setting.precision, other.setting.arithmetic) == (mine.precision, mine.arithmetic)
    ]
    if not near:
        return "this defense was tried on no clean network at this precision"
    parts = min(near, key=len)
    remedy = f"; {_MEASURED_HERE}" if "runtime" in parts else ""
    return (
        f"clean networks were measured {' and '.join(told for name, told in _PARTS.items() if name in parts)}{remedy}"
    )


def _weaknesses(report: BenchReport) -> Iterator[str]:
    """What a filter says of itself on a file, which no rate shows."""
    told: Counter[tuple[str, str]] = Counter()
    for row in report.filters:
        told.update({(row.defense, what): count for what, count in row.weaknesses.items()})
    for (defense, what), count in told.items():
        yield f"{defense}, on {count} files: {what}."


def _paces(report: BenchReport) -> Iterator[str]:
    """Milliseconds of two files say nothing of the files where the machine had another pace."""
    files = [row for row in report.latency if row.variant == PLAIN]
    unknown = sum(row.yardstick_ms is None for row in files)
    if unknown:
        yield (
            f"Files timed without a yardstick: {unknown}. Whether the machine ran at one pace is unknown: compare each "
            "with its own variants, not with another file."
        )
    paces: defaultdict[str, list[float]] = defaultdict(list)
    for row in files:
        if row.yardstick_ms is not None:
            paces[f"{row.setting.place}, {row.runtime}"].append(row.yardstick_ms)
    for place, found in paces.items():
        if max(found) > _ONE_PACE * min(found):
            yield (
                f"{place}: files were timed while the machine ran at different paces (yardstick {rounded(min(found))} "
                f"to {rounded(max(found))} ms): compare multiples of the yardstick, not milliseconds."
            )


_ONE_PACE = 1.1
_MEASURED_HERE = "'qdefense bench --here' measures them on this one, too"
_PARTS = {
    "runtime": "on another CPU or ONNX Runtime",
    "evaluation": "under other rules, revisions or test images",
    "calibration": "with another calibration",
}


def network_rows(report: BenchReport) -> list[tuple[str, str]]:
    """The networks, and how many of each could not be trained."""
    rows = []
    for row in report.networks:
        failed = f"; {row.failed} could not be trained" if row.failed else ""
        seeds = f"seed{'s' * (len(row.seeds) > 1)} {', '.join(map(str, row.seeds))}"
        rows.append((row.data, f"{row.architecture}, {row.attack}: {seeds}{failed}"))
    return rows


def environment_rows(report: BenchReport) -> list[tuple[str, str]]:
    """What made the records; several values where they differ."""
    found = report.environment
    return [
        *((name, " and ".join(values)) for name, values in found.versions.items()),
        *(("runtime", one) for one in found.runtimes),
        *(("session", one) for one in found.sessions),
        *((label, full) for label, full in found.precisions.items()),
        ("schema", " and ".join(found.schema_versions)),
    ]
