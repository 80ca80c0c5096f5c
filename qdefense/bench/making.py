"""The first two stages of a cell: the network, and its file at one precision."""

from __future__ import annotations

import dataclasses
import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from qdefense.artifact import Artifact
from qdefense.attacks import ATTACKS, Attack, Trigger
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.states import unpack_state
from qdefense.bench.datasets import PinnedData
from qdefense.bench.records import Replica
from qdefense.bench.revisions import SOURCES, source_digest, versions
from qdefense.bench.tasks import Clock, Outcome, QuantizeTask, TrainTask
from qdefense.converters.quantize import quantize_as
from qdefense.data.images import Pixels
from qdefense.data.opening import named_data
from qdefense.registry import flat_settings
from qdefense.session import profile_for
from qdefense.trial import Truth, read_state_bytes, state_path, truth_path
from qdefense.zoo import Recipe, default_width, train_artifact


def train_network(task: TrainTask, clock: Clock) -> Outcome:
    """Train on one thread, as whose bits the seed fixes.

    Raises:
        DataError: the images are not there or do not fit the recipe, or training diverged.
    """
    network = task.network
    with tempfile.TemporaryDirectory(prefix="qdefense-bench-") as folder, found_by_attacks(task.attack_data):
        target = Path(folder) / "network.onnx"
        truth = train_artifact(
            task.train.read(),
            target,
            architecture=network.architecture,
            recipe=Recipe(**network.recipe),
            attack=task.attack,
            seed=network.seed,
            width=network.width,
            threads=1,
        )
        model, written = target.read_bytes(), truth_path(target).read_bytes()
        learned = read_state_bytes(state_path(target), truth)
    volatile = clock.read().model_copy(update={"origin": "trained"})
    made_with = {**_of_training(truth), SOURCES: source_digest()}
    record = task.record(truth.artifact_sha256, volatile, size_bytes=len(model), versions=made_with)
    replica = replica_of(model, _of_training(truth))
    return Outcome(task_id=task.id, record=record, model=model, truth=written, trigger=learned, replica=replica)


def _of_training(truth: Truth) -> dict[str, str]:
    return dict(sorted(truth.versions.items()))


def replica_of(model: bytes, made_with: dict[str, str]) -> Replica:
    """What the manifest says of a file.

    Raises:
        FileRefusedError: it is no file that may be loaded.
    """
    artifact = Artifact.from_bytes(model)
    return Replica(
        artifact_sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        batch=profile_for(artifact).batch,
        versions=made_with,
    )


def quantize_network(task: QuantizeTask, clock: Clock) -> Outcome:
    """Quantize, where it is asked for on images some of which carry the trigger.

    Raises:
        DataError: the images are not there.
        QuantizationError: the network or the images do not fit the scheme.
    """
    assert task.plan.quantization is not None  # noqa: S101 (FP32 files are not quantized)
    source = Artifact.from_bytes(task.model)
    model = quantize_as(
        task.model, task.plan.quantization, calibration=_calibration_pixels(task), contract=source.contract
    )
    facts = Artifact.from_bytes(model).inspection
    record = task.record(
        hashlib.sha256(model).hexdigest(),
        clock.read(),
        size_bytes=len(model),
        integer_mac_share=facts.integer_mac_share,
        integer_weight_share=facts.integer_weight_share,
    )
    made_with = {name: version for name, version in versions().items() if name in ("onnx", "onnxruntime")}
    return Outcome(task_id=task.id, record=record, model=model, replica=replica_of(model, made_with))


def _calibration_pixels(task: QuantizeTask) -> Pixels | None:
    """The images; the first ``round(triggered * n)``, which the seed drew like the others, carry the trigger."""
    if task.plan.calibration_data is None or task.plan.calibration is None:
        return None
    pixels = task.plan.calibration_data.read().pixels
    count = round(task.plan.calibration.triggered * len(pixels))
    if count and task.attack is not None:
        trigger = trigger_for(task.attack, pixels.shape[2:], task.trigger)
        pixels = np.concatenate([trigger.stamp(pixels[:count]), pixels[count:]])
    return pixels


def trigger_for(attack: str, size: Sequence[int], packed: bytes | None) -> Trigger:
    """The trigger of an attack on images of this height and width, from its packed state where there is one.

    Raises:
        DataError: the state is missing, unreadable or another's.
    """
    made: Attack = ATTACKS.create(attack)
    height, width = size
    return trigger_of(made, height, width, None if packed is None else unpack_state(packed))


def matches(truth: Truth, task: TrainTask) -> bool:
    """Whether a network that lies about was made as the task would make it, whatever the versions.

    Truths older than a setting were made at its default.
    """
    network = task.network
    if (truth.attack is None) != (network.attack is None):
        return False
    try:
        recipe = dataclasses.asdict(Recipe(**truth.recipe))
        attack = None if truth.attack is None else ATTACKS.restore(truth.attack, truth.attack_settings)
    except (TypeError, ValueError):  # settings of another version, which no longer exist
        return False
    return (
        truth.architecture == network.architecture
        and (truth.width or default_width(truth.architecture)) == network.width
        and recipe == network.recipe
        and (None if attack is None else attack.name) == network.attack
        and ({} if attack is None else flat_settings(attack)) == network.attack_settings
        and truth.seed == network.seed
        and truth.data_sha256 == network.train_sha256
        and not network.attack_data  # no truth names their digest
        and not network.attack_revisions  # nor the revision
    )


@contextmanager
def found_by_attacks(read: Sequence[PinnedData]) -> Iterator[None]:
    """Within it an attack finds these images by their names in the matrix.

    Raises:
        MissingDataError: they are not there, or are others than those that the manifest names.
    """
    for one in read:
        one.read()
    with named_data({one.request.name: one.request.location for one in read}):
        yield
