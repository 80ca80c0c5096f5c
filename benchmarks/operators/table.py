"""Which node test cases of the onnx package the shadow agrees with: writes results.json and README.md.

Run it as ``python -P benchmarks/operators/table.py``. With ``--operator Resize`` it writes nothing and prints what came
of each case of that operator; with ``--failures`` what came of all that differ or are refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from node_cases import NodeCase, Outcome, exceptions, judge, load_cases  # noqa: E402

Results = Mapping[str, tuple[NodeCase, Outcome]]


def show(operator: str | None) -> int:
    listed, cases = exceptions(), load_cases(operator)
    for case in cases.values():
        outcome = judge(case)
        if operator or outcome.verdict in ("differs", "refused"):
            note = f" [listed: {listed[case.name]}]" if case.name in listed else ""
            print(f"{outcome.verdict:12} {case.name} ({', '.join(outcome.variants) or '-'}) {outcome.reason}{note}")
    return len(cases)


def versions() -> dict[str, str]:
    return {
        "onnx": f"{onnx.__version__} (opset {onnx.defs.onnx_opset_version()})",
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def counts(results: Results) -> dict[str, Counter[str]]:
    """Verdicts by tested operator."""
    found: dict[str, Counter[str]] = {}
    for case, outcome in results.values():
        found.setdefault(case.operator[1], Counter())[outcome.verdict] += 1
    return dict(sorted(found.items()))


def as_json(results: Results) -> str:
    listed = exceptions()
    operators: dict[str, dict[str, object]] = {}
    for name, (case, outcome) in sorted(results.items()):
        entry = operators.setdefault(case.operator[1], {})
        cases = entry.setdefault(outcome.verdict, {})
        assert isinstance(cases, dict)
        if outcome.verdict == "agrees":
            cases[name] = " ".join(outcome.variants)
        elif outcome.verdict == "unregistered":
            cases[name] = f"no function for {outcome.reason}"
        else:
            cases[name] = listed.get(name, f"NOT LISTED: {outcome.reason}")
    total = Counter(outcome.verdict for _, outcome in results.values())
    return json.dumps({"versions": versions(), "cases": total, "operators": operators}, indent=1, sort_keys=True) + "\n"


def as_markdown(results: Results) -> str:
    total = Counter(outcome.verdict for _, outcome in results.values())
    registered = total.total() - total["unregistered"]
    table = ["| operator | cases | agree | listed exceptions | unregistered |", "| --- | --: | --: | --: | --: |"]
    absent = []
    for name, found in counts(results).items():
        if found["unregistered"] == found.total():
            absent.append(f"{name} ({found.total()})")
            continue
        numbers = (found.total(), found["agrees"], found["differs"] + found["refused"], found["unregistered"])
        table.append(f"| {name} | " + " | ".join(str(number) if number else "" for number in numbers) + " |")
    return (HERE / "preface.md").read_text() + "\n".join([
        f"Of {total.total()} cases {registered} hold registered operators only, and of these {total['agrees']} "
        f"({total['agrees'] / registered:.1%}) agree; {total['unregistered']} hold an operator without a function.",
        "",
        "Made with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ".",
        "",
        "## Cases by the operator they test",
        "",
        *table,
        "",
        "## Exceptions, by reason",
        "",
        *reasons(results),
        "",
        "## Operators none of whose cases can run",
        "",
        ", ".join(absent) + ".",
        "",
    ])  # fmt: skip


def reasons(results: Results) -> list[str]:
    """Each reason of the list with its cases, and what came unlisted."""
    by_reason: dict[str, list[str]] = {}
    listed = exceptions()
    for name, (_, outcome) in sorted(results.items()):
        if outcome.verdict in ("differs", "refused"):
            by_reason.setdefault(listed.get(name, "NOT LISTED"), []).append(f"`{name}`")
    return [f"- {reason}: {len(names)} cases. {', '.join(names)}" for reason, names in sorted(by_reason.items())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", help="print the cases of this operator instead of writing the table")
    parser.add_argument("--failures", action="store_true", help="print every case that differs or is refused instead")
    options = parser.parse_args()
    if options.operator or options.failures:
        count = show(options.operator)
        sys.exit(0 if count else f"the suite has no file for the operator {options.operator!r}")
    results = {case.name: (case, judge(case)) for case in load_cases().values()}
    (HERE / "results.json").write_text(as_json(results))
    (HERE / "README.md").write_text(as_markdown(results))


if __name__ == "__main__":
    main()
