"""Times the files of a plan one after another in this process; each record is on the disk before the next file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import replace

import numpy as np
import torch

from qdefense.artifact import Artifact
from qdefense.bench.latency import behind, deployed_variants, measure_latency, peak_memory
from qdefense.bench.measuring import Bench, fit_filter, lay_out, open_trial
from qdefense.bench.revisions import EVALUATION_REVISION
from qdefense.bench.running import Notice, Progress
from qdefense.bench.store import Store, StoreError, read_model
from qdefense.bench.tasks import Clock, TrialKey, TrialTask
from qdefense.bench.timing_plan import TimingItem, timed_data
from qdefense.bench.timing_records import PLAIN, FileLatency, PeakMemory, Rounds, TimedFilter
from qdefense.converters.reading import FileRefusedError
from qdefense.converters.runtime_graph import RuntimeGraphError
from qdefense.data.images import DataError, ImageSet, Pixels
from qdefense.data.selection import choose_rows
from qdefense.defenses import FittedFilter
from qdefense.findings import Finding
from qdefense.session import DeployedSession, SessionError

OFFLINE_ROWS = 64
TIMED_IMAGES = 256
FITTED_IMAGES = 256
"""Where a line lies does not change what a decision costs, and to draw it well took longer than all that is timed."""
BAR = "latency (files)"


def time_files(
    items: Sequence[TimingItem], store: Store, rounds: Rounds, *, on_progress: Progress, on_notice: Notice
) -> dict[str, str]:
    """Time those that are missing; why the others of them have no record, by title.

    Raises:
        OSError: the record cannot be written.
    """
    torch.set_num_threads(1)  # as in the workers of a bench
    missing = [item for item in items if item.state == "missing"]
    failed = {}
    on_progress(BAR, 0, len(missing))
    for done, item in enumerate(missing, start=1):
        try:
            record = _time_file(item, store, rounds, on_notice)
        except (FileRefusedError, RuntimeGraphError, SessionError, DataError, StoreError) as error:
            failed[item.title] = str(error)
            on_notice(f"failed: {item.title}: {error}")
        else:
            store.add_latency(record)
        on_progress(BAR, done, len(missing))
    return failed


def _time_file(item: TimingItem, store: Store, rounds: Rounds, on_notice: Notice) -> FileLatency:
    clock, task = Clock(), _task(item, item.plain, store)
    session, test = open_trial(task)
    bench = lay_out(task, session, test)
    tasks = {text: _task(item, trial, store) for text, trial in zip(item.variants, item.filters, strict=True)}
    answers = {text: _fit(replace(bench, task=mine)) for text, mine in tasks.items()}
    fitted = {text: answer for text, answer in answers.items() if not isinstance(answer, Finding)}
    told = tuple(_told(tasks[text], answer) for text, answer in answers.items())
    for one in told:
        if one.variant is None:
            on_notice(f"{item.title}: {one.text} is left out: {one.reason}")
    x = _timed_pixels(bench)
    seed, rows = bench.seed, min(OFFLINE_ROWS, len(x))
    timed = measure_latency(session, deployed_variants(session, fitted), x, batch=rows, rounds=rounds, seed=seed)
    # After the timing: processes that start make a machine busy.
    memory = _memories({PLAIN: task, **{behind(text): tasks[text] for text in fitted}}, bench.seen, x[:rows], on_notice)
    return FileLatency.model_validate(
        {
            **dict(timed),
            "memory": memory,
            "key": item.key,
            "data_sha256": timed_data(task.trial),
            "evaluation_revision": EVALUATION_REVISION,
            "filters": told,
            "volatile": clock.read(),
        }
    )


def _fit(bench: Bench) -> FittedFilter | Finding:
    """The filter on few of the images that it may see, or on all where few do not do."""
    few = replace(bench, seen=bench.seen.take(np.arange(min(FITTED_IMAGES, len(bench.seen)))))
    fitted = fit_filter(few)
    return fitted if not isinstance(fitted, Finding) or len(few.seen) == len(bench.seen) else fit_filter(bench)


def _task(item: TimingItem, trial: TrialKey | None, store: Store) -> TrialTask:
    """A trial of a file of which nobody needs to know the truth."""
    path = None if trial is None else store.model_path(trial.artifact_sha256)
    assert trial is not None and path is not None  # noqa: PT018, S101 (only files that are there are missing)
    return TrialTask(
        trial=trial,
        attack=None,
        replica=0,
        train=item.network.train,
        test=item.network.test,
        model=read_model(path, trial.artifact_sha256),
    )


def _told(task: TrialTask, answer: FittedFilter | Finding) -> TimedFilter:
    asked = task.trial.cell.defense
    assert asked is not None  # noqa: S101 (a filter is one)
    named = {"text": asked.text, "name": asked.name, "settings": asked.settings}
    if isinstance(answer, Finding):
        return TimedFilter(**named, variant=None, verdict=answer.verdict, reason=answer.reason)
    return TimedFilter(**named, variant=behind(asked.text))


def _timed_pixels(bench: Bench) -> Pixels:
    """Images that no filter was fitted on, where there are any."""
    images = bench.unseen if len(bench.unseen) else bench.seen
    return images.take(choose_rows(len(images), limit=TIMED_IMAGES, seed=bench.seed)).pixels


def _memories(tasks: Mapping[str, TrialTask], seen: ImageSet, x: Pixels, on_notice: Notice) -> tuple[PeakMemory, ...]:
    found = []
    for variant, task in tasks.items():
        try:
            found.append(peak_memory(variant, functools.partial(running, variant, task, seen, x)))
        except BrokenExecutor:
            on_notice(f"{task.trial.cell.title}: no peak memory of {variant}: its process was killed, or out of memory")
    return tuple(entry for entry in found if entry is not None)


def running(variant: str, task: TrialTask, seen: ImageSet, x: Pixels) -> Callable[[], object]:
    """What a fresh process runs for its peak memory; the filter's fit takes part.

    Raises:
        SessionError: the filter cannot be fitted there.
    """
    torch.set_num_threads(1)
    session = DeployedSession(Artifact.from_bytes(task.model), task.trial.profile)
    filters = {}
    if task.trial.cell.defense is not None:
        fitted = _fit(Bench(task=task, session=session, seen=seen, unseen=seen, trigger=None))
        if isinstance(fitted, Finding):
            raise SessionError(f"{variant}: {fitted.reason}")
        filters[task.trial.cell.defense.text] = fitted
    return functools.partial(deployed_variants(session, filters)[variant], x)
