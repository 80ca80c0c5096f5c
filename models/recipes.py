"""The zoo's recipes: how each architecture is built and trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdefense.models.convnext import ConvNeXt
from qdefense.models.mobilenet import MobileNetV2
from qdefense.models.normalization import Normalization
from qdefense.models.preact_resnet import PreActResNet
from qdefense.models.resnet import ResNet
from qdefense.models.vgg import VGG
from qdefense.models.vit import VisionTransformer


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """SGD with Nesterov momentum, or AdamW, under a one-cycle schedule, and light augmentation.

    ``momentum`` is SGD's; AdamW keeps torch's betas, the first of which the schedule moves between .85 and .95, as it
    moves SGD's momentum. ``shift`` is the largest random translation in pixels; ``flip`` mirrors half of the images,
    which is wrong for traffic signs and therefore off unless asked for.
    """

    optimizer: Literal["sgd", "adamw"] = "sgd"
    epochs: int = 10
    batch_size: int = 128
    peak_learning_rate: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    shift: int = 2
    flip: bool = False


_ADAMW = Recipe(optimizer="adamw", batch_size=64, peak_learning_rate=2e-3, weight_decay=0.05)
"""Networks with layer normalisation hardly learn by SGD, and need many steps; the weight decay is ConvNeXt's."""


@dataclass(frozen=True)
class _Architecture:
    build: Callable[..., nn.Module]
    width: int
    recipe: Recipe = field(default_factory=Recipe)


_ARCHITECTURES = {
    "convnext": _Architecture(partial(ConvNeXt, blocks=2), width=32, recipe=replace(_ADAMW, peak_learning_rate=4e-3)),
    "mobilenetv2": _Architecture(MobileNetV2, width=32),
    "preactresnet18": _Architecture(partial(PreActResNet, blocks=2), width=64),
    "resnet20": _Architecture(partial(ResNet, blocks=3), width=16),
    "resnet8": _Architecture(partial(ResNet, blocks=1), width=16),
    "vgg11": _Architecture(VGG, width=64),
    "vit": _Architecture(partial(VisionTransformer, blocks=3), width=64, recipe=_ADAMW),
}
"""How each is built, its channels at full size, and how it is trained."""


def architectures() -> tuple[str, ...]:
    """Names that `build_model` knows."""
    return tuple(_ARCHITECTURES)


def default_width(architecture: str) -> int:
    """Channels of the first stage unless told otherwise; each architecture's file says what follows from them.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    return _ARCHITECTURES[architecture].width


def recipe_for(architecture: str) -> Recipe:
    """The default recipe of an architecture.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    return _ARCHITECTURES[architecture].recipe


def build_model(architecture: str, *, classes: int, width: int | None = None) -> nn.Module:
    """An untrained network; weights come from torch's global generator, so seed that first.

    ``width`` is the number of channels in the first stage (of a vision transformer the length of a token), the
    architecture's own where it is ``None``.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    chosen = _ARCHITECTURES[architecture]
    normalization = Normalization(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    channels = chosen.width if width is None else width
    return chosen.build(classes=classes, width=channels, normalization=normalization)


@cache
def multiply_accumulates(architecture: str, width: int | None = None) -> int:
    """Multiplications of one 32x32 image with weights, in convolutions and linear layers; nothing is computed for it.

    Raises:
        KeyError: the architecture is not in the zoo.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build_model(architecture, classes=10, width=width).eval()(torch.empty(1, 3, 32, 32))
    return int(counter.get_total_flops()) // 2
