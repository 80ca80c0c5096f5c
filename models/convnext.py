"""A ConvNeXt (Liu et al. 2022, arXiv 2201.03545) for small images, normalisation in the graph.

A patch stem, three stages of widths w, 2w and 4w with a downsampling layer before the second and third, global average
pooling, layer normalisation and one linear layer. A block is a depthwise 7x7 convolution, layer normalisation over the
channels, a 1x1 convolution to four times the channels, GELU, a 1x1 convolution back and a layer scale.

Unlike the paper's: patches of 2 pixels and three stages, for small images; no stochastic depth; layer scales that begin
at 0.1, as Touvron et al. 2021 (arXiv 2103.17239, section 2) begin networks of up to 18 blocks, not at 1e-6; weights as
torch draws them, because the paper's deviation of 0.02 is one for wider layers. The 1x1 convolutions are the authors'
first form; their second, linear layers, computes the same.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdefense.models.normalization import Normalization

_PATCH, _STAGES, _EXPANSION, _LAYER_SCALE = 2, 3, 4, 0.1


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of ``(N, C, H, W)``."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every pixel over its channels."""
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7 convolution and a perceptron of every pixel, scaled by channel and added to the input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, 1, 3, groups=channels)
        self.norm = ChannelNorm(channels)
        self.expand = nn.Conv2d(channels, _EXPANSION * channels, 1)
        self.project = nn.Conv2d(_EXPANSION * channels, channels, 1)
        self.scale = nn.Parameter(torch.full((channels, 1, 1), _LAYER_SCALE))

    def forward(self, x: Tensor) -> Tensor:
        """Residual branch plus input."""
        branch: Tensor = self.project(F.gelu(self.expand(self.norm(self.depthwise(x)))))
        return x + self.scale * branch


class ConvNeXt(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``."""

    def __init__(self, *, classes: int, blocks: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        self.stem = nn.Sequential(nn.Conv2d(3, width, _PATCH, _PATCH), ChannelNorm(width))
        layers: list[nn.Module] = []
        for stage in range(_STAGES):
            channels = width << stage
            if stage > 0:
                layers += [ChannelNorm(channels // 2), nn.Conv2d(channels // 2, channels, 2, 2)]
            layers += [ConvNeXtBlock(channels) for _ in range(blocks)]
        self.stages = nn.Sequential(*layers)
        self.norm = ChannelNorm(channels)
        self.classifier = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        features = self.stages(self.stem(self.normalization(x)))
        return self.classifier(self.norm(features.mean(dim=(2, 3), keepdim=True)).flatten(1))  # type: ignore[no-any-return]
