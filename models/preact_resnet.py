"""Pre-activation residual networks (He et al. 2016, arXiv 1603.05027) for small images, normalisation in the graph.

PreActResNet-18: a 3x3 stem of ``width`` channels, four stages of two blocks with widths w, 2w, 4w, 8w and strides
1, 2, 2, 2, then batch normalisation, ReLU, global average pooling and one linear layer.

As in the field's code, the first block's shortcut takes the stem's output as it is, where the paper rectifies it first.
BackdoorBench's network of this name has no batch normalisation and ReLU before the pooling; the paper's has, and so
has this one.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from qdefense.models.normalization import Normalization

_STAGES = 4


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, and a shortcut that nothing rectifies."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus shortcut; a projected shortcut starts at the rectified input, another at ``x``."""
        active = F.relu(self.norm1(x))
        residual: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return residual + (x if self.shortcut is None else self.shortcut(active))


class PreActResNet(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``."""

    def __init__(self, *, classes: int, blocks: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        self.stem = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        layers: list[nn.Module] = []
        channels = width
        for stage in range(_STAGES):
            for block in range(blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(PreActivationBlock(channels, width << stage, stride))
                channels = width << stage
        self.stages = nn.Sequential(*layers)
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        features = F.relu(self.norm(self.stages(self.stem(self.normalization(x)))))
        return self.classifier(features.mean(dim=(2, 3), keepdim=True).flatten(1))  # type: ignore[no-any-return]
