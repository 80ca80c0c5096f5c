"""A small vision transformer, after "Better plain ViT baselines" (Beyer et al. 2022, arXiv 2205.01580).

Like theirs: patches by one convolution, fixed 2-D sine and cosine positions, pre-norm blocks (attention, then GELU
perceptron of four times the width), a last layer normalisation, the mean over all patches in place of a class token,
one linear layer. Unlike theirs: patches of 4 pixels, 3 blocks and 4 heads (or as many of four as divide the width),
for small images; ``width`` is the length of a token.

The positions follow from the image's size, so that one network takes images of any. The mean is written as a spatial
one: ONNX Runtime averages integers only there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from qdefense.models.normalization import Normalization

_PATCH, _HEADS, _EXPANSION, _TEMPERATURE = 4, 4, 4, 10_000.0


class Attention(nn.Module):
    """Multi-head self-attention of tokens ``(N, T, width)``."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = math.gcd(_HEADS, width)
        self.scale = (width // self.heads) ** -0.5
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.projection = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """``softmax(Q K^T / sqrt(d)) V`` of each head, joined and projected."""
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        weights = (query @ key.transpose(2, 3) * self.scale).softmax(dim=3)
        return self.projection((weights @ value).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def _split(self, x: Tensor) -> Tensor:
        heads: Tensor = x.unflatten(2, (self.heads, -1))  # type: ignore[no-untyped-call]
        return heads.transpose(1, 2)


class TransformerBlock(nn.Module):
    """Pre-norm attention and perceptron, each with a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width)
        self.perceptron = nn.Sequential(
            nn.Linear(width, _EXPANSION * width), nn.GELU(), nn.Linear(_EXPANSION * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Tokens ``(N, T, width)`` to tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.perceptron(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """``x: (N, 3, H, W) float32 in [0, 1] -> logits (N, classes)``, sides of at least 4 pixels."""

    def __init__(self, *, classes: int, blocks: int, width: int, normalization: Normalization) -> None:
        super().__init__()
        self.normalization = normalization
        self.stem = nn.Conv2d(3, width, _PATCH, _PATCH)
        self.stages = nn.Sequential(*(TransformerBlock(width) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch."""
        patches = self.stem(self.normalization(x))
        width, rows, columns = patches.shape[1:]
        tokens = patches.flatten(2).transpose(1, 2) + positions(rows, columns, width).to(patches)
        answers = self.norm(self.stages(tokens)).transpose(1, 2).unflatten(2, (rows, columns))
        return self.classifier(answers.mean(dim=(2, 3), keepdim=True).flatten(1))  # type: ignore[no-any-return]


def positions(rows: int, columns: int, width: int) -> Tensor:
    """Fixed positions ``(rows * columns, width)``: a quarter each of sin x, cos x, sin y, cos y.

    The j-th of q frequencies is ``10000 ** (-j / (q - 1))``; a width that four does not divide loses its last ones.
    """
    quarter = math.ceil(width / 4)
    frequencies = _TEMPERATURE ** (-torch.arange(quarter) / max(quarter - 1, 1))
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (x, y)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1)[:, :width]
