"""Normalisation inside the graph, so that every file takes pixels in [0, 1]."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Normalization(nn.Module):
    """Per-channel ``(x - mean) / std`` for ``x: (N, 3, H, W) float32 in [0, 1]``."""

    def __init__(self, mean: tuple[float, float, float], std: tuple[float, float, float]) -> None:
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise a batch."""
        return (x - self.mean) / self.std
