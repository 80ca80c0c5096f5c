from __future__ import annotations

import hashlib
import http.client
import http.server
import io
import socket
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qdefense.data import fetching
from qdefense.data.fetching import PUBLIC_SETS, PublicSet, RemoteFile, download, fetch, unpack
from qdefense.data.images import DataError

CONTENT = bytes(range(256)) * 3000


class Site:
    """A web server on loopback: what it serves, how it behaves, and what it was asked."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"file.bin": CONTENT}
        self.ranges = True
        self.wrong_range = False
        self.status = 200
        self.says_length = True
        self.cut_after: int | None = None
        self.asked: list[str | None] = []
        self.url = ""

    def file(self, name: str = "file.bin", **changes: Any) -> RemoteFile:
        digest = hashlib.sha256(self.files.get(name, b"")).hexdigest()
        return RemoteFile(**({"url": f"{self.url}/{name}", "algorithm": "sha256", "digest": digest} | changes))

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        content, wanted = self.files.get(handler.path[1:]), handler.headers.get("Range")
        self.asked.append(wanted)
        if content is None or self.status != 200:
            handler.send_error(404 if content is None else self.status)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and self.ranges else 0
        if start >= len(content):
            handler.send_error(416)
            return
        handler.send_response(206 if start else 200)
        if start:
            first = start + 1 if self.wrong_range else start
            handler.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        if self.says_length:
            handler.send_header("Content-Length", str(len(content) - start))
        handler.end_headers()
        handler.wfile.write(content[start:] if self.cut_after is None else content[start:][: self.cut_after])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    made = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            made.answer(self)

        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("no_proxy", "*")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    made.url = f"http://127.0.0.1:{server.server_port}"
    yield made
    server.shutdown()
    thread.join()
    server.server_close()


class Steps:
    """Remembers the progress told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, int, int]] = []

    def __call__(self, stage: str, done: int, total: int) -> None:
        self.told.append((stage, done, total))


def held(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# --- download ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("says_length", [True, False])
def test_download_fetches_a_whole_file(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, says_length: bool
) -> None:
    site.says_length = says_length
    monkeypatch.setattr(fetching, "_MEGABYTE", 1000)
    steps = Steps()
    assert download(site.file(), tmp_path, progress=steps) == tmp_path / "file.bin"
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert (held(tmp_path), site.asked) == (["file.bin"], [None])
    assert steps.told[-1] == ("file.bin, MB", 768, 768)
    assert [done for _, done, _ in steps.told] == sorted(done for _, done, _ in steps.told)
    assert says_length is (steps.told[0][2] == 768)


@pytest.mark.parametrize("algorithm", ["md5", "sha256"])
def test_download_keeps_a_file_that_is_there_and_right(site: Site, tmp_path: Path, algorithm: str) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)
    file = site.file(algorithm=algorithm, digest=hashlib.new(algorithm, CONTENT).hexdigest())
    assert download(file, tmp_path, progress=Steps()) == tmp_path / "file.bin"
    assert site.asked == []


def test_download_raises_and_keeps_a_file_that_is_there_and_wrong(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")
    found, expected = hashlib.sha256(b"mine").hexdigest(), hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(DataError) as caught:
        download(site.file(), tmp_path, progress=Steps())
    path = tmp_path / "file.bin"
    assert str(caught.value) == f"{path}: sha256 is {found}, expected {expected}; remove the file and call again"
    assert path.read_bytes() == b"mine"


def test_download_goes_on_where_it_was_cut(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    download(site.file(), tmp_path, progress=Steps())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert (held(tmp_path), site.asked) == (["file.bin"], ["bytes=1000-"])


def test_download_starts_anew_when_the_server_ignores_ranges(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    (tmp_path / "file.bin.part").write_bytes(b"something else")
    download(site.file(), tmp_path, progress=Steps())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == ["bytes=14-"]


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_download_starts_anew_when_the_part_is_as_long_and_wrong_or_longer(
    site: Site, tmp_path: Path, extra: bytes
) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[::-1] + extra)
    download(site.file(), tmp_path, progress=Steps())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == [f"bytes={len(CONTENT) + len(extra)}-", None]


def test_download_asks_nobody_when_the_part_is_whole(site: Site, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)
    download(site.file(), tmp_path, progress=Steps())
    assert (held(tmp_path), site.asked) == (["file.bin"], [])


def test_download_raises_when_the_server_sends_another_range(site: Site, tmp_path: Path) -> None:
    site.wrong_range = True
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1000])
    with pytest.raises(DataError, match=r"/file.bin: the server sends another part than was asked for; download it by"):
        download(site.file(), tmp_path, progress=Steps())
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:1000]


def test_download_removes_the_part_and_names_both_digests_when_the_checksum_is_wrong(
    site: Site, tmp_path: Path
) -> None:
    file = site.file(algorithm="md5", digest="0" * 32)
    with pytest.raises(DataError) as caught:
        download(file, tmp_path, progress=Steps())
    assert str(caught.value) == (
        f"{file.url}: md5 is {hashlib.md5(CONTENT).hexdigest()}, expected {'0' * 32}; it was removed, call again or "
        f"download it by hand and put it there as {tmp_path / 'file.bin'}"
    )
    assert held(tmp_path) == []


def test_download_keeps_the_part_and_goes_on_when_the_connection_is_cut(site: Site, tmp_path: Path) -> None:
    site.cut_after = 300_000
    file = site.file()
    for done in (300_000, 600_000):
        with pytest.raises(DataError) as caught:
            download(file, tmp_path, progress=Steps())
        cut = f"{file.url}: the connection was cut after {done:,} bytes; call again to go on from there"
        assert str(caught.value) == cut
        assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:done]
    download(file, tmp_path, progress=Steps())
    assert (tmp_path / "file.bin").read_bytes() == CONTENT
    assert site.asked == [None, "bytes=300000-", "bytes=600000-"]


@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), ConnectionResetError(104, "reset"), http.client.IncompleteRead(b"")]
)
def test_download_keeps_the_part_when_reading_fails(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    whole = http.client.HTTPResponse.read
    calls = []

    def fail_later(response: http.client.HTTPResponse, size: int | None = None) -> bytes:
        calls.append(size)
        if len(calls) > 1:
            raise error
        return whole(response, size)

    monkeypatch.setattr(http.client.HTTPResponse, "read", fail_later)
    message = r"the connection was cut after 262,144 bytes; call again to go on from there \(.+\)$"
    with pytest.raises(DataError, match=message):
        download(site.file(), tmp_path, progress=Steps())
    assert (tmp_path / "file.bin.part").stat().st_size == 262_144


def test_download_keeps_the_part_when_interrupted(site: Site, tmp_path: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(site.file(), tmp_path, progress=interrupt)
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[: fetching.CHUNK_BYTES]
    download(site.file(), tmp_path, progress=Steps())
    assert site.asked == [None, "bytes=262144-"]


@pytest.mark.parametrize("status", [403, 404, 500, 503])
def test_download_names_status_and_remedy_when_the_server_refuses(site: Site, tmp_path: Path, status: int) -> None:
    site.status = status
    file = site.file()
    message = rf"^{file.url}: the server answers {status} [\w ]+; download it by hand and put it there as \S+/file.bin$"
    with pytest.raises(DataError, match=message):
        download(file, tmp_path, progress=Steps())
    assert held(tmp_path) == []


def test_download_says_so_when_nobody_listens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    file = RemoteFile(url=f"http://127.0.0.1:{port}/file.bin", algorithm="md5", digest="")
    message = (
        rf"^{file.url}: not reached \(\[Errno \d+\] Connection refused\); check the network, or download it by hand"
    )
    with pytest.raises(DataError, match=message):
        download(file, tmp_path, progress=Steps())


def test_download_says_so_when_the_server_is_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(fetching, "TIMEOUT_SECONDS", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/file.bin"
        with pytest.raises(DataError, match=rf"^{url}: not reached \(timed out\); check the network, or"):
            download(RemoteFile(url=url, algorithm="md5", digest=""), tmp_path, progress=Steps())


def test_download_raises_when_a_file_has_no_end(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "MAX_DOWNLOAD_BYTES", 300_000)
    with pytest.raises(DataError, match=r"/file.bin: sends more than 300,000 bytes; download it by hand"):
        download(site.file(), tmp_path, progress=Steps())


# --- unpack -----------------------------------------------------------------------------------------------------------


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def special(name: str, mode: int) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    return member


def test_unpack_writes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(("x/", b""), ("x/y/z.txt", b"text"), (special("w", 0o100644), b"")))
    steps = Steps()
    unpack(tmp_path / "a.zip", tmp_path / "out", progress=steps)
    assert held(tmp_path / "out") == ["w", "x", "x/y", "x/y/z.txt"]
    assert (tmp_path / "out" / "x" / "y" / "z.txt").read_bytes() == b"text"
    assert steps.told == [("unpacking a.zip", count, 3) for count in (1, 2, 3)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/etc/passwd", "leads out of the archive; remove it and fetch it again$"),
        ("x/../../y", "leads out of the archive"),
        ("..", "leads out of the archive"),
        ("x\\..\\y", "leads out of the archive"),
        ("C:/y", "leads out of the archive"),
        (special("link", 0o120777), "is no file or folder but a link or a device; remove it and fetch it again$"),
        (special("tty", 0o020666), "is no file or folder but a link or a device"),
    ],
)
def test_unpack_names_the_member_and_writes_nothing_when_it_could_do_harm(
    tmp_path: Path, name: str | zipfile.ZipInfo, message: str
) -> None:
    (tmp_path / "a.zip").write_bytes(zipped(("good", b""), (name, b"/etc/passwd")))
    with pytest.raises(DataError, match=rf"^a.zip: member '.+' {message}"):
        unpack(tmp_path / "a.zip", tmp_path / "out", progress=Steps())
    assert held(tmp_path) == ["a.zip"]


@pytest.mark.parametrize(("bound", "value"), [("MAX_MEMBERS", 2), ("MAX_UNPACKED_BYTES", 29)])
def test_unpack_raises_when_an_archive_is_a_bomb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, value: int
) -> None:
    monkeypatch.setattr(fetching, bound, value)
    (tmp_path / "a.zip").write_bytes(zipped(*((str(number), bytes(10)) for number in range(3))))
    with pytest.raises(DataError, match=r"^a.zip: 3 members of 30 bytes are more than the data set has$"):
        unpack(tmp_path / "a.zip", tmp_path / "out", progress=Steps())


def broken(kind: str) -> bytes:
    whole = bytearray(zipped(("x", b"some text")))
    if kind == "no zip":
        return b"text"
    if kind == "encrypted":
        whole[whole.index(b"PK\x01\x02") + 8] |= 1
    else:
        whole[32] ^= 255  # in the compressed text
    return bytes(whole)


@pytest.mark.parametrize("kind", ["no zip", "encrypted", "flipped"])
def test_unpack_raises_when_an_archive_is_damaged(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.zip").write_bytes(broken(kind))
    with pytest.raises(DataError, match=r"/a.zip: not readable as zip \(.+\); remove it and fetch it again$"):
        unpack(tmp_path / "a.zip", tmp_path / "out", progress=Steps())


# --- fetch ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def offer(site: Site, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``offer(name, data, files)``: a public set on the site; each file's name, content and place to unpack."""

    def make(name: str, data: str, *files: tuple[str, bytes, str | None]) -> None:
        site.files = {file: content for file, content, _ in files}
        made = tuple(site.file(file, unpack_into=place) for file, _, place in files)
        monkeypatch.setitem(PUBLIC_SETS, name, PublicSet(files=made, data=data))

    return make


def test_fetch_leaves_an_archive_as_it_is_when_that_is_what_is_read(offer: Callable[..., None], tmp_path: Path) -> None:
    offer("one", "a.tar.gz", ("a.tar.gz", CONTENT, None))
    assert fetch("one", tmp_path / "new" / "folder", progress=Steps()) == tmp_path / "new" / "folder" / "a.tar.gz"
    assert held(tmp_path / "new" / "folder") == ["a.tar.gz"]


def test_fetch_unpacks_archives_into_one_folder_and_asks_nobody_again(
    offer: Callable[..., None], site: Site, tmp_path: Path
) -> None:
    images, labels = zipped(("SET/Images/x.ppm", b"x")), zipped(("labels.csv", b"y"))
    offer("two", "SET", ("images.zip", images, "."), ("labels.zip", labels, "SET"))
    (tmp_path / "SET.part" / "old").mkdir(parents=True)
    for _ in range(2):
        assert fetch("two", tmp_path, progress=Steps()) == tmp_path / "SET"
    expected = ["SET", "SET/Images", "SET/Images/x.ppm", "SET/labels.csv", "images.zip", "labels.zip"]
    assert held(tmp_path) == expected
    assert len(site.asked) == 2


def test_fetch_leaves_no_half_folder_when_unpacking_fails(offer: Callable[..., None], tmp_path: Path) -> None:
    offer("two", "SET", ("images.zip", zipped(("SET/x", b"x")), "."), ("bad.zip", zipped(("/y", b"")), "."))
    with pytest.raises(DataError, match=r"^bad.zip: member '/y' leads out"):
        fetch("two", tmp_path, progress=Steps())
    assert held(tmp_path) == ["bad.zip", "images.zip"]


def test_fetch_leaves_no_half_folder_when_interrupted(offer: Callable[..., None], tmp_path: Path) -> None:
    offer("two", "SET", ("images.zip", zipped(("SET/x", b"x")), "."))

    def interrupt(stage: str, *_: int) -> None:
        if stage.startswith("unpacking"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch("two", tmp_path, progress=interrupt)
    assert held(tmp_path) == ["images.zip"]


@pytest.mark.parametrize("name", sorted(PUBLIC_SETS))
def test_public_sets_have_whole_digests_and_safe_addresses(name: str) -> None:
    for file in PUBLIC_SETS[name].files:
        assert file.url.startswith("https://")
        assert len(bytes.fromhex(file.digest)) == hashlib.new(file.algorithm).digest_size
        assert file.name.endswith((".zip", ".tar.gz"))
