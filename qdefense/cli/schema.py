"""`qdefense schema`."""

from __future__ import annotations

import json

import click

from qdefense.cli.options import write_json
from qdefense.report.model import Report


@click.command("schema")
def command() -> None:
    """Print the JSON schema of the report."""
    write_json(json.dumps(Report.model_json_schema(), indent=2, sort_keys=True))
