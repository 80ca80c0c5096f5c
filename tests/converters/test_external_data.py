from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.external_data import with_external_data
from qdefense.converters.reading import FileRefusedError
from qdefense.session import DeployedSession, profile_for

WEIGHT = np.random.default_rng(0).standard_normal((12, 4)).astype(np.float32)
OFFSET = np.arange(4, dtype=np.float32)
SAVE = "; save the model in one file"


def small_model() -> onnx.ModelProto:
    nodes = [
        helper.make_node("Flatten", ["image"], ["flat"]),
        helper.make_node("Gemm", ["flat", "weight", "offset"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 3, 2, 2])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(WEIGHT, "weight"), numpy_helper.from_array(OFFSET, "offset")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def placed(folder: Path, **entries: str) -> Path:
    """The model whose weight lies where these entries say; the digits of a good file stand in weights.bin."""
    (folder / "weights.bin").write_bytes(b"head" + WEIGHT.tobytes() + b"tail")
    model = small_model()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    stated = {"location": "weights.bin", "offset": "4", "length": str(WEIGHT.nbytes)} | entries
    for key, value in stated.items():
        if value:
            weight.external_data.add(key=key, value=value)
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def refused(path: Path) -> str:
    with pytest.raises(FileRefusedError) as caught:
        Artifact.read(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def answers(artifact: Artifact) -> np.ndarray:
    x = np.random.default_rng(1).random((2, 3, 2, 2), dtype=np.float32)
    return DeployedSession(artifact, profile_for(artifact)).logits(x)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- what is read -----------------------------------------------------------------------------------------------------


def test_with_external_data_gives_the_same_bytes_when_nothing_is_external(tmp_path: Path) -> None:
    data = small_model().SerializeToString()
    found = with_external_data(data, tmp_path)
    assert found[0] is data
    assert found[1] == {}


@pytest.mark.parametrize("data", [b"", b"no model", b"\x08\x0a"])
def test_with_external_data_leaves_what_is_no_model_to_others(tmp_path: Path, data: bytes) -> None:
    assert with_external_data(data, tmp_path) == (data, {})


@pytest.mark.parametrize("together", [True, False], ids=["one file", "a file per tensor"])
def test_read_takes_the_weights_that_onnx_saved_beside_the_model(tmp_path: Path, together: bool) -> None:
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"location": "weights/all.bin"} if together else {}
    (tmp_path / "weights").mkdir()
    onnx.save(
        small_model(),
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=together,
        size_threshold=0,
        **options,
    )
    artifact = Artifact.read(path)
    inside = Artifact.from_bytes(small_model().SerializeToString())
    names = ["weights/all.bin"] if together else ["offset", "weight"]
    assert artifact.external_files == tuple((name, digest(tmp_path / name)) for name in names)
    assert (artifact.sha256, artifact.size_bytes) == (digest(path), path.stat().st_size)
    assert artifact.size_bytes < len(artifact.data), "the weights are inside"
    for file in (path, *(tmp_path / name for name in names)):
        file.unlink()
    np.testing.assert_array_equal(answers(artifact), answers(inside))


def test_read_takes_the_weights_that_torch_saved_beside_the_model(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 400), torch.nn.Linear(400, 4)).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network, (torch.zeros(1, 3, 2, 2),), path, dynamo=True, input_names=["x"], external_data=True, verbose=False
        )
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["model.onnx", "model.onnx.data"]
    artifact = Artifact.read(path)
    assert artifact.external_files == (("model.onnx.data", digest(tmp_path / "model.onnx.data")),)
    x = np.random.default_rng(1).random((2, 3, 2, 2), dtype=np.float32)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(answers(artifact), expected, atol=1e-5)


@pytest.mark.parametrize(
    "entries",
    [{}, {"length": ""}, {"checksum": "0" * 40}, {"location": "sub/../weights.bin"[7:]}],
    ids=["offset and length", "to the end", "a checksum", "plain"],
)
def test_read_takes_the_bytes_that_the_entries_name(tmp_path: Path, entries: dict[str, str]) -> None:
    path = placed(tmp_path, **entries)
    if entries == {"length": ""}:
        (tmp_path / "weights.bin").write_bytes(b"head" + WEIGHT.tobytes())
    artifact = Artifact.read(path)
    weight = onnx.load_from_string(artifact.data).graph.initializer[0]
    assert (weight.data_location, len(weight.external_data)) == (TensorProto.DEFAULT, 0)
    np.testing.assert_array_equal(numpy_helper.to_array(weight), WEIGHT)


def test_read_takes_the_weights_of_a_constant_node_and_of_a_branch(tmp_path: Path) -> None:
    def constant(name: str) -> onnx.NodeProto:
        tensor = numpy_helper.from_array(OFFSET, name)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value="offset.bin")
        return helper.make_node("Constant", [], [name], value=tensor)

    (tmp_path / "offset.bin").write_bytes(OFFSET.tobytes())
    model = small_model()
    branch = helper.make_graph(
        [constant("inner")], "branch", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, [4])]
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "always"))
    model.graph.node.insert(0, constant("outer"))
    model.graph.node.insert(1, helper.make_node("If", ["always"], ["if"], then_branch=branch, else_branch=branch))
    found, files = with_external_data(model.SerializeToString(), tmp_path)
    assert files == {"offset.bin": digest(tmp_path / "offset.bin")}
    assert b"offset.bin" not in found
    assert found.count(OFFSET.tobytes()) == 1 + 3


def test_read_takes_a_file_behind_a_link_when_it_lies_in_the_folder(tmp_path: Path) -> None:
    path = placed(tmp_path, location="link.bin")
    (tmp_path / "link.bin").symlink_to("weights.bin")
    assert Artifact.read(path).external_files == (("link.bin", digest(tmp_path / "weights.bin")),)


def test_read_finds_the_weights_when_the_folder_is_named_relatively(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [name for name, _ in Artifact.read(Path("model.onnx")).external_files] == ["weights.bin"]


def test_from_bytes_looks_for_no_file_when_it_has_no_folder(tmp_path: Path) -> None:
    data = placed(tmp_path).read_bytes()
    with pytest.raises(FileRefusedError, match="tensor 'weight' keeps its data in another file; read the model from"):
        Artifact.from_bytes(data)


# --- what is refused --------------------------------------------------------------------------------------------------

OUTSIDE = f", which is no file of the model's own folder{SAVE}"
LEADS_OUT = f", which leads out of the model's folder{SAVE}"
LOCATIONS = {
    "it climbs": ("../weights.bin", OUTSIDE),
    "it climbs from below": ("sub/../../weights.bin", OUTSIDE),
    "it climbs and comes back": ("sub/../weights.bin", OUTSIDE),
    "it is absolute": ("/etc/passwd", OUTSIDE),
    "it holds a NUL": ("weights.bin\0.txt", OUTSIDE),
    "it holds a backslash": ("..\\weights.bin", OUTSIDE),
    "it is missing": ("absent.bin", ", which is not there; put it beside the model"),
    "it is a folder": ("sub", LEADS_OUT),
    "it is the folder itself": (".", LEADS_OUT),
    "it is a device": ("device", LEADS_OUT),
    "it is a pipe": ("pipe", LEADS_OUT),
    "it is a link to a file elsewhere": ("out", LEADS_OUT),
    "it is a link to a folder elsewhere": ("up/outside.bin", LEADS_OUT),
    "its name is too long": ("x" * 300, ", which cannot be read (File name too long); save the model in one file"),
}


@pytest.mark.parametrize(("location", "reason"), LOCATIONS.values(), ids=list(LOCATIONS))
def test_read_refuses_a_location_when(tmp_path: Path, location: str, reason: str) -> None:
    (tmp_path / "outside.bin").write_bytes(b"head" + WEIGHT.tobytes())
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "out").symlink_to("../outside.bin")
    (folder / "up").symlink_to("..")
    (folder / "device").symlink_to("/dev/zero")
    os.mkfifo(folder / "pipe")
    message = refused(placed(folder, location=location))
    assert message.startswith("tensor 'weight' keeps its data in '")
    assert message.endswith(reason)


def test_read_refuses_an_empty_location(tmp_path: Path) -> None:
    assert refused(placed(tmp_path, location="")) == f"tensor 'weight' keeps its data in ''{OUTSIDE}"


def test_read_escapes_a_hostile_location(tmp_path: Path) -> None:
    message = refused(placed(tmp_path, location="\x1b[2J\u202e.bin"))
    assert message.startswith(r"tensor 'weight' keeps its data in '\x1b[2J\u202e.bin', which is not there")


@pytest.mark.parametrize("spoil", [lambda data: data.replace(b"weights.bin", b"weights\xff\xfe\xff\xff")])
def test_read_refuses_a_location_that_is_no_text(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = placed(tmp_path)
    path.write_bytes(spoil(path.read_bytes()))
    assert refused(path) == "a name in the file is not UTF-8 text; export the model again with a current exporter"


SHORT = {
    "the length": ({"length": "9999"}, "needs bytes 4 to 10003 of 'weights.bin', which has 200; save the model again"),
    "the offset": ({"offset": "9"}, "needs bytes 9 to 201 of 'weights.bin', which has 200; save the model again"),
    "the offset alone": (
        {"offset": "999", "length": ""},
        "needs bytes 999 to 999 of 'weights.bin', which has 200; save the model again",
    ),
    "a large number": (
        {"length": "9" * 18},
        f"needs bytes 4 to {10**18 + 3} of 'weights.bin', which has 200; save the model again",
    ),
}


@pytest.mark.parametrize(("entries", "reason"), SHORT.values(), ids=list(SHORT))
def test_read_refuses_a_file_that_is_too_short_for(tmp_path: Path, entries: dict[str, str], reason: str) -> None:
    assert refused(placed(tmp_path, **entries)) == f"tensor 'weight' {reason}"


@pytest.mark.parametrize("value", ["-4", "4.0", "0x4", " 4", "", "٤", "four", "9" * 5000])
@pytest.mark.parametrize("key", ["offset", "length"])
def test_read_refuses_what_is_no_number(tmp_path: Path, key: str, value: str) -> None:
    path = placed(tmp_path, **{key: value or "?"})
    shown = value[:117] + "..." if len(value) > 120 else (value or "?").strip()
    assert refused(path) == f"tensor 'weight' states the {key} '{shown}' of its external data; no number"


def test_read_refuses_a_length_that_is_not_the_shapes(tmp_path: Path) -> None:
    path = placed(tmp_path, length="8")
    with pytest.raises(FileRefusedError, match=r"weight"):
        Artifact.read(path)


def test_read_refuses_files_that_are_together_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = placed(tmp_path)
    monkeypatch.setattr("qdefense.converters.external_data.LARGEST_FILE", 199)
    expected = "the model and its external data are larger than 2 GB; only smaller ones can be read"
    assert refused(path) == expected
    monkeypatch.setattr("qdefense.converters.external_data.LARGEST_FILE", 200)
    assert Artifact.read(path).external_files


def test_read_refuses_slices_that_are_together_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tensors may name one file: 400 of 50 MB made 21 GB."""
    path = placed(tmp_path)
    model = onnx.load(path, load_external_data=False)
    for index in range(400):
        model.graph.initializer.add().CopyFrom(model.graph.initializer[0])
        model.graph.initializer[-1].name = f"more{index}"
    path.write_bytes(model.SerializeToString())
    needed = 401 * WEIGHT.nbytes
    monkeypatch.setattr("qdefense.converters.external_data.LARGEST_FILE", needed - 1)
    assert refused(path) == "the model and its external data are larger than 2 GB; only smaller ones can be read"
    monkeypatch.setattr("qdefense.converters.external_data.LARGEST_FILE", needed)
    assert with_external_data(path.read_bytes(), tmp_path)[0].count(WEIGHT.tobytes()) == 401


def test_read_refuses_a_sparse_file_of_terabytes_unread(tmp_path: Path) -> None:
    path = placed(tmp_path)
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(2**42)
    assert "larger than 2 GB" in refused(path)
