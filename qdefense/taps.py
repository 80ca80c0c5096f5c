"""Taps: intermediate tensors as extra outputs of the graph that ONNX Runtime made of a file."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from qdefense.converters.reading import bodies, every_graph, node_label, safe_text
from qdefense.converters.runtime_graph import GraphOptions, Optimization, open_session

_SESSIONS = 8


class TapError(RuntimeError):
    """A tensor cannot be read, or not without changing the logits; the message says why and what to tap instead."""


class Tapped(NamedTuple):
    """A session with extra outputs, and the shapes that it declares for them: a symbol for each free dimension."""

    session: onnxruntime.InferenceSession
    shapes: dict[str, list[int | str | None]]


class Taps:
    """Sessions of one optimized graph with extra outputs, the last few of which are kept.

    Args:
        optimized: the graph that the runtime made of the file.
        shipped: the file, whose tensors may be gone in it.
        options: of the sessions.
        threads: of each session.
    """

    def __init__(self, optimized: bytes, shipped: bytes, options: GraphOptions, *, threads: int) -> None:
        self._optimized, self._shipped = optimized, shipped
        self._options, self._threads = options, threads
        self._kept: OrderedDict[tuple[frozenset[str], Optimization], Tapped] = OrderedDict()
        self._lock = threading.Lock()

    @cached_property
    def names(self) -> frozenset[str]:
        """The tensors that the optimized graph computes."""
        graph = onnx.load_from_string(self._optimized).graph
        return frozenset(name for node in graph.node for name in node.output if name)

    def check(self, tensor: str) -> None:
        """Refuse a tensor that the runtime keeps no value of.

        Raises:
            TapError: why there is none, and what to tap instead.
        """
        if tensor not in self.names:
            raise TapError(_why_missing(tensor, onnx.load_from_string(self._shipped).graph, self.names))

    def open(self, tensors: Iterable[str], optimization: Optimization) -> Tapped:
        """The session that answers with these tensors, too.

        Raises:
            TapError: a value is no tensor.
            RuntimeGraphError: the runtime refused the tapped graph.
        """
        key = (frozenset(tensors), optimization)
        with self._lock:
            found = self._kept.pop(key, None) or self._tapped(key[0], optimization)
            self._kept[key] = found
            if len(self._kept) > _SESSIONS:
                self._kept.popitem(last=False)
        return found

    def _tapped(self, tensors: frozenset[str], optimization: Optimization) -> Tapped:
        model = onnx.load_from_string(self._optimized)
        known = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in sorted(tensors - known))
        session = open_session(model.SerializeToString(), self._options, optimization, threads=self._threads)
        outputs = {output.name: output for output in session.get_outputs() if output.name in tensors}
        for name, output in outputs.items():
            if not output.type.startswith("tensor("):
                raise TapError(f"'{safe_text(name)}' is a {output.type}, not a tensor; tap what is taken out of it")
        return Tapped(session, {name: list(output.shape) for name, output in outputs.items()})


def joined(
    tensor: str, values: list[NDArray[np.generic]], rows: list[int], shape: list[int | str | None], *, frozen: bool
) -> NDArray[np.generic]:
    """The values of all groups of rows as one array.

    Row by row where the first axis is the images'; one value per group, stacked, where no axis is theirs.

    Args:
        tensor: its name, for the message.
        values: one array per group.
        rows: how many images each group has.
        shape: as the session declares it.
        frozen: the batch is a number in the file, so that its axis cannot be told by its symbol.

    Raises:
        TapError: the images are on another axis, or on none that can be told.
    """
    ranks = {value.ndim for value in values}
    fixed = all(isinstance(size, int) for size in shape) and not frozen
    if ranks == {0} or (fixed and shape and len({value.shape for value in values}) == 1):
        return np.stack(values)
    first_is_theirs = not shape or frozen or not isinstance(shape[0], int)
    if first_is_theirs and all(value.ndim and len(value) == count for value, count in zip(values, rows)):
        return np.concatenate(values)
    raise TapError(
        f"tensor '{safe_text(tensor)}' has shape {values[0].shape} for {rows[0]} images; its first axis must be theirs"
    )


def _why_missing(tensor: str, graph: onnx.GraphProto, kept: frozenset[str]) -> str:
    name = safe_text(tensor)
    if any(tensor == value.name for value in graph.input):
        return f"'{name}' is an input that is fed as the contract says; read it there"
    if any(tensor == constant.name for constant in graph.initializer):
        return f"'{name}' is a constant of the file, not an activation; read it from the file"
    if not tensor or not any(_is_computed(tensor, body) for body in every_graph(graph)):
        return f"neither the file nor what the runtime makes of it has a tensor '{name}'; see the outputs of its nodes"
    if not _is_computed(tensor, graph):
        return f"'{name}' lies in a branch of control flow, where no tap reaches; tap what comes out of it"
    return _why_gone(tensor, graph, kept)


def _why_gone(tensor: str, graph: onnx.GraphProto, kept: frozenset[str]) -> str:
    name = safe_text(tensor)
    if tensor not in moved_by_inputs(graph):
        return f"'{name}' follows from constants of the file alone; read it from the file"
    survivor, node = _first_kept(tensor, graph, kept)
    if node is None:
        return f"the runtime computes no '{name}': nothing that it keeps depends on it"
    return (
        f"the runtime keeps no value of '{name}': it is fused into what computes '{safe_text(survivor)}' (up to node "
        f"'{node_label(node)}', {safe_text(node.op_type)}); tap '{safe_text(survivor)}'"
    )


def _is_computed(tensor: str, graph: onnx.GraphProto) -> bool:
    return any(tensor in node.output for node in graph.node)


def moved_by_inputs(graph: onnx.GraphProto) -> set[str]:
    """The tensors of a graph that depend on what it is fed, and do not follow from constants alone."""
    constants = {tensor.name for tensor in graph.initializer}
    moved = {value.name for value in graph.input if value.name not in constants}
    for node in graph.node:
        inner = {name for _, body in bodies(node) for part in every_graph(body) for n in part.node for name in n.input}
        if not moved.isdisjoint((*node.input, *inner)):
            moved.update(filter(None, node.output))
    return moved


def _first_kept(tensor: str, graph: onnx.GraphProto, kept: frozenset[str]) -> tuple[str, onnx.NodeProto | None]:
    """The nearest tensor downstream that still exists, and the node of the file that computes it."""
    seen, front = {tensor}, [tensor]
    while front:
        readers = [node for node in graph.node if seen.intersection(node.input) and set(front).intersection(node.input)]
        found = next(((name, node) for node in readers for name in node.output if name in kept), None)
        if found is not None:
            return found
        front = [name for node in readers for name in node.output if name and name not in seen]
        seen.update(front)
    return tensor, None
