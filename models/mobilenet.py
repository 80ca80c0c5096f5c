"""MobileNetV2 (Sandler et al. 2018, arXiv 1801.04381, table 2) for small images, normalisation in the graph.

A 3x3 stem, 17 inverted residual blocks (1x1 expansion, depthwise 3x3, linear 1x1 projection, ReLU6), a 1x1 convolution
and one linear layer. ``width`` is the channels of the stem: the paper's width multiplier is ``width / 32``. Channels
are rounded to multiples of 8 as in the authors' code, and as in the paper a multiplier below one leaves the last
convolution's 1280 channels as they are.

The paper halves a 224-pixel image five times. For 32 pixels the stem and the 24-channel stage keep the size, as in the
field's CIFAR code; that code also projects shortcuts, which the paper and this network do not.
"""

from __future__ import annotations

from torch import Tensor, nn

from qdefense.models.normalization import Normalization

_PAPERS_STEM, _LAST, _DIVISOR = 32, 1280, 8
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion, channels at multiplier one, blocks, stride of the first block."""


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection; the input is added where the shape stays."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        expand = [] if expansion == 1 else [_rectified(inputs, hidden, 1)]
        self.branch = nn.Sequential(
            *expand,
            _rectified(hidden, hidden, 3, stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's answer; nothing rectifies it."""
        answer: Tensor = self.branch(x)
        return x + answer if self.residual else answer


class MobileNetV2(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``."""

    def __init__(self, *, classes: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        multiplier = width / _PAPERS_STEM
        channels = _rounded(width)
        self.stem = _rectified(3, channels, 3)
        layers: list[nn.Module] = []
        for expansion, at_one, blocks, first_stride in _STAGES:
            outputs = _rounded(at_one * multiplier)
            for block in range(blocks):
                layers.append(InvertedResidual(channels, outputs, first_stride if block == 0 else 1, expansion))
                channels = outputs
        last = _rounded(_LAST * max(1.0, multiplier))
        self.stages = nn.Sequential(*layers, _rectified(channels, last, 1))
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        features = self.stages(self.stem(self.normalization(x)))
        return self.classifier(features.mean(dim=(2, 3), keepdim=True).flatten(1))  # type: ignore[no-any-return]


def _rectified(inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU6())


def _rounded(channels: float) -> int:
    """The nearest multiple of 8, at least 8 and never less than nine tenths of what was asked for."""
    nearest = max(_DIVISOR, int(channels + _DIVISOR / 2) // _DIVISOR * _DIVISOR)
    return nearest if nearest >= 0.9 * channels else nearest + _DIVISOR
