"""Draw a report as the SVG of a terminal: python docs/render_report.py REPORT.json PICTURE.svg."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console

from qdefense.report.model import Report
from qdefense.report.text import print_report

WIDTH = 110


def main(source: Path, target: Path) -> None:
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    print_report(Report.model_validate_json(source.read_bytes()), console)
    picture = console.export_svg(title="qdefense audit")
    # rich names a font on a foreign server; a picture in a repository should not make its readers call anyone.
    target.write_text(re.sub(r"@font-face \{.*?\}", "", picture, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
