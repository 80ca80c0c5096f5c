from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from qdefense.converters.inspection import Inspection, inspect_model, runtime_operators
from qdefense.converters.reading import FileRefusedError, parse_model

from .inspected_graphs import DYNAMIC, FP32, FULL_RANGE, STATIC, edited


def test_inspect_model_describes_the_file_when_fp32() -> None:
    found = inspect_model(FP32)
    assert (found.ir_version, found.opsets, found.producer) == (10, {"ai.onnx": 21, "com.microsoft": 1}, "tests")
    assert found.size_bytes == len(FP32)
    assert found.operators == {
        "Add": 1, "Conv": 4, "Div": 1, "Flatten": 1, "Gemm": 1, "GlobalAveragePool": 1, "Relu": 4, "Sub": 1
    }  # fmt: skip
    assert (found.scheme, found.granularity) == ("fp32", None)
    assert (found.weight_types, found.activation_types) == (("float32",), ("float32",))
    assert (found.integer_mac_share, found.integer_weight_share) == (0.0, 0.0)


def test_inspect_model_survives_json() -> None:
    found = inspect_model(STATIC)
    assert Inspection.model_validate_json(found.model_dump_json()) == found


def test_inspect_model_answers_or_refuses_when_bytes_are_flipped() -> None:
    rng = np.random.default_rng(0)
    refusals = []
    for _ in range(300):
        data = bytearray(DYNAMIC)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            inspect_model(bytes(data))
        except FileRefusedError as error:
            refusals.append(str(error))
    assert 10 < len(refusals) < 290
    assert all(reason.isprintable() for reason in refusals)


def test_inspect_model_lists_nonfinite_initializers() -> None:
    proto = onnx.load_from_string(FP32)
    for name, value in (("conv2_w", np.nan), ("fc_b", -np.inf)):
        tensor = next(t for t in proto.graph.initializer if t.name == name)
        array = numpy_helper.to_array(tensor).copy()
        array.flat[1] = value
        tensor.CopyFrom(numpy_helper.from_array(array, name))
    assert inspect_model(proto.SerializeToString()).nonfinite_initializers == ("conv2_w", "fc_b")
    assert inspect_model(FP32).nonfinite_initializers == ()


def test_inspect_model_escapes_names_when_hostile() -> None:
    proto = onnx.load_from_string(FULL_RANGE)
    proto.producer_name = "\x1b[2J\n::error::"
    gemm = next(node for node in proto.graph.node if node.op_type == "Gemm")
    gemm.name = "fc\x1b]0;x\x07\u202e" + "a" * 500
    found = inspect_model(proto.SerializeToString())
    assert found.producer == r"\x1b[2J\n::error:: 0.1.0"
    assert found.saturation_layers[-1].startswith(r"fc\x1b]0;x\x07\u202eaaa")
    assert len(found.saturation_layers[-1]) == 120
    assert found.model_dump_json().isprintable()


def test_runtime_operators_refuses_when_runtime_cannot_load(capfd: pytest.CaptureFixture[str]) -> None:
    data = edited(lambda model: setattr(model.graph.node[0], "domain", "com.microsoft"))
    parse_model(data)
    with pytest.raises(
        FileRefusedError, match=r"^ONNX Runtime cannot load the file: .*Sub.*; export the model again or use"
    ):
        runtime_operators(data)
    assert capfd.readouterr() == ("", "")


def test_runtime_operators_counts_fused_operators() -> None:
    counts = runtime_operators(FP32)
    assert (counts["Conv"], counts["FusedConv"], counts["Relu"], counts["Gemm"]) == (1, 3, 1, 1)
    assert list(counts) == sorted(counts)


def test_inspection_imports_no_torch() -> None:
    code = "import sys, qdefense.converters.inspection as i, pathlib; i.inspect_model(sys.stdin.buffer.read()); "
    code += "print(sorted(name for name in sys.modules if name.split('.')[0] in ('torch', 'sympy')))"
    done = subprocess.run([sys.executable, "-P", "-c", code], input=STATIC, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "[]"
