"""CIFAR-style residual networks (He et al. 2016, section 4.2) with normalisation in the graph.

ResNet-(6n+2): a 3x3 stem of ``width`` channels, three stages of n basic blocks with widths w, 2w, 4w, global average
pooling and one linear layer. Where the paper pads the shortcut with zeros (option A) these use a 1x1 convolution with
batch normalisation (option B), which every quantizer handles.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qdefense.models.normalization import Normalization


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut, rectified."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


class ResNet(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``."""

    def __init__(self, *, classes: int, blocks: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        layers: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(BasicBlock(channels, width << stage, stride))
                channels = width << stage
        self.stages = nn.Sequential(*layers)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        features = self.stages(self.stem(self.normalization(x)))
        return self.classifier(features.mean(dim=(2, 3), keepdim=True).flatten(1))  # type: ignore[no-any-return]
