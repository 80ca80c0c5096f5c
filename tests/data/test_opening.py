from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from qdefense.data.images import DataError
from qdefense.data.opening import open_data


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


def test_open_data_raises_when_nothing_is_there() -> None:
    with pytest.raises(
        DataError, match=r"^'nowhere': no such file or folder; data is 'signs' \(built in\), a folder with"
    ):
        open_data("nowhere")


def test_open_data_says_what_exists_when_a_folder_has_no_known_format(tmp_path: Path) -> None:
    for number in range(7):
        (tmp_path / f"{number}.txt").touch()
    found = "the folder holds '0.txt', '1.txt', '2.txt', '3.txt', '4.txt' and 2 more"
    with pytest.raises(DataError, match=f"unknown data format; looked for 'signs' .*; {re.escape(found)}$"):
        open_data(str(tmp_path))


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
