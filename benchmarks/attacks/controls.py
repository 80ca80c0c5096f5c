"""The control of every ASR: what the same trigger does to the clean network, which never learned it.

    QDEFENSE_DATA=... python benchmarks/attacks/controls.py     # results/controls.jsonl; what is there is kept

A stamp over the whole image may send any network's answers to one class; what it sends to the attacker's is no
backdoor. The clean network is the one of the same data, architecture, seed and precision. A trigger whose state shows
images of the data is not committed: its control is measured on the machine that trained the network, or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np
from margins import DATA, HERE, SCHEMES, SEED, Attacked, attacked_networks

from qdefense.artifact import Artifact
from qdefense.bench.records import BehaviourRecord, Network
from qdefense.bench.store import RECORDS, StoreError, read_model, read_records
from qdefense.data.images import ImageSet
from qdefense.data.opening import open_data
from qdefense.data.selection import choose_rows
from qdefense.session import DeployedSession, profile_for, runtime

RESULTS = HERE / "results"
CONTROLS = RESULTS / "controls.jsonl"
IMAGES = 2000


@dataclass(frozen=True, kw_only=True)
class Control:
    """``hits`` of ``images`` eligible test images that the clean file gives to the attacker's class once stamped.

    ``plain_hits`` are those that it gives to that class without the stamp.
    """

    network_sha256: str
    artifact_sha256: str
    clean_sha256: str
    scheme: str
    images: int
    hits: int
    plain_hits: int
    seed: int
    runtime: dict[str, object]


@lru_cache(maxsize=2)
def test_split(data: str) -> ImageSet:
    return open_data(str(DATA / data), split="test", seed=SEED)


def place_of(network: Network, scheme: str) -> tuple[object, ...]:
    """What an attacked file and its clean twin share."""
    return (network.data, network.architecture, network.width, network.seed, scheme)


def clean_files() -> dict[tuple[object, ...], BehaviourRecord]:
    """The clean networks' files, by what they share with attacked ones; a later record counts."""
    records = (one for one in read_records(RESULTS / RECORDS) if isinstance(one, BehaviourRecord) and not one.failed)
    return {place_of(one.network, one.scheme): one for one in records if one.network.attack is None}


def measured(network: Attacked, scheme: str, twin: BehaviourRecord) -> Control:
    """The control of one file.

    Raises:
        StoreError: the trigger, or the clean file, is not among the results, or is damaged.
    """
    path = network.store.model_path(twin.artifact_sha256)
    if path is None:
        raise StoreError(f"{twin.artifact_sha256[:16]}.onnx, the clean twin, is not among the results")
    images = test_split(twin.network.data)
    trigger = network.trigger(*images.images.shape[1:3])
    eligible = images.take(np.flatnonzero(trigger.eligible(images.labels)))
    chosen = eligible.take(choose_rows(len(eligible), limit=IMAGES, seed=SEED))
    artifact = Artifact.from_bytes(read_model(path, twin.artifact_sha256))
    session, goal = DeployedSession(artifact, profile_for(artifact)), trigger.goal(chosen.labels)
    hits, plain = (
        int(np.sum(session.logits(x).argmax(axis=1) == goal)) for x in (trigger.stamp(chosen.pixels), chosen.pixels)
    )
    return Control(
        network_sha256=network.files["fp32"].artifact_sha256,
        artifact_sha256=network.files[scheme].artifact_sha256,
        clean_sha256=twin.artifact_sha256,
        scheme=scheme,
        images=len(chosen),
        hits=hits,
        plain_hits=plain,
        seed=SEED,
        runtime=runtime().model_dump(mode="json"),
    )


def missing() -> Iterator[tuple[Attacked, str, BehaviourRecord]]:
    """Attacked files with a clean twin and no control yet."""
    lines = CONTROLS.read_text(encoding="utf-8").splitlines() if CONTROLS.exists() else []
    there = {(row["artifact_sha256"], row["clean_sha256"], row["network_sha256"]) for row in map(json.loads, lines)}
    twins = clean_files()
    for network in attacked_networks():
        own = network.files["fp32"].artifact_sha256
        for scheme in filter(network.files.__contains__, SCHEMES):
            twin = twins.get(place_of(network.files[scheme].network, scheme))
            if twin and (network.files[scheme].artifact_sha256, twin.artifact_sha256, own) not in there:
                yield network, scheme, twin


def main() -> None:
    for network, scheme, twin in missing():
        try:
            control = measured(network, scheme, twin)
        except StoreError as error:
            print(f"{network.title}, {scheme}: no control: {error}")
            continue
        with CONTROLS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(control), sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
