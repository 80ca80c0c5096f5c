from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdefense.data.images import DataError
from qdefense.data.pickled import load_batch, load_names

PLANES = np.arange(12, dtype=np.uint8).reshape(2, 6)
BATCH = {"labels": [7, 2], "data": PLANES}


def test_python_2_pickles_of_these_tests_are_pickles(python_2: Callable[[Any], bytes]) -> None:
    loaded = pickle.loads(python_2(BATCH), encoding="bytes")
    np.testing.assert_array_equal(loaded[b"data"], PLANES)
    assert loaded[b"labels"] == [7, 2]


def test_load_batch_reads_what_python_2_wrote(python_2: Callable[[Any], bytes]) -> None:
    pixels, labels = load_batch(python_2(BATCH), "batch")
    np.testing.assert_array_equal(pixels, PLANES)
    assert (pixels.dtype.name, labels.dtype.name, labels.tolist()) == ("uint8", "int64", [7, 2])


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("keys", [str, str.encode])
def test_load_batch_reads_every_protocol_of_python_3(protocol: int, keys: Callable[[str], Any]) -> None:
    content = {keys("labels"): [7, 2], keys("data"): PLANES}
    pixels, labels = load_batch(pickle.dumps(content, protocol), "batch")
    np.testing.assert_array_equal(pixels, PLANES)
    assert labels.tolist() == [7, 2]


@pytest.mark.parametrize("protocol", [2, 5])
def test_load_batch_reads_arrays_of_other_orders_and_types(protocol: int) -> None:
    content = {"data": np.asfortranarray(PLANES), "labels": np.array([300 - 293, 2], dtype=">i8")}
    pixels, labels = load_batch(pickle.dumps(content, protocol), "batch")
    np.testing.assert_array_equal(pixels, PLANES)
    assert labels.tolist() == [7, 2]


class _Runs:
    """Calls a function as soon as an ordinary unpickler reads it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize(
    ("call", "called"), [(os.system, "posix.system"), (eval, "builtins.eval"), (np.load, "numpy.load"), (getattr, "")]
)
def test_load_batch_names_the_global_and_calls_nothing_when_a_pickle_wants_more(
    tmp_path: Path, protocol: int, call: Callable[..., Any], called: str
) -> None:
    data = pickle.dumps(
        {"data": PLANES, "labels": [1], "extra": _Runs(call, f"touch {tmp_path}/seen")}, protocol, fix_imports=False
    )
    with pytest.raises(
        DataError, match=rf"^batch: the pickle calls '.*{called}', which no CIFAR-10 file needs; it was not run"
    ):
        load_batch(data, "batch")
    assert list(tmp_path.iterdir()) == []


def test_load_batch_shortens_and_escapes_a_hostile_global() -> None:
    with pytest.raises(DataError) as caught:
        load_batch(b"c\x1b[2J" + b"x" * 900 + b"\nsystem\n.", "batch")
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value)) < 200


ENCODE = b"c_codecs\nencode\n"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        b"\x80\x02}(U\x06labels",
        b"\x80\x02" + ENCODE + b"U\x01aU\x03zip\x86R.",  # another encoding
        b"\x80\x02" + ENCODE + b"}U\x04nameU\x01xsb.",  # sets an attribute of what find_class gave
        b"\x80\x02" + ENCODE + b"N}X\x09\x00\x00\x00_functionX\x01\x00\x00\x00xs\x86b.",
        b"\x80\x02cnumpy\nndarray\nN}X\x01\x00\x00\x00xK\x01s\x86b.",
        b"\x80\x02cnumpy\nndarray\n)\x81.",  # makes an object of it
        b"\x80\x02cnumpy\nndarray\n)R.",
        b"\x80\x02cnumpy\ndtype\n)R.",
        b"\x80\x02cnumpy\ndtype\nU\x02u1\x85R)b.",
        b"\x80\x02cnumpy\ndtype\nU\x02u1\x85RK\x01b.",
        b"P1\n.",  # a persistent id
        b"\x80\x02\x82\x01.",  # an extension code
        b"\x80\x02}r\xff\xff\xff\xff.",  # 64 GB of memo
        b"\x80\x02}p99999999\n.",
        b"(" * 100_000,
        b"\x80\x02]}s.",  # an unhashable key
    ],
)
def test_load_batch_raises_when_the_pickle_is_malformed(data: bytes) -> None:
    with pytest.raises(DataError, match=r"^batch: not readable as a pickle \(.*\); fetch it again$"):
        load_batch(data, "batch")


def _bomb(hashes: bytes, *, levels: int = 200, last: bytes = b"") -> bytes:
    """A tuple that holds one twice that holds one twice and so on: its hash and its text take 2**levels steps."""
    nested = b"".join(b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(levels))
    return b"\x80\x04" + hashes.replace(b"{one}", b"K\x01q\x00").replace(b"{tuple}", nested + last) + b"."


@pytest.mark.parametrize(
    "hashes",
    [
        b"}{one}{tuple}K\x02s",
        b"}({one}{tuple}K\x02u",
        b"}(U\x01aK\x01{one}{tuple}K\x02u",
        b"({one}{tuple}K\x02d",
        b"\x8f({one}{tuple}\x90",
        b"({one}{tuple}\x91",
        b"}{one}{tuple}2K\x02s",
    ],
    ids=["SETITEM", "SETITEMS", "later", "DICT", "ADDITEMS", "FROZENSET", "DUP"],
)
@pytest.mark.parametrize(
    "last",
    [b"", b"0h\xc8", b"\x94", b"Nb", b"(K\x010K\x0100", b"(e", b"(1"],
    ids=["plain", "GET", "MEMOIZE", "BUILD", "marks", "APPENDS", "POP_MARK"],
)
def test_load_batch_hashes_no_tuple_whatever_way_it_comes_to_be_a_key(hashes: bytes, last: bytes) -> None:
    with pytest.raises(DataError, match=r"^batch: not readable as a pickle \(a key that is neither text nor number\)"):
        load_batch(_bomb(hashes, last=last), "batch")


def test_load_batch_shows_no_nested_tuple() -> None:
    encode = b"c_codecs\nencode\n(X\x01\x00\x00\x00a{one}{tuple}tR"
    with pytest.raises(DataError, match=r"^batch: not readable as a pickle \(bytes encoded as a tuple\)"):
        load_batch(_bomb(encode), "batch")


def _array(**state: Any) -> bytes:
    """A batch whose array has another state."""
    whole = {"version": 1, "shape": (2, 6), "dtype": np.dtype("u1"), "order": False, "raw": PLANES.tobytes()} | state

    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            reconstruct = PLANES.__reduce__()[0]
            return reconstruct, (np.ndarray, (0,), b"b"), tuple(whole.values())

    return pickle.dumps({"data": Array(), "labels": [0, 1]}, 2)


@pytest.mark.parametrize(
    "state",
    [
        {"shape": (3, 6)},
        {"shape": "x"},
        {"shape": (-2, -6)},
        {"raw": []},
        {"raw": b"x"},
        {"dtype": 3},
        {"dtype": np.dtype("O"), "raw": [1] * 12},
        {"dtype": np.dtype("f4"), "raw": bytes(48)},
        {"extra": 1},
    ],
)
def test_load_batch_raises_when_an_array_is_malformed(state: dict[str, Any]) -> None:
    load_batch(_array(), "batch")
    with pytest.raises(DataError, match=r"^batch: holds a malformed array \(.*\); fetch it again$"):
        load_batch(_array(**state), "batch")


def test_load_batch_raises_when_an_array_has_no_state() -> None:
    data = b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\n)RsU\x06labels]s."
    with pytest.raises(DataError, match=r"holds a malformed array"):
        load_batch(data, "batch")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "batch: the pickle holds a list, expected a dict"),
        (PLANES, "batch: the pickle holds a array, expected a dict"),
        ({}, "batch: holds no 'data' but nothing; is it CIFAR-10?"),
        ({"data": PLANES, "fine_labels": []}, "batch: holds no 'labels' but 'data', 'fine_labels'; is it CIFAR-10?"),
        ({"data": [1], "labels": [0]}, "batch: 'data' is of type list, expected an array of uint8"),
        ({"data": PLANES, "labels": "01"}, "batch: 'labels' is no list of class numbers"),
        ({"data": PLANES, "labels": [0, True]}, "batch: 'labels' is no list of class numbers"),
        ({"data": PLANES, "labels": [0, -1]}, "batch: 'labels' is no list of class numbers"),
        ({"data": PLANES, "labels": [0, 1 << 70]}, "batch: 'labels' is no list of class numbers"),
        ({"data": PLANES, "labels": [[0]]}, "batch: 'labels' is no list of class numbers"),
    ],
)
def test_load_batch_says_what_is_wrong_when_the_content_is_another(content: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_batch(pickle.dumps(content), "batch")
    assert str(caught.value) == message


def test_load_names_reads_text_and_bytes(python_2: Callable[[Any], bytes]) -> None:
    assert load_names(python_2({"label_names": ["cat", "dog"]}), "meta") == ("cat", "dog")
    assert load_names(pickle.dumps({"label_names": ["é", b"\xff"]}), "meta") == ("é", "\\xff")


@pytest.mark.parametrize("names", ["cat", [1], {"cat": 1}])
def test_load_names_raises_when_they_are_no_names(names: object) -> None:
    with pytest.raises(DataError, match=r"^meta: 'label_names' is no list of names$"):
        load_names(pickle.dumps({"label_names": names}), "meta")
