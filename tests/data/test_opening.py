from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qdefense.data.images import DataError
from qdefense.data.opening import open_data, training_split
from qdefense.data.resizing import Resize

WriteImage = Callable[..., np.ndarray]
MakeCifar = Callable[[Path, str], Path]


def test_open_data_reads_parquet_when_given_a_folder_or_a_file(parquet_folder: Path) -> None:
    assert open_data(str(parquet_folder)).source == f"parquet {parquet_folder.name}/test"
    assert open_data(str(parquet_folder / "test.parquet")).source == "parquet test.parquet"


def test_open_data_reads_npz_when_given_one(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", x_test=np.zeros((2, 4, 4, 3), np.uint8), y_test=[0, 1])
    assert open_data(str(tmp_path / "set.npz"), limit=1).source == "npz set.npz/test"


def test_open_data_reads_the_folder_when_signs_is_written_as_a_path(
    parquet_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet_folder.rename(parquet_folder.with_name("signs"))
    monkeypatch.chdir(parquet_folder.parent)
    assert open_data("./signs").source == "parquet signs/test"
    assert open_data("signs", limit=1).source == "signs test"


@pytest.fixture
def make_folder(
    parquet_folder: Path, tmp_path: Path, make_cifar: MakeCifar, write_image: WriteImage
) -> Callable[[str], Path]:
    """``make_folder(format)``: a small data set of that format."""

    def make(kind: str) -> Path:
        if kind == "parquet":
            return parquet_folder
        if kind == "CIFAR-10 python":
            return make_cifar(tmp_path / "batches", "python-2")
        write_image(tmp_path / "pictures" / "00000" / "00000_00000.ppm", 0)
        if kind == "GTSRB":
            csv = "Filename;ClassId\n00000_00000.ppm;0\n"
            (tmp_path / "pictures" / "00000" / "GT-00000.csv").write_text(csv)
        return tmp_path / "pictures"

    return make


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8")
@pytest.mark.parametrize(
    ("kind", "split"), [("parquet", "/test"), ("CIFAR-10 python", "/test"), ("GTSRB", "/train"), ("images", "")]
)
def test_open_data_gives_a_name_that_is_utf8_when_that_of_the_folder_is_not(
    make_folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, kind: str, split: str
) -> None:
    folder = make_folder(kind)
    folder = folder.rename(folder.with_name(os.fsdecode(b"gr\xfcn")))
    folder.with_name("link").symlink_to(folder)
    monkeypatch.chdir(folder)
    for spec in (".", "../link"):
        assert open_data(spec).source == f"{kind} gr\\udcfcn{split}"


KNOWN = (
    "'signs' (built in); a .parquet, .npz or CIFAR-10 .tar.gz file; a folder with {split}-*.parquet (there or in "
    "data/), CIFAR-10's batches, GTSRB's Final_Training or Final_Test, folders of images (one a class, or train, val "
    "and test with those), or images"
)


def test_open_data_raises_when_nothing_is_there() -> None:
    with pytest.raises(DataError) as caught:
        open_data("nowhere")
    assert str(caught.value) == f"'nowhere': no such file or folder; data is {KNOWN}"


def test_open_data_says_what_exists_when_a_folder_has_no_known_format(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    found = "the folder holds '0.txt', '1.txt', '2.txt', '3.txt', '4.txt' and 2 more"
    with pytest.raises(DataError) as caught:
        open_data(str(tmp_path))
    assert str(caught.value) == f"{str(tmp_path)!r}: unknown data format; looked for {KNOWN}; {found}"


def test_open_data_says_so_when_a_folder_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"the folder holds nothing$"):
        open_data(str(tmp_path))


def test_open_data_names_the_ending_when_a_file_has_no_known_format(tmp_path: Path) -> None:
    (tmp_path / "data.csv").touch()
    with pytest.raises(DataError, match=r"unknown data format; looked for .*; the file ends in '\.csv'$"):
        open_data(str(tmp_path / "data.csv"))


def test_opening_never_imports_torch() -> None:
    code = "import sys, qdefense.data.opening; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


@pytest.fixture
def parquet_folder(tmp_path: Path) -> Path:
    png = bytes.fromhex(
        "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
        "0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
    )
    pq.write_table(pa.table({"image": [png], "label": [0]}), tmp_path / "test.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["x.parquet", "x.npz"])
def test_open_data_takes_a_folder_for_a_folder_when_its_name_has_an_ending(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=r"unknown data format; .*; the folder holds nothing$"):
        open_data(str(tmp_path / name))


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz", "A.TAR.GZ"])
def test_open_data_reads_cifar_from_an_archive(
    tmp_path: Path, make_cifar: MakeCifar, make_tar: Callable[..., Path], name: str
) -> None:
    archive = make_tar(tmp_path / name, make_cifar(tmp_path / "cifar", "python-2"))
    loaded = open_data(str(archive), limit=3)
    assert (len(loaded), loaded.source) == (3, f"CIFAR-10 python {name}/test")
    assert training_split(str(archive)) == "train"


@pytest.mark.parametrize("folder", ["cifar-10-batches-py", "."])
def test_open_data_reads_cifar_from_a_folder(tmp_path: Path, make_cifar: MakeCifar, folder: str) -> None:
    make_cifar(tmp_path / "cifar" / folder, "python-5") if folder != "." else make_cifar(tmp_path / "cifar", "binary")
    assert len(open_data(str(tmp_path / "cifar"), split=training_split(str(tmp_path / "cifar")))) == 20


def write_gtsrb(folder: Path, write_image: WriteImage) -> None:
    write_image(folder / "Final_Training" / "Images" / "00003" / "00000_00000.ppm", 0)
    row = "Filename;ClassId\n00000_00000.ppm;3\n"
    (folder / "Final_Training" / "Images" / "00003" / "GT-00003.csv").write_text(row)


def test_open_data_reads_gtsrb(tmp_path: Path, write_image: WriteImage) -> None:
    write_gtsrb(tmp_path / "GTSRB", write_image)
    loaded = open_data(str(tmp_path), split=training_split(str(tmp_path)))
    assert (loaded.source, loaded.labels.tolist()) == (f"GTSRB {tmp_path.name}/train", [3])
    assert loaded.detection == "GTSRB: the folder holds GTSRB/Final_Training/Images with GTSRB's train images"


@pytest.mark.parametrize(
    ("files", "split", "detection", "training"),
    [
        (["train/a/x.png", "test/a/y.png"], "test", "image folder: test/ holds 1 folders, one for each class", "train"),
        (["a/x.png", "b/y.png"], None, "image folder: the folder holds 2 folders, one for each class", None),
        (["x.png"], None, "unlabelled images: the folder holds 1 images and no folder of images", None),
    ],
)
def test_open_data_reads_folders_of_images(
    tmp_path: Path, write_image: WriteImage, files: list[str], split: str | None, detection: str, training: str | None
) -> None:
    for seed, name in enumerate(files):
        write_image(tmp_path / name, seed)
    assert open_data(str(tmp_path), split=split).detection == detection
    assert training_split(str(tmp_path)) == training


def test_open_data_takes_the_first_of_its_order_when_a_folder_could_be_all(
    tmp_path: Path, write_image: WriteImage, make_cifar: MakeCifar
) -> None:
    png = write_image(tmp_path / "folder" / "loose.png", 0)
    assert png.shape == (4, 4, 3)
    found = [open_data(str(tmp_path / "folder")).detection]
    write_image(tmp_path / "folder" / "class" / "x.png", 1)
    found.append(open_data(str(tmp_path / "folder")).detection)
    write_image(tmp_path / "folder" / "test" / "class" / "x.png", 1)
    found.append(open_data(str(tmp_path / "folder")).detection)
    write_gtsrb(tmp_path / "folder", write_image)
    found.append(open_data(str(tmp_path / "folder"), split="train").detection)
    for version in ("binary", "python-5"):
        for file in make_cifar(tmp_path / version, version).iterdir():
            file.rename(tmp_path / "folder" / file.name)
        found.append(open_data(str(tmp_path / "folder")).detection)
    encoded = (tmp_path / "folder" / "loose.png").read_bytes()
    pq.write_table(pa.table({"image": [encoded], "label": [0]}), tmp_path / "folder" / "test.parquet")
    found.append(open_data(str(tmp_path / "folder")).detection)
    kinds = [detection.partition(":")[0] for detection in found]
    assert kinds == [
        *("unlabelled images", "image folder", "image folder", "GTSRB", "CIFAR-10 binary", "CIFAR-10 python", "parquet")
    ]
    assert ("the folder" in found[1], "test/" in found[2]) == (True, True)


def test_open_data_resizes_every_format_to_one_size(
    tmp_path: Path, write_image: WriteImage, make_cifar: MakeCifar
) -> None:
    np.savez(tmp_path / "set.npz", images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
    write_image(tmp_path / "flat" / "x.png", 0, (9, 5))
    encoded = (tmp_path / "flat" / "x.png").read_bytes()
    pq.write_table(pa.table({"image": [encoded], "label": [0]}), tmp_path / "set.parquet")
    write_gtsrb(tmp_path / "Train", write_image)
    make_cifar(tmp_path / "cifar", "binary")
    for data in ("signs", *(str(tmp_path / name) for name in ("set.npz", "set.parquet", "flat", "Train", "cifar"))):
        split = "train" if data.endswith("Train") else None
        loaded = open_data(data, split=split, limit=1, resize=Resize("bilinear", 6, 7))
        assert loaded.images.shape == (1, 6, 7, 3), data


def test_open_data_changes_nothing_when_the_size_is_right() -> None:
    assert open_data("signs", limit=5, resize=Resize("crop", 32, 32)).digest == open_data("signs", limit=5).digest


def test_open_data_tells_what_is_wrong_with_an_npz_where_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "set.npz"
    np.savez(file, images=np.zeros((2, 4, 4, 3), np.uint8), labels=[0, 1])
    content = bytearray(file.read_bytes())
    content[content.index(b"PK\x01\x02")] = 0
    file.write_bytes(content)
    assert training_split(str(file)) is None
    with pytest.raises(DataError, match=r"^npz set.npz: not readable as npz"):
        open_data(str(file))


@pytest.mark.parametrize(("name", "split"), [("nowhere", "train"), ("data.csv", None), ("empty", "train")])
def test_training_split_leaves_it_to_open_data_to_complain(tmp_path: Path, name: str, split: str | None) -> None:
    (tmp_path / "data.csv").touch()
    (tmp_path / "empty").mkdir()
    assert training_split(str(tmp_path / name)) == split
