"""The zoo's recipes: how each architecture is built and trained."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qdefense.models.normalization import Normalization
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


_BLOCKS = {"resnet8": 1}


def architectures() -> tuple[str, ...]:
    """Names that `build_model` knows."""
    return tuple(sorted(_BLOCKS))


def recipe_for(architecture: str) -> Recipe:
    """The default recipe of an architecture.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    if architecture not in _BLOCKS:
        raise KeyError(architecture)
    return Recipe()


def build_model(architecture: str, *, classes: int, width: int = 16) -> nn.Module:
    """An untrained network; weights come from torch's global generator, so seed that first.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    normalization = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    return ResNet(classes=classes, blocks=_BLOCKS[architecture], width=width, normalization=normalization)
