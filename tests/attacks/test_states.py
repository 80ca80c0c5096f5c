from __future__ import annotations

import io

import numpy as np
import pytest

from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.sig import SIG
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.data.images import DataError

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


@pytest.mark.parametrize("data", [b"", b"no archive", pack_state(STATE)[:-60], _pickled()])
def test_unpack_state_refuses_what_is_no_archive_of_plain_arrays(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^the trigger state is unreadable \(.+\); train the network again$"):
        unpack_state(data)


def test_trigger_of_refuses_a_state_when_the_attack_knows_none() -> None:
    with pytest.raises(DataError, match=r"^sig: the truth names a trigger state, and this attack has none; train "):
        trigger_of(SIG(), 8, 8, STATE)
