"""Draw a report as the SVG of a terminal: python docs/render_report.py REPORT.json PICTURE.svg."""

from __future__ import annotations

import io
import sys
from pathlib import Path

from rich.console import Console

from qdefense.report.model import Report
from qdefense.report.text import print_report

WIDTH = 110


def main(source: Path, target: Path) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    print_report(Report.model_validate_json(source.read_bytes()), console)
    target.write_text(console.export_svg(title="qdefense audit"), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
