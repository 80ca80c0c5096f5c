from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.dfb import DFB, ResidualEncoder
from qdefense.attacks.input_aware import InputAware
from qdefense.attacks.interfaces import LearnsTrigger, TriggerState, trigger_of
from qdefense.attacks.issba import Issba
from qdefense.attacks.sig import SIG
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.data.images import DataError, ImageSet

STATE = {"weight": np.arange(6, dtype=np.float32).reshape(2, 3), "classes": np.array(4)}


def test_a_state_comes_back_as_it_was() -> None:
    found = unpack_state(pack_state(STATE))
    assert list(found) == ["classes", "weight"]
    assert found["classes"] == 4
    assert (found["weight"].dtype, found["weight"].tobytes()) == (np.float32, STATE["weight"].tobytes())


def test_equal_states_give_equal_bytes_whatever_their_order() -> None:
    assert pack_state(STATE) == pack_state(dict(reversed(STATE.items())))
    assert pack_state(STATE) != pack_state(STATE | {"classes": np.array(5)})


def test_pack_state_refuses_objects() -> None:
    with pytest.raises(ValueError, match="Object arrays cannot be saved when allow_pickle=False"):
        pack_state({"weight": np.array([object()], dtype=object)})


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, weight=np.array([{}], dtype=object))
    return buffer.getvalue()


def _with_header(header: str) -> bytes:
    """One array whose header says this, and no data."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("weight.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode())
    return buffer.getvalue()


def _of_shape(shape: str) -> bytes:
    return _with_header(f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({shape},), }}\n")


def _with_field(behind: int, value: int) -> bytes:
    """A packed state whose member has this field in the archive's directory, so many bytes behind its signature."""
    data = bytearray(pack_state({"weight": np.zeros(3, np.float32)}))
    data[data.index(b"PK\x01\x02") + behind] = value
    data[data.index(b"PK\x03\x04") + behind - 2] = value
    return bytes(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no archive",
        pack_state(STATE)[:-60],
        _pickled(),
        _of_shape("10" + "0" * 14),
        _of_shape("10" + "0" * 22),
        _with_header("{'descr': '<f4', 'shape': (1,"),
        _with_field(8, 1),
        _with_field(10, 97),
    ],
    ids=["empty", "text", "torn", "pickle", "huge", "beyond any integer", "unbalanced", "encrypted", "unknown method"],
)
def test_unpack_state_refuses_what_is_no_archive_of_plain_arrays(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^the trigger state is unreadable \(.+\); train the network again$"):
        unpack_state(data)


def test_trigger_of_refuses_a_state_when_the_attack_knows_none() -> None:
    with pytest.raises(DataError, match=r"^sig: the truth names a trigger state, and this attack has none; train "):
        trigger_of(SIG(), 8, 8, STATE)


# --- what a trigger takes ---------------------------------------------------------------------------------------------


def _class_counts() -> list[NDArray[Any]]:
    return [np.array(value) for value in (0, 1, -3, 2.7, np.nan, "x", b"x", True, 4.0)] + [np.array(4, dtype=np.uint8)]


@pytest.mark.parametrize("name", ["badnets", "blended", "wanet"])
@pytest.mark.parametrize("count", _class_counts(), ids=repr)
def test_all_to_all_triggers_take_two_classes_or_more(name: str, count: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=rf"^{name}: the trigger state is not that of these settings; train the "):
        trigger_of(ATTACKS.create(f"{name}:mode=all-to-all"), 8, 8, {"classes": count})


INPUT_AWARE = InputAware(channels=2, stages=1, mask_epochs=1, mode="all-to-all")
ISSBA = Issba(bits=4, channels=2, stages=1, encoder_epochs=1)
WEIGHT = {"input-aware": "mask.0.weight", "issba": "encoder.spread.weight"}


@pytest.fixture(scope="module")
def states() -> dict[str, TriggerState]:
    """Of 8x8 images in four classes."""
    images = ImageSet(
        images=np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8),
        labels=np.arange(40) % 4,
        class_names=tuple("abcd"),
        source="noise",
    )
    learned = ISSBA.poison(images, np.random.default_rng(0)).trigger_state
    assert learned is not None
    return {
        "input-aware": INPUT_AWARE.begin(images, batch_size=40, steps=1, rng=np.random.default_rng(0)).end(),
        "issba": learned,
    }


def _with_one(value: float) -> Callable[[NDArray[Any]], NDArray[Any]]:
    def change(weights: NDArray[Any]) -> NDArray[Any]:
        changed = weights.copy()
        changed.flat[-1] = value
        return changed

    return change


@pytest.mark.parametrize("attack", [INPUT_AWARE, ISSBA], ids=lambda attack: attack.name)
@pytest.mark.parametrize(
    "change",
    [
        _with_one(np.nan),
        _with_one(np.inf),
        lambda weights: weights.astype(str),
        lambda weights: weights.astype(np.float64),
        lambda weights: weights[None],
        lambda weights: weights.tobytes(),
    ],
    ids=["nan", "inf", "text", "float64", "shape", "no array"],
)
def test_learned_triggers_take_finite_weights_of_their_type_and_shape(
    states: dict[str, TriggerState], attack: InputAware | Issba, change: Callable[[NDArray[Any]], Any]
) -> None:
    good, name = states[attack.name], WEIGHT[attack.name]
    assert isinstance(attack, LearnsTrigger)
    attack.restored_trigger(8, 8, good)
    with pytest.raises(DataError, match=rf"^{attack.name}: the trigger state is not that of these settings"):
        attack.restored_trigger(8, 8, {**good, name: change(good[name])})


@pytest.mark.parametrize("attack", [INPUT_AWARE, ISSBA], ids=lambda attack: attack.name)
def test_learned_triggers_take_no_other_names(states: dict[str, TriggerState], attack: InputAware | Issba) -> None:
    for extra in ("another", "encoder.another", "pattern.another"):
        with pytest.raises(DataError, match=rf"^{attack.name}: the trigger state is not that of these settings"):
            attack.restored_trigger(8, 8, {**states[attack.name], extra: np.zeros(1, np.float32)})


@pytest.mark.parametrize("count", _class_counts(), ids=repr)
def test_input_aware_takes_two_classes_or_more(states: dict[str, TriggerState], count: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=r"^input-aware: the trigger state is not that of these settings; train the "):
        INPUT_AWARE.restored_trigger(8, 8, {**states["input-aware"], "classes": count})


@pytest.mark.parametrize(
    "secret", [np.array([7, 300, 2, -1]), np.array([0, 1, 2, 1], np.uint8), np.zeros((2, 2), np.uint8)]
)
def test_issba_takes_a_secret_of_zeros_and_ones(states: dict[str, TriggerState], secret: NDArray[Any]) -> None:
    with pytest.raises(DataError, match=r"^issba: the trigger state is not that of these settings on 8x8 images; "):
        ISSBA.restored_trigger(8, 8, {**states["issba"], "secret": secret})


@pytest.mark.parametrize("spec", ["dfb", "cassock:variant=cont", "cassock-loop:variant=comp"])
def test_learned_patterns_are_finite(spec: str) -> None:
    name = "residual" if spec == "dfb" else "pattern"
    attack, good = ATTACKS.create(spec), np.zeros((3, 8, 8), np.float32)
    trigger_of(attack, 8, 8, {name: good})
    for state in ({name: good + np.nan}, {name: good.astype(np.float64)}, {name: good, "another": good}, {name: b"x"}):
        with pytest.raises(DataError, match=rf"^{attack.name}: the trigger state is not that of these settings"):
            trigger_of(attack, 8, 8, state)  # type: ignore[arg-type]


def test_dfbs_encoder_has_finite_weights_of_its_names_and_types() -> None:
    attack, encoder = DFB(variant="encoder", channels=2), ResidualEncoder(2)
    good = {key: value.numpy() for key, value in encoder.state_dict().items()}
    name = "first.weight"
    attack.restored_trigger(8, 8, good)
    for state in (
        {**good, name: good[name] * np.nan},
        {**good, name: good[name].astype(np.float64)},
        {**good, "x": good[name]},
    ):
        with pytest.raises(DataError, match=r"^dfb: the trigger state is not that of these settings"):
            attack.restored_trigger(8, 8, state)


@pytest.mark.parametrize("attack", [INPUT_AWARE, ISSBA], ids=lambda attack: attack.name)
def test_restoring_leaves_the_state_of_torch_alone(states: dict[str, TriggerState], attack: InputAware | Issba) -> None:
    before = torch.random.get_rng_state()
    attack.restored_trigger(8, 8, states[attack.name])
    assert torch.equal(torch.random.get_rng_state(), before)
