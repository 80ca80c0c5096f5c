from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

from qdefense.converters.contract import InputContract, read_contract, write_contract
from qdefense.converters.quantize import QuantizationError, quantize, settings_of

from .quantized_nets import CLASSES, NET, SIDE, images, metadata, small_net

SCHEMES: Any = ("int8-static", "int8-dynamic", "int4", "int4-a8")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_keeps_metadata_and_drops_traces(scheme: Any) -> None:
    model = small_net()
    helper.set_model_props(model, {"qdefense.contract": "{}", "owner": "us"})
    model.doc_string = model.graph.doc_string = model.graph.node[2].doc_string = "/home/me/net.py"
    model.graph.node[2].metadata_props.add(key="stack_trace", value="/home/me/net.py")
    model.graph.initializer[0].doc_string = model.graph.input[0].doc_string = "/home/me/net.py"
    made = quantize(model.SerializeToString(), scheme, calibration=images())
    assert {key: value for key, value in metadata(made).items() if key != "qdefense.quantization"} == {
        "qdefense.contract": "{}",
        "owner": "us",
    }
    assert b"/home" not in made
    assert tempfile.gettempdir().encode() not in made


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_keeps_the_contract(scheme: Any) -> None:
    model = small_net()
    contract = InputContract(
        input_name="image",
        output_name="logits",
        height=SIDE,
        width=SIDE,
        mean=(0.1, 0.2, 0.3),
        class_names=tuple("abc"[:CLASSES]),
        pixels_from="metadata",
    )
    write_contract(model, contract)
    made = quantize(model.SerializeToString(), scheme, calibration=images(), contract=contract)
    assert read_contract(onnx.load_from_string(made)) == contract


@pytest.mark.parametrize("scheme", SCHEMES)
def test_quantize_keeps_door_and_opset(scheme: Any) -> None:
    before, after = small_net(), onnx.load_from_string(quantize(NET, scheme, calibration=images()))
    assert (after.graph.input, after.graph.output) == (before.graph.input, before.graph.output)
    assert [(entry.domain, entry.version) for entry in after.opset_import] == [("", 21)]
    assert after.ir_version == (10 if scheme.startswith("int4") else before.ir_version)


@pytest.mark.parametrize("scheme", ["int4", "int4-a8"])
def test_quantize_writes_the_name_of_its_settings(scheme: Any) -> None:
    record = json.loads(metadata(quantize(NET, scheme, calibration=images()))["qdefense.quantization"])
    assert record["name"] == settings_of(scheme).name


def test_quantize_gives_the_same_bytes_when_hashing_differs(tmp_path: Path) -> None:
    np.save(tmp_path / "images.npy", images())
    (tmp_path / "net.onnx").write_bytes(NET)
    code = """
import hashlib, sys, numpy as np
from pathlib import Path
from qdefense.converters.quantize import quantize
model, images = Path("net.onnx").read_bytes(), np.load("images.npy")
for scheme, settings in (
    ("int8-static", {}),
    ("int8-static", {"method": "percentile"}),
    ("int8-static", {"format": "qoperator", "types": "u8u8"}),
    ("int8-static", {"format": "qoperator", "types": "s8s8", "per_channel": False}),
    ("int8-dynamic", {}),
    ("int8-dynamic", {"types": "u8s8", "per_channel": True}),
    ("int4", {}),
    ("int4", {"symmetric": False}),
    ("int4-a8", {"symmetric": False}),
):
    print(hashlib.sha256(quantize(model, scheme, calibration=images, **settings)).hexdigest())
assert "torch" not in sys.modules
"""
    runs = [run_python(code, tmp_path, seed) for seed in ("0", "1")]
    assert runs[0] == runs[1]
    assert len(set(runs[0].split())) == 9
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images.npy", "net.onnx"]


def run_python(code: str, folder: Path, seed: str) -> str:
    # With telemetry on, importing onnxruntime 1.32 leaves a file in the temporary folder.
    environment = {"PYTHONHASHSEED": seed, "TMPDIR": str(folder), "ORT_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_quantize_leaves_console_and_logging_alone(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level)
    with caplog.at_level(logging.DEBUG):
        quantize(NET, "int8-static", calibration=images(), method="percentile")
        for scheme in SCHEMES:
            quantize(NET, scheme, calibration=images())
        logging.getLogger().warning("ours")
    assert [record.message for record in caplog.records if record.name == "root"] == ["ours"]
    assert capfd.readouterr() == ("", "")
    assert (list(root.handlers), list(root.filters), root.level) == before


@pytest.mark.parametrize("scheme", ["int8-static", "int4-a8"])
def test_quantize_refuses_when_images_are_missing(scheme: Any) -> None:
    with pytest.raises(QuantizationError, match=f"{scheme} needs calibration images; pass a few hundred"):
        quantize(NET, scheme)
