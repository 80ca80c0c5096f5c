"""A job run in the test's own process, and what it told."""

from __future__ import annotations

from typing import Any

from qdefense.audit import worker
from qdefense.audit.events import Event, Job


def done(job: Job) -> list[Event]:
    """The events of a job, run in this process."""
    events: list[Event] = []
    worker.run(job, events.append)
    return events


def of_kind(events: list[Event], kind: type[Event]) -> Any:
    (event,) = [event for event in events if isinstance(event, kind)]
    return event
