from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdefense.data import cifar
from qdefense.data.cifar import find_cifar, load_cifar
from qdefense.data.images import DataError, ImageSet

MakeCifar = Callable[[Path, str], Path]
MakeTar = Callable[..., Path]
Batch = Callable[[int], tuple[np.ndarray, list[int]]]
VERSIONS = ("python-2", "python-5", "binary")
META = {"python-2": "batches.meta", "python-5": "batches.meta", "binary": "batches.meta.txt"}


def load(path: Path, split: str | None = None, limit: int | None = None, seed: int = 0) -> ImageSet:
    return load_cifar(path, split=split, limit=limit, seed=seed)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("version", VERSIONS)
def test_load_cifar_reads_both_splits_of_every_version(
    tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar, cifar_batch: Batch, version: str, packed: bool
) -> None:
    path = make_cifar(tmp_path / "cifar", version)
    if packed:
        path = make_tar(tmp_path / "cifar.tar.gz", path)
    name, kind = ("CIFAR-10 binary" if version == "binary" else "CIFAR-10 python"), ("archive" if packed else "folder")
    test, train = load(path), load(path, "train")
    np.testing.assert_array_equal(test.images, cifar_batch(0)[0])
    assert test.labels.tolist() == cifar_batch(0)[1]
    np.testing.assert_array_equal(train.images, np.concatenate([cifar_batch(number)[0] for number in range(1, 6)]))
    assert train.labels.tolist() == [label for number in range(1, 6) for label in cifar_batch(number)[1]]
    assert (test.source, train.source) == (f"{name} {path.name}/test", f"{name} {path.name}/train")
    batch = "test_batch.bin" if version == "binary" else "test_batch"
    assert test.detection == f"{name}: the {kind} holds {META[version]} and {batch}"
    assert (len(test.class_names), test.class_names[0], test.class_names[9]) == (10, "airplane", "truck")


@pytest.mark.parametrize("version", VERSIONS)
def test_load_cifar_draws_rows_of_all_batches_when_limited(tmp_path: Path, make_cifar: MakeCifar, version: str) -> None:
    path = make_cifar(tmp_path / "cifar", version)
    everything = load(path, "train")
    chosen = np.random.default_rng(3).permutation(20)[:9]
    some = load(path, "train", limit=9, seed=3)
    assert some.digest == everything.take(chosen).digest
    assert len({int(row) // 4 for row in chosen}) > 2


@pytest.mark.parametrize(
    ("folder", "version"), [("cifar-10-batches-py", "python-2"), ("cifar-10-batches-bin", "binary")]
)
def test_find_cifar_looks_into_the_folder_of_the_official_archives(
    tmp_path: Path, make_cifar: MakeCifar, folder: str, version: str
) -> None:
    inner = make_cifar(tmp_path / folder, version)
    assert find_cifar(tmp_path) == find_cifar(inner) == inner


def test_find_cifar_finds_nothing_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "data_batch.txt").touch()
    assert find_cifar(tmp_path) is None


def test_load_cifar_prefers_python_when_a_folder_holds_both(tmp_path: Path, make_cifar: MakeCifar) -> None:
    both = make_cifar(tmp_path / "both", "python-5")
    for file in make_cifar(tmp_path / "binary", "binary").iterdir():
        file.rename(both / file.name)
    assert load(both).source == "CIFAR-10 python both/test"


@pytest.mark.parametrize("split", ["val", "train"])
def test_load_cifar_lists_the_splits_when_the_split_is_missing(
    tmp_path: Path, make_cifar: MakeCifar, split: str
) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    for number in range(1, 6):
        (path / f"data_batch_{number}.bin").unlink()
    with pytest.raises(DataError, match=rf"^CIFAR-10 binary cifar/{split}: no split '{split}'; it has 'test'$"):
        load(path, split)


def test_load_cifar_names_the_files_when_some_are_missing(tmp_path: Path, make_cifar: MakeCifar) -> None:
    path = make_cifar(tmp_path / "cifar", "python-5")
    for name in ("data_batch_2", "data_batch_5", "batches.meta"):
        (path / name).unlink()
    message = r"^CIFAR-10 python cifar/train: data_batch_2, data_batch_5, batches.meta missing; fetch the official"
    with pytest.raises(DataError, match=message):
        load(path, "train")


@pytest.mark.parametrize("cut", [1, 3072])
def test_load_cifar_raises_when_a_binary_batch_is_cut(tmp_path: Path, make_cifar: MakeCifar, cut: int) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    whole = (path / "test_batch.bin").read_bytes()
    (path / "test_batch.bin").write_bytes(whole[:-cut])
    with pytest.raises(
        DataError, match=rf"cifar/test: test_batch.bin: {len(whole) - cut} bytes are no whole number of"
    ):
        load(path)


def test_load_cifar_raises_when_a_binary_batch_is_empty(tmp_path: Path, make_cifar: MakeCifar) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    (path / "test_batch.bin").write_bytes(b"")
    with pytest.raises(DataError, match=r"test_batch.bin: 0 bytes are no whole number of records of 3073"):
        load(path)


def test_load_cifar_raises_when_a_label_has_no_name(tmp_path: Path, make_cifar: MakeCifar) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    (path / "batches.meta.txt").write_text("cat\ndog\n")
    with pytest.raises(DataError, match=r"cifar/test: labels run from \d to \d, but there are 2 class names"):
        load(path)


def test_load_cifar_raises_when_class_names_are_not_utf8(tmp_path: Path, make_cifar: MakeCifar) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    (path / "batches.meta.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"batches.meta.txt: the class names are not UTF-8; fetch the official archive"):
        load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            {"data": np.zeros((2, 3071), np.uint8), "labels": [0, 1]},
            r"test_batch: data is uint8 \(2, 3071\), expected uint8 \(N, 3072\); fetch",
        ),
        ({"data": np.zeros((0, 3072), np.uint8), "labels": []}, r"data is uint8 \(0, 3072\), expected"),
        ({"data": np.zeros((2, 3072), np.uint16), "labels": [0, 1]}, r"data is uint16 \(2, 3072\), expected"),
        ({"data": np.zeros(3072, np.uint8), "labels": [0]}, r"data is uint8 \(3072,\), expected"),
        ({"data": np.zeros((2, 3072), np.uint8), "labels": [0]}, "test_batch: 2 images but 1 labels; fetch"),
    ],
)
def test_load_cifar_raises_when_a_python_batch_has_another_shape(
    tmp_path: Path, make_cifar: MakeCifar, python_2: Callable[[Any], bytes], content: dict[str, Any], message: str
) -> None:
    path = make_cifar(tmp_path / "cifar", "python-2")
    (path / "test_batch").write_bytes(python_2(content))
    with pytest.raises(DataError, match=message):
        load(path)


def test_load_cifar_runs_no_pickle(tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar) -> None:
    path = make_cifar(tmp_path / "cifar", "python-2")
    (path / "batches.meta").write_bytes(f"cposix\nsystem\n(Vtouch {tmp_path}/seen\ntR.".encode())
    for place in (path, make_tar(tmp_path / "cifar.tar.gz", path)):
        message = rf"{place.name}/test: batches.meta: the pickle calls 'posix.system', which no CIFAR-10 file needs"
        with pytest.raises(DataError, match=message):
            load(place)
    assert not (tmp_path / "seen").exists()


def test_load_cifar_raises_when_a_file_is_too_large(
    tmp_path: Path, make_cifar: MakeCifar, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    monkeypatch.setattr(cifar, "MAX_FILE_BYTES", 12_000)
    with pytest.raises(DataError, match=r"^cifar: test_batch.bin has 12,292 bytes, more than any file of CIFAR-10;"):
        load(path)


def test_load_cifar_raises_when_a_file_is_a_folder(tmp_path: Path, make_cifar: MakeCifar) -> None:
    path = make_cifar(tmp_path / "cifar", "binary")
    (path / "test_batch.bin").unlink()
    (path / "test_batch.bin").mkdir()
    with pytest.raises(DataError, match=r"^cifar: test_batch.bin is no regular file; fetch"):
        load(path)


# --- archives ---------------------------------------------------------------------------------------------------------


def member(name: str, kind: bytes = tarfile.REGTYPE, **facts: Any) -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type = kind
    for fact, value in facts.items():
        setattr(made, fact, value)
    return made


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (member("/etc/passwd"), r"member '/etc/passwd' leads out of the archive"),
        (member("cifar/../../x"), r"member 'cifar/../../x' leads out of the archive"),
        (member("link", tarfile.SYMTYPE, linkname="test_batch"), r"member 'link' is no regular file or folder but a"),
        (member("link", tarfile.LNKTYPE, linkname="test_batch"), r"member 'link' is no regular file or folder but a"),
        (member("tty", tarfile.CHRTYPE), r"member 'tty' is no regular file or folder but a link or a device; fetch"),
        (member("disk", tarfile.BLKTYPE), r"member 'disk' is no regular file or folder"),
        (member("pipe", tarfile.FIFOTYPE), r"member 'pipe' is no regular file or folder"),
        (member("\x1b[2J" * 40, tarfile.FIFOTYPE), r"member '(\\x1b\[2J){15}' is no regular file"),
        (member("cifar/test_batch"), r"two members are called 'cifar/test_batch'; fetch"),
        (member("more/test_batch"), r"CIFAR-10 batches in 2 folders, '\w+' and others; keep one$"),
    ],
)
def test_load_cifar_names_the_member_when_an_archive_could_do_harm(
    tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar, extra: tarfile.TarInfo, message: str
) -> None:
    archive = make_tar(tmp_path / "bad.tar.gz", make_cifar(tmp_path / "cifar", "python-5"), (extra, b""))
    with pytest.raises(DataError, match=rf"^bad.tar.gz: {message}"):
        load(archive)


def test_load_cifar_skips_other_members_and_folders(tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar) -> None:
    folder = make_cifar(tmp_path / "cifar", "python-5")
    readme = member("cifar/readme.html", size=5)
    archive = make_tar(tmp_path / "a.tgz", folder, (member("cifar", tarfile.DIRTYPE), b""), (readme, b"hello"))
    assert load(archive).digest == load(folder).digest


def test_load_cifar_reads_an_archive_without_a_folder(tmp_path: Path, make_cifar: MakeCifar) -> None:
    folder = make_cifar(tmp_path / "cifar", "binary")
    with tarfile.open(tmp_path / "flat.tar.gz", "w:gz") as archive:
        for file in folder.iterdir():
            archive.add(file, f"./{file.name}")
    assert load(tmp_path / "flat.tar.gz").digest == load(folder).digest


def gzipped(path: Path, *parts: bytes) -> Path:
    with gzip.open(path, "wb", compresslevel=1) as stream:
        for part in parts:
            stream.write(part)
    return path


def header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    return member(name, kind, size=size).tobuf(tarfile.GNU_FORMAT)


def test_load_cifar_raises_when_a_member_claims_to_be_large(tmp_path: Path) -> None:
    archive = gzipped(tmp_path / "bomb.tar.gz", header("cifar/test_batch", 1 << 40), bytes(1024))
    with pytest.raises(
        DataError, match=r"^bomb.tar.gz: member 'cifar/test_batch' has 1,099,511,627,776 bytes, more th"
    ):
        load(archive)


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_load_cifar_raises_when_a_header_would_fill_the_memory(tmp_path: Path, kind: bytes) -> None:
    archive = gzipped(tmp_path / "bomb.tar.gz", header("long", 1 << 35, kind), bytes(1024))
    with pytest.raises(
        DataError, match=r"^bomb.tar.gz: a header claims 34359738368 bytes, more than a batch has; fetch"
    ):
        load(archive)


def test_load_cifar_raises_when_an_archive_unpacks_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "MAX_ARCHIVE_BYTES", 100_000)
    parts = [header(f"{number}", 40_960) + bytes(40_960) for number in range(4)]
    archive = gzipped(tmp_path / "bomb.tar.gz", *parts, bytes(1024))
    with pytest.raises(DataError, match=r"^bomb.tar.gz: unpacks to more than 100,000 bytes, CIFAR-10 to 186 MB; fetch"):
        load(archive)


def test_load_cifar_raises_when_there_are_too_many_members(tmp_path: Path) -> None:
    archive = gzipped(tmp_path / "many.tar.gz", *(header(f"{number}", 0) for number in range(1002)), bytes(1024))
    with pytest.raises(DataError, match=r"^many.tar.gz: more than 1000 members, CIFAR-10 has nine; fetch"):
        load(archive)


def test_load_cifar_says_what_was_looked_for_when_an_archive_is_another(tmp_path: Path) -> None:
    members = [header(f"cifar-100-python/{name}", 0) for name in ("meta", "test", "train")]
    archive = gzipped(tmp_path / "cifar-100-python.tar.gz", *members, bytes(1024))
    message = (
        r"^cifar-100-python.tar.gz: no CIFAR-10; looked for test_batch, data_batch_1 and the like, with or without "
        r".bin; it holds 'cifar-100-python/meta', 'cifar-100-python/test', 'cifar-100-python/train'$"
    )
    with pytest.raises(DataError, match=message):
        load(archive)


def test_load_cifar_says_so_when_an_archive_is_empty(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^a.tar.gz: no CIFAR-10; .* it holds nothing$"):
        load(gzipped(tmp_path / "a.tar.gz", bytes(10_240)))


def broken_archives(whole: bytes) -> dict[str, bytes]:
    stored = gzip.compress(gzip.decompress(whole), compresslevel=0) if whole else b""
    second = stored.find(b"ustar", stored.find(b"ustar") + 1)
    return {
        "empty": b"",
        "no gzip": b"PK\x03\x04" + bytes(100),
        "cut": whole[: len(whole) // 2],
        "no tar": gzip.compress(b"x" * 2000),
        "flipped": whole[:2000] + bytes(400) + whole[2400:],
        # a header that tar takes for the end of the archive: only gzip's checksum tells
        "flipped header": stored[:second] + b"\xff" + stored[second + 1 :],
        "bad number": gzip.compress(header("a", 0).replace(b"0000644", b"zzzzzzz") + bytes(1024)),
    }


@pytest.mark.parametrize("kind", sorted(broken_archives(b"")))
def test_load_cifar_raises_when_an_archive_is_damaged(
    tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar, kind: str
) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", make_cifar(tmp_path / "cifar", "python-5"))
    archive.write_bytes(broken_archives(archive.read_bytes())[kind])
    with pytest.raises(DataError, match=r"^a.tar.gz: not readable as .tar.gz \(.*\); fetch the official archive again"):
        load(archive)


def test_load_cifar_writes_nothing_to_disk(
    tmp_path: Path, make_cifar: MakeCifar, make_tar: MakeTar, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = make_tar(tmp_path / "a.tar.gz", make_cifar(tmp_path / "cifar", "binary"))
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert len(load(archive, "train")) == 20
    assert sorted(tmp_path.rglob("*")) == before


def test_bounded_stream_refuses_to_read_to_the_end(tmp_path: Path) -> None:
    with cifar._BoundedGzip(gzipped(tmp_path / "a.gz", b"abc")) as stream:
        assert stream.read(2) == b"ab"
        assert stream.seek(0, io.SEEK_SET) == 0
        for size in (-1, None):
            with pytest.raises(DataError, match=r"^a.gz: a header claims"):
                stream.read(size)
