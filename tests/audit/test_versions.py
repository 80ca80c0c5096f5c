from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdefense.audit import versions as module
from qdefense.audit.provenance import environment
from qdefense.audit.versions import UNKNOWN, distributions_of, version_of, versions


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What is installed is read anew in each test."""
    module._providers.cache_clear()
    yield
    module._providers.cache_clear()


def provided_by(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    monkeypatch.setattr(module, "packages_distributions", lambda: {"onnxruntime": list(names)} if names else {})


def install(folder: Path, name: str, version: str, provides: str) -> None:
    """Lay down the metadata of a distribution."""
    metadata = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "top_level.txt").write_text(f"{provides}\n")


def test_versions_name_what_decides_an_answer() -> None:
    assert {"qdefense", "onnxruntime", "onnx", "torch", "numpy"} <= set(versions())
    assert versions()["numpy"] == importlib.metadata.version("numpy")
    assert UNKNOWN not in versions().values()


def test_versions_name_onnxruntime_gpu_when_it_provides_the_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, `environment` failed there with PackageNotFoundError."""
    provided_by(monkeypatch, "onnxruntime-gpu", "onnxruntime-gpu")
    monkeypatch.setattr(module, "version", lambda name: {"onnxruntime-gpu": "1.30.0"}.get(name, "7"))
    assert (versions()["onnxruntime-gpu"], "onnxruntime" in versions()) == ("1.30.0", False)
    assert environment().versions["onnxruntime-gpu"] == "1.30.0"


def test_versions_name_both_when_two_builds_lie_over_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, "onnxruntime-gpu", "1.30.0", provides="onnxruntime")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert distributions_of("onnxruntime") == ("onnxruntime", "onnxruntime-gpu")
    assert versions()["onnxruntime-gpu"] == "1.30.0"


def test_version_is_unknown_when_no_metadata_tell_it(monkeypatch: pytest.MonkeyPatch) -> None:
    provided_by(monkeypatch)
    assert distributions_of("onnxruntime") == ("onnxruntime",)
    assert version_of("no-such-distribution") == UNKNOWN
    monkeypatch.setattr(module, "version", lambda name: None)
    assert set(versions().values()) == {UNKNOWN}


def test_environment_has_the_versions_and_pythons() -> None:
    assert environment().versions == {"python": sys.version.split()[0], **versions()}
