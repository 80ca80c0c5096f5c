"""Calibrate on one part of the sweep and score the rest by it; works on whatever part of the sweep is there.

    python benchmarks/calibration/score.py

The group `calibrate` gives the thresholds, as `qdefense calibrate` does; once it is complete they are written to
`qdefense/calibrations/signs-resnet8.json`, with the bytes of the command in preface.md. The groups `clean` and
`badnets` are scored by them, and by the paper's threshold 2. Writes `results/scores.json` and README.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sweep import BEHAVIOUR, CLEAN_IMAGES, HERE, NETWORKS, REPORTS, RESULTS, SCHEMES, WORK, Network

from qdefense.audit.calibrating import Measured, ReportFolder, Scan, make_entries, read_models, scan_of
from qdefense.audit.events import Job
from qdefense.audit.provenance import conditions_of
from qdefense.calibration import (
    DEFAULT_RATE,
    CalibrationBody,
    CalibrationError,
    CalibrationFile,
    Calibrations,
    parse_calibration,
)
from qdefense.defenses.scans.neural_cleanse import PAPER_THRESHOLD
from qdefense.files import write_atomically
from qdefense.rates import auroc, rounded_up, wilson_interval

SHIPPED = HERE.parents[1] / "qdefense" / "calibrations" / "signs-resnet8.json"
COMMAND = ("qdefense", "calibrate", "--data", "signs", "--limit", str(CLEAN_IMAGES))
NAMES = ("fp32", "int8-static", "int8-dynamic")
LINES = ("calibrated", "paper")
Record = dict[str, Any]


def files_of(network: Network) -> list[Path]:
    return [network.path if s is None else WORK / f"{network.path.stem}.{s}.onnx" for s in SCHEMES]


def measured_of(group: str, scan: Scan, folder: ReportFolder) -> tuple[list[Measured], int]:
    """What is there of a group, and how many files or reports are missing."""
    paths = [path for network in NETWORKS if network.group == group for path in files_of(network)]
    jobs = [Job(model=str(path), data="signs", limit=CLEAN_IMAGES, seed=0) for path in paths if path.exists()]
    found = [folder.find(model, scan) for model in read_models(jobs)]
    there = [measured for measured in found if measured is not None]
    return there, len(paths) - len(there)


def calibrate(measured: Sequence[Measured], scan: Scan, *, complete: bool) -> CalibrationFile:
    entries, problems = make_entries(measured, scan)
    for problem in problems:
        print(problem)
    data = CalibrationBody(command=COMMAND, entries=entries).to_bytes()
    if complete and not problems:
        SHIPPED.parent.mkdir(exist_ok=True)
        write_atomically(SHIPPED, data)
    return parse_calibration(data, SHIPPED.name)


def behaviours() -> dict[str, Record]:
    lines = BEHAVIOUR.read_text(encoding="utf-8").splitlines() if BEHAVIOUR.exists() else []
    return {record["artifact_sha256"]: record for record in map(json.loads, lines)}


def record_of(measured: Measured, calibration: CalibrationFile, scan: Scan, seen: Record) -> Record:
    """One file, judged as `audit --calibration` judges it; a population that is too small draws no line."""
    model, score = measured.model, measured.score
    calibrations = Calibrations(
        artifact=model.identity,
        population=model.population,
        conditions=conditions_of(measured.report.environment, model.job.seed),
        files=(calibration,),
    )
    try:
        line = calibrations.line(scan.defense, scan.settings, paper=PAPER_THRESHOLD).judged(score)
    except CalibrationError:
        line = None
    drawn = line is not None and line.source == "calibrated"
    finding = measured.finding
    return {
        "model": seen["model"],
        "group": seen["group"],
        "scheme": seen["scheme"],
        "artifact_sha256": model.identity,
        "activity": seen["behaviour"]["activity"],
        "asr": seen["behaviour"]["asr"],
        "clean_accuracy": seen["behaviour"]["clean_accuracy"],
        "score": score,
        "p_value": line.p_value if line is not None and drawn else None,
        "note": None if line is None else line.note,
        "alarm": {
            "paper": None if score is None else score > PAPER_THRESHOLD,
            "calibrated": score > line.value if score is not None and line is not None and drawn else None,
        },
        "not_measured": measured.reason if score is None else None,
        "verdict": finding.verdict.value if finding is not None else None,
    }


def share(alarms: Iterable[bool | None]) -> Record | None:
    """Alarms of those files that the line could judge; null where there is none."""
    judged = [alarm for alarm in alarms if alarm is not None]
    if not judged:
        return None
    low, high = wilson_interval(sum(judged), len(judged))
    return {"alarms": sum(judged), "n": len(judged), "rate": sum(judged) / len(judged), "wilson_95": [low, high]}


def summary_of(records: Sequence[Record], scheme: str, line: str) -> Record:
    mine = [record for record in records if record["scheme"] == scheme]
    by_activity = {
        activity: [record for record in mine if record["activity"] == activity]
        for activity in ("active", "attenuated", "dormant", "clean")
    }
    scores = {
        activity: [record["score"] for record in members if record["score"] is not None]
        for activity, members in by_activity.items()
    }
    return {
        "scheme": scheme,
        "threshold": line,
        **{activity: share(record["alarm"][line] for record in members) for activity, members in by_activity.items()},
        "auroc": auroc(scores["active"], scores["clean"]) if scores["active"] and scores["clean"] else None,
        "not_measured": {
            activity: sum(record["score"] is None for record in members) for activity, members in by_activity.items()
        },
    }


def thresholds_of(calibration: CalibrationFile) -> list[Record]:
    found = []
    for entry in calibration.body.entries:
        try:
            value, rate = entry.threshold(DEFAULT_RATE)
        except ValueError as error:
            print(f"{entry.population.scheme}: {error}")
            value, rate = None, None
        found.append(
            {
                "scheme": entry.population.scheme,
                "n": entry.n,
                "not_measured": entry.not_measured,
                "threshold": value,
                "false_alarm_rate": rate,
                "scores": entry.scores,
                "above_the_papers": sum(score > PAPER_THRESHOLD for score in entry.scores),
                "conditions": entry.conditions.model_dump(mode="json"),
            }
        )
    return sorted(found, key=lambda record: NAMES.index(record["scheme"]))


# --- the page ---------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 2) -> str:
    return "n/a" if value is None else f"{value:.{digits}f}"


def rate(cell: Record | None) -> str:
    if cell is None:
        return "n/a"
    low, high = cell["wilson_95"]
    return f"{cell['alarms']} of {cell['n']} = {cell['rate']:.2f} [{low:.2f}, {high:.2f}]"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def threshold_table(records: Iterable[Record]) -> str:
    head = (
        "scheme",
        "n",
        "no score",
        "threshold",
        "promised rate",
        "lowest",
        "median",
        "highest",
        "above the paper's 2",
    )
    rows = []
    for r in records:
        scores, promised = r["scores"], r["false_alarm_rate"]
        middle = (scores[(len(scores) - 1) // 2] + scores[len(scores) // 2]) / 2
        spread = [number(scores[0]), number(middle), number(scores[-1])]
        drawn = [number(r["threshold"], 3), "n/a" if promised is None else rounded_up(promised)]
        rows.append([r["scheme"], str(r["n"]), str(r["not_measured"]), *drawn, *spread, str(r["above_the_papers"])])
    return table(head, rows)


def summary_table(records: Iterable[Record]) -> str:
    head = (
        "scheme", "threshold", "TPR (active)", "FPR (clean)", "AUROC", "attenuated alarmed", "dormant alarmed",
        "no score: active, clean",
    )  # fmt: skip
    rows = [
        [
            r["scheme"], r["threshold"], rate(r["active"]), rate(r["clean"]), number(r["auroc"], 3),
            rate(r["attenuated"]), rate(r["dormant"]),
            f"{r['not_measured']['active']}, {r['not_measured']['clean']}",
        ]
        for r in records
    ]  # fmt: skip
    return table(head, rows)


def file_table(records: Iterable[Record]) -> str:
    head = ("model", "scheme", "activity", "ASR", "accuracy", "score", "p", "calibrated", "paper")
    said = {True: "alarm", False: "", None: "n/a"}
    rows = [
        [
            r["model"], r["scheme"], r["activity"], "" if r["asr"] is None else number(r["asr"], 3),
            number(r["clean_accuracy"], 4), number(r["score"]),
            "n/a" if r["p_value"] is None else rounded_up(r["p_value"]),
            said[r["alarm"]["calibrated"]], said[r["alarm"]["paper"]],
        ]
        for r in records
    ]  # fmt: skip
    return table(head, rows)


def machine(thresholds: Sequence[Record]) -> str:
    if not thresholds:
        return "nothing was audited yet"
    made = thresholds[0]["conditions"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    return f"{made['runtime']['machine']} {' '.join(made['runtime']['isa'])}; {versions}"


def page(results: Record) -> str:
    missing = ", ".join(f"{group} {count}" for group, count in results["missing"].items())
    state = "complete" if not any(results["missing"].values()) else f"files without a report: {missing}"
    parts = [
        (HERE / "preface.md").read_text(encoding="utf-8").rstrip(),
        f"**State of the sweep:** {state}.",
        "## Thresholds from the clean models of group `calibrate`\n\n" + threshold_table(results["thresholds"]),
        "## The other models\n\n" + summary_table(results["summary"]),
        "## Files\n\n" + file_table(results["files"]),
        "## Machine\n\n" + machine(results["thresholds"]),
    ]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    scan, folder, seen = scan_of("neural-cleanse"), ReportFolder(REPORTS), behaviours()
    groups = {group: measured_of(group, scan, folder) for group in ("calibrate", "clean", "badnets")}
    missing = {group: lacking for group, (_, lacking) in groups.items()}
    print("files without a report:", ", ".join(f"{group} {count}" for group, count in missing.items()))
    calibration = calibrate(groups["calibrate"][0], scan, complete=not missing["calibrate"])
    records = [
        record_of(measured, calibration, scan, seen[measured.model.identity])
        for group in ("clean", "badnets")
        for measured in groups[group][0]
    ]
    results = {
        "missing": missing,
        "calibration_sha256": calibration.sha256,
        "thresholds": thresholds_of(calibration),
        "summary": [summary_of(records, scheme, line) for scheme in NAMES for line in LINES],
        "files": records,
    }
    RESULTS.mkdir(exist_ok=True)
    written = json.dumps(results, indent=2, sort_keys=True, allow_nan=False) + "\n"
    (RESULTS / "scores.json").write_text(written, encoding="utf-8")
    (HERE / "README.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
