"""`qdefense quantize`: names, folders, settings, and the accuracy that a result may lose."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qdefense.cli import run
from qdefense.converters.contract import read_contract
from qdefense.data.npz import load_npz

if TYPE_CHECKING:
    from ..conftest import Toy  # noqa: TID252 (the fixtures are there)

Capture = pytest.CaptureFixture[str]


def ran(capfd: Capture, *arguments: str | Path) -> str:
    """What a successful command writes to stdout; it writes nothing to stderr."""
    assert run(["quantize", *(str(argument) for argument in arguments)]) == 0
    output, errors = capfd.readouterr()
    assert errors == ""
    return output


def record_of(model: onnx.ModelProto) -> dict[str, Any]:
    entries = {entry.key: entry.value for entry in model.metadata_props}
    record: dict[str, Any] = json.loads(entries["qdefense.quantization"])
    return record


@pytest.mark.parametrize(
    ("options", "name", "expected"),
    [
        (
            ("--scheme", "int8-static", "--types", "u8u8", "--format", "qoperator", "--percentile", "99.5"),
            "int8-static-u8u8-per-channel-full-percentile99.5-qoperator",
            {"format": "qoperator", "types": "u8u8", "reduce_range": False, "percentile": 99.5},
        ),
        (
            ("--scheme", "int8-static", "--per-tensor", "--full-range", "--types", "s8s8"),
            "int8-static-s8s8-per-tensor-full-minmax-qdq",
            {"format": "qdq", "types": "s8s8", "reduce_range": False, "per_channel": False},
        ),
        (
            ("--scheme", "int8-dynamic", "--types", "u8s8", "--per-channel"),
            "int8-dynamic-u8s8-per-channel-matmul-reduced",
            {"types": "u8s8", "reduce_range": True, "per_channel": True},
        ),
        (
            ("--scheme", "int4", "--block-size", "32", "--asymmetric"),
            "int4-block32-asymmetric",
            {"block_size": 32, "symmetric": False},
        ),
        (
            (
                "--scheme",
                "int4-a8",
            ),
            "int4-a8-per-channel-symmetric-minmax",
            {"symmetric": True, "method": "minmax"},
        ),
    ],
)
def test_quantize_writes_a_file_named_by_what_it_is_into_a_folder(
    toy: Toy, tmp_path: Path, capfd: Capture, options: tuple[str, ...], name: str, expected: dict[str, Any]
) -> None:
    text = ran(capfd, toy.clean, *options, "--calibration", toy.data, "--limit", "64", "-o", tmp_path)
    (made,) = tmp_path.iterdir()
    assert made.name == f"clean.{name}.onnx"
    assert text.startswith(f"{made.name}: {made.stat().st_size:,} bytes\n  name: {name}\n")
    model = onnx.load(made)
    record = record_of(model)
    assert record.get("name", name) == name
    assert {key: record[key] for key in expected} == expected
    assert read_contract(model) == read_contract(onnx.load(toy.clean))


def test_quantize_packs_four_bits_and_says_that_nothing_was_measured(toy: Toy, tmp_path: Path, capfd: Capture) -> None:
    target = tmp_path / "q.onnx"
    text = ran(capfd, toy.clean, "--scheme", "int4", "-o", target)
    kinds = {tensor.data_type for tensor in onnx.load(target).graph.initializer if len(tensor.dims) > 1}
    assert kinds == {TensorProto.INT4}
    assert text.endswith("clean accuracy: not measured: it needs labelled images; give them with --calibration\n")


def test_quantize_measures_on_the_calibration_images_when_there_are_no_others(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    asked = ("--scheme", "int8-static", "--calibration", toy.data, "--limit", "100")
    text = ran(capfd, toy.clean, *asked, "-o", tmp_path)
    assert text.splitlines()[-1] == (
        "  clean accuracy: 100.00% in FP32, 100.00% quantized, a drop of 0.00 points on 100 calibration images "
        "(npz toy.npz)"
    )


def split_npz(toy: Toy, path: Path, *, test: bool = True) -> Path:
    images = load_npz(toy.data, split=None, limit=None, seed=0)
    parts = {"train": slice(0, 200)} | ({"test": slice(200, 320)} if test else {})
    arrays: dict[str, Any] = {f"x_{name}": images.images[rows] for name, rows in parts.items()}
    arrays |= {f"y_{name}": images.labels[rows] for name, rows in parts.items()}
    np.savez(path, class_names=np.array(images.class_names), **arrays)
    return path


@pytest.mark.parametrize(
    ("options", "measured"),
    [
        ((), "120 held-out images (npz split.npz/test)"),
        (("--split", "test"), "64 calibration images (npz split.npz/test)"),
    ],
)
def test_quantize_measures_on_the_test_split_when_it_did_not_calibrate_on_it(
    toy: Toy, tmp_path: Path, capfd: Capture, options: tuple[str, ...], measured: str
) -> None:
    data = split_npz(toy, tmp_path / "split.npz")
    asked = ("--scheme", "int8-static", "--calibration", data, "--limit", "64", *options)
    text = ran(capfd, toy.clean, *asked, "-o", tmp_path)
    assert text.splitlines()[-1].endswith(f" points on {measured}")


def test_quantize_measures_on_the_calibration_images_when_the_data_have_no_test_split(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    data = split_npz(toy, tmp_path / "split.npz", test=False)
    text = ran(capfd, toy.clean, "--scheme", "int4", "--calibration", data, "--limit", "64", "-o", tmp_path)
    assert text.splitlines()[-1].endswith(" points on 64 calibration images (npz split.npz/train)")


def test_quantize_calibrates_on_foreign_images_and_says_that_nothing_was_measured(
    toy: Toy, tmp_path: Path, capfd: Capture
) -> None:
    text = ran(
        capfd,
        toy.clean,
        *("--scheme", "int8-static", "--calibration", "signs", "--limit", "16", "--resize", "nearest"),
        *("-o", tmp_path),
    )
    assert text.splitlines()[-1] == (
        "  clean accuracy: not measured: signs test has 12 classes, the model answers with 8; give the data set that "
        "the model was made for"
    )


@pytest.mark.parametrize(("allowed", "code"), [("5.8", 1), ("5.9", 0)])
def test_quantize_refuses_with_1_what_loses_more_than_is_allowed(
    toy: Toy, tmp_path: Path, capfd: Capture, allowed: str, code: int
) -> None:
    asked = [str(toy.backdoored), "--scheme", "int4", "--calibration", str(toy.data), "--max-accuracy-drop", allowed]
    assert run(["quantize", *asked, "-o", str(tmp_path)]) == code
    output, errors = capfd.readouterr()
    figures = "100.00% in FP32, 94.14% quantized, a drop of 5.86 points on 256 calibration images (npz toy.npz)"
    if code:
        assert (output, errors) == (
            "",
            f"error: int4-per-channel-symmetric is refused: {figures}; at most 5.8 points were allowed\n",
        )
        assert list(tmp_path.iterdir()) == []
    else:
        assert output.endswith(f"clean accuracy: {figures}\n")
        assert len(list(tmp_path.iterdir())) == 1
