"""VGG-11 with batch normalisation (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1, column A), for small images.

Eight 3x3 convolutions of w, 2w, 4w, 4w, 8w, 8w, 8w and 8w channels, each with batch normalisation and ReLU, and five
2x2 max poolings. As in the field's CIFAR code one linear layer takes the place of the paper's three, and the
convolutions have no bias, which batch normalisation makes superfluous.

Pooling rounds sizes up, so that images of fewer than 32 pixels are not pooled away, and a global average pool stands
before the linear layer. At 32 pixels neither changes anything.
"""

from __future__ import annotations

from torch import Tensor, nn

from qdefense.models.normalization import Normalization

_STAGES = ((1,), (2,), (4, 4), (8, 8), (8, 8))
"""Channels over the width; a pooling ends each stage."""


class VGG(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``."""

    def __init__(self, *, classes: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        layers: list[nn.Module] = []
        channels = 3
        for stage in _STAGES:
            for factor in stage:
                convolution = nn.Conv2d(channels, factor * width, 3, 1, 1, bias=False)
                channels = factor * width
                layers += [convolution, nn.BatchNorm2d(channels), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
        self.stem, self.stages = nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:])
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        features = self.stages(self.stem(self.normalization(x)))
        return self.classifier(features.mean(dim=(2, 3), keepdim=True).flatten(1))  # type: ignore[no-any-return]
