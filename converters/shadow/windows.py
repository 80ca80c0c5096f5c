"""Strides, padding and dilation of convolutions and poolings, as ONNX spells them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from qdefense.converters.shadow.registry import Node

_AUTO_PADS = ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER")


@dataclass(frozen=True)
class Padding:
    """Cells added before and after each spatial axis."""

    begin: tuple[int, ...]
    end: tuple[int, ...]

    @property
    def symmetric(self) -> bool:
        """Whether a torch operator can add them itself."""
        return self.begin == self.end

    def apply(self, x: Tensor, value: float = 0.0) -> Tensor:
        """The padded tensor."""
        both = [size for axis in reversed(range(len(self.begin))) for size in (self.begin[axis], self.end[axis])]
        return functional.pad(x, both, value=value) if any(both) else x


@dataclass(frozen=True)
class Window:
    """The sliding window of a node; fields that the node leaves out are None."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[int, ...]
    auto_pad: str
    ceil: bool = False

    @property
    def extent(self) -> tuple[int, ...]:
        """Cells that the dilated kernel spans on each axis."""
        return tuple((size - 1) * dilation + 1 for size, dilation in zip(self.kernel, self.dilations, strict=True))

    def padding(self, sizes: Sequence[int]) -> Padding:
        """Padding of an input with the given spatial sizes."""
        rank = len(self.kernel)
        if self.auto_pad == "NOTSET":
            return Padding(self.pads[:rank], self.pads[rank:])
        if self.auto_pad == "VALID":
            return Padding((0,) * rank, (0,) * rank)
        total = [
            max(0, (-(-size // stride) - 1) * stride + extent - size)
            for size, stride, extent in zip(sizes, self.strides, self.extent, strict=True)
        ]
        small, large = tuple(cells // 2 for cells in total), tuple(cells - cells // 2 for cells in total)
        return Padding(small, large) if self.auto_pad == "SAME_UPPER" else Padding(large, small)

    def outputs(self, sizes: Sequence[int], padding: Padding) -> tuple[int, ...]:
        """Spatial sizes of the result."""
        found = []
        for axis, (size, stride, extent) in enumerate(zip(sizes, self.strides, self.extent, strict=True)):
            room = size + padding.begin[axis] + padding.end[axis] - extent
            count = (-(-room // stride) if self.ceil else room // stride) + 1
            # a window that starts behind the input and its leading padding sees nothing and is dropped
            if self.ceil and (count - 1) * stride >= size + padding.begin[axis]:
                count -= 1
            found.append(count)
        return tuple(found)


def slid(x: Tensor, sliding: Window) -> Tensor:
    """What the window sees at each place of padded `x`: (N, C, ...), a view of shape (N, C, outputs..., kernel...)."""
    for axis, (extent, stride, dilation) in enumerate(
        zip(sliding.extent, sliding.strides, sliding.dilations, strict=True)
    ):
        x = x.unfold(2 + axis, extent, stride)[..., ::dilation]
    return x


def window(node: Node, kernel: Sequence[int] | None = None) -> Window:
    """The window of a node; convolutions take the kernel's size from their weights.

    Raises:
        UnsupportedOperatorError: there is no kernel size, or an unknown `auto_pad`.
    """
    named = node.integers("kernel_shape")
    sizes = tuple(kernel) if kernel is not None else named
    if sizes is None:
        raise node.unsupported("attribute 'kernel_shape' is missing")
    auto_pad = node.text("auto_pad", "NOTSET") or "NOTSET"
    if auto_pad not in _AUTO_PADS:
        raise node.unsupported(f"attribute 'auto_pad' is {auto_pad!r}, expected one of {_AUTO_PADS}")
    rank = len(sizes)
    strides, dilations = node.integers("strides") or (1,) * rank, node.integers("dilations") or (1,) * rank
    pads = node.integers("pads") or (0,) * (2 * rank)
    if not len(strides) == len(dilations) == rank or len(pads) != 2 * rank or min(pads) < 0:
        raise node.unsupported(
            f"'strides' {strides}, 'dilations' {dilations} or 'pads' {pads} don't fit kernel {sizes}"
        )
    return Window(sizes, strides, dilations, pads, auto_pad, ceil=bool(node.integer("ceil_mode", 0)))
