"""The networks of these results, their files and triggers, and the images that they are asked about."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import MappingProxyType

import numpy as np
from kept_rows import KeptRows, Table

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS, Trigger
from qdefense.attacks.interfaces import TriggerState, trigger_of
from qdefense.attacks.states import unpack_state
from qdefense.bench.cohort import Cohort
from qdefense.bench.records import BehaviourRecord, Network
from qdefense.bench.store import RECORDS, Store, read_model, read_records
from qdefense.data.images import ImageSet, Labels, Pixels
from qdefense.data.opening import open_data
from qdefense.session import DeployedSession, Logits, profile_for

HERE = Path(__file__).parent
DATA = Path(os.environ.get("QDEFENSE_DATA", HERE.parents[2] / "shared" / "data"))
KEPT = HERE / "kept_rows.json"
SEED, IMAGES, OTHERS = 0, 600, 2000
TOLD = ("smoothing", "variant", "mode", "content_amplitude", "class_rate", "amplitude")
"""Settings by which a row is told from others of its attack."""
USUAL_RATE = 0.1
NOTHING: Mapping[str, str] = MappingProxyType({})


@lru_cache(maxsize=2)
def test_images(data: str) -> ImageSet:
    return open_data(str(DATA / data), split="test", seed=SEED, limit=IMAGES)


@lru_cache(maxsize=2)
def all_test_images(data: str) -> ImageSet:
    return open_data(str(DATA / data), split="test", seed=SEED)


@lru_cache(maxsize=2)
def training_images(data: str) -> ImageSet:
    return open_data(str(DATA / data), split="train", seed=SEED)


def others_than(target: int, data: str) -> Pixels:
    """Test images of the other classes of a data set."""
    images = open_data(str(DATA / data), split="test", seed=SEED, limit=OTHERS)
    return images.take(np.flatnonzero(images.labels != target)).pixels


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """One network, with a backdoor or clean: its files by scheme."""

    files: dict[str, BehaviourRecord]
    store: Store

    @property
    def made(self) -> Network:
        """What it was made of."""
        return self.files["fp32"].network

    @property
    def title(self) -> str:
        """The first two columns of a table."""
        made = self.made
        told = {key: value for key, value in made.attack_settings.items() if key in TOLD}
        if told.get("variant") in ("cont", "comp"):
            told.pop("amplitude", None)
        else:
            told.pop("content_amplitude", None)
        rate = made.attack_settings.get("poison_rate")
        if told.get("mode") == "all-to-all" and rate not in (None, USUAL_RATE):
            told["poison_rate"] = rate
        settings = ",".join(f"{key.replace('_', '-')}={value}" for key, value in told.items() if value != "all-to-one")
        rare = made.attack_settings.get("poison_count")
        named = f"`{made.attack}{f':{settings}' if settings else ''}`" if made.attack else "none"
        revised = "".join(f" ({name}: revision {number})" for name, number in made.attack_revisions.items())
        return f"{named}{f' ({rare} poisons)' if rare else ''}{revised} | {made.data}, {made.seed}"

    def rows(
        self, kept: KeptRows, table: Table, measure: Measure | None, beside: Mapping[str, str] = NOTHING
    ) -> Iterator[str]:
        """Lines of a table: what is kept, or measured now; ``beside`` are the digests of other networks' files."""
        files = {name: one.artifact_sha256 for name, one in self.files.items() if name in table.schemes}
        found = kept.rows(table, {**files, **beside}, None if measure is None else partial(measure, self))
        yield from (f"| {self.title} | {cells} |" for cells in found)

    def triggered_rows(
        self, kept: KeptRows, table: Table, measure: Measure, beside: Mapping[str, str] = NOTHING
    ) -> Iterator[str]:
        """Lines that take its trigger to measure."""
        yield from self.rows(kept, table, None if self.lacks_trigger else measure, beside)

    @property
    def place(self) -> tuple[str, int]:
        """Data set and seed."""
        return self.made.data, self.made.seed

    def model(self, scheme: str) -> bytes:
        """The bytes of its file at a precision."""
        sha256 = self.files[scheme].artifact_sha256
        path = self.store.model_path(sha256)
        if path is None:
            raise SystemExit(f"the {scheme} file of {self.title} is not among the results")
        return read_model(path, sha256)

    @cached_property
    def asked(self) -> tuple[Pixels, Labels, Labels]:
        """Eligible test images with the trigger, their labels, and what the attacker wants of them."""
        images = test_images(self.made.data)
        trigger = self.trigger(*images.images.shape[1:3])
        eligible = images.take(np.flatnonzero(trigger.eligible(images.labels)))
        return trigger.stamp(eligible.pixels), eligible.labels, trigger.goal(eligible.labels)

    def trigger(self, height: int, width: int) -> Trigger:
        """On images of this size.

        Raises:
            StoreError: its state is not among the results; one that shows images of the data is not committed.
        """
        attack = ATTACKS.restore(self.made.attack or "", self.made.attack_settings)
        found: Trigger = trigger_of(attack, height, width, self.trigger_state)
        return found

    @property
    def trigger_state(self) -> TriggerState | None:
        """What was learned of its trigger.

        Raises:
            StoreError: it is not among the results.
        """
        packed = self.store.trigger(self.files["fp32"].artifact_sha256)
        return None if packed is None else unpack_state(packed)

    def answers(self, model: bytes) -> Logits:
        """What a file answers to the triggered images."""
        return answers_of(model, self.asked[0])

    @property
    def lacks_trigger(self) -> bool:
        """Whether its trigger was learned and its state is not at hand."""
        return self.store.lacks_trigger(self.files["fp32"].artifact_sha256)


Measure = Callable[[Attacked], Iterable[str]]
"""Gives the cells of a network's rows behind its title."""


def session_of(model: bytes) -> DeployedSession:
    artifact = Artifact.from_bytes(model)
    return DeployedSession(artifact, profile_for(artifact))


def answers_of(model: bytes, images: Pixels) -> Logits:
    return session_of(model).logits(images)


def networks() -> list[Attacked]:
    """Every network of the records whose FP32 file was measured, held against its control; a later record counts."""
    store, found = Store(HERE / "results"), dict[str, dict[str, BehaviourRecord]]()
    records = list(read_records(HERE / "results" / RECORDS))
    cohort = Cohort(records)
    for record in records:
        if isinstance(record, BehaviourRecord) and not record.failed:
            found.setdefault(record.network.model_dump_json(), {})[record.scheme] = cohort.judged(record)
    return [Attacked(files=files, store=store) for files in found.values() if "fp32" in files]


def attacked_networks() -> list[Attacked]:
    """Those with a backdoor."""
    return [network for network in networks() if network.made.attack]


def clean_networks(every: Iterable[Attacked]) -> dict[tuple[str, int], Attacked]:
    """Those without, by data set and seed."""
    return {one.place: one for one in every if one.made.attack is None}
