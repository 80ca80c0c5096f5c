from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def _short(text: bytes) -> bytes:
    return b"U" + bytes([len(text)]) + text


def _array_as_python_2(array: np.ndarray) -> bytes:
    shape = b"".join(b"J" + struct.pack("<i", side) for side in array.shape)
    kind = b"cnumpy\ndtype\n" + _short(array.dtype.str[1:].encode()) + b"K\x00K\x01\x87R"
    order = b"(K\x03" + _short(array.dtype.str[:1].encode()) + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    raw = array.tobytes()
    return (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + _short(b"b") + b"\x87R(K\x01("
        + shape + b"t" + kind + order + b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )  # fmt: skip


def _value_as_python_2(value: Any) -> bytes:
    if isinstance(value, np.ndarray):
        return _array_as_python_2(value)
    if isinstance(value, dict):
        return b"}(" + b"".join(_short(key.encode()) + _value_as_python_2(held) for key, held in value.items()) + b"u"
    if isinstance(value, list):
        return b"](" + b"".join(map(_value_as_python_2, value)) + b"e"
    return b"J" + struct.pack("<i", value) if isinstance(value, int) else _short(value.encode())


def as_python_2(value: Any) -> bytes:
    """What cPickle of Python 2 wrote with protocol 2, CIFAR-10's own format; `test_pickled` checks it."""
    return b"\x80\x02" + _value_as_python_2(value) + b"."


@pytest.fixture(scope="session")
def python_2() -> Callable[[Any], bytes]:
    return as_python_2


def cifar_images(number: int, count: int = 4) -> np.ndarray:
    """``(count, 32, 32, 3) uint8`` of batch ``number``; 0 is the test batch."""
    return np.random.default_rng(number).integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)


def cifar_labels(number: int, count: int = 4) -> list[int]:
    return [(number + 3 * row) % 10 for row in range(count)]


def _planes(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)).reshape(len(images), -1)


@pytest.fixture(scope="session")
def cifar_batch() -> Callable[[int], tuple[np.ndarray, list[int]]]:
    """``cifar_batch(number)``: images and labels; 0 is the test batch."""
    return lambda number: (cifar_images(number), cifar_labels(number))


def write_cifar(folder: Path, version: str) -> Path:
    """A CIFAR-10 of four images a batch; versions: python-2, python-5 (pickled by the Python of today), binary."""
    folder.mkdir(parents=True)
    for number in range(6):
        name = f"data_batch_{number}" if number else "test_batch"
        planes, labels = _planes(cifar_images(number)), cifar_labels(number)
        if version == "binary":
            records = np.hstack([np.array(labels, np.uint8)[:, None], planes])
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {"batch_label": name, "labels": labels, "data": planes, "filenames": ["a.png"] * len(labels)}
            (folder / name).write_bytes(as_python_2(content) if version == "python-2" else pickle.dumps(content, 5))
    if version == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(CIFAR_NAMES) + "\n\n")
    else:
        meta = {"num_cases_per_batch": 4, "label_names": CIFAR_NAMES, "num_vis": 3072}
        (folder / "batches.meta").write_bytes(as_python_2(meta) if version == "python-2" else pickle.dumps(meta, 5))
    return folder


@pytest.fixture(scope="session")
def make_cifar() -> Callable[[Path, str], Path]:
    return write_cifar


@pytest.fixture(scope="session")
def make_tar() -> Callable[..., Path]:
    """``make_tar(path, folder)``: the folder as CIFAR-10's archives hold it, members in an order of its own."""

    def make(path: Path, folder: Path, *extra: tuple[tarfile.TarInfo, bytes]) -> Path:
        with tarfile.open(path, "w:gz", compresslevel=1) as archive:
            for file in sorted(folder.iterdir(), reverse=True):
                archive.add(file, f"{folder.name}/{file.name}")
            for member, content in extra:
                archive.addfile(member, io.BytesIO(content))
        return path

    return make


@pytest.fixture(scope="session")
def write_image() -> Callable[..., np.ndarray]:
    """``write_image(path, seed, size=(4, 4), mode="RGB", **options)``; gives back the RGB pixels of a lossless one."""

    def write(path: Path, seed: int, size: tuple[int, int] = (4, 4), mode: str = "RGB", **options: Any) -> np.ndarray:
        pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels).convert(mode)
        image.save(path, **options)
        return np.asarray(image.convert("RGB"))

    return write
