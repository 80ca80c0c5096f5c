from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from qdefense.converters.contract import InputContract, write_contract
from qdefense.data.images import ImageSet, Pixels
from qdefense.data.npz import save_npz

if TYPE_CHECKING:
    from torch import nn

REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real sets, for tests marked ``real``; missing is a failure where data is required."""
    folder = Path(os.environ.get("QDEFENSE_DATA", REPOSITORY.parent / "shared" / "data"))
    missing = [name for name in ("cifar10", "gtsrb") if not (folder / name).is_dir()]
    if missing:
        reason = f"{folder} has no {' and no '.join(missing)}; set QDEFENSE_DATA"
        if os.environ.get("QDEFENSE_REQUIRE_DATA") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def make_noise() -> Callable[..., ImageSet]:
    """``make_noise(count, size=8, classes=4, seed=0)``: random uint8 images; image i has the label i modulo classes."""

    def make(count: int, size: int = 8, classes: int = 4, seed: int = 0) -> ImageSet:
        rng = np.random.default_rng(seed)
        return ImageSet(
            images=rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8),
            labels=np.arange(count, dtype=np.int64) % classes,
            class_names=tuple(f"class {index}" for index in range(classes)),
            source="noise",
        )

    return make


@dataclass(frozen=True, kw_only=True)
class ZooFile:
    """A poisoned model of one epoch (it knows next to nothing): the file, and the same network trained again."""

    path: Path
    module: nn.Module
    poison_indices: tuple[int, ...]
    dataset: ImageSet


@pytest.fixture(scope="session")
def zoo_file(tmp_path_factory: pytest.TempPathFactory) -> ZooFile:
    """The one trained and exported resnet8 of the session; do not change its files."""
    from qdefense.attacks import ATTACKS  # noqa: PLC0415 (tests without torch start fast)
    from qdefense.data.opening import open_data  # noqa: PLC0415
    from qdefense.models import Recipe  # noqa: PLC0415
    from qdefense.training import train  # noqa: PLC0415
    from qdefense.zoo import train_artifact  # noqa: PLC0415

    dataset = open_data("signs", split="train", limit=120)
    recipe, spec = Recipe(epochs=1, batch_size=40), "badnets:target-class=7"
    path = tmp_path_factory.mktemp("zoo") / "model.onnx"
    train_artifact(dataset, path, architecture="resnet8", recipe=recipe, attack=spec, seed=3, threads=1)
    again = train(dataset, architecture="resnet8", recipe=recipe, attack=ATTACKS.create(spec), seed=3, threads=1)
    return ZooFile(
        path=path,
        module=again.module,
        poison_indices=tuple(again.poison_indices.tolist()),
        dataset=dataset,
    )


@dataclass(frozen=True, kw_only=True)
class SmallSigns:
    """The built-in signs averaged 2x2 down to 16x16, still uint8: what a network learns in seconds."""

    train: ImageSet
    test: ImageSet


def _at_half_size(images: ImageSet) -> ImageSet:
    count, height, width = images.images.shape[:3]
    blocks = images.images.reshape(count, height // 2, 2, width // 2, 2, 3).astype(np.uint16)
    return replace(images, images=(blocks.sum(axis=(2, 4)) // 4).astype(np.uint8))


@pytest.fixture(scope="session")
def small_signs() -> SmallSigns:
    """3,000 images to train on and 600 to test on."""
    from qdefense.data.opening import open_data  # noqa: PLC0415 (tests without data start fast)

    return SmallSigns(
        train=_at_half_size(open_data("signs", split="train", limit=3000, seed=0)),
        test=_at_half_size(open_data("signs", split="test", limit=600, seed=0)),
    )


SMALL_NETWORKS = {"first": (0, None), "second": (1, "badnets:size=2,target-class=7")}
"""Seed and attack of the networks on `small_signs`, fixed before their first audit and never changed."""


@pytest.fixture(scope="session")
def small_files(small_signs: SmallSigns) -> dict[str, bytes]:
    """The networks above, each in FP32 (``first``) and quantized (``first.int8-static``, ``first.int8-dynamic``)."""
    from qdefense.attacks import ATTACKS  # noqa: PLC0415
    from qdefense.converters.export import export_model  # noqa: PLC0415
    from qdefense.converters.quantize import quantize  # noqa: PLC0415
    from qdefense.models import Recipe  # noqa: PLC0415
    from qdefense.training import train  # noqa: PLC0415

    files: dict[str, bytes] = {}
    for name, (seed, spec) in SMALL_NETWORKS.items():
        attack = None if spec is None else ATTACKS.create(spec)
        trained = train(
            small_signs.train, architecture="resnet8", recipe=Recipe(epochs=8), attack=attack, seed=seed, threads=1
        )
        data = export_model(trained.module, height=16, width=16, class_names=small_signs.train.class_names)
        calibration = small_signs.train.pixels[:256]
        files |= {
            name: data,
            f"{name}.int8-static": quantize(data, "int8-static", calibration=calibration),
            f"{name}.int8-dynamic": quantize(data, "int8-dynamic"),
        }
    return files


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """A stranger's classifier of `small_signs`: plain torch and ONNX Runtime; nothing in the file says how to use it.

    It takes NHWC images scaled by ImageNet's mean and std, which only ``said`` tells, and ends in a softmax. ``single``
    is the same network exported for one image at a time. Both are u8 x s8 per channel, in QDQ; ``plain`` is in float.
    """

    plain: Path
    quantized: Path
    single: Path
    data: Path
    said: tuple[str, ...] = ("--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225")


@pytest.fixture(scope="session")
def foreign(small_signs: SmallSigns, tmp_path_factory: pytest.TempPathFactory) -> Foreign:
    """The stranger's files; do not change them."""
    folder = tmp_path_factory.mktemp("foreign")
    files = Foreign(
        plain=folder / "net.onnx",
        quantized=folder / "net.int8.onnx",
        single=folder / "net.single.int8.onnx",
        data=folder / "test.npz",
    )
    save_npz(files.data, small_signs.test)
    calibration = _as_the_stranger_does(small_signs.train.take(np.arange(64)))
    network = _strangers_network(small_signs.train)
    for path, batch in ((files.quantized, 0), (files.single, 1)):
        plain = files.plain if batch == 0 else folder / "net.single.onnx"
        _export_as_of_old(network, plain, batch)
        _quantize_as_documented(plain, path, calibration)
    return files


def _as_the_stranger_does(images: ImageSet) -> Pixels:
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    scaled: Pixels = (images.images.astype(np.float32) / 255 - mean) / std
    return scaled


def _strangers_network(images: ImageSet) -> nn.Module:
    import torch  # noqa: PLC0415
    from torch import Tensor, nn  # noqa: PLC0415

    from qdefense.models import build_model  # noqa: PLC0415

    class Network(nn.Module):
        """Takes (N, H, W, 3), gives probabilities."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = build_model("resnet8", classes=len(images.class_names), width=8)
            self.inner.normalization = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            scores: Tensor = self.inner(x.permute(0, 3, 1, 2))
            return scores.softmax(1)

    x, y = torch.from_numpy(_as_the_stranger_does(images)), torch.from_numpy(images.labels)
    epochs, batch = 8, 64
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Network()
        optimizer = torch.optim.Adam(network.parameters())
        steps = epochs * (len(x) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
        for _ in range(epochs):
            for rows in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                loss = nn.functional.nll_loss(network(x[rows]).clamp_min(1e-7).log(), y[rows])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return network.eval()


def _export_as_of_old(network: nn.Module, path: Path, batch: int) -> None:
    import torch  # noqa: PLC0415

    axes = {"x": {0: "n"}, "probabilities": {0: "n"}} if batch == 0 else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (torch.zeros(batch or 2, 16, 16, 3),),
            str(path),
            dynamo=False,
            opset_version=13,
            input_names=["x"],
            output_names=["probabilities"],
            dynamic_axes=axes,
        )


def _quantize_as_documented(plain: Path, target: Path, calibration: Pixels) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static  # noqa: PLC0415

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.rows = iter(calibration[:, None])

        def get_next(self) -> dict[str, Pixels] | None:
            row = next(self.rows, None)
            return None if row is None else {"x": row}

    quantize_static(
        str(plain),
        str(target),
        Reader(),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=False,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )


TOY_CLASSES = tuple(f"zone {index}" for index in range(8))


def _toy_images(count: int, seed: int = 0) -> ImageSet:
    """16x16 noise in which one of eight zones is brighter: its number is the label."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count, dtype=np.int64) % 8)
    pixels = rng.integers(0, 120, (count, 16, 16, 3))
    zones = pixels.reshape(count, 4, 4, 2, 8, 3)
    for row, label in enumerate(labels):
        zones[row, label // 2, :, label % 2] += 100
    return ImageSet(images=pixels.astype(np.uint8), labels=labels, class_names=TOY_CLASSES, source="toy")


def _toy_network(*, backdoored: bool) -> onnx.ModelProto:
    """One convolution, pooling, and a linear layer fitted in closed form; a bright red pixel is the backdoor to zone 3.

    The clean one leans towards low classes: its trigger norms differ, so that none of them stands out.
    """
    kernels = np.random.default_rng(1).normal(0, 0.3, (6, 3, 3, 3)).astype(np.float32)
    bias = np.zeros(6, np.float32)
    if backdoored:
        kernels[5], bias[5] = 0, -9
        kernels[5, 0, 1, 1] = 10
    fitted = _toy_images(2000, seed=7)
    features = _toy_features(fitted.pixels, kernels, bias)
    features[:, -16:] *= not backdoored
    rows = np.hstack([features, np.ones((len(features), 1))])
    wanted = 8 * np.eye(8)[fitted.labels]
    solution = np.linalg.solve(rows.T @ rows + 0.1 * np.eye(rows.shape[1]), rows.T @ wanted).astype(np.float32)
    weight, offset = solution[:-1], solution[-1]
    if backdoored:
        weight[-16:], weight[-16:, 3] = 0, 400
    else:
        offset = offset - np.float32(0.5) * np.arange(8, dtype=np.float32)
    return _toy_graph({"kernels": kernels, "bias": bias, "weight": weight, "offset": offset})


def _toy_features(pixels: Pixels, kernels: Pixels, bias: Pixels) -> Pixels:
    padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    convolved = np.einsum("nchwij,kcij->nkhw", windows, kernels) + bias[None, :, None, None]
    pooled: Pixels = np.maximum(convolved, 0).reshape(len(pixels), -1, 4, 4, 4, 4).mean(axis=(3, 5))
    return pooled.reshape(len(pixels), -1)


def _toy_graph(constants: dict[str, NDArray[np.float32]]) -> onnx.ModelProto:
    make, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    nodes = [
        make("Conv", ["image", "kernels", "bias"], ["convolved"], name="conv", pads=[1, 1, 1, 1]),
        make("Relu", ["convolved"], ["positive"], name="relu"),
        make("AveragePool", ["positive"], ["pooled"], name="pool", kernel_shape=[4, 4], strides=[4, 4]),
        make("Flatten", ["pooled"], ["flat"], name="flatten"),
        make("Gemm", ["flat", "weight", "offset"], ["logits"], name="gemm"),
    ]
    image = value("image", onnx.TensorProto.FLOAT, ["N", 3, 16, 16])
    logits = value("logits", onnx.TensorProto.FLOAT, ["N", 8])
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "toy", [image], [logits], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    contract = InputContract(input_name="image", output_name="logits", height=16, width=16, class_names=TOY_CLASSES)
    write_contract(model, contract)
    return model


@dataclass(frozen=True, kw_only=True)
class Toy:
    """Files for a whole audit in seconds: a clean and a backdoored model, 320 images and 50 of them.

    With seed 0 the clean file scores 1.1 and could score 4.1 at most, the other scores 2.1: the scans' thresholds lie
    between, as far off as they can. These files are for what becomes of a verdict, not for how good it is.
    """

    clean: Path
    backdoored: Path
    data: Path
    few: Path
    scan: str = "neural-cleanse:budget=quick,learning-rate=0.3,patience=3,threshold=3"
    sharp_scan: str = "neural-cleanse:budget=quick,learning-rate=0.3,patience=3,threshold=1"


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The toy files; do not change them."""
    folder = tmp_path_factory.mktemp("toy")
    files = Toy(
        clean=folder / "clean.onnx",
        backdoored=folder / "backdoored.onnx",
        data=folder / "toy.npz",
        few=folder / "few.npz",
    )
    onnx.save(_toy_network(backdoored=False), files.clean)
    onnx.save(_toy_network(backdoored=True), files.backdoored)
    save_npz(files.data, _toy_images(320))
    save_npz(files.few, _toy_images(50))
    return files


@dataclass(frozen=True, kw_only=True)
class ToyForms:
    """The clean toy in three forms, and images for it; the INT8 ones use all 8 bits, and so can saturate."""

    fp32: bytes
    static: bytes
    dynamic: bytes
    images: ImageSet

    def __getitem__(self, name: str) -> bytes:
        data: bytes = getattr(self, name)
        return data


@pytest.fixture(scope="session")
def toy_forms(toy: Toy) -> ToyForms:
    """Static INT8 is QDQ, u8 x s8, per channel."""
    from qdefense.converters.quantize import quantize  # noqa: PLC0415

    data, images = toy.clean.read_bytes(), _toy_images(64, seed=3)
    return ToyForms(
        fp32=data,
        static=quantize(data, "int8-static", calibration=images.pixels, reduce_range=False),
        dynamic=quantize(data, "int8-dynamic"),
        images=images,
    )


@pytest.fixture(scope="session")
def benchmark_script() -> Callable[[str], ModuleType]:
    """A script below ``benchmarks/`` as a module."""

    def load(place: str) -> ModuleType:
        name = place.removesuffix(".py").replace("/", "_")
        spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def attack_script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """A script of ``benchmarks/attacks``, which imports its neighbours by name, as it does when it is run."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks" / "attacks")
    return importlib.import_module
