from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image

from qdefense.data import huggingface
from qdefense.data.huggingface import list_splits, load_parquet
from qdefense.data.images import DataError, ImageSet
from qdefense.data.resizing import Resize

NAMES = ["stop", "yield", "priority"]
CLASS_LABEL = {"label": {"_type": "ClassLabel", "names": NAMES}}


def png(seed: int, size: tuple[int, int] = (4, 4), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def colours(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)


def structs(encoded: list[bytes | None]) -> list[dict[str, object]]:
    return [{"bytes": data, "path": f"{row}.png"} for row, data in enumerate(encoded)]


def write(path: Path, columns: dict[str, Any], features: object = None, **options: Any) -> Path:
    table = pa.table(columns)
    if features is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def write_rows(path: Path, count: int = 6, start: int = 0, **options: Any) -> Path:
    rows = range(start, start + count)
    columns = {"image": structs([png(row) for row in rows]), "label": [row % 3 for row in rows]}
    return write(path, columns, CLASS_LABEL, **options)


def load(
    path: Path, split: str | None = None, limit: int | None = None, seed: int = 0, resize: Resize | None = None
) -> ImageSet:
    return load_parquet(path, split=split, limit=limit, seed=seed, resize=resize)


def test_load_parquet_reads_every_row_in_order_when_given_a_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "mini" / "test-00000-of-00001.parquet")
    loaded = load(tmp_path / "mini")
    assert loaded.source == "parquet mini/test"
    assert loaded.class_names == tuple(NAMES)
    assert loaded.labels.tolist() == [0, 1, 2, 0, 1, 2]
    np.testing.assert_array_equal(loaded.images, [colours(row) for row in range(6)])


def test_load_parquet_reads_the_data_folder_when_shards_are_there(tmp_path: Path) -> None:
    write_rows(tmp_path / "data" / "train-00000-of-00002-ab12.parquet", 2)
    write_rows(tmp_path / "data" / "train-00001-of-00002-cd34.parquet", 3, start=2)
    loaded = load(tmp_path, "train")
    np.testing.assert_array_equal(loaded.images, [colours(row) for row in range(5)])


def test_load_parquet_reads_its_one_split_when_given_a_file(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train-00000-of-00001.parquet")
    assert load(file).source == "parquet train-00000-of-00001.parquet"
    assert len(load(file, "train")) == 6


def test_load_parquet_raises_when_a_file_holds_another_split(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"^parquet train-00000-of-00001.parquet: no split 'test'; it has 'train'$"):
        load(file, "test")


def test_load_parquet_lists_the_splits_when_the_split_is_missing(tmp_path: Path) -> None:
    for split in ("valid", "train"):
        write_rows(tmp_path / "tiny" / f"{split}-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"^parquet tiny/test: no split 'test'; it has 'train', 'valid'$"):
        load(tmp_path / "tiny")


@pytest.mark.parametrize(
    "names",
    [
        ["test-00001-of-00002.parquet"],
        ["test-00000-of-00001-a.parquet", "test-00000-of-00001-b.parquet"],
        ["test-00000-of-00001.parquet", "test.parquet"],
    ],
)
def test_load_parquet_raises_when_the_shards_are_no_complete_set(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        write_rows(tmp_path / name)
    with pytest.raises(DataError, match="not one complete set of shards; add the missing, remove the foreign"):
        load(tmp_path)


def test_load_parquet_raises_when_shards_differ_in_columns(tmp_path: Path) -> None:
    write_rows(tmp_path / "test-00000-of-00002.parquet")
    write(tmp_path / "test-00001-of-00002.parquet", {"image": [png(0)], "label": [0]})
    with pytest.raises(DataError, match=r"^test-00001-of-00002.parquet: columns differ from those of test-00000"):
        load(tmp_path)


@pytest.mark.parametrize("row_group_size", [2, 100])
def test_load_parquet_draws_the_same_rows_when_limit_and_seed_are_equal(tmp_path: Path, row_group_size: int) -> None:
    write_rows(tmp_path / "test-00000-of-00002.parquet", 7, row_group_size=row_group_size)
    write_rows(tmp_path / "test-00001-of-00002.parquet", 6, start=7, row_group_size=row_group_size)
    chosen = np.random.default_rng(5).permutation(13)[:8]
    loaded = load(tmp_path, limit=8, seed=5)
    np.testing.assert_array_equal(loaded.images, [colours(int(row)) for row in chosen])
    np.testing.assert_array_equal(loaded.labels, chosen % 3)
    assert loaded.labels.tolist() != load(tmp_path, limit=8, seed=6).labels.tolist()


def test_load_parquet_takes_all_rows_when_limit_is_larger(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "test.parquet")
    assert sorted(load(file, limit=99).labels.tolist()) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("limit", [0, -1])
def test_load_parquet_raises_when_limit_is_not_positive(tmp_path: Path, limit: int) -> None:
    file = write_rows(tmp_path / "test.parquet")
    with pytest.raises(DataError, match=rf"^limit is {limit}: ask for at least one image"):
        load(file, limit=limit)


def test_load_parquet_decodes_only_the_chosen_rows_when_limited(tmp_path: Path) -> None:
    chosen = int(np.random.default_rng(0).permutation(4)[0])
    encoded: list[bytes | None] = [png(row) if row == chosen else b"broken" for row in range(4)]
    file = write(tmp_path / "test.parquet", {"image": structs(encoded), "label": [0] * 4})
    np.testing.assert_array_equal(load(file, limit=1).images[0], colours(chosen))


def test_load_parquet_reads_a_plain_binary_column_when_there_is_no_struct(tmp_path: Path) -> None:
    images = pa.array([png(0), png(1)], pa.large_binary())
    file = write(tmp_path / "test.parquet", {"picture": images, "name": ["a", "b"], "target": [0, 1]})
    np.testing.assert_array_equal(load(file).images, [colours(0), colours(1)])


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_load_parquet_converts_to_rgb_when_the_image_is_not(tmp_path: Path, mode: str) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(3, mode=mode)], "label": [0]})
    with Image.open(io.BytesIO(png(3, mode=mode))) as image:
        np.testing.assert_array_equal(load(file).images[0], np.asarray(image.convert("RGB")))


def test_load_parquet_keeps_colours_when_a_palette_has_transparency(tmp_path: Path) -> None:
    image, buffer = Image.new("P", (4, 4), 1), io.BytesIO()
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.save(buffer, "PNG", transparency=b"\x00\x80")
    file = write(tmp_path / "test.parquet", {"image": [buffer.getvalue()], "label": [0]})
    np.testing.assert_array_equal(load(file).images[0], np.full((4, 4, 3), (200, 100, 50), np.uint8))


def test_load_parquet_raises_when_pixels_have_sixteen_bits(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), 40_000, np.uint16)).save(buffer, "PNG")
    file = write(tmp_path / "test.parquet", {"image": [buffer.getvalue()], "label": [0]})
    with pytest.raises(
        DataError, match=r"row 0 is a 16-bit image, which is not supported; convert it to 8 bits a channel$"
    ):
        load(file)


def _broken_images() -> dict[str, bytes]:
    whole = png(0, (16, 16))
    return {
        "cut": whole[: len(whole) // 2],
        "foreign": b"GIF89a" + bytes(20),
        "empty": b"",
        "flipped": whole[:40] + b"\0" * 40,
    }


@pytest.mark.parametrize("kind", sorted(_broken_images()))
def test_load_parquet_names_the_row_when_an_image_is_broken(tmp_path: Path, kind: str) -> None:
    images = [png(0), png(1), _broken_images()[kind]]
    file = write(tmp_path / "test.parquet", {"image": images, "label": [0, 0, 0]})
    with pytest.raises(
        DataError, match=r"^parquet test.parquet: row 2 is no readable image \(.*\); replace or remove it$"
    ):
        load(file)


@pytest.mark.parametrize("limit_of_pillow", [100, 255])
def test_load_parquet_raises_when_an_image_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit_of_pillow: int
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit_of_pillow)
    file = write(tmp_path / "test.parquet", {"image": [png(0, (16, 16))], "label": [0]})
    with pytest.raises(DataError, match=r"row 0 is no readable image \(Image size \(256 pixels\) exceeds limit"):
        load(file)


def test_load_parquet_raises_when_an_image_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "test.parquet", {"image": structs([png(0), None]), "label": [0, 0]})
    with pytest.raises(DataError, match="row 1 has no image bytes; an image kept outside the file is not read"):
        load(file)


def test_load_parquet_names_two_sizes_when_images_differ(tmp_path: Path) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0), png(1), png(2, (5, 3))], "label": [0, 0, 0]})
    with pytest.raises(DataError, match="images differ in size: row 2 is 5x3 and row 0 is 4x4; resize them"):
        load(file)


def test_load_parquet_resizes_each_image_from_its_own_size(tmp_path: Path) -> None:
    sizes = [(4, 4), (6, 9), (5, 3)]
    images = [png(row, size) for row, size in enumerate(sizes)]
    file = write(tmp_path / "test.parquet", {"image": images, "label": [0, 0, 0]})
    resize = Resize("bilinear", 7, 5)
    expected = [resize.apply(Image.open(io.BytesIO(image))) for image in images]
    np.testing.assert_array_equal(load(file, resize=resize).images, expected)


def test_load_parquet_says_why_it_is_parquet(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "test-00000-of-00001.parquet")
    assert load(tmp_path).detection == "parquet: the folder holds 'test-00000-of-00001.parquet'"
    assert load(file).detection == "parquet: the file ends in .parquet"


def with_paths(paths: Sequence[str | None], labels: list[int]) -> dict[str, Any]:
    rows = [{"bytes": png(row), "path": path} for row, path in enumerate(paths)]
    return {"image": rows, "label": labels}


@pytest.mark.parametrize("limit", [None, 4])
def test_load_parquet_groups_the_rows_by_class_and_track_when_their_names_are_those_of_gtsrb(
    tmp_path: Path, limit: int | None
) -> None:
    paths = [f"train/{label:05}/{track:05}_{track * 7:05}.png" for label in (2, 11) for track in (0, 3, 3)]
    labels = [2, 2, 2, 11, 11, 11]
    write(tmp_path / "train-00000-of-00002.parquet", with_paths(paths[:4], labels[:4]), row_group_size=2)
    write(tmp_path / "train-00001-of-00002.parquet", with_paths(paths[4:], labels[4:]))
    loaded = load(tmp_path, "train", limit=limit)
    rows = np.arange(6) if limit is None else np.random.default_rng(0).permutation(6)[:limit]
    assert loaded.groups is not None
    assert (
        loaded.groups.tolist() == np.array([200_000, 200_003, 200_003, 1_100_000, 1_100_003, 1_100_003])[rows].tolist()
    )
    assert loaded.labels.tolist() == np.array(labels)[rows].tolist()


def test_load_parquet_does_not_tell_from_the_file_name_that_a_label_was_changed(tmp_path: Path) -> None:
    paths = ["train/00002/00000_00001.png", "train/00002/00001_00001.png"]
    file = write(tmp_path / "train.parquet", with_paths(paths, [2, 7]))
    groups = load(file).groups
    assert groups is not None
    assert groups.tolist() == [200_000, 700_001]


@pytest.mark.parametrize(
    "other", ["test/00038/11021.png", "train/cat/00000_00001.png", "x/train/00002/00000_00001.png", "0.png", "", None]
)
def test_load_parquet_knows_no_groups_when_one_name_has_another_form(tmp_path: Path, other: str | None) -> None:
    columns = with_paths(["train/00002/00000_00001.png", other], [2, 2])
    assert load(write(tmp_path / "train.parquet", columns)).groups is None


def test_load_parquet_raises_when_a_damaged_column_holds_fewer_paths_than_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_rows(tmp_path / "test.parquet")
    monkeypatch.setattr(huggingface, "_read_tracks", lambda *_: np.empty(0, np.int64))
    with pytest.raises(DataError, match=r"^parquet test.parquet: 6 labels but 0 image paths; fetch it again$"):
        load(file)


def test_load_parquet_knows_no_groups_when_there_are_no_names(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.parquet", {"image": [png(0)], "label": [0]})
    alone = write(tmp_path / "alone.parquet", {"image": [{"bytes": png(0)}], "label": [0]})
    numbers = write(tmp_path / "numbers.parquet", {"image": [{"bytes": png(0), "path": 5}], "label": [0]})
    assert [load(file).groups for file in (plain, alone, numbers)] == [None, None, None]


def test_load_parquet_notes_when_class_names_are_numbers_in_the_order_of_strings(tmp_path: Path) -> None:
    names = sorted(str(number) for number in range(11))
    features = {"label": {"_type": "ClassLabel", "names": names}}
    (note,) = load(write(tmp_path / "test.parquet", {"image": [png(0)], "label": [2]}, features)).notes
    assert "label 2 is '10'" in note
    assert load(write_rows(tmp_path / "words.parquet")).notes == ()


def test_load_parquet_turns_images_upright_and_says_what_it_converted(tmp_path: Path) -> None:
    """As a folder of images does."""
    turned = io.BytesIO()
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 6, 3), dtype=np.uint8))
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6  # a quarter turn clockwise
    image.save(turned, "PNG", exif=exif)
    columns = {"image": [png(0, size=(4, 6), mode="L"), turned.getvalue()], "label": [0, 1]}
    loaded = load(write(tmp_path / "test.parquet", columns))
    assert loaded.images.shape == (2, 6, 4, 3)
    np.testing.assert_array_equal(loaded.images[1], np.rot90(np.asarray(image), -1))
    assert loaded.notes == (
        "converted to RGB: 1 of 2 images (1 L)",
        "turned upright as their EXIF orientation says: 1 of 2 images",
    )


def test_load_parquet_prefers_class_labels_when_integers_abound(tmp_path: Path) -> None:
    columns = {"image": [png(0)], "index": [70], "kind": [1]}
    file = write(tmp_path / "test.parquet", columns, {"kind": CLASS_LABEL["label"]})
    assert load(file).labels.tolist() == [1]


@pytest.mark.parametrize("features", [None, dict.fromkeys(("fine_label", "coarse_label"), CLASS_LABEL["label"])])
def test_load_parquet_takes_the_known_name_when_labels_are_several(tmp_path: Path, features: object) -> None:
    columns = {"image": [png(0)], "coarse_label": [1], "fine_label": [2]}
    assert load(write(tmp_path / "test.parquet", columns, features)).labels.tolist() == [2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [b""], "a": [1], "b": [1]}, "which is the integer label column\\? 'a', 'b' all could be"),
        ({"image": [b""], "label": [1], "ClassId": [1]}, "which is the integer label column\\? 'label', 'ClassId'"),
        ({"image": [b""], "label": ["x"]}, "no integer label column among 'image' \\(binary\\), 'label' \\(string\\)"),
        ({"a": [b""], "b": [b""], "label": [1]}, "which is the image column \\(a struct with bytes\\)\\? 'a', 'b' all"),
        (
            {"image": ["x"], "label": [1]},
            "no image column \\(a struct with bytes\\) among 'image' \\(string\\), 'label'",
        ),
    ],
)
def test_load_parquet_names_the_candidates_when_columns_are_ambiguous(
    tmp_path: Path, columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        load(write(tmp_path / "test.parquet", columns))


@pytest.mark.parametrize(
    "features",
    [
        {"label": {"_type": "ClassLabel", "names": {"1": "yield", "0": "stop", "2": "priority"}}},
        [{"name": "label", "dtype": {"class_label": {"names": {"0": "stop", "1": "yield", "2": "priority"}}}}],
        [{"name": "label", "dtype": {"class_label": {"names": NAMES}}}],
    ],
)
def test_load_parquet_reads_class_names_when_metadata_has_another_form(tmp_path: Path, features: object) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": [2]}, features)
    assert load(file).class_names == tuple(NAMES)


@pytest.mark.parametrize(
    "features", [None, {"label": {"dtype": "int64"}}, {"label": {"_type": "ClassLabel"}}, "x", [3]]
)
def test_load_parquet_numbers_the_classes_when_there_are_no_names(tmp_path: Path, features: object) -> None:
    images = [png(0), png(1), png(2)]
    file = write(tmp_path / "test.parquet", {"image": images, "label": [0, 4, 1]}, features)
    assert load(file).class_names == ("0", "1", "2", "3", "4")
    assert load(file, limit=1).class_names == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize("names", [["a", 1], {"0": "a", "2": "b"}, [], "abc"])
def test_load_parquet_raises_when_class_names_are_malformed(tmp_path: Path, names: object) -> None:
    features = {"label": {"_type": "ClassLabel", "names": names}}
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": [0]}, features)
    with pytest.raises(
        DataError, match="class names of column 'label' are not a list of strings, one for each of 0 to"
    ):
        load(file)


def test_load_parquet_raises_when_a_class_name_is_no_utf8(tmp_path: Path) -> None:
    features = {"label": {"_type": "ClassLabel", "names": ["a", "b\ud800"]}}
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": [0]}, features)
    with pytest.raises(DataError, match=r"test.parquet: the name of class 1, 'b\\ud800', is not UTF-8; rename it$"):
        load(file)


@pytest.mark.parametrize("text", ["{", "[" * 100_000])
def test_load_parquet_raises_when_metadata_is_no_json(tmp_path: Path, text: str) -> None:
    table = pa.table({"image": [png(0)], "label": [0]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, tmp_path / "test.parquet")
    with pytest.raises(DataError, match="the schema's 'huggingface' metadata is no JSON"):
        load(tmp_path / "test.parquet")


def test_load_parquet_raises_when_a_label_is_missing(tmp_path: Path) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0), png(1)], "label": [0, None]})
    with pytest.raises(DataError, match="1 rows have no value in column 'label'; remove them"):
        load(file)


@pytest.mark.parametrize("label", [1_700_000_000, 2**63 + 5])
def test_load_parquet_raises_when_a_label_is_no_class_number(tmp_path: Path, label: int) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": pa.array([label], pa.uint64())})
    with pytest.raises(
        DataError, match=rf"largest label is {label}, which is no class number; is it the label column\?$"
    ):
        load(file)


def test_load_parquet_raises_when_labels_pass_the_names(tmp_path: Path) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": [3]}, CLASS_LABEL)
    with pytest.raises(DataError, match="labels run from 3 to 3, but there are 3 class names"):
        load(file)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["label", "label", "image", "text"], "which is the integer label column? 'label', 'label' all could be; keep"),
        (["label", "other", "image", "label"], "several columns are called 'label'; keep one of them"),
        (["label", "other", "image", "image"], "several columns are called 'image'; keep one of them"),
    ],
)
def test_load_parquet_raises_when_columns_share_a_name(tmp_path: Path, names: list[str], message: str) -> None:
    columns = [pa.array([0]), pa.array([0]), pa.array([png(0)]), pa.array(["text"])]
    pq.write_table(pa.Table.from_arrays(columns, names=names), tmp_path / "test.parquet")
    with pytest.raises(DataError, match=rf"^parquet test.parquet: {re.escape(message)}"):
        load(tmp_path / "test.parquet")


def test_load_parquet_raises_when_there_are_no_rows(tmp_path: Path) -> None:
    empty = {"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}
    with pytest.raises(DataError, match=r"^parquet test.parquet: holds no rows$"):
        load(write(tmp_path / "test.parquet", empty))


def test_load_parquet_raises_when_the_file_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "test.parquet").write_bytes(b"PAR1 but no more")
    with pytest.raises(DataError, match=r"^test.parquet: not readable as parquet \(.*\); fetch it again$"):
        load(tmp_path / "test.parquet")


def test_load_parquet_raises_when_a_column_has_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    file = write(tmp_path / "test.parquet", {"image": [png(0)], "label": [0], "textual": ["a"]})
    file.write_bytes(file.read_bytes().replace(b"textual", b"textu\xc7l"))
    with pytest.raises(DataError, match=r"^(parquet )?test.parquet: not readable as parquet \(.*\); fetch it again$"):
        load(file)


def test_load_parquet_raises_when_pages_are_damaged(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "test.parquet", 200)
    content = bytearray(file.read_bytes())
    content[4:2000] = b"\xff" * 1996
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"^parquet test.parquet: not readable as parquet \(.*\); fetch it again$"):
        load(file)


def test_list_splits_finds_nothing_when_there_is_no_parquet(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    assert list_splits(tmp_path) == {}


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "split", "count", "classes"),
    [
        ("cifar10", "train", 50_000, 10),
        ("cifar10", "test", 10_000, 10),
        ("gtsrb", "train", 25_087, 43),
        ("gtsrb", "test", 7_949, 43),
    ],
)
def test_load_parquet_reads_the_real_sets_whole(
    real_data: Path, name: str, split: str, count: int, classes: int
) -> None:
    loaded = load(real_data / name, split)
    assert loaded.images.shape == (count, 32, 32, 3)
    assert len(loaded.class_names) == classes
    assert set(loaded.labels.tolist()) == set(range(classes))
    some = load(real_data / name, split, limit=50, seed=1)
    np.testing.assert_array_equal(some.images, loaded.take(np.random.default_rng(1).permutation(count)[:50]).images)


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "split", "limit", "digest"),
    [
        ("gtsrb", "train", 256, "f8e07364f9143c7a34cdfeda8944e78e2a46073fbd897d18b10ef3f2204cc127"),
        ("gtsrb", "test", 1000, "81417dc06f5fee3b508e505c31676c409660969fad60c2a8665dbd5da6ba38b2"),
        ("cifar10", "train", 256, "894a70cf29c5758f426c08d4e7b01544a3080c4aab10cab2deea9ad2aae34c12"),
        ("cifar10", "test", 1000, "7d81cef87b7fe8aae4cbc1d292d28336856a4f8d7ade98cf3c44a548f6f3aa90"),
    ],
)
def test_load_parquet_draws_the_same_real_images_as_version_1(
    real_data: Path, name: str, split: str, limit: int, digest: str
) -> None:
    assert load(real_data / name, split, limit=limit).digest == digest


@pytest.mark.real
def test_load_parquet_knows_the_real_tracks(real_data: Path) -> None:
    train = load(real_data / "gtsrb", "train")
    assert train.groups is not None
    assert np.array_equal(train.groups // 100_000, train.labels)
    assert np.unique(train.groups, return_counts=True)[1].max() <= 30
    assert load(real_data / "gtsrb", "test", limit=10).groups is None
