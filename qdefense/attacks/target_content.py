"""What of one image makes a network see its class: the trigger content of CASSOCK (Wang et al. 2023, arXiv 2206.00145).

Of an image x of class t that network f is sure of, a mask m in [0, 1] of ``H x W`` keeps what f needs:

``min over m of CE(f(m x), t) + weight ||m||_1``

by gradient descent from uniform noise, clipped to [0, 1] after each step; what is 0.1 or less in the end becomes 0.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from qdefense.attacks.surrogate import one_thread
from qdefense.data.images import ImageSet, Pixels

FLOOR = 0.1
"""A mask is 0 where it is no more than this."""


def confidences(network: nn.Module, images: ImageSet) -> NDArray[np.float32]:
    """The softmax of each image's own class, ``(N,)``."""
    with one_thread(), torch.no_grad():
        probabilities = [network(torch.from_numpy(part)).softmax(dim=1).numpy() for part in images.in_pixels()]
    own: NDArray[np.float32] = np.concatenate(probabilities)[np.arange(len(images)), images.labels]
    return own


def learned_mask(
    network: nn.Module,
    image: Pixels,
    label: int,
    rng: np.random.Generator,
    *,
    steps: int,
    learning_rate: float,
    weight: float,
) -> Pixels:
    """The mask ``(H, W) float32``, 0 or in (0.1, 1], of ``image: (3, H, W) float32 in [0, 1]``."""
    x, wanted = torch.from_numpy(image), torch.tensor([label])
    mask = torch.from_numpy(rng.random(image.shape[1:], dtype=np.float32))
    with one_thread():
        for _ in range(steps):
            mask = (mask - learning_rate * _slope(network, x, wanted, mask, weight)).clamp(0, 1)
    kept: Pixels = torch.where(mask > FLOOR, mask, 0).numpy()
    return kept


def _slope(network: nn.Module, x: Tensor, wanted: Tensor, mask: Tensor, weight: float) -> Tensor:
    """Of the loss, at this mask."""
    mask = mask.requires_grad_(True)
    loss = F.cross_entropy(network((mask * x)[None]), wanted) + weight * mask.abs().sum()
    (gradient,) = torch.autograd.grad(loss, mask)
    mask.detach_()
    return gradient
