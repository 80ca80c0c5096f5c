"""Changed shadow parameters back into the graph that they came from: as floats, or as codes of the same type."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from qdefense.converters.reading import every_graph, parse_model, safe_text
from qdefense.converters.rescaling import Rescaling, WriteBackError, rescaled
from qdefense.converters.shadow import Shadow, build_shadow
from qdefense.converters.shadow.graph import file_weights
from qdefense.converters.shadow.weights import Weights

Scales = Literal["keep", "recalibrate"]

_DATA_FIELDS = ("raw_data", "float_data", "int32_data", "double_data")


@dataclass(frozen=True, kw_only=True)
class ChangedTensor:
    """What writing back did to one initializer.

    Attributes:
        initializer: its name.
        size: number of its elements.
        changed: number of elements that the file now holds otherwise.
        clipped: number of changed parameters outside the range of the codes, which are held as its end.
    """

    initializer: str
    size: int
    changed: int
    clipped: int = 0


@dataclass(frozen=True, kw_only=True)
class WrittenModel:
    """A file with changed weights.

    Attributes:
        data: its bytes, self-contained; those of the old file where nothing changed.
        changed: what happened to each initializer that changed or was clipped, in the order of the file.
    """

    data: bytes
    changed: tuple[ChangedTensor, ...]


def write_back(model: bytes, shadow: Shadow, *, scales: Scales = "keep") -> WrittenModel:
    """Put the parameters of a shadow into the file that it was built from.

    The graph, its names, types and shapes, its metadata and every other tensor stay as they are, byte for byte. A
    trainable shadow computes what the new file computes; the parameters of another one are rounded to the file's grid
    here, and its answers differ by that.

    Args:
        model: the bytes that the shadow was built from.
        shadow: made by `build_shadow` with ``source="shipped"``.
        scales: "keep" rounds to the file's own scales and zero points and clips to the range of codes that it uses.
            "recalibrate" computes scales and zero points of changed integer weights anew, by the rule that the file's
            own follow, and brings the int32 biases behind them to the new scales; the shadow, which keeps the old
            ones, then differs by the rounding. Scales of activations stay in both.

    Raises:
        WriteBackError: the shadow is of another file or of the optimized graph; a parameter is not finite, or its
            initializer can't be changed, or the change reached some of its readers only; a scale to be recalibrated
            has other readers.
        FileRefusedError: the model is no file this tool reads.
        ShadowError: see `build_shadow`.
    """
    _check_origin(model, shadow, scales)
    weights = file_weights(model, shadow.contract)
    moved = _moved_parameters(model, shadow, weights)
    proto = parse_model(model)
    new = Rescaling({}, {})
    if scales == "recalibrate":
        new = rescaled(weights, {name: change.value for name, change in moved.items()}, _readers(proto))
    tensors, found = _tensors(proto), []
    for name in sorted({*moved, *new.weights, *new.parameters}, key=list(tensors).index):
        held, clipped = _held(name, weights, moved, new)
        found.append(_store(tensors[name], held, clipped))
    changed = tuple(entry for entry in found if entry.changed or entry.clipped)
    any_changed = any(entry.changed for entry in changed)
    return WrittenModel(data=bytes(proto.SerializeToString()) if any_changed else model, changed=changed)


@dataclass(frozen=True)
class _Moved:
    """A parameter that is not what the file holds, and where it still is."""

    value: Tensor
    same: Tensor


def _check_origin(model: bytes, shadow: Shadow, scales: str) -> None:
    if scales not in get_args(Scales):
        raise ValueError(f"scales is {scales!r}, expected one of {get_args(Scales)}")
    if shadow.source != "shipped":
        raise WriteBackError(
            "the shadow was built from the graph that ONNX Runtime makes of the file, whose weights are not those of "
            'the file; build it with source="shipped"'
        )
    if hashlib.sha256(model).hexdigest() != shadow.file_sha256:
        raise WriteBackError(
            f"the shadow was built from another file (sha256 {shadow.file_sha256[:12] or 'unknown'}); "
            "pass the bytes that it was built from"
        )


@torch.no_grad()
def _moved_parameters(model: bytes, shadow: Shadow, weights: Weights) -> dict[str, _Moved]:
    """The changed parameters by initializer; a change that can't be written is an error, never lost."""
    twin = build_shadow(model, source="shipped", contract=shadow.contract, trainable=shadow.trainable)
    names = {id(parameter): name for name, parameter in shadow.parameters_by_initializer.items()}
    before, moved = twin.state_dict(), {}
    if unknown := sorted(shadow.state_dict().keys() ^ before.keys()):
        raise WriteBackError(f"the module has gained or lost {unknown[0]!r}; change the values of its parameters only")
    for key, parameter in shadow.named_parameters():
        start, value = before[key], parameter.detach()
        name = names.get(id(parameter), key)
        if value.shape != start.shape:
            raise WriteBackError(
                f"initializer {safe_text(name)!r} has the shape {tuple(start.shape)} and its parameter "
                f"{tuple(value.shape)}; the graph stays as it is, so keep the shape"
            )
        same = _same(value, start)
        if not bool(same.all()):
            moved[name] = _Moved(value, same)
            _check_change(name, moved[name], weights)
            _check_reach(name, shadow, weights)
    for key, value in shadow.named_buffers():
        if not bool(_same(value, before[key]).all()):
            raise WriteBackError(f"buffer {key!r} was changed, which holds a constant of the graph; leave it as it was")
    return moved


def _same(a: Tensor, b: Tensor) -> Tensor:
    """Where two tensors are equal; a NaN is equal to another here."""
    return (a == b) | (torch.isnan(a) & torch.isnan(b))


def _check_change(name: str, change: _Moved, weights: Weights) -> None:
    if name not in weights.trainable:
        reason = weights.frozen.get(name, "it is no weight of the file but a scale, or a constant of its contract")
        raise WriteBackError(
            f"the parameter of initializer {safe_text(name)!r} was changed, and can't be written back: "
            f"{safe_text(reason)}; leave it as it was"
        )
    lost = int((~torch.isfinite(change.value) & ~change.same).sum())
    if lost:
        raise WriteBackError(
            f"the parameter of initializer {safe_text(name)!r} has {lost} values of {change.value.numel()} that are "
            "NaN or infinite; train with a smaller learning rate"
        )


def _check_reach(name: str, shadow: Shadow, weights: Weights) -> None:
    if not shadow.trainable and name in weights.copied:
        raise WriteBackError(
            f"the parameter of initializer {safe_text(name)!r} was changed, which another node reads in a form that "
            "this shadow has computed once, so that the change reached some nodes only; build the shadow with "
            "trainable=True"
        )


def _readers(proto: onnx.ModelProto) -> Mapping[str, int]:
    return Counter(name for graph in every_graph(proto.graph) for node in graph.node for name in node.input)


def _tensors(proto: onnx.ModelProto) -> dict[str, TensorProto]:
    """The initializers by name; those of branches have one of their own, or are none that the shadow knows."""
    found = {tensor.name: tensor for tensor in proto.graph.initializer}
    for graph in every_graph(proto.graph):
        for tensor in graph.initializer:
            found.setdefault(tensor.name, tensor)
    return found


@torch.no_grad()
def _held(name: str, weights: Weights, moved: Mapping[str, _Moved], new: Rescaling) -> tuple[Tensor, int]:
    """What the file is to hold, and how many changed numbers are beyond the range of codes."""
    if name in new.parameters:
        return new.parameters[name].value, 0
    weight = weights.trainable[name]
    if name in new.weights:
        value = moved[name].value if name in moved else weight.value()
        return new.weights[name].held(value), int(new.weights[name].beyond(value).sum())
    change = moved[name]
    held = torch.where(change.same, weight.stored.value, weight.held(change.value))
    if not bool(torch.isfinite(held[~change.same]).all()):
        raise WriteBackError(
            f"the parameter of initializer {safe_text(name)!r} holds numbers too large for its float16; keep them "
            "within 65504"
        )
    return held, int((weight.beyond(change.value) & ~change.same).sum())


def _store(tensor: TensorProto, held: Tensor, clipped: int) -> ChangedTensor:
    """Put new values into a tensor in the form that it has; one whose values stay is not touched."""
    before = numpy_helper.to_array(tensor)
    array = np.ascontiguousarray(held.numpy().astype(before.dtype)).reshape(before.shape)
    changed = int(np.count_nonzero(_bits(array) != _bits(before)))
    if changed:
        if tensor.HasField("raw_data"):
            fresh = numpy_helper.from_array(array)
        else:
            fresh = helper.make_tensor("", tensor.data_type, tensor.dims, array.reshape(-1))
        for field in _DATA_FIELDS:
            tensor.ClearField(field)
        fresh.ClearField("dims")
        fresh.ClearField("name")
        tensor.MergeFrom(fresh)
    return ChangedTensor(initializer=tensor.name, size=array.size, changed=changed, clipped=clipped)


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """The array as whole numbers: a NaN is not equal to itself, its bits are."""
    bits: NDArray[Any] = np.ascontiguousarray(array).view(f"u{array.itemsize}")
    return bits
