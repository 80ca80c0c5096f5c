from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdefense.data.gtsrb import find_gtsrb, load_gtsrb
from qdefense.data.images import DataError, ImageSet
from qdefense.data.resizing import Resize

WriteImage = Callable[..., np.ndarray]
HEADER = "Filename;Width;Height;Roi.X1;Roi.Y1;Roi.X2;Roi.Y2;ClassId\n"
CLASSES = (0, 14, 42)
TRACKS, FRAMES = 3, 4


def line(name: str, label: object) -> str:
    return f"{name};4;4;1;1;3;3;{label}\n"


@pytest.fixture
def official(tmp_path: Path, write_image: WriteImage) -> Path:
    """The three archives unpacked in ``GTSRB``: 3 classes of 3 tracks of 4 frames, and 5 test images."""
    root = tmp_path / "GTSRB"
    for label in CLASSES:
        folder = root / "Final_Training" / "Images" / f"{label:05}"
        names = [f"{track:05}_{frame:05}.ppm" for track in range(TRACKS) for frame in range(FRAMES)]
        for number, name in enumerate(names):
            write_image(folder / name, 1000 * label + number)
        (folder / f"GT-{label:05}.csv").write_text(HEADER + "".join(line(name, label) for name in names))
    test = root / "Final_Test" / "Images"
    for number in range(5):
        write_image(test / f"{number:05}.ppm", 50 + number)
    rows = [line(f"{number:05}.ppm", (42, 7, 0, 14, 14)[number]) for number in range(5)]
    (test / "GT-final_test.test.csv").write_text(HEADER.replace(";ClassId", "") + "00000.ppm;4;4;1;1;3;3\n")
    (root / "GT-final_test.csv").write_text(HEADER + "".join(rows))
    return root


def load(
    path: Path, split: str | None = None, limit: int | None = None, seed: int = 0, resize: Resize | None = None
) -> ImageSet:
    found = find_gtsrb(path)
    assert found is not None
    return load_gtsrb(found, split=split, limit=limit, seed=seed, resize=resize)


def training_csv(root: Path, label: int = 14) -> Path:
    return root / "Final_Training" / "Images" / f"{label:05}" / f"GT-{label:05}.csv"


def test_load_gtsrb_reads_the_training_images_with_their_tracks(official: Path) -> None:
    loaded = load(official, "train")
    assert loaded.images.shape == (36, 4, 4, 3)
    assert loaded.labels.tolist() == [0] * 12 + [14] * 12 + [42] * 12
    assert loaded.groups is not None
    assert loaded.groups[[0, 3, 4, 12, 35]].tolist() == [0, 0, 1, 1_400_000, 4_200_002]
    assert loaded.class_names == tuple(str(number) for number in range(43))
    assert loaded.source == "GTSRB GTSRB/train"
    assert loaded.detection == "GTSRB: the folder holds Final_Training/Images with GTSRB's train images"
    with Image.open(official / "Final_Training" / "Images" / "00014" / "00002_00001.ppm") as image:
        np.testing.assert_array_equal(loaded.images[12 + 2 * 4 + 1], np.asarray(image))


def test_load_gtsrb_reads_the_test_images_with_the_labels_beside(official: Path) -> None:
    loaded = load(official)
    assert loaded.labels.tolist() == [42, 7, 0, 14, 14]
    assert (loaded.groups, loaded.source) == (None, "GTSRB GTSRB/test")
    with Image.open(official / "Final_Test" / "Images" / "00003.ppm") as image:
        np.testing.assert_array_equal(loaded.images[3], np.asarray(image))


@pytest.mark.parametrize(
    ("place", "split", "default"),
    [
        ("..", "train", "test"),
        (".", "train", "test"),
        ("Final_Training", "train", "train"),
        ("Final_Training/Images", "train", "train"),
        ("..", "test", "test"),
        ("Final_Test", "test", "test"),
        ("Final_Test/Images", "test", "test"),
    ],
)
def test_load_gtsrb_accepts_the_folder_at_every_depth(official: Path, place: str, split: str, default: str) -> None:
    whole = load(official, split)
    assert load(official / place, split).digest == whole.digest
    assert load(official / place).source.endswith(f"/{default}")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Final_Training/Images", "Training"),
        ("Final_Training/Images", "Train"),
        ("Final_Training/Images", "Images"),
    ],
)
def test_load_gtsrb_accepts_the_layouts_of_torchvision_and_backdoorbench(
    official: Path, before: str, after: str
) -> None:
    digest = load(official, "train").digest
    (official / before).rename(official / after)
    assert load(official, "train").digest == digest


@pytest.mark.parametrize("place", ["GTSRB/Final_Test/Images", "GTSRB/Final_Test", "GTSRB", "."])
def test_load_gtsrb_finds_the_test_labels_beside_or_above(official: Path, place: str) -> None:
    digest = load(official).digest
    (official / "GT-final_test.csv").rename(official.parent / place / "GT-final_test.csv")
    assert load(official).digest == load(official / "Final_Test" / "Images").digest == digest


def test_load_gtsrb_finds_the_test_labels_in_a_folder_of_the_name(official: Path) -> None:
    digest = load(official).digest
    inner = official.parent / "GTSRB" / "GTSRB"
    inner.mkdir()
    (official / "GT-final_test.csv").rename(inner / "GT-final_test.csv")
    assert load(official).digest == digest


def test_load_gtsrb_raises_when_the_test_labels_are_missing(official: Path) -> None:
    (official / "GT-final_test.csv").unlink()
    message = (
        r"^GTSRB GTSRB/test: no GT-final_test.csv with the labels, neither beside the images nor above them; unpack"
    )
    with pytest.raises(DataError, match=message):
        load(official)


def test_find_gtsrb_finds_nothing_in_other_folders(tmp_path: Path, write_image: WriteImage) -> None:
    assert find_gtsrb(tmp_path) is None
    write_image(tmp_path / "00001" / "00000_00000.ppm", 0)  # class folders without a CSV
    write_image(tmp_path / "00000.ppm", 0)  # images without a CSV
    assert find_gtsrb(tmp_path) is None
    (tmp_path / "GT-final_test.csv").touch()
    assert find_gtsrb(tmp_path) is not None


@pytest.mark.parametrize(("split", "held"), [("train", "test"), ("val", "test"), (None, "train")])
def test_load_gtsrb_lists_the_splits_when_the_split_is_missing(official: Path, split: str | None, held: str) -> None:
    gone = "Final_Training" if held == "test" else "Final_Test"
    (official / gone).rename(official / "elsewhere")
    wanted = split or "test"
    with pytest.raises(DataError, match=rf"^GTSRB GTSRB/{wanted}: no split '{wanted}'; it has '{held}'$"):
        load(official, split)


@pytest.mark.parametrize("seed", range(3))
def test_load_gtsrb_draws_whole_tracks_when_limited(official: Path, seed: int) -> None:
    some = load(official, "train", limit=10, seed=seed)
    assert some.groups is not None
    tracks, counts = np.unique(some.groups, return_counts=True)
    assert (len(some), sorted(counts.tolist())) == (10, [2, 4, 4])
    whole = load(official, "train")
    for track in tracks:
        expected, found = whole.images[whole.groups == track], some.images[some.groups == track]
        np.testing.assert_array_equal(found, expected[: len(found)])
    assert load(official, "train", limit=10, seed=seed).digest == some.digest
    assert load(official, "train", limit=10, seed=seed + 10).digest != some.digest


def test_load_gtsrb_draws_test_images_one_by_one_when_limited(official: Path) -> None:
    chosen = np.random.default_rng(2).permutation(5)[:3]
    assert load(official, limit=3, seed=2).digest == load(official).take(chosen).digest


def test_load_gtsrb_reads_no_image_but_the_chosen_ones(official: Path) -> None:
    some = load(official, "train", limit=4)
    kept = {f"{int(some.labels[0]):05}/{int(some.groups[0]) % 100_000:05}"}  # type: ignore[index]
    for file in (official / "Final_Training" / "Images").rglob("*.ppm"):
        if f"{file.parent.name}/{file.name[:5]}" not in kept:
            file.write_bytes(b"broken")
    assert load(official, "train", limit=4).digest == some.digest


def test_load_gtsrb_names_two_sizes_when_they_differ_and_resizes_them_when_told(
    official: Path, write_image: WriteImage
) -> None:
    images = official / "Final_Test" / "Images"
    pixels = write_image(images / "00002.ppm", 9, (15, 25))
    message = (
        r"differ in size: GT-final_test.csv row 4, image 00002.ppm is 15x25 and GT-final_test.csv row 2, image 000"
    )
    with pytest.raises(DataError, match=message):
        load(official)
    resize = Resize("bilinear", 8, 8)
    loaded = load(official, resize=resize)
    assert loaded.images.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(loaded.images[2], resize.apply(Image.fromarray(pixels)))


def test_load_gtsrb_raises_when_a_class_has_no_csv(official: Path) -> None:
    training_csv(official).unlink()
    with pytest.raises(
        DataError, match=r"^GTSRB GTSRB/train: 00014/GT-00014.csv is missing; unpack the archive again$"
    ):
        load(official, "train")


@pytest.mark.parametrize("split", ["train", "test"])
def test_load_gtsrb_names_csv_row_and_file_when_an_image_is_missing(official: Path, split: str) -> None:
    places = {
        "train": ("Final_Training/Images/00014/00000_00001.ppm", "GT-00014.csv row 3, image 00000_00001.ppm"),
        "test": ("Final_Test/Images/00003.ppm", "GT-final_test.csv row 5, image 00003.ppm"),
    }
    file, name = places[split]
    (official / file).unlink()
    with pytest.raises(DataError, match=rf"^GTSRB GTSRB/{split}: {name} is missing or no regular file; copy or unpack"):
        load(official, split)


def test_load_gtsrb_names_csv_row_and_file_when_an_image_is_broken(official: Path) -> None:
    (official / "Final_Test" / "Images" / "00003.ppm").write_bytes(b"P6\n4 4\n255\nxx")
    message = r"^GTSRB GTSRB/test: GT-final_test.csv row 5, image 00003.ppm is no readable image \(.*\); replace or rem"
    with pytest.raises(DataError, match=message):
        load(official)


def test_load_gtsrb_raises_when_a_label_is_not_its_folders(official: Path) -> None:
    file = training_csv(official)
    file.write_text(file.read_text().replace("00001_00002.ppm;4;4;1;1;3;3;14", "00001_00002.ppm;4;4;1;1;3;3;13"))
    message = (
        r"/train: GT-00014.csv row 8, image 00001_00002.ppm has ClassId 13 in the folder of class 14; unpack the arc"
    )
    with pytest.raises(DataError, match=message):
        load(official, "train")


@pytest.mark.parametrize("label", ["43", "-1", "x", "", "1.0", "9" * 5000, "²"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_load_gtsrb_raises_when_a_label_is_no_class(official: Path, split: str, label: str) -> None:
    file = training_csv(official) if split == "train" else official / "GT-final_test.csv"
    image = "00000_00000.ppm" if split == "train" else "00000.ppm"
    file.write_text(HEADER + line(image, label), encoding="utf-8")
    with pytest.raises(DataError, match=rf"{file.name} row 2 has ClassId '.{{0,60}}', expected 0 to 42$"):
        load(official, split)


@pytest.mark.parametrize("name", ["../../secret.ppm", "/etc/passwd", "0000_0000.ppm", "00000_00000.ppm.exe", "", "a"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_load_gtsrb_raises_when_a_name_has_another_form(official: Path, split: str, name: str) -> None:
    file = training_csv(official) if split == "train" else official / "GT-final_test.csv"
    file.write_text(HEADER + line(name, 14))
    form = "TRACK_FRAME.ppm such as 00000_00029.ppm" if split == "train" else "NUMBER.ppm such as 00000.ppm"
    with pytest.raises(DataError, match=rf"{file.name} row 2 names the image '{name}', expected {form}$"):
        load(official, split)


def test_load_gtsrb_raises_when_a_row_is_cut(official: Path) -> None:
    (official / "GT-final_test.csv").write_text(HEADER + "00000.ppm;4")
    with pytest.raises(DataError, match=r"GT-final_test.csv row 2 has ClassId '', expected 0 to 42$"):
        load(official)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "GT-final_test.csv has no columns Filename and ClassId; unpack the archive again$"),
        (HEADER.replace(";", ",").encode(), "GT-final_test.csv has no columns Filename and ClassId"),
        (HEADER.replace(";ClassId", "").encode(), "GT-final_test.csv has no columns Filename and ClassId"),
        (b"\xff\xfe\x00", "GT-final_test.csv is not UTF-8 text; unpack the archive again$"),
        (HEADER.encode() + b"x" * 200_000, r"GT-final_test.csv is no readable CSV \(field larger than field limit"),
        (b"x" * ((1 << 24) + 1), "GT-final_test.csv has more than 16,777,216 bytes; unpack the archive again$"),
        (HEADER.encode(), "the CSV files name no images; unpack the archives again$"),
    ],
)
def test_load_gtsrb_raises_when_a_csv_is_malformed(official: Path, content: bytes, message: str) -> None:
    (official / "GT-final_test.csv").write_bytes(content)
    with pytest.raises(DataError, match=rf"^GTSRB GTSRB/test: {message}"):
        load(official)


@pytest.mark.parametrize("linked", ["folder", "image"])
def test_load_gtsrb_refuses_a_link_that_leads_out(official: Path, tmp_path: Path, linked: str) -> None:
    place = official / "Final_Training" / "Images" / "00014"
    place = place if linked == "folder" else place / "00000_00000.ppm"
    place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(
        DataError, match=rf"/train: '{place.name}' is a link that leads out of the folder; put the images"
    ):
        load(official, "train")
