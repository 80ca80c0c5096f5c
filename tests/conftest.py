from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from qdefense.data.images import ImageSet

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
