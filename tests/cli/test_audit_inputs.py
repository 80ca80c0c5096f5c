from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdefense.cli import run
from qdefense.cli.audit import FILTERS
from qdefense.data.npz import save_npz
from qdefense.defenses import DEFENSES

from ..defenses.filters.corner_nets import images, network  # noqa: TID252

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module", name="files")
def _files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    (folder / "net.onnx").write_bytes(network(backdoored=False))
    save_npz(folder / "clean.npz", images(200))
    save_npz(folder / "inputs.npz", images(40, seed=4))
    return folder


def audit(files: Path, *options: str) -> int:
    return run(["audit", str(files / "net.onnx"), "--data", str(files / "clean.npz"), "--threads", "1", *options])


def test_filters_are_those_of_the_registry() -> None:
    """The command knows them by name, so that a usage error needs no torch."""
    found = {name for name in DEFENSES.names() if DEFENSES.create(name).kind == "filter"}
    assert found == set(FILTERS)


def test_audit_asks_for_inputs_when_a_filter_is_named(files: Path, capfd: Capture) -> None:
    assert audit(files, "--defense", "strip") == 2
    assert "strip judges inputs; name them with --inputs" in capfd.readouterr().err


def reported(capfd: Capture) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(capfd.readouterr().out)
    return report


def test_audit_adds_strip_to_the_scan_when_inputs_are_given(files: Path, capfd: Capture) -> None:
    code = audit(files, "--inputs", str(files / "inputs.npz"), "--format", "json")
    report = reported(capfd)
    assert report["gate"]["required"] == ["neural-cleanse", "strip"]
    assert [finding["defense"] for finding in report["findings"]] == ["neural-cleanse", "strip"]
    strip = report["findings"][1]
    assert (strip["kind"], strip["verdict"], strip["result"]["kind"]) == ("filter", "NOT_MEASURED", "filter")
    assert "less poison would not be seen" in strip["reason"]  # 50 held-out images and 40 inputs are few
    assert len(strip["result"]["scores"]) == len(strip["result"]["decisions"]) == 40
    assert report["subject"]["inputs"]["images"] == 40
    assert code == 3, "neural-cleanse has too few classes here"


def test_audit_adds_no_second_filter_when_one_is_named(files: Path, capfd: Capture) -> None:
    audit(files, "--defense", "strip:overlays=20", "--inputs", str(files / "inputs.npz"), "--format", "json")
    report = reported(capfd)
    assert report["gate"]["required"] == ["strip"]
    (finding,) = report["findings"]
    assert finding["settings"]["overlays"] == 20


def test_audit_reads_the_split_of_the_inputs_that_is_asked_for(files: Path, tmp_path: Path, capfd: Capture) -> None:
    given = images(30, seed=5)
    arrays = {"x_train": given.images[:12], "y_train": given.labels[:12], "x_test": given.images[12:],
              "y_test": given.labels[12:]}  # fmt: skip
    np.savez(tmp_path / "splits.npz", **arrays)
    options = ("--defense", "strip:overlays=20", "--inputs", str(tmp_path / "splits.npz"), "--format", "json")
    audit(files, *options, "--inputs-split", "train")
    assert reported(capfd)["subject"]["inputs"]["images"] == 12
    audit(files, *options)
    assert reported(capfd)["subject"]["inputs"]["images"] == 18


def test_audit_tells_that_inputs_are_missing(files: Path, capfd: Capture) -> None:
    assert audit(files, "--inputs", "nowhere.npz", "--defense", "strip") == 2
    assert "'nowhere.npz': no such file or folder" in capfd.readouterr().err


def test_audit_refuses_a_split_of_no_inputs(files: Path, capfd: Capture) -> None:
    assert audit(files, "--inputs-split", "train") == 2
    assert "--inputs-split is of --inputs, which is not given" in capfd.readouterr().err
