from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
import onnxruntime
import pytest

from qdefense.converters.exact_products import exact_model
from qdefense.converters.runtime_graph import GraphOptions, RuntimeGraphError, is_settled, optimized_model
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


def _int4_product() -> tuple[bytes, Pixels, Pixels]:
    """Blocked INT4 weights behind a DequantizeLinear, an input, and the product in float64."""
    rng, helper = np.random.default_rng(0), onnx.helper
    codes, scales = rng.integers(-8, 8, (64, 8)), rng.uniform(0.01, 0.1, (2, 8)).astype(np.float32)
    weights = helper.make_tensor("w", onnx.TensorProto.INT4, (64, 8), codes.flatten().tolist())
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "scales"], ["floats"], axis=0, block_size=32),
        helper.make_node("MatMul", ["image", "floats"], ["y"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "graph",
        [value("image", onnx.TensorProto.FLOAT, ["n", 64])],
        [value("y", onnx.TensorProto.FLOAT, ["n", 8])],
        [weights, onnx.numpy_helper.from_array(scales, "scales")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    x = rng.standard_normal((4, 64)).astype(np.float32)
    return model.SerializeToString(), x, (x @ (codes * np.repeat(scales, 32, axis=0).astype(np.float64)))


@pytest.mark.parametrize(("options", "level"), [({}, 1), ({"matmulnbits_accuracy_level": 4}, 4)])
def test_optimized_model_quantizes_no_activation_behind_ones_back(options: dict[str, int], level: int) -> None:
    data, x, expected = _int4_product()
    optimized = optimized_model(data, GraphOptions.model_validate(options))
    (node,) = onnx.load_from_string(optimized).graph.node
    assert node.op_type == "MatMulNBits"
    assert {a.name: a.i for a in node.attribute}["accuracy_level"] == level
    error = np.abs(_logits(optimized, x) - expected).max() / np.abs(expected).max()
    assert (error < 1e-5) == (level == 1)


def test_optimized_model_has_no_mixed_product_when_arithmetic_is_exact(toy_forms: Any) -> None:
    plain = optimized_model(toy_forms.static)
    exact = optimized_model(toy_forms.static, GraphOptions(arithmetic="exact"))
    assert len(exact_model(plain).rewritten) >= 2
    assert exact == exact_model(plain).data


@pytest.mark.parametrize("optimization", ["disable", "basic", "extended", "all"])
def test_optimized_model_follows_the_level_up_to_extended(toy_forms: Any, optimization: Any) -> None:
    model = onnx.load_from_string(optimized_model(toy_forms.static, optimization=optimization))
    fused = "QLinearConv" in {node.op_type for node in model.graph.node}
    assert fused == (optimization in {"extended", "all"})


@pytest.mark.parametrize("arithmetic", ["as-run", "exact"])
@pytest.mark.parametrize("form", ["fp32", "static", "dynamic"])
def test_is_settled_holds_for_what_the_runtime_optimized_itself(toy_forms: Any, form: str, arithmetic: Any) -> None:
    options = GraphOptions(arithmetic=arithmetic)
    assert is_settled(optimized_model(toy_forms[form], options), options)


def test_is_settled_does_not_hold_for_a_shipped_graph(toy_forms: Any) -> None:
    assert not is_settled(toy_forms.static, GraphOptions())
