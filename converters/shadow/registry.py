"""One table from ONNX operators to the functions that build their differentiable twin."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from onnx import TensorProto
from torch import Tensor

from qdefense.converters import operator_versions
from qdefense.converters.operator_versions import last_change, operator_label, version_problem

MICROSOFT = operator_versions.MICROSOFT

VERIFIED: Mapping[str, int] = {"": 28, MICROSOFT: 1}
"""The newest version of each domain that the registered functions were held against.

A function has one meaning from its `since` up to the next function of the same operator, and at most up to here: what
a later release of onnx changes is refused until someone has looked at it. That no operator changed in between is
tested against ONNX Runtime at every version that its schema has (tests/converters/shadow/test_operator_versions.py).
"""


class ShadowError(ValueError):
    """The file can't be turned into a shadow; the message says what, where and what to do."""


class UnsupportedOperatorError(ShadowError):
    """The graph holds an operator, or a use of one, that no registered function covers.

    Attributes:
        node: name of the node.
    """

    def __init__(self, message: str, *, node: str) -> None:
        super().__init__(message)
        self.node = node


@dataclass(frozen=True)
class Mode:
    """How one forward pass computes.

    Attributes:
        exact: accumulate so that every quantized value equals the runtime's integer arithmetic.
        saturate: reproduce the int16 pair saturation of u8 x s8 kernels, in value.
        rows: batch size, the length of axis 0 of the graph's input.
        group: images that share their dynamic scales: the batch that the runtime is given, the last one may be short.
        dtype: what the graph's float32 tensors are computed in.
    """

    exact: bool = False
    saturate: bool = False
    rows: int = 1
    group: int = 1
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Constant:
    """A tensor known at build time.

    Attributes:
        value: 2, 4, 8 and 16 bit integers as float32 codes, floats below 32 bits as float32, unsigned ones of 32 and
            64 bits as int64, everything else in its own type.
        element_type: the ONNX type of the tensor in the file.
        initializer: name of the initializer that a change of `value` would have to be written to.
    """

    value: Tensor
    element_type: int
    initializer: str | None = None


Kernel = Callable[..., Any]
MALFORMED = (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, OverflowError)
"""What functions and kernels raise when inputs or attributes are none that their operator can have."""


@dataclass
class Node:
    """What a builder may know of one node: its attributes, and the constants among its inputs.

    A builder reads attributes only through `integer`, `integers`, `number`, `text` and `ignore`; one that it
    never read is one that it would not obey, and makes the node unsupported. An input read through `constant` is
    folded into the kernel, which gets None in its place.

    Attributes:
        opset: version of the node's domain in the file.
        constants: by position, the inputs known at build time.
        element_types: ONNX types of the inputs, as far as they are known.
        per_row: which inputs hold one value per image.
        emits: set by the builder, the types of the outputs; without it they have that of the first input.
        emits_per_row: set by the builder, which outputs hold one value per image; without it they do where all
            inputs do that are not constant.
        folded: positions of the inputs that the kernel doesn't need any more.
    """

    name: str
    op_type: str
    domain: str
    opset: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constants: Mapping[int, Constant]
    element_types: Sequence[int | None]
    per_row: Sequence[bool]
    emits: tuple[int, ...] = ()
    emits_per_row: tuple[bool, ...] | None = None
    folded: set[int] = field(default_factory=set)
    _read: set[str] = field(default_factory=set)

    def has(self, index: int) -> bool:
        """Whether the optional input is there."""
        return index < len(self.inputs) and self.inputs[index] != ""

    def constant(self, index: int) -> Tensor:
        """Value of an input that must be known at build time, and is folded into the kernel.

        Raises:
            UnsupportedOperatorError: it is computed by the graph.
        """
        value = self._known(index).value
        self.folded.add(index)
        return value

    def constant_shape(self, index: int) -> torch.Size:
        """Shape of an input that must be known at build time and stays an input of the kernel.

        Raises:
            UnsupportedOperatorError: it is computed by the graph.
        """
        return self._known(index).value.shape

    def optional_constant(self, index: int) -> Tensor | None:
        """Value of an optional input that must be known at build time, None where it is left out."""
        return self.constant(index) if self.has(index) else None

    def element_type(self, index: int) -> int | None:
        """ONNX type of an input as far as it is known."""
        return self.element_types[index] if index < len(self.inputs) else None

    def integer(self, name: str, default: int) -> int:
        """An integer attribute."""
        return int(self._attribute(name, default))

    def integers(self, name: str) -> tuple[int, ...] | None:
        """An attribute that lists integers, None where it is left out."""
        value = self._attribute(name, None)
        return None if value is None else tuple(int(item) for item in value)

    def optional_integer(self, name: str) -> int | None:
        """An integer attribute, None where it is left out."""
        value = self._attribute(name, None)
        return None if value is None else int(value)

    def number(self, name: str, default: float) -> float:
        """A float attribute."""
        return float(self._attribute(name, default))

    def numbers(self, name: str) -> tuple[float, ...]:
        """An attribute that lists floats, empty where it is left out."""
        return tuple(float(item) for item in self._attribute(name, ()))

    def text(self, name: str, default: str) -> str:
        """A string attribute."""
        value = self._attribute(name, default)
        return value.decode(errors="replace") if isinstance(value, bytes) else str(value)

    def ignore(self, *names: str) -> None:
        """Mark attributes that say nothing the inputs don't say already."""
        self._read.update(names)

    def require(self, name: str, allowed: int) -> None:
        """Accept one value of an integer attribute only.

        Raises:
            UnsupportedOperatorError: the attribute has another value.
        """
        value = self.integer(name, allowed)
        if value != allowed:
            raise self.unsupported(f"attribute {name!r} is {value}, only {allowed} is covered")

    def keep_first_output(self) -> None:
        """Forget outputs that only training needs: a node that reads one is refused."""
        self.outputs = self.outputs[:1]

    def unread(self) -> list[str]:
        """Attributes that the builder has not looked at."""
        return sorted(set(self.attributes) - self._read)

    def unsupported(self, reason: str) -> UnsupportedOperatorError:
        """The error that names this node, its operator and the reason."""
        return UnsupportedOperatorError(
            f"{self.label}: {reason}; "
            "register it with qdefense.converters.shadow.operator, or export the model without it",
            node=self.name,
        )

    def corrupt(self, reason: str) -> ShadowError:
        """The error that names this node, its operator and what is wrong with a value that the file gives it."""
        return ShadowError(f"{self.label}: {reason}; quantize or export the model again")

    @property
    def label(self) -> str:
        """What errors say of this node."""
        return operator_label(self.name, self.op_type, self.domain, self.opset)

    def _known(self, index: int) -> Constant:
        if index not in self.constants:
            name = self.inputs[index] if index < len(self.inputs) else ""
            raise self.unsupported(f"input {index} ({name!r}) is not a constant")
        return self.constants[index]

    def _attribute(self, name: str, default: Any) -> Any:
        self._read.add(name)
        return self.attributes.get(name, default)


@dataclass(frozen=True)
class Operator:
    """A registered function: `build(node)` returns the kernel, `kernel(*inputs)` or `kernel(mode, *inputs)`."""

    op_type: str
    domain: str
    since: int
    build: Callable[[Node], Kernel]
    per_row: bool
    needs_mode: bool


_TABLE: dict[tuple[str, str, int], Operator] = {}


def operator(
    op_type: str,
    domain: str = "",
    since: int = 1,
    *,
    per_row: bool = False,
    needs_mode: bool = False,
) -> Callable[[Callable[[Node], Kernel]], Callable[[Node], Kernel]]:
    """Register the function that builds the kernel of one ONNX operator.

    Args:
        op_type: the operator's name.
        domain: "" is ai.onnx.
        since: first opset version whose meaning the function has; the newest that is not above the file's wins.
        per_row: the function knows what to do with inputs that hold one value per image (see `operands`).
        needs_mode: the kernel takes the `Mode` of the pass before its inputs.

    Raises:
        ValueError: the operator is registered already.
    """

    def register(build: Callable[[Node], Kernel]) -> Callable[[Node], Kernel]:
        key = (domain, op_type, since)
        if key in _TABLE:
            raise ValueError(f"operator {key} is registered twice; remove one of the two functions")
        _TABLE[key] = Operator(op_type, domain, since, build, per_row, needs_mode)
        return build

    return register


def _find(node: Node) -> Operator:
    problem = version_problem(node.op_type, node.domain, node.opset) if node.domain in VERIFIED else ""
    if problem:
        raise node.unsupported(problem)
    versions = [key[2] for key in _TABLE if key[:2] == (node.domain, node.op_type)]
    fitting = [version for version in versions if version <= max(node.opset, 1)]
    if not fitting:
        later = f" before version {min(versions)}" if versions else ""
        raise node.unsupported(f"no function is registered for it{later}")
    if node.domain == "":
        changed = last_change(node.op_type, node.opset)
        if changed > max(VERIFIED[""], *fitting):
            raise node.unsupported(
                f"ONNX changed it in version {changed}, and its function was held against versions up to {VERIFIED['']}"
            )
    return _TABLE[node.domain, node.op_type, max(fitting)]


def registered() -> Mapping[tuple[str, str, int], Operator]:
    """The table: (domain, operator, since) to its function."""
    return dict(_TABLE)


def one_line(error: Exception) -> str:
    """What a malformed node made Python or torch say, shortened."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


@contextmanager
def malformed_refused(node: Node) -> Iterator[None]:
    """Make of whatever Python or torch say of a malformed node the error that names it."""
    try:
        yield
    except ShadowError:
        raise
    except MALFORMED as error:
        raise node.unsupported(f"its inputs or attributes don't fit it ({one_line(error)})") from error


def build_kernel(node: Node) -> Kernel:
    """The kernel of one node, as ``kernel(mode, *inputs)``.

    Raises:
        UnsupportedOperatorError: no function is registered, or it does not cover this use of the operator.
    """
    found = _find(node)
    if any(node.per_row) and not found.per_row:
        raise node.unsupported("it takes a scale or zero point that dynamic quantization computes per image")
    with malformed_refused(node):
        kernel = found.build(node)
    if node.unread():
        raise node.unsupported(f"attributes {node.unread()} are not covered")
    return kernel if found.needs_mode else lambda _mode, *inputs: kernel(*inputs)


CODE_RANGES: Mapping[int, tuple[int, int]] = {
    TensorProto.UINT8: (0, 255),
    TensorProto.INT8: (-128, 127),
    TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
    TensorProto.UINT4: (0, 15),
    TensorProto.INT4: (-8, 7),
    TensorProto.UINT2: (0, 3),
    TensorProto.INT2: (-2, 1),
}
"""What codes of each type can be."""

UNSIGNED_RANGES: Mapping[int, tuple[int, int]] = {
    TensorProto.UINT32: (0, 2**32 - 1),
    TensorProto.UINT64: (0, 2**63 - 1),
}
"""Unsigned integers carried as int64; of the 64 bit ones, those that it can hold."""

NARROW_FLOATS = frozenset(
    {
        TensorProto.FLOAT16,
        TensorProto.BFLOAT16,
        TensorProto.FLOAT8E4M3FN,
        TensorProto.FLOAT8E4M3FNUZ,
        TensorProto.FLOAT8E5M2,
        TensorProto.FLOAT8E5M2FNUZ,
        TensorProto.FLOAT8E8M0,
        TensorProto.FLOAT4E2M1,
    }
)
"""Floats carried as float32 that hold what they round to."""
