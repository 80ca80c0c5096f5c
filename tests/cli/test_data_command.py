from __future__ import annotations

import functools
import hashlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qdefense.cli import run
from qdefense.data.fetching import PUBLIC_SETS, PublicSet, RemoteFile
from qdefense.data.opening import open_data

Capture = pytest.CaptureFixture[str]


def shown(capfd: Capture, *arguments: str | Path) -> str:
    """What a successful command writes to stdout, each run of spaces one; it writes nothing to stderr."""
    assert run(["data", *(str(argument) for argument in arguments)]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    return "\n".join(" ".join(line.split()) for line in output.splitlines())


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")


def write_images(folder: Path, sizes: dict[str, tuple[int, int]]) -> Path:
    for seed, (name, (height, width)) in enumerate(sizes.items()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


# --- show -------------------------------------------------------------------------------------------------------------


def test_show_says_what_the_data_are_taken_for(capfd: Capture) -> None:
    images = open_data("signs", limit=100)
    counts = np.bincount(images.labels)
    expected = (
        "data signs test\n"
        "read as signs: the built-in set\n"
        "images 100\n"
        "size 32x32 (height x width)\n"
        "classes 12: 'speed_30', 'speed_50', 'ahead_only', 'turn_right', 'turn_left' and 7 more\n"
        f"per class {counts.min()} to {counts.max()} images\n"
        f"digest {images.digest}"
    )
    assert shown(capfd, "show", "signs", "--limit", "100") == expected


def test_show_keeps_the_digest_on_one_line_of_80_columns(capfd: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = shown(capfd, "show", "signs", "--limit", "5")
    assert f"digest {open_data('signs', limit=5).digest}" in text.splitlines()


@pytest.mark.parametrize("colour", ["FORCE_COLOR", "NO_COLOR"])
def test_show_neither_wraps_nor_pads_in_a_file(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch, colour: str
) -> None:
    monkeypatch.delenv("COLUMNS")
    monkeypatch.setenv(colour, "1")
    names = [f"{letter * 29} {letter * 29}" for letter in "abcde"]
    write_images(tmp_path / "set", {f"{name}/x.png": (4, 5) for name in names})
    assert run(["data", "show", str(tmp_path / "set")]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert [line for line in lines if ", ".join(map(repr, names)) in line] != []
    assert [line for line in lines if line != line.rstrip()] == []


def test_show_reads_the_split_named(capfd: Capture) -> None:
    assert shown(capfd, "show", "signs", "--split", "train", "--limit", "9").startswith("data signs train\n")


def test_show_tells_notes_and_empty_classes_and_leaves_no_class_out(tmp_path: Path, capfd: Capture) -> None:
    names = {f"{split}/{number}/x.png": (4, 5) for number in range(11) for split in ("train", "test")}
    write_images(tmp_path / "set", names | {"test/3/y.png": (4, 5)})
    for number in (7, 8):
        (tmp_path / "set" / "test" / str(number) / "x.png").unlink()
    text = shown(capfd, "show", tmp_path / "set")
    for part in (
        "data images set/test",
        "read as image folder: test/ holds 11 folders, one for each class",
        "images 10",
        "size 4x5 (height x width)",
        "classes 11: '0', '1', '10', '2', '3' and 6 more",
        "per class 1 to 2 images; 2 classes have none",
        "note class names are numbers in the order of strings, not of numbers: label 2 is '10'; the model's outputs "
        "may be in numeric order: then name them with --classes",
        "note 2 of the 11 classes of all splits have no image in this one",
    ):
        assert part in text.splitlines(), text


def test_show_says_so_when_images_have_no_labels(tmp_path: Path, capfd: Capture) -> None:
    text = shown(capfd, "show", write_images(tmp_path, {"a.png": (4, 4)}))
    assert "classes none, the images have no labels" in text.splitlines()
    assert "per class" not in text


def test_show_counts_tracks(tmp_path: Path, capfd: Capture) -> None:
    names = [f"{track:05}_{frame:05}.ppm" for track in range(2) for frame in range(3)]
    folder = tmp_path / "Final_Training" / "Images" / "00005"
    write_images(folder, dict.fromkeys(names, (4, 4)))
    (folder / "GT-00005.csv").write_text("Filename;ClassId\n" + "".join(f"{name};5\n" for name in names))
    text = shown(capfd, "show", tmp_path, "--split", "train")
    assert "tracks 2 groups of images that show the same sign" in text.splitlines()


def test_show_resizes_images_of_several_sizes_when_told(tmp_path: Path, capfd: Capture) -> None:
    folder = write_images(tmp_path, {"a.png": (4, 4), "b.png": (9, 7)})
    assert run(["data", "show", str(folder)]) == 2
    errors = capfd.readouterr().err
    assert errors.startswith(f"error: images {folder.name}: images differ in size: 'b.png' is 7x9 and 'a.png' is 4x4;")
    assert errors.endswith("--resize bilinear\n")
    text = shown(capfd, "show", folder, "--resize", "bilinear", "--size", "6x8")
    assert "size 6x8 (height x width)" in text.splitlines()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--resize", "crop"], "--resize and --size go together, such as --resize bilinear --size 32x32"),
        (["--size", "8x8"], "--resize and --size go together"),
        (["--resize", "crop", "--size", "8"], "'8' is not HEIGHTxWIDTH, such as 32x32"),
        (["--resize", "crop", "--size", "0x8"], "'0x8' is not HEIGHTxWIDTH, such as 32x32"),
        (["--resize", "crop", "--size", "8x99999"], "'8x99999' is not HEIGHTxWIDTH"),
        (["--resize", "none", "--size", "8x8"], "'none' is not one of"),
        (["--limit", "0"], "0 is not in the range x>=1"),
        (["--split", "val"], "error: signs: no split 'val'; it has 'test', 'train'\n"),
    ],
)
def test_show_exits_2_and_says_why_when(capfd: Capture, options: list[str], message: str) -> None:
    assert run(["data", "show", "signs", *options]) == 2
    output, errors = capfd.readouterr()
    assert output == ""
    assert message in errors


def test_show_exits_2_when_nothing_is_there(capfd: Capture) -> None:
    assert run(["data", "show", "nowhere"]) == 2
    assert capfd.readouterr().err.startswith("error: 'nowhere': no such file or folder; data is 'signs' (built in);")


def test_show_names_the_place_below_qdefense_data_and_takes_no_empty_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("QDEFENSE_DATA", str(tmp_path))
    assert run(["data", "show", "cifar10"]) == 2
    told = (
        f"error: 'cifar10': no such file or folder; there is {str(tmp_path / 'cifar10')!r}; data is 'signs' (built in);"
    )
    assert capfd.readouterr().err.startswith(told)
    assert run(["data", "show", ""]) == 2
    assert capfd.readouterr().err.startswith("error: '': no such file or folder; data is 'signs' (built in);")


def test_show_shows_names_as_text_when_they_are_hostile(tmp_path: Path, capfd: Capture) -> None:
    name = "[bold]\x1b[2J\u202e"
    text = shown(capfd, "show", write_images(tmp_path / name, {f"{name}/a.png": (4, 4)}))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert r"data images [bold]\x1b[2J\u202e" in text
    assert r"classes 1: '[bold]\x1b[2J\u202e'" in text


# --- fetch ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of a web server on loopback that offers a file as CIFAR-10."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "cifar.tar.gz").write_bytes(b"content")

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

    monkeypatch.setenv("no_proxy", "*")
    handler = functools.partial(Handler, directory=str(tmp_path / "site"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    offer(monkeypatch, f"{url}/cifar.tar.gz", b"content")
    yield url
    server.shutdown()
    thread.join()
    server.server_close()


def offer(monkeypatch: pytest.MonkeyPatch, url: str, content: bytes) -> None:
    file = RemoteFile(url=url, algorithm="sha256", digest=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(PUBLIC_SETS, "cifar10", PublicSet(files=(file,), data="cifar.tar.gz"))


@pytest.mark.usefixtures("site")
def test_fetch_says_what_to_give_to_data(tmp_path: Path, capfd: Capture) -> None:
    folder = tmp_path / "my data"
    text = shown(capfd, "fetch", "cifar10", "--output-dir", folder)
    assert text == f"cifar10 is there; use it as --data '{folder}/cifar.tar.gz'"
    assert (folder / "cifar.tar.gz").read_bytes() == b"content"


@pytest.mark.usefixtures("site")
def test_fetch_writes_to_data_when_no_folder_is_named(
    tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert shown(capfd, "fetch", "cifar10") == "cifar10 is there; use it as --data data/cifar.tar.gz"


def test_fetch_exits_2_with_one_line_when_the_server_refuses(
    site: str, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    offer(monkeypatch, f"{site}/gone.tar.gz", b"")
    assert run(["data", "fetch", "cifar10", "--output-dir", str(tmp_path / "data")]) == 2
    expected = (
        f"error: {site}/gone.tar.gz: the server answers 404 File not found; download it by hand and put it there as "
        f"{tmp_path}/data/gone.tar.gz\n"
    )
    assert capfd.readouterr() == ("", expected)


@pytest.mark.usefixtures("site")
def test_fetch_exits_2_when_the_folder_cannot_be_made(tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "file").touch()
    assert run(["data", "fetch", "cifar10", "--output-dir", str(tmp_path / "file" / "data")]) == 2
    expected = f"error: {tmp_path}/file/data: Not a directory; check the path and its permissions\n"
    assert capfd.readouterr() == ("", expected)


def test_fetch_exits_130_and_keeps_the_part_when_interrupted(
    site: str, tmp_path: Path, capfd: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(path: Path, algorithm: str) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("qdefense.data.fetching._digest", interrupt)
    assert run(["data", "fetch", "cifar10", "--output-dir", str(tmp_path)]) == 130
    assert capfd.readouterr() == ("", "interrupted\n")
    assert (tmp_path / "cifar.tar.gz.part").read_bytes() == b"content"


def test_fetch_exits_2_and_lists_the_sets_when_there_is_no_such(capfd: Capture) -> None:
    assert run(["data", "fetch", "mnist"]) == 2
    assert "'mnist' is not one of 'cifar10', 'gtsrb'" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["show", "fetch"])
def test_help_fits_80_columns(capfd: Capture, name: str) -> None:
    text = shown(capfd, name, "-h")
    assert text.startswith(f"Usage: qdefense data {name} [OPTIONS]")
    assert max(len(line) for line in text.splitlines()) <= 80
