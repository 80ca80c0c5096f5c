"""nn.Module to one ONNX file: dynamo exporter, opset 21, dynamic batch, nothing about the build machine left inside."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import onnx
import torch
from onnx import numpy_helper
from torch import nn

from qdefense.converters.contract import ContractError, InputContract, read_contract, write_contract

OPSET = 21
INPUT_NAME, OUTPUT_NAME = "image", "logits"
_REGISTRATION_LOGGER = "torch.onnx._internal.exporter._registration"


class ExportError(RuntimeError):
    """The exporter produced something other than what was asked for."""


def export_model(module: nn.Module, *, height: int, width: int, class_names: tuple[str, ...]) -> bytes:
    """Serialise a classifier that takes ``x: (N, 3, height, width) float32 in [0, 1]``, normalisation inside.

    Spatial ``ReduceMean`` becomes ``GlobalAveragePool``: the same function, but one that ONNX Runtime has an integer
    kernel for, so that a quantized file is integer from the first convolution to the last layer.

    Raises:
        ExportError: the opset read back is not the one asked for, or the graph does not end in (N, classes).
    """
    model = _run_exporter(module, height, width)
    _average_pools(model.graph)
    _strip(model)
    _check(model)
    contract = InputContract(
        input_name=INPUT_NAME, output_name=OUTPUT_NAME, height=height, width=width, class_names=class_names
    )
    write_contract(model, contract)
    _check_contract(model)
    data: bytes = model.SerializeToString(deterministic=True)
    return data


def _run_exporter(module: nn.Module, height: int, width: int) -> onnx.ModelProto:
    training = module.training
    module.eval()
    try:
        with _quiet_exporter():
            program = torch.onnx.export(
                module,
                (torch.zeros(2, 3, height, width),),
                dynamo=True,
                opset_version=OPSET,
                external_data=False,
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
    finally:
        module.train(training)
    if program is None:
        raise ExportError("torch.onnx.export returned nothing; the installed torch has no dynamo exporter")
    return program.model_proto


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Hide what no user can act on: torchvision's absence and a deprecation inside torch itself."""
    logger = logging.getLogger(_REGISTRATION_LOGGER)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=r".*LeafSpec.*", category=FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def _average_pools(graph: onnx.GraphProto) -> None:
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {value.name: len(value.type.tensor_type.shape.dim) for value in (*graph.input, *graph.value_info)}
    for node in graph.node:
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in constants:
            continue
        if ranks.get(node.input[0], 4) != 4:  # the pool averages all axes behind the second, of whatever rank
            continue
        axes = numpy_helper.to_array(constants[node.input[1]]).tolist()
        keep = all(attribute.i == 1 for attribute in node.attribute if attribute.name == "keepdims")
        if sorted(axes) in ([2, 3], [-2, -1]) and keep:
            node.op_type = "GlobalAveragePool"
            del node.input[1:]
            del node.attribute[:]
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def _strip(model: onnx.ModelProto) -> None:
    """Remove stack traces, local paths and everything else that tells where and how the file was built."""
    graph = model.graph
    del model.metadata_props[:]
    model.doc_string = graph.doc_string = ""
    for holder in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del holder.metadata_props[:]
        holder.doc_string = ""


def _check(model: onnx.ModelProto) -> None:
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    if opsets.get("") != OPSET:
        raise ExportError(f"asked for opset {OPSET}, the exporter wrote {opsets}; use the pinned torch and onnxscript")
    if model.functions:
        raise ExportError(f"the exporter left {len(model.functions)} local functions in the graph; inline them first")
    onnx.checker.check_model(model, full_check=True)


def _check_contract(model: onnx.ModelProto) -> None:
    try:
        read_contract(model)
    except ContractError as error:
        raise ExportError(f"the exported graph does not fit what was asked for: {error}") from error
