"""The digest of the package's code: the same of the same code, and no other file's."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest

from qdefense.audit.versions import versions as installed
from qdefense.bench.revisions import SOURCES, source_digest, versions

Digest = Callable[[Path], str]


@pytest.fixture(name="digest_at")
def _digest_at(monkeypatch: pytest.MonkeyPatch) -> Digest:
    """The digest where qdefense is found in that folder, and nothing beside it."""

    def at(folder: Path) -> str:
        found = ModuleSpec("qdefense", None, is_package=True)
        found.submodule_search_locations = [str(folder)]
        monkeypatch.setattr("qdefense.bench.revisions.find_spec", lambda name: found if name == "qdefense" else None)
        return source_digest.__wrapped__()

    return at


def copied(package: str, target: Path) -> None:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(spec.submodule_search_locations[0], target, ignore=ignored, dirs_exist_ok=True)


def test_covers_the_whole_package_wherever_it_lies(tmp_path: Path, digest_at: Digest) -> None:
    copy = tmp_path / "elsewhere"
    copied("qdefense", copy)
    for package in ("converters", "models"):  # an editable install has them beside it
        copied(f"qdefense.{package}", copy / package)
    assert digest_at(copy) == source_digest()
    (copy / "notes.txt").write_text("no code")
    assert digest_at(copy) == source_digest()
    for name in ("defenses/scans/neural_cleanse.py", "converters/quantize/int4.py"):
        before = digest_at(copy)
        with (copy / name).open("a") as file:
            file.write("\n")
        assert digest_at(copy) != before


def test_a_file_that_moves_is_other_code(tmp_path: Path, digest_at: Digest) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    before = digest_at(tmp_path)
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    assert digest_at(tmp_path) != before


def test_stands_beside_the_versions_that_an_audit_names() -> None:
    assert versions() == {**installed(), SOURCES: source_digest()}
    assert SOURCES not in installed()
