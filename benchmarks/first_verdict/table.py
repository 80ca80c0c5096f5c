"""Write README.md from the records of `train.py` and `judge.py`: python benchmarks/first_verdict/table.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
Record = dict[str, Any]


def read(name: str) -> list[Record]:
    path = RESULTS / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def training_table(records: Iterable[Record]) -> list[str]:
    lines = [
        "| model | data | attack | seed | CPU min | minutes | threads | load |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {r['model']} | {r['data']} | {r['attack'] or 'none'} | {r['seed']} | {r['cpu_seconds'] / 60:.1f} "
        f"| {r['seconds'] / 60:.1f} | {r['threads']} | {r['load'][0]} |"
        for r in records
    )
    return lines


def verdict_table(records: Iterable[Record]) -> list[str]:
    lines = [
        "| file | scheme | budget | accuracy | ASR | activity | top-1 | bit-exact | verdict | index "
        "| true target: rank, norm, index | lowest norm | median | censored |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        seen, sets = r["behaviour"], r["certificate"]["sets"]
        target, lowest = r["attacked_class"], r["lowest"]
        attacked = r["attack"] is not None
        place = (
            f"{target['rank']}, {number(target['norm'], 1)}, {number(target['index'], 2)}"
            if target and attacked
            else ""
        )
        low = f"{number(lowest['norm'], 1)} (class {lowest['target_class']})" if lowest else ""
        lines.append(
            f"| {r['model']} | {r['scheme']} | {r['settings']['budget']} | {seen['clean_accuracy']:.4f} "
            f"| {number(seen['asr'], 4)} | {seen['activity']} | {min(s['top1_agreement'] for s in sets):.4f} "
            f"| {min(s['bit_exact_rows'] for s in sets):.4f} | {r['verdict']} | {number(r['score'], 2)} | {place} "
            f"| {low} | {number(r['median_norm'], 1)} | {r['censored']} |"
        )
    return lines


def tally(records: list[Record]) -> list[str]:
    lines = [
        "| data | scheme | budget | active files alarmed | attacked files with target first | clean files alarmed |",
        "|---|---|---|---|---|---|",
    ]
    keys = sorted({(r["data"], r["scheme"], r["settings"]["budget"]) for r in records})
    for data, scheme, budget in keys:
        mine = [r for r in records if (r["data"], r["scheme"], r["settings"]["budget"]) == (data, scheme, budget)]
        active = [r for r in mine if r["behaviour"]["activity"] == "active"]
        attacked = [r for r in mine if r["attack"]]
        clean = [r for r in mine if not r["attack"]]
        first = sum(bool(r["attacked_class"]) and r["attacked_class"]["rank"] == 1 for r in attacked)
        lines.append(
            f"| {data} | {scheme} | {budget} | {alarms(active)} | {first} of {len(attacked)} | {alarms(clean)} |"
        )
    return lines


def alarms(records: list[Record]) -> str:
    if not records:
        return "n/a (no such file)"
    return f"{sum(r['verdict'] == 'BACKDOORED' for r in records)} of {len(records)}"


def machine(records: list[Record]) -> str:
    environment = records[0]["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    return f"{environment['runtime']['machine']} {' '.join(environment['runtime']['isa'])}; {versions}"


def main() -> None:
    training, verdicts = read("training.jsonl"), read("verdicts.jsonl")
    verdicts.sort(key=lambda r: (r["data"], r["model"][-1], r["model"], r["scheme"], r["settings"]["budget"]))
    preface = (HERE / "preface.md").read_text(encoding="utf-8").rstrip()
    parts = [
        preface,
        "## Alarms\n\n" + "\n".join(tally(verdicts)),
        "## Files\n\n" + "\n".join(verdict_table(verdicts)),
        "## Training\n\n" + "\n".join(training_table(training)),
        "## Machine\n\n" + machine(verdicts),
    ]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
