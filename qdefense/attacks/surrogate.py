"""The attacker's own network, trained on the clean set, and perturbations of images against it.

It stands for the network that the papers take ready-made: a small one that learns in seconds on a CPU. Everything runs
on one thread, because the order of sums, and so the poisons, would otherwise depend on the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from qdefense.data.images import ImageSet

_WIDTH = 16
_BATCH = 64
_PEAK_LEARNING_RATE = 1e-2


class Surrogate(nn.Module):
    """Three convolutions, a mean over places, a linear layer: ``(N, 3, H, W) in [0, 1]`` to ``(N, K)`` logits."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = [3, _WIDTH, 2 * _WIDTH, 4 * _WIDTH]
        layers = [_layer(inputs, outputs, 1 if inputs == 3 else 2) for inputs, outputs in pairwise(widths)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], classes)

    def features(self, x: Tensor) -> Tensor:
        """What the last layer reads: ``(N, 64)``."""
        maps: Tensor = self.body((x - 0.5) / 0.25)
        return maps.mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        logits: Tensor = self.head(self.features(x))
        return logits


def _layer(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread, and on as many as before afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def train_surrogate(dataset: ImageSet, rng: np.random.Generator, *, epochs: int) -> Surrogate:
    """Train on the clean set by Adam under a one-cycle schedule, without augmentation; frozen, in eval mode.

    The state of torch is left as it was: the weights come from ``rng`` alone.
    """
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**63)))
        surrogate = Surrogate(len(dataset.class_names)).train()
        _fit(surrogate, dataset, rng, epochs)
    return surrogate.eval().requires_grad_(False)


def _fit(surrogate: Surrogate, dataset: ImageSet, rng: np.random.Generator, epochs: int) -> None:
    batches = max(1, len(dataset) // _BATCH)
    optimizer = torch.optim.Adam(surrogate.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PEAK_LEARNING_RATE, total_steps=epochs * batches)
    for _ in range(epochs):
        for rows in np.array_split(rng.permutation(len(dataset)), batches):
            batch = dataset.take(rows)
            loss = F.cross_entropy(surrogate(torch.from_numpy(batch.pixels)), torch.from_numpy(batch.labels))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()


def perturb(
    images: ImageSet, loss: Callable[[Tensor], Tensor], *, eps: int, step_sizes: Iterable[float]
) -> NDArray[np.float32]:
    """Descend on ``loss`` by signed gradient steps inside the L_inf ball (PGD, Madry et al. 2018).

    ``x' <- clip(x' - step sign(grad loss(x')), [x - eps, x + eps] and [0, 1])``, from x. ``eps`` and the steps are in
    codes of 255; with a whole ``eps`` the bound holds after rounding to uint8 too. ``(N, 3, H, W) float32 in [0, 1]``.
    """
    start = torch.from_numpy(images.pixels)
    low, high = (start - eps / 255).clamp(min=0), (start + eps / 255).clamp(max=1)
    moved = start
    with one_thread():
        for step in step_sizes:
            moved = moved.detach().requires_grad_(True)
            (gradient,) = torch.autograd.grad(loss(moved), moved)
            moved = (moved.detach() - step / 255 * gradient.sign()).clamp(low, high)
    perturbed: NDArray[np.float32] = moved.numpy()
    return perturbed
