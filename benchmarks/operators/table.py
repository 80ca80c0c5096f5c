"""Which node test cases of the onnx package the shadow agrees with: writes results.json and README.md.

Run it as ``python -P benchmarks/operators/table.py``. With ``--operator Resize`` it writes nothing and prints what came
of each case of that operator; with ``--failures`` what came of all that differ or are refused.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from node_cases import exceptions, judge, load_cases  # noqa: E402


def show(operator: str | None, *, everything: bool) -> int:
    listed, count = exceptions(), 0
    for case in load_cases(operator).values():
        outcome = judge(case)
        count += 1
        if everything or outcome.verdict in ("differs", "refused"):
            note = f" [listed: {listed[case.name]}]" if case.name in listed else ""
            print(f"{outcome.verdict:12} {case.name} ({', '.join(outcome.variants) or '-'}) {outcome.reason}{note}")
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operator", help="print the cases of this operator instead of writing the table")
    parser.add_argument("--failures", action="store_true", help="print every case that differs or is refused instead")
    options = parser.parse_args()
    if options.operator or options.failures:
        count = show(options.operator, everything=bool(options.operator))
        sys.exit(0 if count else f"the suite has no file for the operator {options.operator!r}")


if __name__ == "__main__":
    main()
