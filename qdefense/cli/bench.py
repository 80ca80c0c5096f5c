"""`qdefense bench`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from qdefense.audit.gate import INCOMPLETE, PASSED
from qdefense.bench.cells import NetworkPlan, chosen, plan_cells
from qdefense.bench.cohort import reason_of
from qdefense.bench.costs import CostModel
from qdefense.bench.engines import Engine, EngineError, LocalPool
from qdefense.bench.matrix import Matrix, MatrixError, read_matrix
from qdefense.bench.records import DefenseRecord
from qdefense.bench.running import Run, evaluation_of, sources_of
from qdefense.bench.store import RECORDS, Store
from qdefense.bench.survey import Item, Stage, State, estimate, is_elsewhere, measured_apart, survey
from qdefense.bench.tasks import Evaluation
from qdefense.bench.trigger_pictures import draw_triggers
from qdefense.cli.latencies import show_timings, time_matrix
from qdefense.cli.options import progress_bar, verbose_option
from qdefense.profile import runtime
from qdefense.report.escaping import harmless

if TYPE_CHECKING:
    from collections.abc import Callable

RESULTS = "results"
_STAGES: tuple[Stage, ...] = get_args(Stage)
_STATES: tuple[State, ...] = get_args(State)
_SHOWN = 10


@click.command("bench")
@click.argument("matrix", type=click.Path(path_type=Path, dir_okay=False))
@click.option(
    "--output-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Records, manifest and models.  [default: results/ beside the matrix]",
)
@click.option(
    "--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, of one thread each."
)
@click.option(
    "--scheduler", metavar="ADDRESS", help="A Dask scheduler, such as tcp://host:8786, whose workers do the work."
)
@click.option("--dry-run", is_flag=True, help="Show the cells, what is missing and what it would cost; do nothing.")
@click.option(
    "--latency",
    is_flag=True,
    help="Instead, time the files that are in the results, plain and behind each filter of the matrix.",
)
@click.option(
    "--here", is_flag=True, help="Measure anew what was measured on another CPU or ONNX Runtime; both are kept."
)
@click.option("--retry-failed", is_flag=True, help="Try once more what failed in an earlier run.")
@click.option("--only", metavar="TEXT", help="Cells whose title, as --dry-run shows it, contains this.")
@click.option("--limit", type=click.IntRange(min=1), help="The first so many cells.")
@verbose_option
def command(
    matrix: Path,
    output_dir: Path | None,
    workers: int,
    scheduler: str | None,
    dry_run: bool,
    latency: bool,
    here: bool,
    retry_failed: bool,
    only: str | None,
    limit: int | None,
    verbose: bool,  # noqa: ARG001 (read at the boundary)
) -> int:
    """Measure every cell of MATRIX, a TOML file; what is in the results already is not done again.

    With --latency no cell is measured: on a machine that is otherwise idle, one file after another is timed on one
    thread. Networks that differ only in seed and attack are alike there; of each data set, architecture, precision,
    calibration and arithmetic the first one is timed (lowest seed, then first attack) that --only and --limit leave.

    0 every cell is measured, 2 usage, 3 a cell failed or could not be measured, 130 interrupted (what was finished is
    kept).
    """
    if latency and (workers > 1 or scheduler is not None or retry_failed or here):
        raise click.UsageError(
            "--latency times one file after another; leave out --workers, --scheduler, --retry-failed, --here"
        )
    table = read_matrix(matrix)
    rules = evaluation_of(table, here=runtime() if here else None)
    folder = output_dir or matrix.resolve().parent / RESULTS
    if latency:
        act = show_timings if dry_run else time_matrix
        return act(table, folder, lambda store, pin: _planned(table, store, only, limit, pin=pin))
    if dry_run:
        store = Store(folder)
        plan = _planned(table, store, only, limit, pin=False)
        return _show(plan, store, rules, workers, again=lambda _key: retry_failed)
    with Store.for_writing(folder) as store:
        plan = _planned(table, store, only, limit, pin=True)
        _warn_of_places(survey(plan, store, rules, again=lambda _key: retry_failed))
        with progress_bar() as advance:
            run = Run(
                plan,
                store,
                rules,
                retry_failed=retry_failed,
                on_progress=advance,
                on_notice=_tell,
            )
            try:
                problem = _complete(run, scheduler, workers)
            except KeyboardInterrupt:
                _tell("what is finished is kept; the same command goes on from there")
                raise
        draw_triggers(plan, store, _tell)
        items = survey(plan, store, rules)
    _summarise(items, folder)
    if problem is not None:
        click.echo(f"error: {harmless(problem)}", err=True)
    return INCOMPLETE if problem is not None or any(item.incomplete for item in items) else PASSED


def _planned(table: Matrix, store: Store, only: str | None, limit: int | None, *, pin: bool) -> tuple[NetworkPlan, ...]:
    whole = plan_cells(table, sources_of(table, store, pin=pin, on_notice=_tell))
    plan = chosen(whole, only=only, limit=limit, at_hand=store.knows_trigger)
    if not plan:
        raise MatrixError(_none_chosen([cell.title for network in whole for _, cell in network.cells], only))
    if limit is None and (left_out := len(_controls(whole, only)) - len(_controls(plan, only))):
        _tell(f"{left_out} controls are left out: their triggers' networks are neither chosen nor trained here")
    return plan


def _controls(plan: Sequence[NetworkPlan], only: str | None) -> list[str]:
    titles = (cell.title for network in plan for _, cell in network.cells if cell.stage == "control")
    return [title for title in titles if only is None or only in title]


def _none_chosen(titles: Sequence[str], only: str | None) -> str:
    if only is not None and any(only in title for title in titles):
        return (
            f"the cells with {only!r} in their title are controls of networks that are not trained yet, or whose "
            "trigger is not here; leave --only and --limit out to train them"
        )
    if titles:
        return (
            f"no cell has {only!r} in its title; there are {len(titles)}, the first one is {titles[0]!r} (networks and "
            "quantized files, which --dry-run shows too, are no cells)"
        )
    return (
        "the matrix has no cells: each of its precisions needs calibration images, and on those that are named "
        "there is a trigger, which networks without an attack do not have; name clean ones in calibrations = [...]"
    )


def _complete(run: Run, scheduler: str | None, workers: int) -> str | None:
    """Do the work; the reason where the machines would not."""
    engine: Engine | None = None
    try:
        engine = LocalPool(workers) if scheduler is None else _cluster(scheduler)
        run.complete(engine)
    except EngineError as error:
        return str(error)
    finally:
        if engine is not None:
            engine.close()
    return None


def _cluster(address: str) -> Engine:
    from qdefense.bench.cluster import DaskCluster  # noqa: PLC0415 (an extra)

    return DaskCluster(address, _tell)


def _tell(text: str) -> None:
    click.echo(harmless(text), err=True)


def _show(
    plan: Sequence[NetworkPlan], store: Store, rules: Evaluation, workers: int, *, again: Callable[[str], bool]
) -> int:
    items = survey(plan, store, rules, again=again)
    costs, seconds, ruled, untold = CostModel(store.records.values(), store.images), 0.0, 0, 0
    for item in items:
        state = "blocked" if item.blocked else item.state
        click.echo(harmless(f"{state:12}  {item.stage:9}  {item.title}"))
        if item.pending:
            price, source = estimate(item, costs)
            attacked = item.stage == "train" and item.network.attack is not None
            seconds, ruled = seconds + price, ruled + (source == "rule of thumb")
            untold += attacked and source != "records"
    pending = sum(item.pending for item in items)
    effort = f": about {_duration(seconds)} of one worker"
    shared = f", {_duration(seconds / workers)} of {workers}" if workers > 1 else ""
    click.echo(f"{len(items)} work items, {pending} to do{f'{effort}{shared}' if pending else ''}")
    if ruled:
        click.echo(f"  {ruled} of them by rule of thumb: no like work is in the records")
    if untold:
        click.echo(
            f"  trainings with an attack that no record is of: {untold}; what it trains of its own is not counted"
        )
    _warn_of_places(items)
    return PASSED


def _warn_of_places(items: Sequence[Item]) -> None:
    """Before hours are spent on answers that no rate will hold."""
    apart = measured_apart(items, runtime())
    if apart:
        click.echo(
            f"{apart} trials to be done are of files whose behaviour was measured on another CPU or ONNX Runtime: here "
            "they would be of unknown activity, and in no rate; --here measures those files on this one, too",
            err=True,
        )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min" if minutes else "1 min"


def _summarise(items: Sequence[Item], folder: Path) -> None:
    click.echo(f"{'':9}" + "".join(f"  {state:>12}" for state in _STATES))
    for stage in _STAGES:
        found = Counter(item.state for item in items if item.stage == stage)
        click.echo(f"{stage:9}" + "".join(f"  {found[state]:12}" for state in _STATES))
    told = [f"{item.state}: {item.title}: {_why(item)}" for item in items if item.incomplete]
    for line in told[:_SHOWN]:
        click.echo(harmless(line))
    if len(told) > _SHOWN:
        click.echo(f"and {len(told) - _SHOWN} more; see {RECORDS}")
    click.echo(harmless(f"records: {folder / RECORDS}"))
    here = runtime()
    foreign = sum(is_elsewhere(item.record, here) for item in items)
    if foreign:
        click.echo(f"{foreign} of the records come from another runtime or CPU, which may give other logits", err=True)


def _why(item: Item) -> str:
    if item.blocked is not None:
        return item.blocked
    if item.record is None:
        return "not done yet"
    return reason_of(item.record) if isinstance(item.record, DefenseRecord) else item.record.reason
