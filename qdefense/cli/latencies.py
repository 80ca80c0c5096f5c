"""`qdefense bench --latency`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import get_args

import click

from qdefense.audit.gate import INCOMPLETE, PASSED
from qdefense.bench.cells import NetworkPlan
from qdefense.bench.matrix import Matrix
from qdefense.bench.running import evaluation_of
from qdefense.bench.store import LATENCY, MODELS, Store
from qdefense.bench.timing_plan import State, TimingItem, rounds_of, survey_timings
from qdefense.cli.options import progress_bar
from qdefense.report.escaping import harmless

Planned = Callable[[Store, bool], Sequence[NetworkPlan]]
"""The cells that were asked for; whether digests of images may be pinned."""


def show_timings(table: Matrix, folder: Path, planned: Planned) -> int:
    """List what would be timed."""
    store = Store(folder)
    items = survey_timings(planned(store, False), store, evaluation_of(table), rounds_of(table))
    for item in items:
        click.echo(harmless(f"{item.state:12}  latency    {item.title}  {', '.join(('plain', *item.variants))}"))
    click.echo(f"{len(items)} files, {sum(item.state == 'missing' for item in items)} to time")
    return PASSED


def time_matrix(table: Matrix, folder: Path, planned: Planned) -> int:
    """Time what is missing; 3 where a file or a filter could not be."""
    from qdefense.bench.timing_run import time_files  # noqa: PLC0415 (imports torch)

    rounds, rules = rounds_of(table), evaluation_of(table)
    with Store.for_writing(folder) as store:
        plan = planned(store, True)
        items = survey_timings(plan, store, rules, rounds)
        with progress_bar() as advance:
            failed = time_files(
                items,
                store,
                rounds,
                on_progress=advance,
                on_notice=lambda text: click.echo(harmless(text), err=True),
            )
        items = survey_timings(plan, store, rules, rounds)
    _summarise(items, failed, folder)
    return INCOMPLETE if any(item.incomplete for item in items) else PASSED


def _summarise(items: Sequence[TimingItem], failed: Mapping[str, str], folder: Path) -> None:
    found = Counter(item.state for item in items)
    click.echo(f"{'':9}" + "".join(f"  {state:>12}" for state in get_args(State)))
    click.echo(f"{'latency':9}" + "".join(f"  {found[state]:12}" for state in get_args(State)))
    for line in (line for item in items for line in _told(item, failed)):
        click.echo(harmless(line))
    click.echo(harmless(f"records: {folder / LATENCY}"))


def _told(item: TimingItem, failed: Mapping[str, str]) -> list[str]:
    if item.record is not None:
        return [
            f"{one.verdict.lower().replace('_', ' ')}: {item.title}/{one.text}: {one.reason}"
            for one in item.record.filters
            if one.verdict is not None
        ]
    return [f"{item.state}: {item.title}: {_why(item, failed)}"]


def _why(item: TimingItem, failed: Mapping[str, str]) -> str:
    if item.state == "missing":
        return failed.get(item.title, "not done yet")
    if item.plain is None:
        return "`qdefense bench` without --latency makes it"
    return f"{item.plain.artifact_sha256[:16]}.onnx is not in {MODELS}/; copy it there from where it was made"
