"""Functions that a model defines for itself, put in the place of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx
from onnx import inliner

from qdefense.converters.operator_versions import quoted
from qdefense.converters.reading import bodies
from qdefense.converters.shadow.registry import ShadowError

LARGEST_GRAPH = 100_000
"""Nodes; a few nested functions that call each other ten times would fill any memory."""

_Key = tuple[str, str]
_Functions = Mapping[_Key, onnx.FunctionProto]


def without_functions(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with every call of one of its own functions replaced by the function's body.

    Bodies in another opset than the model's are converted to it.

    Raises:
        ShadowError: a function calls itself, can't be converted, or the graph would grow beyond 100,000 nodes.
    """
    if not model.functions:
        return model
    functions = {(function.domain, function.name): function for function in model.functions}
    sizes: dict[_Key, int] = {}
    for key in functions:
        _measure(key, functions, sizes, ())
    nodes = _size(model.graph.node, sizes)
    if nodes > LARGEST_GRAPH:
        raise ShadowError(
            f"the file's own functions make a graph of {nodes} nodes, more than {LARGEST_GRAPH}; export a smaller model"
        )
    try:
        return inliner.inline_local_functions(model, convert_version=True)
    except (RuntimeError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ShadowError(
            f"the file's own functions can't be inlined: {reason}; inline them with onnx.inliner and save again"
        ) from error


def _measure(key: _Key, functions: _Functions, sizes: dict[_Key, int], calls: tuple[_Key, ...]) -> None:
    if key in calls:
        raise ShadowError(
            f"function {quoted(key[1])} of domain {quoted(key[0])} calls itself, which ONNX forbids; "
            "export the model again"
        )
    if key in sizes:
        return
    for called in _called(functions[key].node):
        if called in functions:
            _measure(called, functions, sizes, (*calls, key))
    sizes[key] = _size(functions[key].node, sizes)


def _called(nodes: Iterable[onnx.NodeProto]) -> Iterable[_Key]:
    for node in nodes:
        yield node.domain, node.op_type
        for _, body in bodies(node):
            yield from _called(body.node)


def _size(nodes: Iterable[onnx.NodeProto], sizes: Mapping[_Key, int]) -> int:
    return sum(sizes.get(key, 1) for key in _called(nodes))
