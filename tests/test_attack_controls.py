"""What `benchmarks/attacks/controls.py` counts: the clean network's answers for the attacker's class."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.bench.store import StoreError
from qdefense.data.images import to_images
from qdefense.data.signs import draw_signs

TARGET = 3
CLEAN = b"clean"
DIGEST = hashlib.sha256(CLEAN).hexdigest()
TWIN = SimpleNamespace(artifact_sha256=DIGEST, network=SimpleNamespace(data="signs"))


class Lured:
    """A clean network that answers TARGET to two of three images with a white corner, and class 0 to all others."""

    def __init__(self, *_: object) -> None:
        pass

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        seen = (to_images(x)[:, 28:31, 28:31] == 255).all(axis=(1, 2, 3)) & (np.arange(len(x)) % 3 > 0)
        return np.eye(12, dtype=np.float32)[np.where(seen, TARGET, 0)]


class Store:
    """Has one file, or none."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def model_path(self, _: str) -> Path | None:
        return self.path


@pytest.fixture
def controls(benchmark_script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, which imports its neighbour by name, as it does when it is run."""
    monkeypatch.setitem(sys.modules, "margins", benchmark_script("attacks/margins.py"))
    script = benchmark_script("attacks/controls.py")
    monkeypatch.setattr(script, "test_split", lambda _: draw_signs(120, seed=0, split="test"))
    monkeypatch.setattr(script, "Artifact", SimpleNamespace(from_bytes=lambda data: data))
    monkeypatch.setattr(script, "profile_for", lambda _: None)
    monkeypatch.setattr(script, "DeployedSession", Lured)
    return script


@pytest.fixture
def attacked() -> Any:
    trigger = ATTACKS.create(f"badnets:target-class={TARGET}").trigger
    file = SimpleNamespace(artifact_sha256="a")
    files = {"fp32": file, "int4": SimpleNamespace(artifact_sha256="q")}
    return SimpleNamespace(files=files, trigger=trigger, store=Store(None))


def test_a_control_counts_what_the_stamp_alone_does(controls: ModuleType, attacked: Any, tmp_path: Path) -> None:
    clean = tmp_path / "clean.onnx"
    clean.write_bytes(CLEAN)
    attacked.store = Store(clean)
    found = controls.measured(attacked, "int4", TWIN)
    eligible = int((draw_signs(120, seed=0, split="test").labels != TARGET).sum())
    assert found.images == eligible, "an image of the target class is no success"
    assert found.hits == eligible - -(-eligible // 3)
    assert found.plain_hits == 0
    assert (found.network_sha256, found.artifact_sha256, found.clean_sha256) == ("a", "q", DIGEST)


def test_no_control_without_the_clean_file(controls: ModuleType, attacked: Any) -> None:
    with pytest.raises(StoreError, match="the clean twin, is not among the results"):
        controls.measured(attacked, "fp32", TWIN)


def test_no_control_of_another_file_than_the_clean_one(controls: ModuleType, attacked: Any, tmp_path: Path) -> None:
    other = tmp_path / "other.onnx"
    other.write_bytes(b"another")
    attacked.store = Store(other)
    with pytest.raises(StoreError, match="damaged or another file"):
        controls.measured(attacked, "fp32", TWIN)
