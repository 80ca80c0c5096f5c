"""CIFAR-10's pickles, read without running any of them: what is no array, text, number, list or dict is refused."""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import DataError, Labels, first_line, quoted

# What a malformed pickle can raise.
_BROKEN_PICKLE = (
    pickle.UnpicklingError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    LookupError,
    EOFError,
    OverflowError,
    MemoryError,
    RecursionError,
)
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
_GETS = ("GET", "BINGET", "LONG_BINGET")
_PLAIN_TYPES = ("int", "int_or_bool", "bool", "float", "None", "str", "bytes", "bytes_or_str")
_PLAIN, _MARK = "plain", "mark"
_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


def load_batch(data: bytes, name: str) -> tuple[NDArray[Any], Labels]:
    """What a batch holds as ``data`` and ``labels``: ``(N, ...)`` of any integer type, ``(M,) int64``.

    Raises:
        DataError: no pickle, one that names anything but numpy arrays, or one without data and labels.
    """
    batch = _load_dict(data, name)
    pixels, labels = _require(batch, "data", name), _require(batch, "labels", name)
    if not isinstance(pixels, _Array):
        raise DataError(f"{name}: 'data' is of type {_type_of(pixels)}, expected an array of uint8")
    return pixels.to_numpy(name), _to_labels(labels, name)


def load_names(data: bytes, name: str) -> tuple[str, ...]:
    """The class names in ``batches.meta``.

    Raises:
        DataError: as `load_batch`, or ``label_names`` is no list of names.
    """
    names = _require(_load_dict(data, name), "label_names", name)
    if not isinstance(names, list) or not all(isinstance(entry, (str, bytes)) for entry in names):
        raise DataError(f"{name}: 'label_names' is no list of names")
    return tuple(_text(entry) for entry in names)


def _to_labels(labels: object, name: str) -> Labels:
    if isinstance(labels, _Array):
        labels = labels.to_numpy(name).tolist()
    # bool is an int to Python
    if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < 256 for label in labels):
        raise DataError(f"{name}: 'labels' is no list of class numbers")
    return np.array(labels, dtype=np.int64)


def _load_dict(data: bytes, name: str) -> dict[str, Any]:
    try:
        _require_modest_memo(data)
        _require_plain_keys(data)
        content = _Unpickler(data, name).load()
    except DataError:
        raise
    except _BROKEN_PICKLE as error:
        raise DataError(f"{name}: not readable as a pickle ({first_line(error)}); fetch it again") from error
    if not isinstance(content, dict):
        raise DataError(f"{name}: the pickle holds a {_type_of(content)}, expected a dict")
    return {_text(key): value for key, value in content.items() if isinstance(key, (str, bytes))}


def _require_modest_memo(data: bytes) -> None:
    """Ten bytes that memoize under the number 4 billion would make the unpickler allocate 64 GB."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and isinstance(argument, int) and argument > count:
            raise pickle.UnpicklingError(f"memo number {argument} after {count} operations")


def _require_plain_keys(data: bytes) -> None:
    """A tuple as a key is hashed, which takes 2**n steps where n tuples hold the one before twice.

    What is on the stack is followed as far as it takes to tell texts and numbers from the rest.
    """
    stack: list[str] = []
    memo: dict[object, str] = {}
    for operation, argument, _ in pickletools.genops(data):
        before, after, name = operation.stack_before, operation.stack_after, operation.name
        if name in _PUTS:
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        taken = _pop(stack, before)
        if any(kind != _PLAIN for kind in _hashed(name, taken)):
            raise pickle.UnpicklingError("a key that is neither text nor number")
        if name in _GETS:
            stack.append(memo.get(argument, "other"))
        elif name == "DUP":
            stack += 2 * taken
        else:
            stack += [_kind(name, entry) for entry in after]


def _pop(stack: list[str], before: list[pickletools.StackObject]) -> list[str]:
    """Take what an operation takes, off the stack; without the mark and what is below it, where it goes to one."""
    if pickletools.markobject not in before:
        start = len(stack) - len(before)
        taken = stack[start:]
        del stack[start:]
        return taken
    mark = len(stack) - 1 - stack[::-1].index(_MARK)
    taken = stack[mark + 1 :]
    del stack[mark - before.index(pickletools.markobject) :]
    return taken


def _hashed(name: str, taken: list[str]) -> list[str]:
    if name == "SETITEM":
        return taken[1:2]
    if name in ("DICT", "SETITEMS"):
        return taken[::2]
    return taken if name in ("ADDITEMS", "FROZENSET") else []


def _kind(name: str, entry: pickletools.StackObject) -> str:
    if entry is pickletools.markobject:
        return _MARK
    # What may be called gives bytes, or a stand-in that is hashed by its identity.
    return _PLAIN if name == "REDUCE" or entry.name in _PLAIN_TYPES else "other"


def _require(content: dict[str, Any], key: str, name: str) -> object:
    if key not in content:
        held = ", ".join(quoted(held) for held in list(content)[:5]) or "nothing"
        raise DataError(f"{name}: holds no {key!r} but {held}; is it CIFAR-10?")
    return content[key]


def _type_of(value: object) -> str:
    return "array" if isinstance(value, _Array) else type(value).__name__


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("utf-8", errors="backslashreplace")


class _Unpickler(pickle.Unpickler):
    """Knows the four things that numpy arrays are pickled with, and gives them stand-ins of its own.

    It hands out nothing whose attributes a pickle could set for the next one to trip over.
    """

    def __init__(self, data: bytes, name: str) -> None:
        super().__init__(io.BytesIO(data), encoding="bytes")
        self._name = name
        self._known: dict[tuple[str, str], Any] = {
            ("numpy", "ndarray"): "numpy.ndarray",
            ("numpy", "dtype"): _Call(_new_type),
            ("_codecs", "encode"): _Call(_encode),
        }
        for package in ("numpy.core", "numpy._core"):
            self._known[f"{package}.multiarray", "_reconstruct"] = _Call(_new_array)
            self._known[f"{package}.numeric", "_frombuffer"] = _Call(_array_of)

    def find_class(self, module: str, name: str, /) -> Any:
        known = self._known.get((module, name))
        if known is None:
            raise DataError(
                f"{self._name}: the pickle calls {quoted(f'{module}.{name}')}, which no CIFAR-10 file needs; it was "
                "not run: fetch the official archive"
            )
        return known


class _Call:
    """A function that a pickle may call and cannot change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> object:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("it sets attributes of a function")


class _Type:
    """Stands in for numpy.dtype."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = _text(state[1])

    def to_numpy(self) -> np.dtype[Any]:
        """The type.

        Raises:
            ValueError: it is no type of integers.
        """
        if self.code not in _DTYPES or self.order not in ("|", "<", ">", "="):
            raise ValueError(f"of type {quoted(self.order + self.code)}, expected integers")
        return np.dtype(self.order + self.code)


class _Array:
    """Stands in for numpy.ndarray: numpy itself never sees the state."""

    def __init__(self) -> None:
        self._state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._state = state

    def to_numpy(self, name: str) -> NDArray[Any]:
        """The array.

        Raises:
            DataError: the parts do not fit, or it is no array of integers.
        """
        try:
            _, shape, dtype, by_columns, data = self._state
            flat = np.frombuffer(data, dtype=dtype.to_numpy())
            return flat.reshape(shape, order="F" if by_columns else "C")
        except (ValueError, TypeError, AttributeError, OverflowError) as error:
            raise DataError(f"{name}: holds a malformed array ({first_line(error)}); fetch it again") from error


def _new_type(code: str | bytes, *_: object) -> _Type:
    return _Type(_text(code))


def _new_array(*_: object) -> _Array:
    return _Array()


def _array_of(data: bytes, dtype: _Type, shape: tuple[int, ...], order: str, *_: object) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _encode(text: str, encoding: object) -> bytes:
    if not isinstance(encoding, str):  # never shown: the text of nested tuples has no bounds
        raise pickle.UnpicklingError(f"bytes encoded as a {type(encoding).__name__}")
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes encoded as {quoted(encoding)}")
    return text.encode(encoding)
