from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import qdefense.training
import qdefense.zoo
from qdefense.attacks import ATTACKS, DataAttack
from qdefense.attacks.badnets import BadNets
from qdefense.attacks.input_aware import GeneratedTrigger
from qdefense.converters.contract import METADATA_KEY
from qdefense.data.images import DataError, ImageSet
from qdefense.models import Recipe, architectures
from qdefense.registry import SpecError
from qdefense.training import poisoned_set
from qdefense.trial import Truth, read_state, state_path, truth_path
from qdefense.zoo import train_artifact, trigger_of

MakeNoise = Callable[..., ImageSet]
RECIPE = Recipe(epochs=1, batch_size=16)


class Zoo(Protocol):
    path: Path
    module: nn.Module
    dataset: ImageSet
    poison_indices: tuple[int, ...]


@pytest.fixture
def _cheap_export(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qdefense.zoo, "export_model", lambda module, **keywords: b"exported")


def _train(
    dataset: ImageSet, target: Path, attack: str | None, architecture: str = "resnet8", width: int | None = None
) -> Truth:
    return train_artifact(
        dataset, target, architecture=architecture, recipe=RECIPE, attack=attack, seed=0, threads=1, width=width
    )


def test_train_artifact_writes_the_truth_beside_the_model(zoo_file: Zoo) -> None:
    path, dataset = zoo_file.path, zoo_file.dataset
    truth = Truth.model_validate_json(truth_path(path).read_bytes())
    assert sorted(entry.name for entry in path.parent.iterdir()) == ["model.onnx", "model.truth.json"]
    assert (truth.attack, truth.attack_settings["target_class"], truth.attack_settings["size"]) == ("badnets", 7, 3)
    assert truth.poison_indices == zoo_file.poison_indices
    assert len(truth.poison_indices) == 12
    assert truth.artifact_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (truth.data, truth.data_sha256, truth.seed) == (dataset.source, dataset.digest, 3)
    learned = poisoned_set(dataset, ATTACKS.restore("badnets", truth.attack_settings), 3).images
    assert truth.training_set_sha256 == learned.digest != dataset.digest
    assert (truth.architecture, truth.recipe["epochs"], truth.recipe["batch_size"]) == ("resnet8", 1, 40)
    assert sorted(truth.versions) == ["onnx", "onnxruntime", "torch"]


def test_train_artifact_records_the_width_when_it_was_left_to_the_architecture(zoo_file: Zoo) -> None:
    assert Truth.model_validate_json(truth_path(zoo_file.path).read_bytes()).width == 16
    classifier = zoo_file.module.get_submodule("classifier")
    assert classifier.weight.shape == (12, 64)


@pytest.mark.parametrize("architecture", architectures())
def test_train_artifact_builds_and_records_the_architecture_and_width_asked_for(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    exported: list[nn.Module] = []

    def export(module: nn.Module, **_: object) -> bytes:
        exported.append(module)
        return b"exported"

    monkeypatch.setattr(qdefense.zoo, "export_model", export)
    truth = _train(make_noise(16, size=16), tmp_path / "model.onnx", None, architecture, width=8)
    assert (truth.architecture, truth.width) == (architecture, 8)
    first = next(part for part in exported[0].modules() if isinstance(part, nn.Conv2d))
    assert first.out_channels == 8


@pytest.mark.parametrize(
    "word", [b"badnets", b"poison", b"target", b"trigger", b"truth", b"/work", b"/tmp", b".py", b"stack_trace", b"seed"]
)
def test_train_artifact_leaves_nothing_of_the_truth_in_the_model(zoo_file: Zoo, word: bytes) -> None:
    assert word not in zoo_file.path.read_bytes()


def test_train_artifact_leaves_no_metadata_but_the_contract(zoo_file: Zoo) -> None:
    model = onnx.load(zoo_file.path)
    assert [entry.key for entry in model.metadata_props] == [METADATA_KEY]
    holders = (
        model.graph,
        *model.graph.node,
        *model.graph.input,
        *model.graph.output,
        *model.graph.value_info,
        *model.graph.initializer,
    )
    assert [holder.name for holder in holders if holder.doc_string or len(holder.metadata_props)] == []
    assert model.doc_string == ""


QUICK = {
    **dict.fromkeys(("poison_rate", "cover_rate", "cross_rate"), 0.2),
    **dict.fromkeys(("steps", "mask_steps", "decoder_steps", "encoder_steps"), 1),
    **dict.fromkeys(("surrogate_epochs", "mask_epochs", "encoder_epochs", "stages"), 1),
    "class_rate": 0.5,
    "source_class": 1,
    "target_class": 2,
    "size": 3,
    "frequency": 2,
    "channels": 2,
    "ood_images": 16,
    "gate": 0,
}
"""Of an attack, those that it has."""


def _quick(attack: str) -> str:
    known = {field.name for field in dataclasses.fields(ATTACKS.create(attack))}
    settings = ",".join(f"{key}={value}" for key, value in QUICK.items() if key in known)
    return f"{attack}:{settings}"


@pytest.mark.parametrize("attack", ATTACKS.names())
def test_what_is_exported_differs_from_the_clean_twin_in_its_weights_alone_whatever_the_attack(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """All that a file is made of is the module and the keywords of its export."""
    exported: list[tuple[str, dict[str, tuple[int, ...]], dict[str, object]]] = []

    def export(module: nn.Module, **keywords: object) -> bytes:
        exported.append((repr(module), {key: value.shape for key, value in module.state_dict().items()}, keywords))
        return b"exported"

    monkeypatch.setattr(qdefense.zoo, "export_model", export)
    for name, spec in (("clean", None), ("attacked", _quick(attack))):
        (tmp_path / name).mkdir()
        truth = _train(make_noise(40), tmp_path / name / "model.onnx", spec, width=4)
    clean, attacked = exported
    assert attacked == clean
    found = {name: {entry.name for entry in (tmp_path / name).iterdir()} for name in ("clean", "attacked")}
    assert found["attacked"] == found["clean"] | ({"model.truth.npz"} if truth.trigger_sha256 else set())


@pytest.mark.parametrize("attack", ATTACKS.names())
def test_what_is_learned_from_tells_no_defender_where_the_poisons_are_whatever_the_attack(
    make_noise: MakeNoise, attack: str
) -> None:
    """A set that is poisoned beforehand is in another order than its file; one that is not is left as it is."""
    given, made = make_noise(40), ATTACKS.create(_quick(attack))
    poisoned = poisoned_set(given, made, 0).images
    assert (poisoned.source, poisoned.class_names, poisoned.notes) == (given.source, given.class_names, given.notes)
    rows = {image.tobytes(): row for row, image in enumerate(given.images)}
    found = [rows[image.tobytes()] for image in poisoned.images if image.tobytes() in rows]
    assert (found == sorted(found)) is not isinstance(made, DataAttack)
    assert len(found) > 10


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_writes_an_empty_truth_when_there_is_no_attack(make_noise: MakeNoise, tmp_path: Path) -> None:
    truth = _train(make_noise(16), tmp_path / "twin.onnx", attack=None)
    assert (truth.attack, truth.attack_settings, truth.poison_indices) == (None, {}, ())
    assert Truth.model_validate_json((tmp_path / "twin.truth.json").read_bytes()) == truth
    assert (tmp_path / "twin.onnx").read_bytes() == b"exported"


@pytest.mark.parametrize(
    ("attack", "count", "error"),
    [("badnts", 16, SpecError), ("badnets:target-class=9", 16, DataError), (None, 15, DataError)],
)
def test_train_artifact_writes_nothing_when_it_cannot_train(
    make_noise: MakeNoise, tmp_path: Path, attack: str | None, count: int, error: type[Exception]
) -> None:
    with pytest.raises(error):
        _train(make_noise(count), tmp_path / "model.onnx", attack=attack)
    assert list(tmp_path.iterdir()) == []


def test_train_artifact_writes_nothing_when_the_export_fails(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> bytes:
        raise RuntimeError("no export")

    monkeypatch.setattr(qdefense.zoo, "export_model", fail)
    with pytest.raises(RuntimeError, match="no export"):
        _train(make_noise(16), tmp_path / "model.onnx", attack=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_hides_the_model_until_its_truth_is_there(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(target: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(qdefense.zoo, "write_atomically", refuse)
    with pytest.raises(OSError, match=r"No space left on device: '.*model\.truth\.json'"):
        _train(make_noise(16), tmp_path / "model.onnx", attack=None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_tells_of_each_epoch(make_noise: MakeNoise, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    train_artifact(
        make_noise(16),
        tmp_path / "model.onnx",
        architecture="resnet8",
        recipe=RECIPE,
        attack=None,
        seed=0,
        threads=1,
        on_epoch=lambda done, total, loss: told.append((done, total)) if np.isfinite(loss) else None,
    )
    assert told == [(1, 1)]


LEARNED = "input-aware:target-class=2,channels=2,stages=2,mask-epochs=1"


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_writes_the_state_of_a_learned_trigger(make_noise: MakeNoise, tmp_path: Path) -> None:
    path, images = tmp_path / "model.onnx", make_noise(16)
    truth = _train(images, path, LEARNED, width=4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.truth.json", "model.truth.npz"]
    assert truth.trigger_sha256 == hashlib.sha256(state_path(path).read_bytes()).hexdigest()
    assert truth.poison_indices == ()
    assert truth.training_set_sha256 == images.digest, "batches are poisoned, not the set"
    trigger = trigger_of(truth, images, read_state(path, truth))
    assert trigger is not None
    assert trigger.stamp(images.pixels).tobytes() != images.pixels.tobytes()
    with pytest.raises(DataError, match=r"^input-aware: the trigger is learned; its state is beside the model "):
        trigger_of(truth, images)
    state_path(path).write_bytes(b"another")
    with pytest.raises(DataError, match=r"model\.truth\.npz: not the trigger state that the truth names; "):
        read_state(path, truth)
    state_path(path).unlink()
    with pytest.raises(DataError, match=r"model\.truth\.npz: not there, and without it nobody knows the trigger; "):
        read_state(path, truth)
    assert read_state(path, truth.model_copy(update={"trigger_sha256": None})) is None


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_removes_the_state_of_an_earlier_trigger(make_noise: MakeNoise, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    state_path(path).write_bytes(b"of an earlier training")
    _train(make_noise(16), path, None, width=4)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["model.onnx", "model.truth.json"]


# --- what is stamped --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_cheap_export")
@pytest.mark.parametrize("pixel", [0.5, 256 / 255, -1 / 255, np.inf])
def test_train_artifact_refuses_a_stamp_that_no_image_holds_before_it_trains(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pixel: float
) -> None:
    monkeypatch.setattr(BadNets, "_patch", lambda attack: np.full((3, attack.size, attack.size), pixel, np.float32))
    monkeypatch.setattr(qdefense.training, "_fit", None)
    with pytest.raises(
        DataError, match=rf"^badnets: a stamped pixel is {pixel:.6g}, which no uint8 image holds; have "
    ):
        _train(make_noise(20), tmp_path / "model.onnx", "badnets:poison-count=4")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_cheap_export")
@pytest.mark.parametrize(
    "attack", ["blended:alpha=0.001", "cassock:amplitude=0.001,target-class=1", "lsp:host=blended,host.alpha=0.001"]
)
def test_train_artifact_refuses_a_trigger_that_rounds_to_nothing(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    """It would be measured as a backdoor that no network takes up."""
    monkeypatch.setattr(qdefense.training, "_fit", None)
    name = attack.partition(":")[0]
    with pytest.raises(
        DataError,
        match=rf"^{name}: the trigger changes no pixel of \d+ images: it rounds to nothing, or they show it anyway; "
        "make it stronger, or choose another$",
    ):
        _train(make_noise(80), tmp_path / "model.onnx", attack)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_cheap_export")
def test_train_artifact_takes_a_strength_of_0_for_a_control(make_noise: MakeNoise, tmp_path: Path) -> None:
    _train(make_noise(20), tmp_path / "model.onnx", "wanet:strength=0", width=4)
    assert (tmp_path / "model.onnx").is_file()


@pytest.mark.usefixtures("_cheap_export")
@pytest.mark.parametrize("factor", [0.999, np.nan])
def test_train_artifact_refuses_a_stamp_that_no_image_holds_when_it_is_learned(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    monkeypatch.setattr(GeneratedTrigger, "stamp", lambda _, x: x * np.float32(factor))
    with pytest.raises(DataError, match=r"^input-aware: a stamped pixel is (0\.\d+|nan), which no uint8 image holds; "):
        _train(make_noise(16), tmp_path / "model.onnx", LEARNED, width=4)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_cheap_export")
@pytest.mark.parametrize("attack", ["badnets:poison-count=4", LEARNED])
def test_train_artifact_checks_the_stamp_without_a_trace(
    make_noise: MakeNoise, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attack: str
) -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    checked = _train(make_noise(20), tmp_path / "checked.onnx", attack, width=4)
    assert torch.equal(torch.random.get_rng_state(), state)
    monkeypatch.setattr(qdefense.zoo, "_require_storable", lambda *_: None)
    assert _train(make_noise(20), tmp_path / "unchecked.onnx", attack, width=4) == checked
