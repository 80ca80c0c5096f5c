"""What work will cost on one thread of an idle machine: the median of like work's CPU seconds, else a rule of thumb."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import median
from typing import Literal

from qdefense.bench.records import BehaviourRecord, DefenseRecord, QuantizationRecord, Record, TrainingRecord

Source = Literal["records", "rule of thumb"]
SECONDS_PER_IMAGE_AND_EPOCH = 1.4e-3
"""ResNet-8 at 32x32 on one thread: 330 s for ten epochs of 25,087 GTSRB images (`benchmarks/first_verdict`)."""
SECONDS_PER_STAGE = {"quantize": 3.0, "behaviour": 15.0, "defense": 240.0}
_Key = tuple[object, ...]


class CostModel:
    """Seconds of a work item, by the closest work that was measured: the same data and network, then any."""

    def __init__(self, records: Iterable[Record]) -> None:
        self._seconds: dict[_Key, list[float]] = defaultdict(list)
        for record in records:
            if record.failed or record.volatile.origin == "adopted":
                continue
            share = record.epochs if isinstance(record, TrainingRecord) else 1
            for key in _keys_of(record):
                self._seconds[key].append(record.volatile.cpu_seconds / share)

    def training(self, data: str, architecture: str, width: int, *, epochs: int, images: int) -> tuple[float, Source]:
        """Of a network."""
        found = self._median(training_keys(data, architecture, width))
        if found is not None:
            return found * epochs, "records"
        return SECONDS_PER_IMAGE_AND_EPOCH * images * epochs, "rule of thumb"

    def other(self, stage: str, keys: Iterable[_Key]) -> tuple[float, Source]:
        """Of any later stage."""
        found = self._median(keys)
        return (SECONDS_PER_STAGE[stage], "rule of thumb") if found is None else (found, "records")

    def _median(self, keys: Iterable[_Key]) -> float | None:
        return next((median(self._seconds[key]) for key in keys if key in self._seconds), None)


def training_keys(data: str, architecture: str, width: int) -> tuple[_Key, ...]:
    """From the closest to the widest."""
    return ("train", data, architecture, width), ("train", architecture, width)


def file_keys(stage: str, data: str, architecture: str, width: int, scheme: str) -> tuple[_Key, ...]:
    """Of `quantize` and `behaviour`."""
    return (stage, data, architecture, width, scheme), (stage, scheme)


def defense_keys(
    name: str, settings: object, access: str, data: str, architecture: str, width: int, scheme: str
) -> tuple[_Key, ...]:
    """Of `defense`; ``settings`` by their text, since a budget changes everything."""
    told = repr(settings)
    network = (data, architecture, width)
    return (
        ("defense", name, told, access, *network, scheme),
        ("defense", name, told, access, *network),
        ("defense", name, told, access),
        ("defense", name),
    )


def _keys_of(record: Record) -> tuple[_Key, ...]:
    made = record.network
    place = (made.data, made.architecture, made.width)
    if isinstance(record, TrainingRecord):
        return training_keys(*place)
    if isinstance(record, (QuantizationRecord, BehaviourRecord)):
        return file_keys(record.stage, *place, record.scheme)
    return _keys_of_defense(record)


def _keys_of_defense(record: DefenseRecord) -> tuple[_Key, ...]:
    made = record.network
    return defense_keys(
        record.defense, record.settings, record.access, made.data, made.architecture, made.width, record.scheme
    )
