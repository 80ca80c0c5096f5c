"""The zoo's recipes: how each architecture is built and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from qdefense.models.normalization import Normalization
from qdefense.models.preact_resnet import PreActResNet
from qdefense.models.resnet import ResNet


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with Nesterov momentum under a one-cycle schedule, and light augmentation.

    ``shift`` is the largest random translation in pixels; ``flip`` mirrors half of the images, which is wrong for
    traffic signs and therefore off unless asked for.
    """

    epochs: int = 10
    batch_size: int = 128
    peak_learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2
    flip: bool = False


@dataclass(frozen=True)
class _Architecture:
    build: Callable[..., nn.Module]
    blocks: int
    width: int


_ARCHITECTURES = {
    "preactresnet18": _Architecture(PreActResNet, blocks=2, width=64),
    "resnet20": _Architecture(ResNet, blocks=3, width=16),
    "resnet8": _Architecture(ResNet, blocks=1, width=16),
}
"""Blocks per stage, and the default number of channels in the first one."""


def architectures() -> tuple[str, ...]:
    """Names that `build_model` knows."""
    return tuple(_ARCHITECTURES)


def default_width(architecture: str) -> int:
    """Channels of the first stage unless told otherwise.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    return _ARCHITECTURES[architecture].width


def recipe_for(architecture: str) -> Recipe:
    """The default recipe of an architecture.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    if architecture not in _ARCHITECTURES:
        raise KeyError(architecture)
    return Recipe()


def build_model(architecture: str, *, classes: int, width: int | None = None) -> nn.Module:
    """An untrained network; weights come from torch's global generator, so seed that first.

    ``width`` is the number of channels in the first stage, the architecture's own where it is ``None``.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    chosen = _ARCHITECTURES[architecture]
    normalization = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    channels = chosen.width if width is None else width
    return chosen.build(classes=classes, blocks=chosen.blocks, width=channels, normalization=normalization)
