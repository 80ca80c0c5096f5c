from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdefense.data.images import DataError, ImageSet
from qdefense.data.npz import load_npz, save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = np.array([0, 1, 2, 0, 1, 2])


def write(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "set.npz", **arrays)
    return folder / "set.npz"


def load(path: Path, split: str | None = None, limit: int | None = None, seed: int = 0) -> ImageSet:
    return load_npz(path, split=split, limit=limit, seed=seed)


@pytest.mark.parametrize(("images", "labels"), [("images", "labels"), ("X", "y"), ("data", "labels")])
def test_load_npz_reads_all_rows_when_keys_are_known(tmp_path: Path, images: str, labels: str) -> None:
    loaded = load(write(tmp_path, **{images: IMAGES, labels: LABELS}))
    np.testing.assert_array_equal(loaded.images, IMAGES)
    np.testing.assert_array_equal(loaded.labels, LABELS)
    assert (loaded.class_names, loaded.source) == (("0", "1", "2"), "npz set.npz")


def test_load_npz_reads_the_split_named_when_there_are_two(tmp_path: Path) -> None:
    file = write(tmp_path, x_train=IMAGES[:4], y_train=LABELS[:4, None], x_test=IMAGES[4:], y_test=LABELS[4:, None])
    assert (load(file).source, load(file).labels.tolist()) == ("npz set.npz/test", [1, 2])
    assert load(file, "train").labels.tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("split", [None, "test"])
def test_load_npz_lists_the_splits_when_the_split_is_missing(tmp_path: Path, split: str | None) -> None:
    file = write(tmp_path, x_train=IMAGES, y_train=LABELS)
    with pytest.raises(DataError, match=r"^npz set.npz: no split 'test'; it has 'train'$"):
        load(file, split)


def test_load_npz_raises_when_a_split_is_asked_of_one_without(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS)
    with pytest.raises(DataError, match=r"no split 'train'; it has no splits, leave the split out$"):
        load(file, "train")


@pytest.mark.parametrize(
    ("keys", "held"),
    [
        (["pictures", "labels"], "'pictures', 'labels'"),
        (["X", "y", "x_test", "y_test"], "'X', 'y', 'x_test', 'y_test'"),
    ],
)
def test_load_npz_names_the_keys_when_none_or_several_fit(tmp_path: Path, keys: list[str], held: str) -> None:
    file = write(tmp_path, **dict.fromkeys(keys, LABELS))
    with pytest.raises(DataError, match=rf"expected arrays of one naming \(images\+labels, X\+y, .*; it holds {held}$"):
        load(file)


def test_load_npz_draws_the_same_rows_when_limit_and_seed_are_equal(tmp_path: Path) -> None:
    chosen = np.random.default_rng(3).permutation(6)[:4]
    loaded = load(write(tmp_path, images=IMAGES, labels=LABELS), limit=4, seed=3)
    np.testing.assert_array_equal(loaded.images, IMAGES[chosen])
    np.testing.assert_array_equal(loaded.labels, LABELS[chosen])


def test_load_npz_keeps_all_classes_when_limited(tmp_path: Path) -> None:
    assert load(write(tmp_path, images=IMAGES, labels=LABELS), limit=1).class_names == ("0", "1", "2")


def test_load_npz_moves_channels_last_when_they_come_second(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES.transpose(0, 3, 1, 2), labels=LABELS)
    np.testing.assert_array_equal(load(file).images, IMAGES)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_load_npz_rounds_when_floats_stand_on_the_grid(tmp_path: Path, dtype: type) -> None:
    every = np.resize(np.arange(256, dtype=np.uint8), IMAGES.shape)
    file = write(tmp_path, images=(every / 255).astype(dtype), labels=LABELS)
    np.testing.assert_array_equal(load(file).images, every)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES / 255 - 0.5, r"'images' runs from -0.5 to 0.5, expected uint8, or floats in \[0, 1\]; undo the normal"),
        (IMAGES.astype(np.float32), r"'images' runs from 0 to 255, expected uint8"),
        (np.full(IMAGES.shape, np.nan), r"'images' holds values that are no numbers \(NaN\); save uint8"),
        (
            np.full(IMAGES.shape, 10.3 / 255),
            r"'images' is up to 0.30 of a step of 1/255 off the uint8 grid; save uint8$",
        ),
        (IMAGES.astype(np.int32), r"'images' is int32, expected uint8, or floats in \[0, 1\]$"),
        (IMAGES[..., :2], r"'images' is \(6, 4, 5, 2\), expected \(N, H, W, 3\) or \(N, 3, H, W\) and not both$"),
        (IMAGES[:, :3], r"'images' is \(6, 3, 5, 3\), expected \(N, H, W, 3\) or \(N, 3, H, W\) and not both$"),
        (IMAGES[:5], r"'images' is \(5, 4, 5, 3\) and 'labels' \(6,\), expected N images in 4 dimensions and N labels"),
        (IMAGES[..., 0], r"'images' is \(6, 4, 5\) and 'labels' \(6,\), expected N images in 4 dimensions"),
    ],
)
def test_load_npz_raises_when_images_are_of_another_kind(tmp_path: Path, images: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path, images=images, labels=LABELS))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("shape", [(6, 0, 5, 3), (6, 3, 0, 5)])
def test_load_npz_raises_when_images_have_no_pixels(tmp_path: Path, shape: tuple[int, ...], dtype: type) -> None:
    file = write(tmp_path, images=np.zeros(shape, dtype), labels=LABELS)
    with pytest.raises(DataError, match=r"^npz set.npz: images of 0x5 have no pixels; save them again$"):
        load(file)


@pytest.mark.parametrize("labels", [np.eye(6, dtype=int), LABELS.astype(float), LABELS > 0, np.int64(1)])
def test_load_npz_raises_when_labels_are_of_another_kind(tmp_path: Path, labels: Any) -> None:
    with pytest.raises(
        DataError, match=r"'labels' is \w+ \(.*\), expected integers \(N,\) or \(N, 1\), a class number"
    ):
        load(write(tmp_path, images=IMAGES, labels=labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.full(6, -1), "labels run from -1 to -1, which are no class numbers; number the classes from 0, or give"),
        (np.full(6, 2**63 + 5, np.uint64), "largest label is 9223372036854775813, which is no class number; is it"),
    ],
)
def test_load_npz_raises_when_labels_are_no_class_numbers(tmp_path: Path, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=f"^npz set.npz: {message}"):
        load(write(tmp_path, images=IMAGES, labels=labels))


def test_load_npz_raises_when_there_are_no_rows(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected N images in 4 dimensions and N labels, at least one"):
        load(write(tmp_path, images=IMAGES[:0], labels=LABELS[:0]))


def test_load_npz_reads_class_names_when_they_are_there(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS, class_names=np.array(["a", "b", "c"]))
    assert load(file).class_names == ("a", "b", "c")


def test_load_npz_says_why_it_is_npz(tmp_path: Path) -> None:
    loaded = load(write(tmp_path, x_test=IMAGES, y_test=LABELS))
    assert (loaded.detection, loaded.notes) == ("npz: the file ends in .npz and holds x_test and y_test", ())


def test_load_npz_notes_when_class_names_are_numbers_in_the_order_of_strings(tmp_path: Path) -> None:
    names = np.array(sorted(str(number) for number in range(11)))
    (note,) = load(write(tmp_path, images=IMAGES, labels=LABELS, class_names=names)).notes
    assert "label 2 is '10'; the model's outputs may be in numeric order: then name them with --classes" in note


@pytest.mark.parametrize("names", [np.array([b"a", b"b"]), np.array([["a"]]), np.arange(3)])
def test_load_npz_raises_when_class_names_are_of_another_kind(tmp_path: Path, names: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"'class_names' is .*, expected unicode \(K,\)$"):
        load(write(tmp_path, images=IMAGES, labels=LABELS, class_names=names))


def test_load_npz_raises_when_a_class_name_is_no_utf8(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS, class_names=np.array(["a", "b", "c\udcff"]))
    with pytest.raises(DataError, match=r"^npz set.npz: the name of class 2, 'c\\udcff', is not UTF-8; rename it$"):
        load(file)


@pytest.mark.parametrize("key", ["images", "labels", "class_names"])
def test_load_npz_raises_when_an_array_holds_objects(tmp_path: Path, key: str) -> None:
    arrays = {"images": IMAGES, "labels": LABELS, key: np.array([{}], dtype=object)}
    with pytest.raises(
        DataError, match="holds Python objects, which are never loaded; save plain arrays: integers, floa"
    ):
        load(write(tmp_path, **arrays))


def test_load_npz_raises_when_the_file_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "set.npz.npy", IMAGES)
    with pytest.raises(DataError, match=r"^npz set.npz.npy: not an npz archive; write it with numpy.savez$"):
        load(tmp_path / "set.npz.npy")


def test_load_npz_raises_when_bytes_are_damaged(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS)
    content = bytearray(file.read_bytes())
    content[150:160] = bytes(10)
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"^npz set.npz: not readable as npz \(.*\); write it again with numpy.savez$"):
        load(file)


BROKEN_ARRAYS = {
    "the header does not end": ("images", b"{'descr': '|u1', 'fortran_order': False, 'shape': (6, 4, 5, 3"),
    "its type is none": ("images", b"{'descr': '(04,)u1', 'fortran_order': False, 'shape': (6, 4, 5, 3), }"),
    "a character is none": ("class_names", b"{'descr': '<U1', 'fortran_order': False, 'shape': (1,), }"),
}


@pytest.mark.parametrize(("key", "header"), BROKEN_ARRAYS.values(), ids=list(BROKEN_ARRAYS))
def test_load_npz_raises_when_an_array_is_damaged(tmp_path: Path, key: str, header: bytes) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS, class_names=np.array(["a"]))
    with zipfile.ZipFile(file) as archive:
        arrays = {name: archive.read(name) for name in archive.namelist()}
    padded = header.ljust(117) + b"\n"
    arrays[f"{key}.npy"] = b"\x93NUMPY\x01\x00" + len(padded).to_bytes(2, "little") + padded + b"\xff" * 360
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in arrays.items():
            archive.writestr(name, content)
    with pytest.raises(DataError, match=r"^npz set.npz: not readable as npz \(.*\); write it again with numpy.savez$"):
        load(file)


def test_load_npz_raises_when_a_member_claims_to_be_encrypted(tmp_path: Path) -> None:
    file = write(tmp_path, images=IMAGES, labels=LABELS)
    content = bytearray(file.read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(mark) + flags] |= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"^npz set.npz: not readable as npz \(.*encrypted.*\); write it again"):
        load(file)


def test_load_npz_raises_when_a_member_claims_more_memory_than_there_is(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    with zipfile.ZipFile(file, "w") as archive, archive.open("images.npy", "w") as member:
        np.lib.format.write_array_header_1_0(
            member, {"descr": "|u1", "fortran_order": False, "shape": (1 << 50, 32, 32, 3)}
        )
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("labels.npy", b"")
    with pytest.raises(DataError, match="not readable as npz"):
        load(file)


def test_load_npz_raises_when_a_member_is_no_array(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("images", "text")
        archive.writestr("labels", "text")
    with pytest.raises(DataError, match=r"'images' is no array; write it again with numpy.savez"):
        load(file)


@pytest.fixture
def image_set() -> ImageSet:
    return ImageSet(images=IMAGES, labels=LABELS, class_names=("grün", "b", "c"), source="made")


def test_save_npz_gives_the_same_set_back_when_loaded(tmp_path: Path, image_set: ImageSet) -> None:
    save_npz(tmp_path / "out.npz", image_set)
    assert load(tmp_path / "out.npz").digest == image_set.digest
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npz"]


def test_save_npz_gives_equal_bytes_when_sets_are_equal(tmp_path: Path, image_set: ImageSet) -> None:
    for name in ("a.npz", "b.npz"):
        save_npz(tmp_path / name, image_set)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_save_npz_keeps_the_old_file_when_writing_fails(
    tmp_path: Path, image_set: ImageSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out.npz").write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail)
    with pytest.raises(OSError, match="disk full"):
        save_npz(tmp_path / "out.npz", image_set)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.npz"]
    assert (tmp_path / "out.npz").read_text() == "old"
