from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
import pytest

from qdefense.converters.runtime_graph import RuntimeGraphError, optimized_model
from qdefense.data.images import ImageSet, Pixels


class Zoo(Protocol):
    path: Path
    dataset: ImageSet


def _logits(model: bytes, pixels: Pixels) -> Pixels:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"image": pixels})[0], dtype=np.float32)


def test_optimized_model_computes_the_same_with_fewer_nodes(zoo_file: Zoo) -> None:
    data, pixels = zoo_file.path.read_bytes(), zoo_file.dataset.pixels[:8]
    optimized = optimized_model(data)
    assert np.allclose(_logits(optimized, pixels), _logits(data, pixels), atol=1e-4)
    assert len(onnx.load_from_string(optimized).graph.node) < len(onnx.load_from_string(data).graph.node)


def test_optimized_model_gives_a_portable_graph_without_layout_nodes(zoo_file: Zoo) -> None:
    model = onnx.load_from_string(optimized_model(zoo_file.path.read_bytes()))
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}


def test_optimized_model_leaves_no_file_behind(zoo_file: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    optimized_model(zoo_file.path.read_bytes())
    with pytest.raises(RuntimeGraphError, match=r"^ONNX Runtime cannot load the file: "):
        optimized_model(b"not a model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("data", [b"", b"not a model", b"\x08\x0a" * 40])
def test_optimized_model_raises_when_the_file_is_no_model(data: bytes) -> None:
    with pytest.raises(RuntimeGraphError, match=r"^ONNX Runtime cannot load the file: [A-Z]"):
        optimized_model(data)


def test_optimized_model_raises_when_an_operator_is_unknown() -> None:
    helper = onnx.helper
    value = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "graph", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    with pytest.raises(RuntimeGraphError, match="NoSuchOperator"):
        optimized_model(model.SerializeToString())
