"""Bad input to every command: the exit code, one line that says what, where and what next, and nothing half-written."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import re
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from onnx import TensorProto
from onnx.helper import make_node, make_tensor_value_info
from onnx.numpy_helper import from_array, to_array
from PIL import Image

from qdefense.cli import run
from qdefense.data.images import ImageSet
from qdefense.data.npz import load_npz, save_npz

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux is the supported gate: pipes, /proc, limits")
Capture = pytest.CaptureFixture[str]
Change = Callable[[onnx.ModelProto], None]
REPORT, PAGE = "report.json", "report.html"
EARLIER = b"an earlier report"


@dataclass(frozen=True, kw_only=True)
class Given:
    """Where a case puts its files; the command runs in the same folder, so that messages name them without a path."""

    folder: Path
    toy: Toy
    monkeypatch: pytest.MonkeyPatch

    def file(self, name: str, content: bytes | str) -> str:
        (self.folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    def model(self, *changes: Change, name: str = "model.onnx") -> str:
        """The toy model, changed."""
        model = onnx.load(self.toy.clean)
        for change in changes:
            change(model)
        return self.file(name, model.SerializeToString())

    def data(self, change: Callable[[ImageSet], ImageSet], name: str = "data.npz") -> str:
        """The toy images, changed."""
        save_npz(self.folder / name, change(load_npz(self.toy.data, split=None, limit=None, seed=0)))
        return name

    def arrays(self, **arrays: NDArray[Any]) -> str:
        """An npz of any arrays; images and labels are the toy's unless given."""
        toy = load_npz(self.toy.data, split=None, limit=None, seed=0)
        known: dict[str, Any] = {"images": toy.images, "labels": toy.labels, "class_names": np.array(toy.class_names)}
        np.savez(self.folder / "data.npz", **(known | arrays))
        return "data.npz"

    def pictures(self, *names: str, sizes: Sequence[int] = (16,), mode: str = "RGB") -> str:
        """A folder of images; the sizes and the names take turns."""
        for place, name in enumerate(names):
            target = self.folder / "images" / name
            target.parent.mkdir(parents=True, exist_ok=True)
            side = sizes[place % len(sizes)]
            Image.new(mode, (side, side), place % 250).save(target)
        return "images"

    def audit(self, model: str | Path | None = None, *options: str, data: str | Path | None = None) -> list[str]:
        """The command line; output options are the test's."""
        asked = [str(model or self.toy.clean), "--data", str(data or self.toy.data), "--threads", "1"]
        return ["audit", *asked, *options]

    def worker_runs(self, code: str) -> None:
        """Python that the worker runs when it starts."""
        place = self.folder / "injected"
        place.mkdir()
        (place / "sitecustomize.py").write_text(code)
        before = os.environ.get("PYTHONPATH")
        self.monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(place), before])))


Build = Callable[[Given], list[str]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A command line, the exit code that DESIGN gives it, and what it says: ``...`` stands for anything.

    ``{folder}`` is where the case has its files, ``{out}`` where the reports go, ``{model}`` the toy model.
    """

    code: int
    message: str
    build: Build


CASES: dict[str, Case] = {}


def case(name: str, code: int, message: str, build: Build) -> None:
    assert name not in CASES
    CASES[name] = Case(code=code, message=message, build=build)


# --- models -----------------------------------------------------------------------------------------------------------


def weightless(
    shape: Sequence[int | str | None] = ("N", 3, 16, 16),
    kind: int = TensorProto.FLOAT,
    answer: Sequence[int | str | None] | None = ("N", 8),
    node: onnx.NodeProto | None = None,
) -> onnx.ModelProto:
    """Somebody else's file, without a contract: nearly nothing in it but what it declares."""
    nodes = [node or make_node("Flatten", ["x"], ["y"], name="only")]
    inputs, outputs = (
        [make_tensor_value_info("x", kind, shape)],
        [make_tensor_value_info("y", TensorProto.FLOAT, answer)],
    )
    graph = onnx.helper.make_graph(nodes, "foreign", inputs, outputs)
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def foreign(**declared: Any) -> Build:
    """An audit of such a file."""
    return lambda given: given.audit(given.file("model.onnx", weightless(**declared).SerializeToString()))


def changed(*changes: Change, options: Sequence[str] = ()) -> Build:
    """An audit of the toy model, changed."""
    return lambda given: given.audit(given.model(*changes), *options)


def scanned(*changes: Change) -> Build:
    """The same with the toy's quick scan."""
    return lambda given: given.audit(given.model(*changes), "--defense", given.toy.scan)


def content(spoil: Callable[[bytes], bytes | str]) -> Build:
    """An audit of a file with such a content, made from the toy's."""
    return lambda given: given.audit(given.file("model.onnx", spoil(given.toy.clean.read_bytes())))


def unsaid(model: onnx.ModelProto) -> None:
    """No contract in the file."""
    del model.metadata_props[:]


def ending_in(*operators: str) -> Change:
    """More operators behind the logits, whose name the last of them takes."""

    def change(model: onnx.ModelProto) -> None:
        unsaid(model)
        model.graph.node[-1].output[0] = "after 0"
        for place, operator in enumerate(operators):
            last = place == len(operators) - 1
            target = "logits" if last else f"after {place + 1}"
            model.graph.node.append(make_node(operator, [f"after {place}"], [target], name=f"last {place}"))

    return change


def with_noise(model: onnx.ModelProto) -> None:
    """Random numbers too small to change an answer, from an operator that no shadow has."""
    unsaid(model)
    model.graph.node[-1].output[0] = "after 0"
    model.graph.node.append(make_node("RandomUniformLike", ["after 0"], ["noise"], name="last 0", low=0.0, high=1e-6))
    model.graph.node.append(make_node("Add", ["after 0", "noise"], ["logits"], name="last 1"))


def weights(change: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> Change:
    def changed(model: onnx.ModelProto) -> None:
        place = next(i for i, tensor in enumerate(model.graph.initializer) if tensor.name == "weight")
        array = change(to_array(model.graph.initializer[place]).copy())
        model.graph.initializer[place].CopyFrom(from_array(array, "weight"))

    return changed


def first_weight(value: float) -> Change:
    def change(array: NDArray[np.float32]) -> NDArray[np.float32]:
        array[0, 0] = value
        return array

    return weights(change)


def constant(model: onnx.ModelProto) -> None:
    weights(np.zeros_like)(model)


def two_classes(model: onnx.ModelProto) -> None:
    unsaid(model)
    for tensor in model.graph.initializer:
        if tensor.name in ("weight", "offset"):
            tensor.CopyFrom(from_array(to_array(tensor)[..., :2].copy(), tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2


def ending_its_reader(model: onnx.ModelProto) -> None:
    """A kernel larger than the image, and a slice of what is left: an assertion of onnx's shape inference fails."""
    model.graph.node[0].attribute[0].ints[:] = [0, 0, 0, 0]
    model.graph.initializer[0].CopyFrom(from_array(np.zeros((6, 3, 40, 40), np.float32), "kernels"))
    numbers = {"starts": [0], "ends": [5], "axes": [2]}
    model.graph.initializer.extend(from_array(np.array(value, np.int64), name) for name, value in numbers.items())
    model.graph.node.insert(1, make_node("Slice", ["convolved", *numbers], ["cut"], name="slice"))
    model.graph.node[2].input[0] = "cut"


def named_nodes(model: onnx.ModelProto) -> None:
    model.graph.node[0].name = "conv\n\x1b[2J\u202e"
    model.graph.node[0].domain = "evil\x1b[31m\nerror: all is well"


def huge(model: onnx.ModelProto) -> None:
    """4 GiB of zeros on the way to the logits."""
    model.graph.initializer.append(from_array(np.array([2**30], np.int64), "size"))
    model.graph.node[-1].output[0] = "plain"
    model.graph.node.extend(
        [
            make_node("ConstantOfShape", ["size"], ["huge"], name="huge"),
            make_node("ReduceSum", ["huge"], ["zero"], name="zero", keepdims=0),
            make_node("Add", ["plain", "zero"], ["logits"], name="add"),
        ]
    )


def external(location: str, length: int | None = None) -> Change:
    """The weights are said to be in another file."""

    def change(model: onnx.ModelProto) -> None:
        tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "weight")
        stated = {"location": location, "offset": "0", "length": str(length or len(tensor.raw_data))}
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in stated.items():
            tensor.external_data.add(key=key, value=value)

    return change


def linked(given: Given) -> list[str]:
    outside = given.folder.parent / "outside.bin"
    outside.write_bytes(b"secret" * 1000)
    (given.folder / "weights.bin").symlink_to(outside)
    return given.audit(given.model(external("weights.bin")))


def too_short(given: Given) -> list[str]:
    given.file("weights.bin", bytes(100))
    return given.audit(given.model(external("weights.bin")))


def appended(model: onnx.ModelProto, value: onnx.ValueInfoProto) -> None:
    model.graph.input.append(value)


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(make_tensor_value_info("flat", TensorProto.FLOAT, ["N", 96]))


def second_input(model: onnx.ModelProto) -> None:
    appended(model, make_tensor_value_info("training", TensorProto.BOOL, []))


def of_type(kind: onnx.TypeProto) -> bytes:
    model = weightless()
    model.graph.input[0].type.CopyFrom(kind)
    return bytes(model.SerializeToString())


def unsorted(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def cyclic(model: onnx.ModelProto) -> None:
    model.graph.node[0].input[0] = "flat"


def opset(version: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = version

    return change


def ir_version(model: onnx.ModelProto) -> None:
    model.ir_version = 99


def narrow_product() -> bytes:
    """A product of 12 values each."""
    model = weightless(
        shape=("N", 3, 2, 2), answer=("N", 8), node=make_node("Flatten", ["x"], ["flat"], name="flatten")
    )
    model.graph.node.append(make_node("MatMul", ["flat", "w"], ["y"], name="product"))
    model.graph.initializer.append(from_array(np.ones((12, 8), np.float32), "w"))
    return bytes(model.SerializeToString())


def no_kernel(model: onnx.ModelProto) -> None:
    """A valid graph: ONNX Runtime has no Relu of bfloat16 on the CPU."""
    ending_in("Cast", "Relu", "Cast")(model)
    for node, kind in zip(model.graph.node[-3::2], (TensorProto.BFLOAT16, TensorProto.FLOAT), strict=True):
        node.attribute.append(onnx.helper.make_attribute("to", kind))


# --- data -------------------------------------------------------------------------------------------------------------


def mislabelled(images: ImageSet) -> ImageSet:
    """Every label is the next one's."""
    return replace(images, labels=(images.labels + 1) % 8)


def huge_header() -> bytes:
    """An npz whose images claim 10^12 elements, in a few hundred bytes."""
    header = io.BytesIO()
    fact = {"descr": "|u1", "fortran_order": False, "shape": (10**12 // (16 * 16 * 3), 16, 16, 3)}
    np.lib.format.write_array_header_1_0(header, fact)
    labels = io.BytesIO()
    np.save(labels, np.zeros(4, np.int64))
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(1000))
        archive.writestr("labels.npy", labels.getvalue())
    return body.getvalue()


def rolled(images: ImageSet) -> ImageSet:
    """Names in another order than the numbers they go with."""
    return replace(images, class_names=(*images.class_names[1:], images.class_names[0]))


def shuffled(images: ImageSet) -> ImageSet:
    return replace(images, labels=np.random.default_rng(0).permutation(images.labels))


def partly_wrong(images: ImageSet) -> ImageSet:
    return replace(images, labels=np.where(np.arange(len(images)) % 10, images.labels, (images.labels + 3) % 8))


def of_one_class(images: ImageSet) -> ImageSet:
    many = repeated(images)
    distinct = many.images.copy()
    distinct[:, -1, -1, 0] ^= np.arange(len(many), dtype=np.uint8)
    distinct[:, -1, -1, 1] ^= (np.arange(len(many)) // 256).astype(np.uint8)
    return replace(many, images=distinct)


def repeated(images: ImageSet) -> ImageSet:
    rows = np.flatnonzero(images.labels == 0)
    return images.take(np.resize(rows, len(images)))


def first_two(images: ImageSet) -> ImageSet:
    return replace(images.take(np.flatnonzero(images.labels < 2)), class_names=("0", "1"))


def larger(images: ImageSet) -> ImageSet:
    return replace(images, images=np.repeat(images.images, 2, axis=1))


def parquet(given: Given) -> str:
    pq.write_table(pa.table({"label": [0, 1], "text": ["a", "b"]}), given.folder / "data.parquet")
    return "data.parquet"


def png() -> bytes:
    body = io.BytesIO()
    Image.new("RGB", (16, 16)).save(body, "PNG")
    return body.getvalue()


def checkpoint() -> bytes:
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"weight": [1.0]}))
    return body.getvalue()


IMAGES = onnx.helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 3, 16, 16])


def locked(given: Given) -> list[str]:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    model = given.model()
    (given.folder / model).chmod(0)
    return given.audit(model)


def pipe(given: Given) -> list[str]:
    """Reading it would wait forever."""
    os.mkfifo(given.folder / "model.onnx")
    return given.audit("model.onnx")


def larger_than_2_gb(given: Given) -> list[str]:
    """A file with a hole: it takes no room on the disk."""
    with (given.folder / "model.onnx").open("wb") as file:
        file.truncate(3 * 2**30)
    return given.audit("model.onnx")


def empty_folder(given: Given) -> str:
    (given.folder / "nothing").mkdir()
    return "nothing"


def broken_picture(given: Given) -> str:
    folder = given.pictures("a/0.png", "b/0.png")
    (given.folder / folder / "b" / "1.png").write_bytes(png()[:-30])
    return folder


def beside(given: Given) -> list[str]:
    given.file("model.contract.toml", "mean = 3\n")
    return given.audit(given.model(), "--contract", "model.contract.toml")


KILLED = """
import os, signal, sys
def kill(event, arguments):
    if event == "open" and str(arguments[0]).endswith("toy.npz"):
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(kill)
"""


def killed(given: Given) -> list[str]:
    given.worker_runs(KILLED)
    return given.audit()


# --- the cases: what is asked for -------------------------------------------------------------------------------------

case(
    "the model is missing",
    2,
    "no-such.onnx: No such file or directory; check the path and its permissions",
    lambda given: given.audit("no-such.onnx"),
)
case(
    "the model is a folder",
    2,
    "{folder}: Is a directory; check the path and its permissions",
    lambda given: given.audit(given.folder),
)
case("the model is a pipe", 2, "model.onnx: is no regular file; check the path and its permissions", pipe)
case(
    "the model is larger than 2 GB",
    4,
    "the file has 3,221,225,472 bytes, and an ONNX model at most 2 GB; keep the weights in external data",
    larger_than_2_gb,
)
case("the model cannot be read", 2, "model.onnx: Permission denied; check the path and its permissions", locked)
case("the model is empty", 4, "the file is empty (0 bytes); export the model again", content(lambda _: b""))
case(
    "the model has one byte",
    4,
    "the file (1 bytes) is no ONNX model or is cut short; check the path and export it again",
    content(lambda data: data[:1]),
)
case(
    "the model is cut to a tenth",
    4,
    "the file (... bytes) is no ONNX model or is cut short; check the path and export it again",
    content(lambda data: data[: len(data) // 10]),
)
case(
    "the model lacks its last byte",
    4,
    "the file (... bytes) is no ONNX model or is cut short; check the path and export it again",
    content(lambda data: data[:-1]),
)
case(
    "the model is cut before the graph",
    4,
    "the file holds no ONNX graph with nodes and opsets; check the path and export it again",
    content(lambda data: data[:2]),
)
case(
    "the model is a picture",
    4,
    "the file (... bytes) is a PNG picture, no ONNX model; check the path",
    content(lambda _: png()),
)
case(
    "the model is a text",
    4,
    "the file (... bytes) is no ONNX model or is cut short; check the path and export it again",
    content(lambda _: "name,accuracy\nmodel,0.93\n"),
)
case(
    "the model is a pickle",
    4,
    "the file (... bytes) is a pickle, such as torch.save wrote, no ONNX model; export the network with torch.onnx",
    content(lambda _: pickle.dumps({"weight": [1.0]})),
)
case(
    "the model is a torch checkpoint",
    4,
    "the file (... bytes) is a zip archive, such as torch.save writes, no ONNX model; unpack it, or export the "
    "network with torch.onnx",
    content(lambda _: checkpoint()),
)
case(
    "the model is compressed",
    4,
    "the file (... bytes) is compressed with gzip, no ONNX model; unpack it",
    content(gzip.compress),
)
case(
    "the model is an error page",
    4,
    "the file (... bytes) is a web page or XML, no ONNX model; it may be the error page of a download; fetch the "
    "model again",
    content(lambda _: "<!DOCTYPE html>\n<html><body>404</body></html>"),
)
case(
    "the model is a pointer of Git LFS",
    4,
    "the file (... bytes) is a pointer of Git LFS, no ONNX model; fetch the model itself with git lfs pull",
    content(lambda _: "version https://git-lfs.github.com/spec/v1\noid"),
)
case(
    "the model is JSON",
    4,
    "the file (14 bytes) is JSON, no ONNX model; check the path",
    content(lambda _: '{"version": 1}'),
)
case(
    "external data are missing",
    4,
    "tensor 'weight' keeps its data in 'weights.bin', which is not there; put it beside the model",
    changed(external("weights.bin")),
)
case(
    "external data lie outside",
    4,
    "tensor 'weight' keeps its data in '../weights.bin', which is no file of the model's own folder; save the model "
    "in one file",
    changed(external("../weights.bin")),
)
case(
    "external data have an absolute path",
    4,
    "tensor 'weight' keeps its data in '/etc/passwd', which is no file of the model's own folder; save the model in "
    "one file",
    changed(external("/etc/passwd")),
)
case(
    "external data are a link that leads out",
    4,
    "tensor 'weight' keeps its data in 'weights.bin', which leads out of the model's folder; save the model in one "
    "file",
    linked,
)
case(
    "external data are too short",
    4,
    "tensor 'weight' needs bytes 0 to 3072 of 'weights.bin', which has 100; save the model again",
    too_short,
)
case(
    "there are two inputs",
    2,
    "expected one image input, found 'image' [None, 3, 16, 16], 'training' []; name the image with --input and give "
    "every other input a value with --fixed-input NAME=VALUE",
    changed(unsaid, second_input),
)
case(
    "there are two outputs",
    2,
    "expected one output, found 'logits' [None, 8], 'flat' [None, 96]; name the one with the class scores with "
    "--output",
    changed(unsaid, second_output),
)
case(
    "the input is flat",
    2,
    "input 'x' is no batch of images but float [None, 768]; expected float32, float16 or uint8 of (N, 3, H, W) or "
    "(N, H, W, 3)",
    foreign(shape=("N", 768)),
)
case(
    "the input is a video",
    2,
    "input 'x' is no batch of images but float [None, 3, 8, 16, 16]; expected float32, float16 or uint8 of (N, 3, "
    "H, W) or (N, H, W, 3)",
    foreign(shape=("N", 3, 8, 16, 16)),
)
case(
    "the input is grey",
    2,
    "input 'x' is [None, 1, 28, 28]: no axis holds 3 channels; only RGB or BGR images can be driven, and --layout "
    "says which axis is theirs where the graph does not",
    foreign(shape=("N", 1, 28, 28)),
)
case(
    "the input has four channels",
    2,
    "input 'x' is [None, 4, 16, 16]: no axis holds 3 channels; only RGB or BGR images can be driven, and --layout "
    "says which axis is theirs where the graph does not",
    foreign(shape=("N", 4, 16, 16)),
)
case(
    "the input is int64",
    2,
    "input 'x' is no batch of images but int64 [None, 3, 16, 16]; expected float32, float16 or uint8 of (N, 3, H, "
    "W) or (N, H, W, 3)",
    foreign(kind=TensorProto.INT64),
)
case(
    "the input is float64",
    2,
    "input 'x' is no batch of images but double [None, 3, 16, 16]; expected float32, float16 or uint8 of (N, 3, H, "
    "W) or (N, H, W, 3)",
    foreign(kind=TensorProto.DOUBLE),
)
case(
    "the input is text",
    2,
    "input 'x' is no batch of images but string [None, 3, 16, 16]; expected float32, float16 or uint8 of (N, 3, H, "
    "W) or (N, H, W, 3)",
    foreign(kind=TensorProto.STRING),
)
case(
    "the input has any size",
    2,
    "input 'x' has no fixed height and width: [None, 3, None, None]; say --size HEIGHTxWIDTH",
    foreign(shape=("N", 3, "height", "width")),
)
case(
    "the input is a sequence",
    2,
    "input 'x' is no batch of images but of another type (sequence); expected float32, float16 or uint8 of (N, 3, "
    "H, W) or (N, H, W, 3)",
    content(lambda _: of_type(onnx.helper.make_sequence_type_proto(IMAGES))),
)
case(
    "the input is optional",
    2,
    "input 'x' is no batch of images but of another type (optional); expected float32, float16 or uint8 of (N, 3, "
    "H, W) or (N, H, W, 3)",
    content(lambda _: of_type(onnx.helper.make_optional_type_proto(IMAGES))),
)
case(
    "the output is a map",
    2,
    "output 'y' has shape [None, 8, 4, 4], not (N, classes); name another with --output, or the classes with --classes",
    foreign(answer=("N", 8, 4, 4)),
)
case(
    "the output is a scalar",
    2,
    "output 'y' has shape [], not (N, classes); name another with --output, or the classes with --classes",
    foreign(answer=()),
)
case(
    "the output has no shape",
    4,
    "onnx.checker refuses the file: Field 'shape' of 'type' is required but missing; export it again",
    foreign(answer=None),
)
case(
    "the output has any number of classes",
    2,
    "output 'y' has shape [None, None], not (N, classes); name another with --output, or the classes with --classes",
    foreign(answer=("N", "K")),
)
case(
    "there is one class",
    2,
    "output 'y' is one number per image; a classifier answers one per class: export it so, or name another output "
    "with --output",
    foreign(answer=("N", 1)),
)
case(
    "there are 65,537 classes",
    2,
    "output 'y' has 65537 classes, more than 65536; name another with --output",
    foreign(answer=("N", 65_537)),
)
case(
    "there are two classes",
    3,
    "neural-cleanse: NOT_APPLICABLE: 2 classes; an outlier among norms needs at least 6",
    lambda given: given.audit(given.model(two_classes), data=given.data(first_two)),
)
case(
    "an operator is foreign",
    4,
    "node 'f' uses operator 'Flatten' of domain 'custom.ops', opset ..., whose code is not part of ONNX Runtime; "
    "export the model with standard operators",
    foreign(node=make_node("Flatten", ["x"], ["y"], name="f", domain="custom.ops")),
)
case(
    "an operator does not exist",
    4,
    "onnx.checker refuses the file: node 'f': operator 'Flaten' of domain 'ai.onnx', opset ...: ONNX has no such "
    "operator; export it again",
    foreign(node=make_node("Flaten", ["x"], ["y"], name="f")),
)
case(
    "the runtime lacks an operator",
    4,
    "ONNX Runtime cannot load the file: Could not find an implementation for Relu(14) node with name 'last 1' (node "
    "'last 1': operator 'Relu' of domain 'ai.onnx', opset 21); export it again, or use another onnxruntime",
    changed(no_kernel),
)
case(
    "the shadow lacks an operator",
    3,
    "neural-cleanse: NOT_MEASURED: the shadow is not certified: node 'last 0': operator 'RandomUniformLike' of domain "
    "'ai.onnx', opset 21: no function is registered for it; register it with qdefense.converters.shadow.operator, or "
    "export the model without it",
    scanned(with_noise),
)
case(
    "the opset is too new",
    4,
    "ONNX Runtime cannot load the file: ...Opset 99 is under development...Current official support for domain "
    "ai.onnx is till opset ...; export it again, or use another onnxruntime",
    changed(opset(99)),
)
case(
    "the IR version is too new",
    4,
    "onnx.checker refuses the file: Your model ir_version 99 is higher than the checker's (...); export it again",
    changed(ir_version),
)
case(
    "the nodes are unsorted",
    4,
    "onnx.checker refuses the file: Nodes in a graph must be topologically sorted, however input 'flat' of node: "
    "name: gemm OpType: Gemm is not output of...; export it again",
    changed(unsorted),
)
case(
    "the nodes are a cycle",
    4,
    "onnx.checker refuses the file: Nodes in a graph must be topologically sorted, however input 'flat' of node: "
    "name: conv OpType: Conv is not output of...; export it again",
    changed(cyclic),
)
case(
    "a weight is NaN",
    3,
    "neural-cleanse: NOT_MEASURED: the shadow is not certified: clean images: top-1 agreement 0.0000, RMS "
    "difference not finite; cause: numerics, the session's own logits are not finite, as are the weights 'weight'",
    scanned(first_weight(np.nan)),
)
case(
    "a weight is infinite",
    3,
    "neural-cleanse: NOT_MEASURED: the shadow is not certified: clean images: top-1 agreement 0.0000, RMS "
    "difference not finite; cause: numerics, the session's own logits are not finite, as are the weights 'weight'",
    scanned(first_weight(np.inf)),
)
case(
    "the output does not depend on the input",
    3,
    "neural-cleanse: NOT_MEASURED: the shadow is not certified: gradients: 0.0% of rows non-zero, 100.0% finite, "
    "100.0% right in float64; no gradient reaches the images: the answers may not depend on them",
    scanned(constant),
)
case(
    "the labels are random",
    3,
    "clean accuracy on 320 images is ...%, and ...% at best as other files are driven, where guessing gives 12.5%; "
    "check the labels and how the file is driven (`qdefense inspect` shows the contract)",
    lambda given: given.audit(None, "--defense", given.toy.scan, data=given.data(shuffled)),
)
case(
    "the names are in another order",
    3,
    "clean accuracy on 160 images is ...% as the file is driven now, but ...% with classes in the order that half "
    "of the images show: output 0 is 'zone 1', output 1 is 'zone 2', output 2 is 'zone 3', output 3 is 'zone 4' and "
    "4 more (--classes names them); say how the model was trained",
    lambda given: given.audit(None, "--defense", given.toy.scan, data=given.data(rolled)),
)
case(
    "all images are of one class",
    3,
    "neural-cleanse: NOT_MEASURED: 0 of 160 images are outside the most frequent class; at least 50 are needed",
    lambda given: given.audit(None, "--defense", given.toy.scan, data=given.data(of_one_class)),
)
case(
    "images repeat each other",
    3,
    "neural-cleanse: NOT_MEASURED: 40 clean images; at least 200 are needed",
    lambda given: given.audit(None, "--defense", given.toy.scan, data=given.data(repeated)),
)
case(
    "there are 50 images",
    3,
    "neural-cleanse: NOT_MEASURED: 50 clean images; at least 200 are needed",
    lambda given: given.audit(None, "--defense", given.toy.scan, data=given.toy.few),
)
case(
    "there are no images",
    2,
    "npz data.npz: 'images' is (0, 16, 16, 3) and 'labels' (0,), expected N images in 4 dimensions and N labels, at "
    "least one",
    lambda given: given.audit(
        data=given.arrays(images=np.zeros((0, 16, 16, 3), np.uint8), labels=np.zeros(0, np.int64))
    ),
)
case(
    "the images have no pixels, and would be resized",
    2,
    "npz data.npz: images of 0x16 have no pixels; save them again",
    lambda given: given.audit(
        None, "--resize", "bilinear", data=given.arrays(images=np.zeros((320, 0, 16, 3), np.uint8))
    ),
)
case(
    "a label is no class",
    2,
    "npz data.npz: labels run from 0 to 8, but there are 8 class names; number the classes from 0, and name each",
    lambda given: given.audit(data=given.arrays(labels=np.arange(320) % 9)),
)
case(
    "a label is negative",
    2,
    "npz data.npz: labels run from -1 to 7, but there are 8 class names; number the classes from 0, and name each",
    lambda given: given.audit(data=given.arrays(labels=np.arange(320) % 9 - 1)),
)
case(
    "there are nine classes",
    2,
    "npz data.npz has 9 classes, the model answers with 8; give the data set that the model was made for",
    lambda given: given.audit(
        data=given.data(lambda images: replace(images, class_names=(*images.class_names, "zone 8")))
    ),
)
case(
    "a class name is no UTF-8",
    2,
    "npz data.npz: the name of class 7, 'zone\\udcff', is not UTF-8; rename it",
    lambda given: given.audit(
        data=given.arrays(class_names=np.array([*(f"zone {number}" for number in range(7)), "zone\udcff"]))
    ),
)
case(
    "the images have another size",
    2,
    "npz data.npz: images are 32x16, the model takes 16x16; give data of that size, or say how they were resized "
    "for the model: --resize bilinear",
    lambda given: given.audit(data=given.data(larger)),
)
case(
    "the images have several sizes",
    2,
    "images images: images differ in size: 'a/1.png' is 20x20 and 'a/0.png' is 16x16; resize them to one size: "
    "--resize bilinear",
    lambda given: given.audit(data=given.pictures("a/0.png", "a/1.png", "b/0.png", sizes=(16, 20, 16))),
)
case(
    "a pixel is NaN",
    2,
    "npz data.npz: 'images' holds values that are no numbers (NaN); save uint8, or floats in [0, 1]",
    lambda given: given.audit(data=given.arrays(images=np.full((320, 16, 16, 3), np.nan, np.float32))),
)
case(
    "pixels run to 255 as floats",
    2,
    "npz data.npz: 'images' runs from 255 to 255, expected uint8, or floats in [0, 1]; undo the normalisation, or "
    "save uint8",
    lambda given: given.audit(data=given.arrays(images=np.full((320, 16, 16, 3), 255, np.float32))),
)
case(
    "the images are Python objects",
    2,
    "npz data.npz: holds Python objects, which are never loaded; save plain arrays: integers, floats or unicode, "
    "not dtype object",
    lambda given: given.audit(data=given.arrays(images=np.array([print, None]))),
)
case(
    "the npz claims 10^12 numbers",
    2,
    "npz data.npz: not readable as npz (...); write it again with numpy.savez",
    lambda given: given.audit(data=given.file("data.npz", huge_header())),
)
case(
    "the npz is no archive",
    2,
    "npz data.npz: not an npz archive; write it with numpy.savez",
    lambda given: given.audit(data=given.file("data.npz", "images")),
)
case(
    "the parquet file has no images",
    2,
    "parquet data.parquet: no image column (a struct with bytes) among 'label' (int64), 'text' (string); save the "
    "data with one",
    lambda given: given.audit(data=parquet(given)),
)
case(
    "the parquet file is none",
    2,
    "data.parquet: not readable as parquet (...); fetch it again",
    lambda given: given.audit(data=given.file("data.parquet", "PAR1")),
)
case(
    "the data folder is empty",
    2,
    "'nothing': unknown data format; looked for 'signs' (built in)...; the folder holds nothing",
    lambda given: given.audit(data=empty_folder(given)),
)
case(
    "the data are missing",
    2,
    "'nowhere': no such file or folder; data is 'signs' (built in); a .parquet, .npz or ...",
    lambda given: given.audit(data="nowhere"),
)
case(
    "the data are the model",
    2,
    "'{model}': unknown data format; looked for 'signs' (built in)...; the file ends in '.onnx'",
    lambda given: given.audit(data=given.toy.clean),
)
case(
    "an image is broken",
    2,
    "images images: 'b/1.png' is no readable image (image file is truncated); replace or remove it",
    lambda given: given.audit(data=broken_picture(given)),
)
case(
    "the images have no labels",
    3,
    "neural-cleanse: NOT_MEASURED: the images have no labels, so the clean accuracy was not measured; give labelled "
    "images, or vouch for it with --expected-accuracy",
    lambda given: given.audit(data=given.pictures(*(f"{place}.png" for place in range(200)))),
)
case(
    "the split does not exist",
    2,
    "npz toy.npz: no split 'train'; it has no splits, leave the split out",
    lambda given: given.audit(None, "--split", "train"),
)
case(
    "the head is said to be logits and is a softmax",
    2,
    "the contract says that output 'logits' holds logits, but the graph ends in Softmax; say --head softmax",
    changed(ending_in("Softmax"), options=["--head", "logits"]),
)
case(
    "the head is said to be a softmax and is not",
    3,
    "output 'logits' is read as softmax, but the probabilities of an image sum to ...; say --head logits",
    changed(unsaid, options=["--head", "softmax"]),
)
case(
    "the file is multi-label",
    3,
    "neural-cleanse: NOT_APPLICABLE: the file answers with a sigmoid per class: a multi-label model has no single "
    "target class to look for",
    changed(ending_in("Sigmoid")),
)
case(
    "the layout is not the graph's",
    2,
    "input 'image' is [None, 3, 16, 16], which is not NHWC with 3 channels; check --layout",
    changed(unsaid, options=["--layout", "NHWC"]),
)
case(
    "the size is not the graph's",
    2,
    "the contract says height 32, the graph has 16; correct the contract",
    changed(options=["--size", "32x32"]),
)
case(
    "the size is none",
    2,
    "Invalid value for --size: '32' is not HEIGHTxWIDTH, such as 32x32",
    changed(options=["--size", "32"]),
)
case(
    "the range is upside down",
    2,
    "the contract given for 'model.onnx' does not hold: range: 255 to 0 is no range from low to high; correct the "
    "options",
    changed(options=["--range", "255,0"]),
)
case(
    "the range is one number",
    2,
    "Invalid value for --range: '255' is not 2 numbers with commas between",
    changed(options=["--range", "255"]),
)
case(
    "the mean is two numbers",
    2,
    "Invalid value for --mean: '0.5,0.5' is not 1 or 3 numbers with commas between",
    changed(options=["--mean", "0.5,0.5"]),
)
case(
    "the mean is no number",
    2,
    "Invalid value for --mean: 'imagenet' is not 1 or 3 numbers with commas between",
    changed(options=["--mean", "imagenet"]),
)
case(
    "the mean is NaN",
    2,
    "the contract given for 'model.onnx' does not hold: mean: a value is not finite; correct the options",
    changed(options=["--mean", "nan"]),
)
case(
    "the std is zero",
    2,
    "the contract given for 'model.onnx' does not hold: std: a standard deviation must be above 0; correct the options",
    changed(options=["--std", "0"]),
)
case(
    "--input names nothing",
    2,
    "the contract names the input 'pixels', the graph has ['image']; name one of them",
    changed(options=["--input", "pixels"]),
)
case(
    "--output names nothing",
    2,
    "the contract names the output 'scores', the graph has ['logits']; name one of them",
    changed(options=["--output", "scores"]),
)
case(
    "--fixed-input names nothing",
    2,
    "the contract names the input 'training', the graph has ['image']; name one of them",
    changed(options=["--fixed-input", "training=0"]),
)
case(
    "--fixed-input has no number",
    2,
    "Invalid value for --fixed-input: 'training=maybe' is not NAME=NUMBER",
    changed(options=["--fixed-input", "training=maybe"]),
)
case(
    "a fixed input cannot hold the value",
    2,
    "input 'training' holds bool, which can't hold 0.5; give it another value with --fixed-input",
    changed(second_input, options=["--fixed-input", "training=0.5"]),
)
case(
    "--classes are too few",
    2,
    "output 'logits' answers with 8 numbers per image, and 2 class names are given; give 8 names with --classes, or "
    "name another output with --output",
    changed(options=["--classes", "a,b"]),
)
case(
    "--classes is no file",
    2,
    "names.txt: No such file or directory; check the path and its permissions",
    changed(options=["--classes", "names.txt"]),
)
case(
    "--classes names one twice",
    2,
    "the contract given for 'model.onnx' does not hold: class_names: class 'a' is named twice; correct the options",
    changed(options=["--classes", "a,a,b,c,d,e,f,g"]),
)
case(
    "the sidecar has an unknown key",
    2,
    "'c.toml': order: there is no such entry; a contract may hold input_name, output_name, layout, channels, "
    "height, width, resize, range, mean, std, head, class_names, fixed_inputs",
    lambda given: given.audit(given.model(), "--contract", given.file("c.toml", 'order = "bgr"\n')),
)
case(
    "the sidecar is no TOML",
    2,
    "'c.toml' is no TOML file: ...; correct it or remove it",
    lambda given: given.audit(given.model(), "--contract", given.file("c.toml", "layout: NCHW\n")),
)
case(
    "the sidecar is missing",
    2,
    "c.toml: No such file or directory; check the path and its permissions",
    lambda given: given.audit(given.model(), "--contract", "c.toml"),
)
case(
    "the sidecar is wrong",
    2,
    "'model.contract.toml': mean: expected a list; a contract may hold input_name, output_name, layout, channels, "
    "height, width, resize, range, mean, std, head, class_names, fixed_inputs",
    beside,
)
case(
    "the metadata are no contract",
    2,
    "metadata 'qdefense.contract' is not a contract: input_name: Field required; export the model again or remove it",
    changed(lambda model: setattr(model.metadata_props[0], "value", "{}")),
)
case(
    "the calibration is none",
    2,
    "c.json: schema version None, this one reads 1.x; make it again with qdefense calibrate",
    lambda given: given.audit(None, "--calibration", given.file("c.json", "{}")),
)
case(
    "the false-alarm rate is 1",
    2,
    "Invalid value for '--false-alarm-rate': 1.0 is not in the range 0<x<1.",
    lambda given: given.audit(None, "--false-alarm-rate", "1"),
)
case(
    "the expected accuracy is no share",
    2,
    "Invalid value for '--expected-accuracy': 93.0 is not in the range 0<=x<=1.",
    lambda given: given.audit(None, "--expected-accuracy", "93"),
)
case(
    "the accuracy is not the expected one",
    3,
    "clean accuracy is ...%, 100.0% was expected; check how the file is driven (`qdefense inspect` shows the "
    "contract) and the labels",
    lambda given: given.audit(None, "--expected-accuracy", "1", data=given.data(partly_wrong)),
)
case(
    "the defense is unknown",
    2,
    "there is no defense 'xyzzy'; known: activation-clustering, fine-pruning, neural-cleanse, spectral-signatures, "
    "strip",
    lambda given: given.audit(None, "--defense", "xyzzy"),
)
case(
    "the defense is misspelt",
    2,
    "there is no defense 'neural-clense'; did you mean 'neural-cleanse'?",
    lambda given: given.audit(None, "--defense", "neural-clense"),
)
case(
    "a setting is misspelt",
    2,
    "defense 'neural-cleanse:bugdet=quick': there is no setting 'bugdet'; did you mean 'budget'?",
    lambda given: given.audit(None, "--defense", "neural-cleanse:bugdet=quick"),
)
case(
    "a setting is out of range",
    2,
    "defense 'neural-cleanse:learning-rate=-1': learning_rate: Input should be greater than 0",
    lambda given: given.audit(None, "--defense", "neural-cleanse:learning-rate=-1"),
)
case(
    "the limit is 0",
    2,
    "Invalid value for '--limit': 0 is not in the range x>=1.",
    lambda given: given.audit(None, "--limit", "0"),
)
case(
    "the memory limit is no size",
    2,
    "Invalid value for '--memory-limit': 'much' is no size; give a number with KiB, MiB or GiB, such as 4GiB",
    lambda given: given.audit(None, "--memory-limit", "much"),
)
case(
    "the memory limit is too small for torch",
    3,
    "the worker was killed by SIGABRT; was there too little memory (--memory-limit), or does the file end its "
    "reader? -v shows its last words",
    lambda given: given.audit(None, "--memory-limit", "150MiB"),
)
case(
    "the file wants more memory than the limit",
    3,
    "not enough memory: ONNX Runtime refused an input of shape (64, 3, 16, 16): Non-zero status code returned while "
    "running ConstantOfShape node. Name:'huge' Status Message: Failed to allocate memory for requested buffer of size "
    "4294967296; raise --memory-limit, or read fewer images with --limit",
    changed(huge, options=["--memory-limit", "2GiB"]),
)
case(
    "the file ends the process that reads it",
    3,
    "the worker was killed by SIGABRT; was there too little memory (--memory-limit), or does the file end its "
    "reader? -v shows its last words",
    changed(ending_its_reader),
)
case(
    "the worker is killed",
    3,
    "the worker was killed by SIGKILL; was there too little memory (--memory-limit), or does the file end its "
    "reader? -v shows its last words",
    killed,
)
case(
    "the output folder is a file",
    2,
    "Invalid value for '--output-dir': Directory 'out' is a file.",
    lambda given: given.audit(None, "--output-dir", given.file("out", "")),
)
case(
    "the output folder cannot be written",
    2,
    "/proc/self/report.json: No such file or directory; check the path and its permissions",
    lambda given: given.audit(None, "--output-dir", "/proc/self"),
)
case(
    "html goes to stdout",
    2,
    "html and several formats need --output-dir; one text format alone goes to stdout",
    lambda given: [*given.audit(), "--format", "html"],
)
case(
    "the file's name is hostile",
    4,
    "the file is empty (0 bytes); export the model again",
    lambda given: given.audit(given.file("m\n\x1b[2Jerror: fine\u202e.onnx", "")),
)
case(
    "a missing file's name is hostile",
    2,
    "m \\x1b[2Jerror: fine\\u202e.onnx: No such file or directory; check the path and its permissions",
    lambda given: given.audit("m\n\x1b[2Jerror: fine\u202e.onnx"),
)
case(
    "a node's name is hostile",
    4,
    "node 'conv\\n\\x1b[2J\\u202e' uses operator 'Conv' of domain 'evil\\x1b[31m\\nerror: all is well', opset not "
    "stated, whose code is not part of ONNX Runtime; export the model with standard operators",
    changed(named_nodes),
)
case(
    "the data's name is hostile",
    2,
    "npz d \\x1b[2J.npz: not an npz archive; write it with numpy.savez",
    lambda given: given.audit(data=given.file("d\n\x1b[2J.npz", "")),
)
case(
    "inspect: the model is missing",
    2,
    "no-such.onnx: No such file or directory; check the path and its permissions",
    lambda _: ["inspect", "no-such.onnx"],
)
case(
    "inspect: the model is a text",
    4,
    "the file (5 bytes) is no ONNX model or is cut short; check the path and export it again",
    lambda given: ["inspect", given.file("model.onnx", "hello")],
)
case(
    "inspect: the file ends the process",
    3,
    "the worker was killed by SIGABRT; was there too little memory (--memory-limit), or does the file end its "
    "reader? -v shows its last words",
    lambda given: ["inspect", given.model(ending_its_reader)],
)
case(
    "shadow: there are 50 images",
    3,
    "shadow NOT certified: 50 clean images; the certificate needs 256",
    lambda given: ["shadow", str(given.toy.clean), "--data", str(given.toy.few)],
)
case(
    "shadow: the data are missing",
    2,
    "'nowhere': no such file or folder; data is 'signs' (built in); a .parquet, .npz or ...",
    lambda given: ["shadow", str(given.toy.clean), "--data", "nowhere"],
)
case(
    "quantize: the model is a text",
    4,
    "the file (5 bytes) is no ONNX model or is cut short; check the path and export it again",
    lambda given: ["quantize", given.file("m.onnx", "hello"), "--scheme", "int8-dynamic", "-o", "q.onnx"],
)
case(
    "quantize: there are 10 images",
    2,
    "calibration has 10 images, fewer than 16; use a few hundred",
    lambda given: [
        "quantize",
        str(given.toy.clean),
        "--scheme",
        "int8-static",
        "--calibration",
        str(given.toy.data),
        "--limit",
        "10",
        "-o",
        "q.onnx",
    ],
)
case(
    "quantize: the images have another size",
    2,
    "calibration has shape (16, 3, 32, 32), the model's input is [None, 3, 16, 16]; give images of that size, or "
    "say --resize bilinear",
    lambda given: [
        "quantize",
        str(given.toy.clean),
        "--scheme",
        "int8-static",
        "--calibration",
        "signs",
        "--limit",
        "16",
        "-o",
        "q.onnx",
    ],
)
case(
    "quantize: the folder is missing",
    2,
    "no/q.onnx: No such file or directory; check the path and its permissions",
    lambda given: ["quantize", str(given.toy.clean), "--scheme", "int8-dynamic", "-o", "no/q.onnx"],
)


def quantizing(*options: str, model: str | None = None, target: str = "q.onnx") -> Build:
    """A quantization of the toy model; ``{data}`` stands for its images."""
    return lambda given: [
        "quantize",
        model or str(given.toy.clean),
        *(option.replace("{data}", str(given.toy.data)) for option in options),
        "-o",
        target,
    ]


case(
    "quantize: dynamic activations are to be signed",
    2,
    "int8-dynamic computes unsigned activations only; choose the types u8u8 or u8s8",
    quantizing("--scheme", "int8-dynamic", "--types", "s8s8"),
)
case(
    "quantize: unsigned weights are to be reduced",
    2,
    "u8u8 has unsigned weights, which do not saturate, so that a reduced range would only lose a bit; leave it out, or "
    "choose signed weights (u8s8)",
    quantizing("--scheme", "int8-static", "--types", "u8u8", "--reduce-range"),
)
case(
    "quantize: the scheme has no such setting",
    2,
    "int4 has no setting format; it has per channel, block size, symmetric",
    quantizing("--scheme", "int4", "--format", "qdq"),
)
case(
    "quantize: blocks and channels",
    2,
    "weights have a scale per channel or per block, not both; leave one of them out",
    quantizing("--scheme", "int4", "--per-channel", "--block-size", "16"),
)
case(
    "quantize: four bits per tensor",
    2,
    "int4 has no scale per tensor, which 16 levels are too few for; leave it out, or give a block size of 16 or 32",
    quantizing("--scheme", "int4", "--per-tensor"),
)
case(
    "quantize: another block size",
    2,
    "Invalid value for '--block-size': '24' is not one of '16', '32'.",
    quantizing("--scheme", "int4", "--block-size", "24"),
)
case(
    "quantize: a percentile of the whole range",
    2,
    "minmax takes the whole range and no percentile; leave one of them out",
    quantizing("--scheme", "int8-static", "--method", "minmax", "--percentile", "99"),
)
case(
    "quantize: the percentile is no number",
    2,
    "Invalid value for '--percentile': 'nan' is no number in the range 50<x<=100.",
    quantizing("--scheme", "int8-static", "--percentile", "nan"),
)
case(
    "quantize: no block is as long as that",
    2,
    "no weight has 32 or more values along its reduction axis, so that no block would be made; leave the block size "
    "out",
    lambda given: [
        "quantize",
        given.file("m.onnx", narrow_product()),
        "--scheme",
        "int4",
        "--block-size",
        "32",
        "-o",
        "q.onnx",
    ],
)
case(
    "quantize: int4-a8 wants images",
    2,
    "int4-a8 needs calibration images; name a few hundred clean ones with --calibration",
    quantizing("--scheme", "int4-a8"),
)
case(
    "quantize: the folder that is to be written to is missing",
    2,
    "no/: No such file or directory; check the path and its permissions",
    quantizing("--scheme", "int4", target="no/"),
)
case(
    "quantize: over the model",
    2,
    "m.onnx is the model itself, which the result would replace; write to another file",
    lambda given: [
        "quantize",
        given.file("m.onnx", given.toy.clean.read_bytes()),
        *("--scheme", "int4", "-o", "./m.onnx"),
    ],
)
case(
    "quantize: a drop without images",
    2,
    "the accuracy drop cannot be measured: it needs labelled images; give them with --calibration",
    quantizing("--scheme", "int4", "--max-accuracy-drop", "1"),
)
case(
    "quantize: images that calibrate nothing and fit nothing",
    2,
    "the accuracy drop cannot be measured: signs test: images are 32x32, the model takes 16x16; give data of that "
    "size, or say how they were resized for the model: --resize bilinear",
    quantizing("--scheme", "int4", "--calibration", "signs", "--limit", "16"),
)
case(
    "quantize: a drop on images without labels",
    2,
    "the accuracy drop cannot be measured: images images: there are no labelled images; give some with --calibration",
    lambda given: [
        "quantize",
        str(given.toy.clean),
        *("--scheme", "int4", "--calibration", given.pictures("0.png", "1.png"), "-o", "q.onnx"),
    ],
)
case(
    "quantize: the labels are wrong",
    2,
    "the accuracy drop cannot be measured: the FP32 file is right on ...% of 320 images, near chance (12.5%), so that "
    "a drop could not be seen: wrong labels, order or pixels?",
    lambda given: [
        "quantize",
        str(given.toy.clean),
        *("--scheme", "int4", "--calibration", given.data(mislabelled), "--limit", "320", "-o", "q.onnx"),
    ],
)
case(
    "quantize: the result loses too much",
    1,
    "int4-per-channel-symmetric is refused: 100.00% in FP32, 94.14% quantized, a drop of 5.86 points on 256 "
    "calibration images (npz toy.npz); at most 2 points were allowed",
    lambda given: [
        "quantize",
        str(given.toy.backdoored),
        *("--scheme", "int4", "--calibration", str(given.toy.data), "-o", "q.onnx"),
    ],
)
case(
    "train: the images have no labels",
    2,
    "images images: the images have no labels; put those of each class into a folder",
    lambda given: ["train", "--data", given.pictures(*(f"{place}.png" for place in range(128))), "-o", "m.onnx"],
)
case(
    "train: the data are the model",
    2,
    "'{model}': unknown data format; looked for 'signs' (built in)...; the file ends in '.onnx'",
    lambda given: ["train", "--data", str(given.toy.clean), "-o", "m.onnx"],
)
case(
    "train: there are fewer images than a batch",
    2,
    "npz few.npz: 50 images are fewer than one batch of 128; give more",
    lambda given: ["train", "--data", str(given.toy.few), "-o", "m.onnx"],
)
case(
    "train: the attack is misspelt",
    2,
    "there is no attack 'badnet'; did you mean 'badnets'?",
    lambda given: ["train", "--data", str(given.toy.few), "--attack", "badnet", "-o", "m.onnx"],
)
case(
    "train: the target class does not exist",
    2,
    "badnets: target class 8, but npz toy.npz has classes 0 to 7",
    lambda given: ["train", "--data", str(given.toy.data), "--attack", "badnets:target-class=8", "-o", "m.onnx"],
)
case(
    "calibrate: the model is missing",
    2,
    "no-such.onnx: No such file or directory; check the path and its permissions",
    lambda given: ["calibrate", "no-such.onnx", "--data", str(given.toy.data), "-o", "c.json"],
)
case(
    "calibrate: the model is a text",
    4,
    "m.onnx: the file (5 bytes) is no ONNX model or is cut short; check the path and export it again",
    lambda given: ["calibrate", given.file("m.onnx", "hello"), "--data", str(given.toy.data), "-o", "c.json"],
)
case(
    "calibrate: the threshold is set",
    2,
    "'neural-cleanse:threshold=2' sets the threshold, which calibration is to find; leave it out",
    lambda given: [
        "calibrate",
        str(given.toy.clean),
        "--data",
        str(given.toy.data),
        "--defense",
        "neural-cleanse:threshold=2",
        "-o",
        "c.json",
    ],
)
case(
    "data show: the data are missing",
    2,
    "'nowhere': no such file or folder; data is 'signs' (built in); a .parquet, .npz or ...",
    lambda _: ["data", "show", "nowhere"],
)
case(
    "data show: only a size is given",
    2,
    "--resize and --size go together, such as --resize bilinear --size 32x32",
    lambda given: ["data", "show", str(given.toy.data), "--size", "8x8"],
)
case(
    "data show: the images are grey",
    0,
    "data       images images...read as    image folder: ...note       converted to RGB: 2 of 2 images (2 L)...",
    lambda given: ["data", "show", given.pictures("a/0.png", "b/0.png", mode="L")],
)


# --- what every case has to keep --------------------------------------------------------------------------------------

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file."""
    facts = {str(path.relative_to(folder)): path.lstat() for path in folder.rglob("*")}
    return {name: (fact.st_size, fact.st_mtime_ns) for name, fact in facts.items() if not stat.S_ISDIR(fact.st_mode)}


def told(output: str, errors: str) -> str:
    """What a command without a report says: a result on stdout, or one error on stderr, alone or below its usage."""
    assert bool(output) is not bool(errors)
    if not errors:
        return output.removesuffix("\n")
    found = re.fullmatch(r"(?:Usage: qdefense [^\n]+\n(?:  [^\n]+\n)*Try [^\n]+\n\nE|e)rror: ([^\n]+)\n", errors)
    assert found, errors
    return found[1]


@pytest.mark.parametrize("name", list(CASES))
def test_bad_input_gives_its_code_and_one_line_and_leaves_nothing_half_written_when(
    name: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    case = CASES[name]
    folder, out, temporary = (tmp_path / part for part in ("given", "out", "temporary"))
    for place in (folder, out, temporary):
        place.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    for earlier in (REPORT, PAGE):
        (out / earlier).write_bytes(EARLIER)
    command = case.build(Given(folder=folder, toy=toy, monkeypatch=monkeypatch))
    if reporting := command[0] == "audit" and not {"--output-dir", "--format"} & set(command):
        command += ["--output-dir", str(out), "--format", "json", "--format", "html"]
    before = state_of(folder)

    code = run(command)

    output, errors = capfd.readouterr()
    written = {path.name: path.read_bytes() for path in out.iterdir()}
    assert set(written) == {REPORT, PAGE}
    if reporting and code in (3, 4):
        gate = json.loads(written[REPORT])["gate"]
        assert output.startswith(f"{gate['outcome']}  (exit code {code})\n  ")
        assert not CONTROL.search(output)
        assert errors == ""
        message = gate["reasons"][0]
        assert gate["exit_code"] == code
        assert written[PAGE].rstrip().endswith(b"</html>")
        assert not CONTROL.search(written[PAGE].decode())
    else:
        message = told(output, errors)
        assert set(written.values()) == {EARLIER}
        assert not CONTROL.search(output + errors)
    expected = (
        case.message.replace("{model}", str(toy.clean)).replace("{folder}", str(folder)).replace("{out}", str(out))
    )
    pattern = ".*".join(map(re.escape, expected.split("...")))
    assert re.fullmatch(pattern, message, re.DOTALL), message
    assert code == case.code
    assert state_of(folder) == before
    assert list(temporary.iterdir()) == []


CHANGED = """
import pathlib, sys
def change(event, arguments):
    if event == "open" and str(arguments[0]).endswith("few.npz"):
        for name in ("model.onnx", "weights.bin"):
            pathlib.Path(name).write_bytes(b"another file")
sys.addaudithook(change)
"""


def test_audit_judges_and_digests_what_it_read_when_the_files_change_under_it(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    given = Given(folder=tmp_path, toy=toy, monkeypatch=monkeypatch)
    (tensor,) = (tensor for tensor in onnx.load(toy.clean).graph.initializer if tensor.name == "weight")
    files = [given.file("weights.bin", tensor.raw_data), given.model(external("weights.bin"))]
    digests = [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in files]
    given.worker_runs(CHANGED)
    assert run([*given.audit("model.onnx", "--defense", toy.scan, data=toy.few), "--format", "json"]) == 3
    assert [(tmp_path / name).read_bytes() for name in files] == [b"another file"] * 2
    report = json.loads(capfd.readouterr().out)
    subject = report["subject"]
    assert [subject["external_files"]["weights.bin"], subject["sha256"]] == digests
    assert subject["clean_accuracy"]["value"] > 0.8
    assert report["gate"]["reasons"] == ["neural-cleanse: NOT_MEASURED: 50 clean images; at least 200 are needed"]
