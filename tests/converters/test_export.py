from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from qdefense.converters import export
from qdefense.converters.contract import InputContract, read_contract
from qdefense.converters.export import ExportError, export_model
from qdefense.data.images import ImageSet


class Zoo(Protocol):
    path: Path
    module: nn.Module
    dataset: ImageSet


@pytest.fixture(scope="module")
def exported(zoo_file: Zoo) -> onnx.ModelProto:
    return onnx.load(zoo_file.path)


def test_export_model_writes_opset_21_and_one_file(zoo_file: Zoo, exported: onnx.ModelProto) -> None:
    assert [(entry.domain, entry.version) for entry in exported.opset_import] == [("", 21)]
    assert [path.suffix for path in zoo_file.path.parent.iterdir() if path.suffix != ".json"] == [".onnx"]
    assert {tensor.data_location for tensor in exported.graph.initializer} == {TensorProto.DEFAULT}
    assert len(exported.functions) == 0
    onnx.checker.check_model(exported, full_check=True)


def test_export_model_writes_a_contract_that_reads_back(zoo_file: Zoo, exported: onnx.ModelProto) -> None:
    assert read_contract(exported) == InputContract(
        input_name="image", output_name="logits", height=32, width=32, class_names=zoo_file.dataset.class_names,
        pixels_from="metadata",
    )  # fmt: skip


def test_export_model_replaces_the_spatial_mean_by_a_pool(exported: onnx.ModelProto) -> None:
    operators = [node.op_type for node in exported.graph.node]
    assert operators.count("GlobalAveragePool") == 1
    assert "ReduceMean" not in operators
    used = {name for node in exported.graph.node for name in node.input}
    assert [tensor.name for tensor in exported.graph.initializer if tensor.name not in used] == []


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_export_model_agrees_with_torch_in_any_batch(zoo_file: Zoo, batch: int) -> None:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(zoo_file.path.read_bytes(), options, providers=["CPUExecutionProvider"])
    pixels = zoo_file.dataset.pixels[:batch]
    (measured,) = session.run(None, {"image": pixels})
    with torch.no_grad():
        expected = zoo_file.module(torch.from_numpy(pixels)).numpy()
    assert measured.shape == (batch, 12)
    assert np.abs(measured - expected).max() <= 1e-5 * np.abs(expected).max()


def test_export_model_gives_the_same_bytes_when_trained_and_exported_again(zoo_file: Zoo) -> None:
    names = zoo_file.dataset.class_names
    assert export_model(zoo_file.module, height=32, width=32, class_names=names) == zoo_file.path.read_bytes()


class _Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.classifier = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.norm(x).mean(dim=(2, 3)))  # type: ignore[no-any-return]


def test_export_model_raises_and_leaves_the_module_alone_when_the_class_names_do_not_fit() -> None:
    module = _Tiny().train()
    with pytest.raises(ExportError) as caught:
        export_model(module, height=4, width=4, class_names=("a", "b", "c"))
    assert str(caught.value) == (
        "the exported graph does not fit what was asked for: output 'logits' answers with 2 numbers per image, "
        "and 3 class names are given; give 2 names with --classes, or name another output with --output"
    )
    assert module.training
    assert module.norm.training
    assert module.norm.num_batches_tracked == 0


def test_export_model_restores_the_exporters_log_level_when_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    logger = logging.getLogger(export._REGISTRATION_LOGGER)
    levels: list[int] = []

    def fail(*_: object, **__: object) -> None:
        levels.append(logger.level)
        raise ValueError("failed")

    monkeypatch.setattr(logger, "level", logging.DEBUG)
    monkeypatch.setattr(torch.onnx, "export", fail)
    with pytest.raises(ValueError, match=r"^failed$"):
        export_model(_Tiny(), height=4, width=4, class_names=("a", "b"))
    assert [*levels, logger.level] == [logging.ERROR, logging.DEBUG]


def test_export_model_raises_when_the_exporter_gives_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: None)
    module = _Tiny().train()
    with pytest.raises(
        ExportError, match=r"^torch\.onnx\.export returned nothing; the installed torch has no dynamo exporter$"
    ):
        export_model(module, height=4, width=4, class_names=("a", "b"))
    assert module.training


def _graph(
    axes: list[int], attributes: dict[str, int], shape: tuple[str | int, ...] = ("N", 3, 4, 4)
) -> onnx.GraphProto:
    return helper.make_graph(
        [
            helper.make_node("ReduceMean", ["x", "axes"], ["mean"], None, None, None, None, **attributes),
            helper.make_node("Identity", ["mean"], ["y"]),
        ],
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [helper.make_tensor("axes", TensorProto.INT64, [len(axes)], axes)],
    )


@pytest.mark.parametrize(
    ("axes", "attributes", "pooled"),
    [
        ([2, 3], {"keepdims": 1}, True),
        ([3, 2], {}, True),
        ([-1, -2], {"keepdims": 1, "noop_with_empty_axes": 0}, True),
        ([2, 3], {"keepdims": 0}, False),
        ([1, 2], {"keepdims": 1}, False),
        ([2], {"keepdims": 1}, False),
    ],
)
def test_average_pools_replaces_only_means_over_height_and_width_that_keep_them(
    axes: list[int], attributes: dict[str, int], pooled: bool
) -> None:
    graph = _graph(axes, attributes)
    export._average_pools(graph)
    assert graph.node[0].op_type == ("GlobalAveragePool" if pooled else "ReduceMean")
    assert list(graph.node[0].input) == (["x"] if pooled else ["x", "axes"])
    assert [tensor.name for tensor in graph.initializer] == ([] if pooled else ["axes"])
    x = np.random.default_rng(0).random((2, 3, 4, 4), dtype=np.float32)
    (y,) = ReferenceEvaluator(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])).run(None, {"x": x})
    assert np.allclose(y, x.mean(axis=tuple(axes), keepdims=attributes.get("keepdims", 1) == 1), atol=1e-6)


@pytest.mark.parametrize(("axes", "shape"), [([-2, -1], ("N", 5, 3)), ([2, 3], ("N", 3, 4, 4, 4))])
def test_average_pools_leaves_means_of_other_ranks_alone(axes: list[int], shape: tuple[str | int, ...]) -> None:
    """Of three axes the pool would average the last alone, of five the last three."""
    graph = _graph(axes, {"keepdims": 1}, shape)
    export._average_pools(graph)
    assert graph.node[0].op_type == "ReduceMean"


def test_check_raises_when_the_opset_is_another() -> None:
    model = helper.make_model(_graph([2, 3], {}), opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ExportError) as caught:
        export._check(model)
    assert str(caught.value) == ("asked for opset 21, the exporter wrote {'': 18}; use the pinned torch and onnxscript")


def test_check_raises_when_local_functions_are_left() -> None:
    opset = helper.make_opsetid("", 21)
    function = helper.make_function("local", "f", ["x"], ["y"], [helper.make_node("Identity", ["x"], ["y"])], [opset])
    model = helper.make_model(_graph([2, 3], {}), opset_imports=[opset], functions=[function])
    with pytest.raises(ExportError, match=r"^the exporter left 1 local functions in the graph; inline them first$"):
        export._check(model)
