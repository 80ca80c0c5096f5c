"""What work will cost on one thread of an idle machine: the median of like work's CPU seconds, else a rule of thumb.

Work on another network counts by its multiply-accumulates: a network of three times as many takes three times as long;
training on other images by how many there are. An attack may train networks of its own, for longer than the victim:
trainings of the same attack come before any others, those with the same settings first. What it trains of its own
counts as if it grew with the victim's epochs, images and size, too, which it may not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from statistics import median
from typing import Literal, NamedTuple

from qdefense.bench.records import DefenseRecord, Network, Record, TrainingRecord

Source = Literal["records", "other attacks", "rule of thumb"]
RULED = ("resnet8", 16)
"""The network that the rules of thumb are of."""
SECONDS_PER_IMAGE_AND_EPOCH = 1.4e-3
"""ResNet-8 at 32x32 on one thread: 330 s for ten epochs of 25,087 GTSRB images (`benchmarks/first_verdict`)."""
SECONDS_PER_STAGE = {
    "quantize": 3.0,
    "behaviour": 15.0,
    "control": 8.0,
    "defense": 240.0,
    "defense without gradients": 1.0,
}
_Key = tuple[object, ...]


class CostModel:
    """Seconds of a work item, by the closest work that was measured: the same network, then any of the same kind.

    ``images`` tells how many there are by the digest of a training set.
    """

    def __init__(self, records: Iterable[Record], images: Mapping[str, int] | None = None) -> None:
        self._images = images or {}
        self._seconds: dict[_Key, list[tuple[float, Network]]] = defaultdict(list)
        for record in records:
            if record.failed or record.volatile.origin == "adopted":
                continue
            share = record.epochs if isinstance(record, TrainingRecord) else 1
            for key in _keys_of(record):
                self._seconds[key].append((record.volatile.cpu_seconds / share, record.network))

    def training(self, network: Network, *, epochs: int, images: int) -> tuple[float, Source]:
        """Of a network; what an attack that was never recorded trains of its own is not in it."""
        of_attack, of_any = training_keys(network)
        found = self._training(of_attack, network, images)
        if found is not None:
            return found * epochs, "records"
        found = self._training(of_any, network, images)
        if found is not None:
            return found * epochs, "records" if network.attack is None else "other attacks"
        return SECONDS_PER_IMAGE_AND_EPOCH * images * epochs * _relative_size(network), "rule of thumb"

    def _training(self, keys: TrainingKeys, network: Network, images: int) -> float | None:
        """Seconds of an epoch."""
        found = self._median(keys.same, network)
        if found is None:
            found = self._per_image(keys.per_image, images)
        return self._median((keys.other_size,), network) if found is None else found

    def other(self, stage: str, keys: Iterable[_Key], network: Network) -> tuple[float, Source]:
        """Of any later stage."""
        found = self._median(keys, network)
        if found is not None:
            return found, "records"
        return SECONDS_PER_STAGE[stage] * _relative_size(network), "rule of thumb"

    def _per_image(self, key: _Key, images: int) -> float | None:
        """Of like networks on other data; ``None`` where nothing tells how many images they were trained on."""
        made = [(seconds, self._images.get(one.train_sha256)) for seconds, one in self._seconds.get(key, ())]
        known = [seconds / count for seconds, count in made if count]
        return median(known) * images if known else None

    def _median(self, keys: Iterable[_Key], network: Network) -> float | None:
        key = next((key for key in keys if key in self._seconds), None)
        if key is None:
            return None
        if _ANY not in key:  # networks are sized only where one stands in for another: it takes torch seconds
            return median(seconds for seconds, _ in self._seconds[key])
        return median(seconds / _relative_size(made) for seconds, made in self._seconds[key]) * _relative_size(network)


class TrainingKeys(NamedTuple):
    """Like trainings on the same images, the closest first; on other images; of a network of another size."""

    same: tuple[_Key, ...]
    per_image: _Key
    other_size: _Key

    @property
    def every(self) -> tuple[_Key, ...]:
        """Under which a training is looked up."""
        return (*self.same, self.per_image, self.other_size)


def training_keys(network: Network) -> tuple[TrainingKeys, TrainingKeys]:
    """Of the same attack, and of any."""
    attack = ("train", "attack", network.attack or "none")
    exactly = (*attack, repr(network.attack_settings), *_place(network))
    of_attack = _training_keys(attack, network)
    return of_attack._replace(same=(exactly, *of_attack.same)), _training_keys(("train",), network)


def _training_keys(begin: _Key, network: Network) -> TrainingKeys:
    place = _place(network)
    return TrainingKeys(
        same=((*begin, *place),), per_image=(*begin, *place[1:]), other_size=(*begin, _ANY, network.data)
    )


def file_keys(stage: str, network: Network, scheme: str) -> tuple[_Key, ...]:
    """Of `quantize`, `behaviour` and `control`."""
    return (stage, *_place(network), scheme), (stage, _ANY, network.data, scheme), (stage, _ANY, scheme)


def defense_keys(name: str, settings: object, access: str, network: Network, scheme: str) -> tuple[_Key, ...]:
    """Of `defense`; ``settings`` by their text, since a budget changes everything."""
    asked, place = ("defense", name, repr(settings), access), _place(network)
    return (
        (*asked, *place, scheme),
        (*asked, *place),
        (*asked, _ANY, network.data, scheme),
        (*asked, _ANY),
        ("defense", name, access == "no-gradients", _ANY),  # which may take no time at all
    )


_ANY = "any network"
"""In a key: seconds count by the size of the network."""


def _place(network: Network) -> tuple[str, str, int]:
    return network.data, network.architecture, network.width


def _keys_of(record: Record) -> tuple[_Key, ...]:
    if isinstance(record, TrainingRecord):
        return tuple(key for keys in training_keys(record.network) for key in keys.every)
    if isinstance(record, DefenseRecord):
        return defense_keys(record.defense, record.settings, record.access, record.network, record.scheme)
    return file_keys(record.stage, record.network, record.scheme)


def _relative_size(network: Network) -> float:
    """Multiply-accumulates of one image, as a multiple of those of the network that the rules of thumb are of.

    At least 1: around a smaller network it is images and sessions that take the time. 1 for an architecture that the
    zoo has no longer.
    """
    from qdefense.zoo import architectures, multiply_accumulates  # noqa: PLC0415 (imports torch)

    if network.architecture not in architectures():
        return 1.0
    return max(1.0, multiply_accumulates(network.architecture, network.width) / multiply_accumulates(*RULED))
