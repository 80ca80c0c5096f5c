from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path

import numpy as np
import onnx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import qdefense

REPOSITORY = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
SOURCES = {
    "qdefense": REPOSITORY / "qdefense",
    "qdefense/converters": REPOSITORY / "converters",
    "qdefense/models": REPOSITORY / "models",
}
PACKAGE = Path(qdefense.__file__).parent


def _modules(folder: Path, prefix: str) -> dict[str, Path]:
    return {f"{prefix}/{path.relative_to(folder).as_posix()}": path for path in sorted(folder.rglob("*.py"))}


def _repository_modules() -> dict[str, Path]:
    return {name: path for prefix, folder in SOURCES.items() for name, path in _modules(folder, prefix).items()}


@pytest.fixture
def _installed() -> None:
    origin = json.loads(importlib.metadata.distribution("qdefense").read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("qdefense is installed editable: it is the repository")


@pytest.mark.usefixtures("_installed")
def test_package_lies_in_site_packages_when_not_editable() -> None:
    assert Path(sysconfig.get_path("purelib")) / "qdefense" == PACKAGE


@pytest.mark.usefixtures("_installed")
def test_installed_modules_equal_the_repositorys_when_not_editable() -> None:
    installed, expected = _modules(PACKAGE, "qdefense"), _repository_modules()
    changed = [
        name for name in installed.keys() & expected if installed[name].read_bytes() != expected[name].read_bytes()
    ]
    assert (sorted(installed), changed) == (sorted(expected), []), "stale or incomplete: run `make install`"


def test_packages_listed_are_those_in_the_repository() -> None:
    expected = {name.removesuffix("/__init__.py") for name in _repository_modules() if name.endswith("/__init__.py")}
    assert {name.replace(".", "/") for name in PYPROJECT["tool"]["setuptools"]["packages"]} == expected


def test_modules_all_lie_in_a_package() -> None:
    modules = _repository_modules()
    assert [name for name in modules if f"{name.rpartition('/')[0]}/__init__.py" not in modules] == []


def test_constraints_pin_every_requirement_within_its_range() -> None:
    lines = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}
    requirements = [
        Requirement(line)
        for line in (
            *PYPROJECT["build-system"]["requires"],
            *PYPROJECT["project"]["dependencies"],
            *PYPROJECT["project"]["optional-dependencies"]["dev"],
        )
    ]
    assert [str(r) for r in requirements if not r.specifier.contains(pins.get(canonicalize_name(r.name), "0"))] == []


def test_versions_agree_between_package_and_citation() -> None:
    version = PYPROJECT["project"]["version"]
    assert importlib.metadata.version("qdefense") == version
    assert re.findall(r"^version: (.*)$", (REPOSITORY / "CITATION.cff").read_text(), re.MULTILINE) == [version]


def test_script_prints_the_version() -> None:
    script = Path(sysconfig.get_path("scripts")) / "qdefense"
    ran = subprocess.run([script, "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.split()[-1] == PYPROJECT["project"]["version"]


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    image = onnx.helper.make_tensor_value_info("image", onnx.TensorProto.FLOAT, ["N", 3, 8, 8])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", 10])
    weight = onnx.numpy_helper.from_array(np.ones((192, 10), np.float32), "weight")
    nodes = [
        onnx.helper.make_node("Flatten", ["image"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "weight"], ["logits"]),
    ]
    graph = onnx.helper.make_graph(nodes, "graph", [image], [logits], [weight])
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]), path)
    return path


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["inspect", "--help"], ["inspect", "FILE"]])
def test_command_line_imports_no_torch_when_it_needs_none(arguments: list[str], onnx_file: Path) -> None:
    code = "import sys; from qdefense.cli import run; sys.exit(run(sys.argv[1:]) or 'torch' in sys.modules)"
    arguments = [str(onnx_file) if argument == "FILE" else argument for argument in arguments]
    ran = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=60
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_import_writes_no_telemetry_identifier_when_onnxruntime_is_loaded(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    command = [sys.executable, "-P", "-c", "import qdefense.session"]
    subprocess.run(command, check=True, env=environment | {"TMPDIR": str(tmp_path)}, timeout=120)
    assert list(tmp_path.iterdir()) == []
