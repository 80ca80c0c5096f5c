from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdefense.data.folders import ImageFolders, find_folders, load_folders
from qdefense.data.images import DataError, ImageSet
from qdefense.data.resizing import Resize

WriteImage = Callable[..., np.ndarray]


def load(
    path: Path, split: str | None = None, limit: int | None = None, seed: int = 0, resize: Resize | None = None
) -> ImageSet:
    found = find_folders(path)
    assert found is not None
    return load_folders(found, split=split, limit=limit, seed=seed, resize=resize)


def write_classes(folder: Path, write_image: WriteImage, classes: str = "ab", count: int = 3) -> list[np.ndarray]:
    return [write_image(folder / name / f"{row}.png", ord(name) + row) for name in classes for row in range(count)]


def test_load_folders_reads_classes_sorted_when_there_are_no_splits(tmp_path: Path, write_image: WriteImage) -> None:
    pixels = {name: write_image(tmp_path / name, seed) for seed, name in enumerate(("b/2.png", "b/10.bmp", "a/x.ppm"))}
    loaded = load(tmp_path)
    assert loaded.labels.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(loaded.images, [pixels["a/x.ppm"], pixels["b/10.bmp"], pixels["b/2.png"]])
    assert (loaded.class_names, loaded.labelled, loaded.notes) == (("a", "b"), True, ())
    assert loaded.source == f"images {tmp_path.name}"
    assert loaded.detection == "image folder: the folder holds 2 folders, one for each class"


def test_load_folders_reads_every_suffix_in_any_case(tmp_path: Path, write_image: WriteImage) -> None:
    for seed, name in enumerate(("a.png", "b.JPG", "c.jpeg", "d.bmp", "e.PPM", "f.webp")):
        write_image(tmp_path / "class" / name, seed)
    assert len(load(tmp_path)) == 6


@pytest.mark.parametrize("split", ["train", "val", "test"])
def test_load_folders_reads_the_split_named(tmp_path: Path, write_image: WriteImage, split: str) -> None:
    pixels = {name: write_classes(tmp_path / name, write_image, count=2) for name in ("train", "val", "test")}
    write_image(tmp_path / split / "b" / "more.png", 99)
    loaded = load(tmp_path, split)
    np.testing.assert_array_equal(loaded.images[:4], pixels[split])
    assert loaded.labels.tolist() == [0, 0, 1, 1, 1]
    assert loaded.source == f"images {tmp_path.name}/{split}"
    assert loaded.detection == f"image folder: {split}/ holds 2 folders, one for each class"


def test_load_folders_reads_test_when_no_split_is_named(tmp_path: Path, write_image: WriteImage) -> None:
    for split in ("train", "test"):
        write_classes(tmp_path / split, write_image)
    assert load(tmp_path).source.endswith("/test")


@pytest.mark.parametrize("split", [None, "dev\x1b"])
def test_load_folders_lists_the_splits_when_the_split_is_missing(
    tmp_path: Path, write_image: WriteImage, split: str | None
) -> None:
    write_classes(tmp_path / "train", write_image)
    write_classes(tmp_path / "val", write_image)
    wanted = repr(split or "test").replace("\\", "\\\\")
    with pytest.raises(DataError, match=rf": no split {wanted}; it has 'train', 'val'$"):
        load(tmp_path, split)


def test_load_folders_raises_when_a_split_is_asked_of_a_folder_without(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path, write_image)
    with pytest.raises(DataError, match=r"^images \S+: no split 'train'; it has no splits, leave the split out$"):
        load(tmp_path, "train")


def test_load_folders_names_the_classes_of_all_splits_when_one_lacks_some(
    tmp_path: Path, write_image: WriteImage
) -> None:
    write_classes(tmp_path / "train", write_image, "abc")
    write_classes(tmp_path / "test", write_image, "ac")
    (tmp_path / "test" / "d").mkdir()
    write_classes(tmp_path / "val", write_image, "d")
    loaded = load(tmp_path)
    assert loaded.class_names == ("a", "b", "c", "d")
    assert loaded.labels.tolist() == [0, 0, 0, 2, 2, 2]
    assert loaded.notes == ("2 of the 4 classes of all splits have no image in this one",)


def test_find_folders_takes_train_for_a_class_when_it_holds_images_alone(
    tmp_path: Path, write_image: WriteImage
) -> None:
    for name in ("car", "train"):
        write_image(tmp_path / name / "x.png", 0)
    assert find_folders(tmp_path) == ImageFolders(root=tmp_path, splits=())
    assert load(tmp_path).class_names == ("car", "train")


def test_load_folders_reads_an_unlabelled_split_beside_a_labelled_one(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path / "train", write_image)
    write_image(tmp_path / "test" / "x.png", 0)
    loaded = load(tmp_path, "test")
    assert (loaded.labelled, loaded.labels.tolist(), loaded.class_names) == (False, [-1], ())
    assert loaded.detection == "unlabelled images: test/ holds 1 images and no folder of images"
    assert load(tmp_path, "train").labelled


def test_load_folders_gives_a_set_without_labels_when_images_lie_alone(tmp_path: Path, write_image: WriteImage) -> None:
    pixels = [write_image(tmp_path / f"{name}.png", ord(name)) for name in "bca"]
    (tmp_path / "readme.txt").touch()
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.images, [pixels[2], pixels[0], pixels[1]])
    assert (loaded.labelled, loaded.labels.tolist(), loaded.class_names) == (False, [-1, -1, -1], ())
    assert loaded.detection == "unlabelled images: the folder holds 3 images and no folder of images"
    assert loaded.notes == ("left out: 1 files or folders that are no png, jpg, jpeg, bmp, ppm, webp of a class",)


@pytest.mark.parametrize("content", [[], ["notes.txt"], ["sub/notes.txt"], [".hidden.png"], [".git/x.png"]])
def test_find_folders_finds_nothing_when_there_are_no_images(tmp_path: Path, content: list[str]) -> None:
    for name in content:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_folders(tmp_path) is None


def test_load_folders_ignores_hidden_files_and_counts_others(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path, write_image)
    for name in (".DS_Store", "a/.x.png", ".git/y.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert load(tmp_path).notes == ()
    (tmp_path / "loose.png").touch()
    (tmp_path / "a" / "labels.csv").touch()
    (tmp_path / "b" / "deeper").mkdir()
    loaded = load(tmp_path)
    assert len(loaded) == 6
    assert loaded.notes == ("left out: 3 files or folders that are no png, jpg, jpeg, bmp, ppm, webp of a class",)


def test_load_folders_raises_when_a_class_holds_no_images(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path, write_image)
    (tmp_path / "docs").mkdir()
    with pytest.raises(DataError, match=r": folder 'docs' holds no images; is it a class\? remove it, or fill it$"):
        load(tmp_path)


def test_load_folders_raises_when_a_split_has_no_image_at_all(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path / "train", write_image)
    write_classes(tmp_path / "test", write_image)
    found = find_folders(tmp_path)
    assert found is not None
    for file in (tmp_path / "test").rglob("*.png"):
        file.unlink()
    with pytest.raises(DataError, match=r"/test: holds no images$"):
        load_folders(found, split="test", limit=None, seed=0)


@pytest.mark.parametrize("split", [None, "train"])
def test_load_folders_notes_when_numbers_stand_in_the_order_of_strings(
    tmp_path: Path, write_image: WriteImage, split: str | None
) -> None:
    for number in range(11):
        write_image(tmp_path / (split or "") / str(number) / "x.png", number)
    loaded = load(tmp_path, split)
    assert loaded.class_names[:4] == ("0", "1", "10", "2")
    assert len(loaded.notes) == 1
    assert "label 2 is '10'; the model's outputs may be in numeric order" in loaded.notes[0]


def test_load_folders_draws_the_same_rows_and_decodes_no_others_when_limited(
    tmp_path: Path, write_image: WriteImage
) -> None:
    pixels = np.stack(write_classes(tmp_path, write_image))
    chosen = np.random.default_rng(4).permutation(6)[:2]
    for row in set(range(6)) - set(chosen.tolist()):
        (tmp_path / "ab"[row // 3] / f"{row % 3}.png").write_bytes(b"broken")
    loaded = load(tmp_path, limit=2, seed=4)
    np.testing.assert_array_equal(loaded.images, pixels[chosen])
    assert loaded.labels.tolist() == (chosen // 3).tolist()


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_load_folders_refuses_a_split_that_is_a_link_leading_out(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path / "data" / "train", write_image)
    write_classes(tmp_path / "outside", write_image)
    (tmp_path / "data" / "test").symlink_to(tmp_path / "outside")
    with pytest.raises(
        DataError, match=r"^images data/test: 'test' is a link that leads out of the folder; put the im"
    ):
        load(tmp_path / "data", "test")
    load(tmp_path / "data", "train")


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
@pytest.mark.parametrize("linked", ["a/link.png", "c"])
def test_load_folders_refuses_a_link_that_leads_out(tmp_path: Path, write_image: WriteImage, linked: str) -> None:
    write_classes(tmp_path / "data", write_image)
    write_image(tmp_path / "outside" / "x.png", 0)
    target = tmp_path / "outside" / ("x.png" if linked.endswith(".png") else "")
    (tmp_path / "data" / linked).symlink_to(target)
    name = Path(linked).name
    with pytest.raises(DataError, match=rf"^images data: '{name}' is a link that leads out of the folder; put the im"):
        load(tmp_path / "data")


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_load_folders_follows_links_that_stay_inside(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path / "data", write_image)
    (tmp_path / "data" / "a" / "again.png").symlink_to("../b/0.png")
    (tmp_path / "link").symlink_to("data")
    loaded = load(tmp_path / "link")
    assert loaded.source == "images data"
    np.testing.assert_array_equal(loaded.images[3], loaded.images[4])


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX only")
@pytest.mark.parametrize("kind", ["pipe", "dangling"])
def test_load_folders_raises_when_an_image_is_no_file(tmp_path: Path, write_image: WriteImage, kind: str) -> None:
    write_classes(tmp_path, write_image)
    path = tmp_path / "a" / "pipe.png"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("nowhere.png")
    with pytest.raises(
        DataError, match=r": 'a/pipe.png' is missing or no regular file; copy or unpack the data again$"
    ):
        load(tmp_path)


def test_load_folders_names_the_file_when_an_image_is_broken(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path, write_image)
    whole = (tmp_path / "b" / "1.png").read_bytes()
    (tmp_path / "b" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"^images \S+: 'b/1.png' is no readable image \(.*\); replace or remove it$"):
        load(tmp_path)


def test_load_folders_names_the_file_when_it_may_not_be_read(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, write_image)

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    others = "5 more of the 6 files cannot be read either"
    with pytest.raises(
        DataError, match=rf"'a/0.png' cannot be opened \(Permission denied\); check its permissions; {others}$"
    ):
        load(tmp_path)


def test_load_folders_says_that_sixteen_bits_are_too_many(tmp_path: Path, write_image: WriteImage) -> None:
    write_classes(tmp_path, write_image)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "b" / "1.png")
    message = r": 'b/1.png' is a 16-bit image, which is not supported; convert it to 8 bits a channel$"
    with pytest.raises(DataError, match=message):
        load(tmp_path)


def png_of_16_bits(channels: int, colour_type: int) -> bytes:
    """One 4 x 4 image; Pillow writes none with colours."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    row = b"\0" + struct.pack(f">{4 * channels}H", *[0x1280] * (4 * channels))
    header = struct.pack(">IIBBBBB", 4, 4, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row * 4)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("name", "body"),
    [
        pytest.param("1.png", png_of_16_bits(3, 2), id="RGB"),
        pytest.param("1.png", png_of_16_bits(4, 6), id="RGBA"),
        pytest.param("1.png", png_of_16_bits(2, 4), id="gray with alpha"),
        pytest.param("1.ppm", b"P6 4 4 65535\n" + b"\x12\x80" * 48, id="PPM"),
        pytest.param("1.ppm", b"P3 4 4 65535\n" + b"4736 " * 48, id="plain PPM"),
    ],
)
def test_load_folders_refuses_colours_of_16_bits_that_pillow_would_cut(
    tmp_path: Path, write_image: WriteImage, name: str, body: bytes
) -> None:
    write_classes(tmp_path, write_image)
    (tmp_path / "b" / "1.png").unlink()
    (tmp_path / "b" / name).write_bytes(body)
    with pytest.raises(DataError, match=f"'b/{name}' is a 16-bit image, which is not supported"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("body", "value"),
    [
        pytest.param(b"P6 4 4 100\n" + b"\x32" * 48, 128, id="PPM"),
        pytest.param(b"P3 4 4 255\n" + b"50 " * 48, 50, id="plain PPM"),
        pytest.param(b"P1 4 4\n" + b"1 " * 16, 0, id="plain bits"),
    ],
)
def test_load_folders_reads_portable_maps_of_8_bits(
    tmp_path: Path, write_image: WriteImage, body: bytes, value: int
) -> None:
    write_classes(tmp_path, write_image)
    for path in tmp_path.rglob("*.png"):
        path.with_suffix(".ppm").write_bytes(body)
        path.unlink()
    assert np.all(load(tmp_path).images == value)


def test_load_folders_counts_the_others_when_several_images_are_broken(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, write_image)
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(tmp_path / "a" / "1.png")
    for name in ("a/2.png", "b/0.png"):
        (tmp_path / name).write_bytes(b"broken")
    opened: list[Path] = []
    plain = Path.open

    def counted(path: Path, mode: str) -> object:
        opened.append(path)
        return plain(path, mode)

    monkeypatch.setattr(Path, "open", counted)
    message = r"'a/1.png' is a 16-bit image, .*; 2 more of the 6 files cannot be read either$"
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    assert len(opened) == len(set(opened)) == 6


def test_load_folders_shortens_and_escapes_hostile_names(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "\x1b[2J\u202e" / ("x" * 200 + ".png"), 0)
    (tmp_path / "\x1b[2J\u202e" / ("y" * 200 + ".png")).write_bytes(b"broken")
    with pytest.raises(DataError) as caught:
        load(tmp_path)
    assert "\x1b" not in str(caught.value)
    assert r"'\x1b[2J\u202e/y" in str(caught.value)
    assert str(caught.value).endswith("yyy' is no readable image (no PNG, JPEG, WEBP, BMP, PPM); replace or remove it")
    assert len(str(caught.value)) < 220


@pytest.mark.skipif(os.name != "posix", reason="POSIX only")
def test_load_folders_raises_when_a_class_name_is_not_utf8(tmp_path: Path, write_image: WriteImage) -> None:
    name = os.fsdecode(b"gr\xfcn")
    write_image(tmp_path / name / "x.png", 0)
    with pytest.raises(DataError, match=r": the name of class 0, 'gr\\udcfcn', is not UTF-8; rename it$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("modes", "note"),
    [
        (("L", "RGB", "RGB"), "converted to RGB: 1 of 3 images (1 L)"),
        (("L", "P", "L"), "converted to RGB: 3 of 3 images (2 L, 1 P)"),
        (("RGBA", "RGB", "1"), "converted to RGB: 2 of 3 images (1 1, 1 RGBA)"),
    ],
)
def test_load_folders_counts_what_it_converts_to_rgb(
    tmp_path: Path, write_image: WriteImage, modes: tuple[str, ...], note: str
) -> None:
    pixels = [write_image(tmp_path / "a" / f"{row}.png", row, mode=mode) for row, mode in enumerate(modes)]
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.images, pixels)
    assert loaded.notes == (note,)


def test_load_folders_turns_images_as_their_exif_says(tmp_path: Path, write_image: WriteImage) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the top is at the right: turn by 270 degrees counter-clockwise
    pixels = write_image(tmp_path / "a" / "0.png", 0, (4, 6), exif=exif)
    upright = write_image(tmp_path / "a" / "1.png", 1, (6, 4))
    loaded = load(tmp_path)
    np.testing.assert_array_equal(loaded.images, [np.rot90(pixels, -1), upright])
    assert loaded.notes == ("turned upright as their EXIF orientation says: 1 of 2 images",)


@pytest.mark.parametrize("limit_of_pillow", [100, 255])
def test_load_folders_raises_when_an_image_is_a_bomb(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch, limit_of_pillow: int
) -> None:
    write_image(tmp_path / "a" / "0.png", 0, (16, 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pillow)
    with pytest.raises(DataError, match=r"'a/0.png' is no readable image \(Image size \(256 pixels\) exceeds limit"):
        load(tmp_path)


def test_load_folders_names_two_sizes_and_the_remedy_when_they_differ(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "a" / "0.png", 0)
    write_image(tmp_path / "a" / "1.png", 1, (5, 3))
    message = (
        r": images differ in size: 'a/1.png' is 5x3 and 'a/0.png' is 4x4; resize them to one size: --resize biline"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path)
    with pytest.raises(DataError, match=message):
        load(tmp_path, resize=Resize("none", 8, 8))


@pytest.mark.parametrize("rule", ["nearest", "bilinear", "bicubic", "crop"])
def test_load_folders_resizes_each_image_from_its_own_size(tmp_path: Path, write_image: WriteImage, rule: str) -> None:
    pixels = [write_image(tmp_path / "a" / f"{row}.png", row, (9 + row, 12 - row)) for row in range(3)]
    resize = Resize(rule, 8, 7)  # type: ignore[arg-type]
    loaded = load(tmp_path, resize=resize)
    np.testing.assert_array_equal(loaded.images, [resize.apply(Image.fromarray(image)) for image in pixels])


def test_load_folders_names_the_file_when_an_image_cannot_be_cropped(tmp_path: Path, write_image: WriteImage) -> None:
    write_image(tmp_path / "a" / "0.png", 0, (1, 9000))
    with pytest.raises(DataError, match=r"^images \S+: 'a/0.png': 1x9000 is too narrow to crop; add --resize bilinear"):
        load(tmp_path, resize=Resize("crop", 500, 500))


def test_load_folders_says_so_when_images_do_not_fit_into_memory(
    tmp_path: Path, write_image: WriteImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_classes(tmp_path, write_image)

    def fail(*arguments: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("qdefense.data.decoding.np.empty", fail)
    with pytest.raises(
        DataError, match=r": 6 images of 4x4 do not fit into memory; read fewer with --limit, or smaller"
    ):
        load(tmp_path)
