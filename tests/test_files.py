from __future__ import annotations

from pathlib import Path

import pytest

from qdefense.files import write_atomically


def test_write_atomically_replaces_the_old_file_when_there_is_one(tmp_path: Path) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"old")
    write_atomically(target, b"new")
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomically_keeps_the_old_file_and_no_part_when_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "file"
    target.write_bytes(b"old")

    def write_half(self: Path, data: bytes) -> int:
        with self.open("wb") as stream:
            stream.write(data[: len(data) // 2])
        assert [entry.name for entry in tmp_path.iterdir() if entry != target] == [self.name]
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(target, b"newer")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomically_leaves_no_part_when_the_target_is_a_folder(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    with pytest.raises(IsADirectoryError, match="Is a directory"):
        write_atomically(target, b"data")
    assert list(tmp_path.iterdir()) == [target]


def test_write_atomically_raises_when_the_folder_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="No such file or directory"):
        write_atomically(tmp_path / "missing" / "file", b"data")
    assert list(tmp_path.iterdir()) == []
