"""Weights that a file keeps beside itself: read once, from its own folder only, and put into one model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError, EncodeError
from onnx import TensorProto

from qdefense.converters.reading import LARGEST_FILE, FileRefusedError, every_graph, safe_text, tensors_of

_DIGITS = 20
_TOO_LARGE = "the model and its external data are larger than 2 GB; only smaller ones can be read"


def with_external_data(data: bytes, folder: Path) -> tuple[bytes, dict[str, str]]:
    """The model with its external tensors inside, and the sha256 of every external file by its name.

    A model without external tensors, and bytes that are no model, come back as they are.

    Raises:
        FileRefusedError: an external file is missing, lies outside the folder, is too short, or all is too large.
    """
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except DecodeError:
        return data, {}
    external = [tensor for tensor in _all_tensors(model) if tensor.data_location == TensorProto.EXTERNAL]
    if not external:
        return data, {}
    if any(isinstance(text, bytes) for tensor in external for text in _texts(tensor)):
        raise FileRefusedError("a name in the file is not UTF-8 text; export the model again with a current exporter")
    contents: dict[str, bytes] = {}
    slices = [_slice(tensor, folder, contents) for tensor in external]
    if sum(map(len, slices)) > LARGEST_FILE:  # many tensors may name one file
        raise FileRefusedError(_TOO_LARGE)
    for tensor, part in zip(external, slices, strict=True):
        tensor.raw_data = bytes(part)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
    try:
        whole = model.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise FileRefusedError(_TOO_LARGE) from error
    return bytes(whole), {name: hashlib.sha256(body).hexdigest() for name, body in contents.items()}


def _all_tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    for graph in every_graph(model.graph):
        yield from tensors_of(graph)


def _texts(tensor: TensorProto) -> Iterator[object]:
    """Its strings; protobuf hands over those that are not UTF-8 as bytes."""
    yield tensor.name
    for entry in tensor.external_data:
        yield from (entry.key, entry.value)


def _slice(tensor: TensorProto, folder: Path, contents: dict[str, bytes]) -> memoryview:
    """The bytes that a tensor names, which are no copy yet."""
    stated = {entry.key: entry.value for entry in tensor.external_data}
    name, label = stated.get("location", ""), safe_text(tensor.name)
    if name not in contents:
        contents[name] = _read(name, label, folder, sum(map(len, contents.values())))
    offset, length = (_number(stated, key, label) for key in ("offset", "length"))
    body = contents[name]
    start = offset or 0
    end = max(start, len(body)) if length is None else start + length
    if end > len(body):
        raise FileRefusedError(
            f"tensor '{label}' needs bytes {start} to {end} of '{safe_text(name)}', which has {len(body)}; save the "
            "model again"
        )
    return memoryview(body)[start:end]


def _number(stated: dict[str, str], key: str, label: str) -> int | None:
    text = stated.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < _DIGITS):
        raise FileRefusedError(f"tensor '{label}' states the {key} '{safe_text(text)}' of its external data; no number")
    return int(text)


def _read(name: str, label: str, folder: Path, before: int) -> bytes:
    where = f"tensor '{label}' keeps its data in '{safe_text(name)}'"
    # Two models are known to have read /etc/passwd this way: neither `..`, nor an absolute path, nor a link leads out.
    if not name or "\\" in name or "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise FileRefusedError(f"{where}, which is no file of the model's own folder; save the model in one file")
    try:
        return _read_inside(folder / name, where, folder, before)
    except OSError as error:
        raise FileRefusedError(
            f"{where}, which cannot be read ({error.strerror}); save the model in one file"
        ) from error


def _read_inside(path: Path, where: str, folder: Path, before: int) -> bytes:
    if not path.exists():
        raise FileRefusedError(f"{where}, which is not there; put it beside the model")
    if not path.resolve().is_relative_to(folder.resolve()) or not path.is_file():
        raise FileRefusedError(f"{where}, which leads out of the model's folder; save the model in one file")
    if before + path.stat().st_size > LARGEST_FILE:
        raise FileRefusedError(_TOO_LARGE)
    return path.read_bytes()
