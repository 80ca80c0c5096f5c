"""Write README.md from the records of `compare.py` and `timing.py`: python benchmarks/neural_cleanse/table.py."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from compare import FILES, HERE
from numpy.typing import NDArray

from qdefense.defenses.outliers import low_side_indices

Record = dict[str, Any]


def read(name: str) -> list[Record]:
    path = HERE / "results" / name
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def norms_of(record: Record) -> NDArray[np.float64]:
    """(K, R) in class order: +inf where a start is censored, NaN where a class was not started so often."""
    classes = sorted(record["findings"][0]["result"]["classes"], key=lambda entry: entry["target_class"])
    norms = np.full((len(classes), max(len(entry["restart_norms"]) for entry in classes)), np.nan)
    for row, entry in zip(norms, classes, strict=True):
        row[: len(entry["restart_norms"])] = [np.inf if n is None else n for n in entry["restart_norms"]]
    return norms


def index_of(norms: NDArray[np.float64]) -> float:
    return float(low_side_indices(norms).max())


def merged_index(first: NDArray[np.float64], norms: NDArray[np.float64]) -> float:
    """What the index would be if the further starts of the lowest class took the place of its first."""
    low = int(first.argmin())
    changed = first.copy()
    changed[low] = np.nanmin(norms[low])
    return index_of(changed)


def compared(full: Record, screened: Record) -> dict[str, Any]:
    """One file, both ways."""
    every, norms = norms_of(full), norms_of(screened)
    spread = [index_of(start) for start in every.T]
    index = screened["findings"][0]["result"]["score"]
    return {
        "lowest": (int(every.min(axis=1).argmin()), int(norms[:, 0].argmin())),
        "each": [int(start.argmin()) for start in every.T],
        "index": (full["findings"][0]["result"]["score"], index),
        "spread": (min(spread), float(np.median(spread)), max(spread)),
        "inside": min(spread) <= index <= max(spread),
        "same_bits": bool((every[:, 0] == norms[:, 0]).all()),
        "merged": merged_index(norms[:, 0], norms),
        "verdict": (full["findings"][0]["verdict"], screened["findings"][0]["verdict"]),
        "steps": (full["findings"][0]["cost"]["gradient_steps"], screened["findings"][0]["cost"]["gradient_steps"]),
        "cpu": (full["cpu_seconds"], screened["cpu_seconds"]),
    }


def table(rows: dict[str, dict[str, Any]]) -> list[str]:
    lines = [
        "| file | lowest class: exhaustive (each start), screened | index: exhaustive, screened | spread of the starts "
        "| inside | merged | verdict: exhaustive, screened | steps | CPU s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, r in rows.items():
        low, median, high = r["spread"]
        lines.append(
            f"| {name} | {r['lowest'][0]} ({' '.join(map(str, r['each']))}), {r['lowest'][1]} "
            f"| {r['index'][0]:.2f}, {r['index'][1]:.2f} | {low:.2f}, {median:.2f}, {high:.2f} "
            f"| {'yes' if r['inside'] else 'no'} | {r['merged']:.2f} | {', '.join(r['verdict'])} "
            f"| {r['steps'][0]}, {r['steps'][1]} | {r['cpu'][0]:.0f}, {r['cpu'][1]:.0f} |"
        )
    return lines


def summary(rows: dict[str, dict[str, Any]]) -> list[str]:
    n = len(rows)
    lowest = [name for name, r in rows.items() if r["lowest"][0] != r["lowest"][1]]
    outside = [name for name, r in rows.items() if not r["inside"]]
    verdicts = [name for name, r in rows.items() if r["verdict"][0] != r["verdict"][1]]
    dear = [name for name, r in rows.items() if 3 * r["steps"][1] > r["steps"][0]]
    other = [name for name, r in rows.items() if not r["same_bits"]]
    return [
        f"{n} of {len(FILES)} files are scanned both ways.",
        "",
        f"- Lowest class the same: {n - len(lowest)} of {n}{listed(lowest)}.",
        f"- Index within the spread of the exhaustive starts: {n - len(outside)} of {n}{listed(outside)}.",
        f"- Verdict (paper's threshold 2) the same: {n - len(verdicts)} of {n}{listed(verdicts)}.",
        f"- At most a third of the steps: {n - len(dear)} of {n}{listed(dear)}.",
        f"- First starts equal the exhaustive scan's bit for bit: {n - len(other)} of {n}{listed(other)}.",
    ]


def listed(names: list[str]) -> str:
    return f"; not {', '.join(names)}" if names else ""


def timings(records: list[Record]) -> list[str]:
    lines = [
        "| file | classes | scan | gradient steps | CPU s | half of it | wall s (2 threads) | load | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines.extend(
        f"| {r['model']} int8-static | {r['classes']} | `{r['spec']}` | {r['gradient_steps']} | {r['cpu_seconds']:.0f} "
        f"| {r['cpu_seconds'] / 2:.0f} | {r['wall_seconds']:.0f} | {r['load'][0]:.1f} | {r['verdict']} |"
        for r in records
    )
    return lines


def main() -> None:
    records = {(r["model"], r["scheme"], r["mode"]): r for r in read("records.jsonl")}
    rows = {
        f"{name} {scheme}": compared(records[name, scheme, "exhaustive"], records[name, scheme, "screened"])
        for name, scheme in FILES
        if (name, scheme, "exhaustive") in records and (name, scheme, "screened") in records
    }
    preface = (HERE / "preface.md").read_text(encoding="utf-8").rstrip()
    parts = [
        preface,
        "## What came\n\n" + "\n".join(summary(rows)),
        "## Files\n\n" + "\n".join(table(rows)),
        "## Time of the gate\n\n" + "\n".join(timings(read("timings.jsonl"))),
    ]
    (HERE / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
