from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qdefense.attacks.target_content import FLOOR, confidences, learned_mask
from qdefense.data.images import ImageSet

MakeNoise = Callable[..., ImageSet]


class _Constant(nn.Module):
    """The same logits, 0 and log 2, for every image."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor([1.0, 2.0]).log() + 0 * x.mean(dim=(1, 2, 3))[:, None]


class _Corner(nn.Module):
    """Class 1 is the brightness of the first pixel."""

    def forward(self, x: Tensor) -> Tensor:
        seen = 8 * x[:, :, 0, 0].sum(dim=1)
        return torch.stack([torch.zeros_like(seen), seen], dim=1)


WHITE = np.ones((3, 4, 5), dtype=np.float32)


def test_confidences_are_the_softmax_of_each_images_own_class(make_noise: MakeNoise) -> None:
    """Logits 0 and log(2): of the first class 1/3, of the second 2/3."""
    assert confidences(_Constant(), make_noise(4, classes=2)).tolist() == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])


def test_a_mask_that_no_class_needs_shrinks_by_the_norms_slope_alone() -> None:
    """Of 40 steps each takes learning rate times weight, 0.005: 0.2 in all."""
    mask = learned_mask(_Constant(), WHITE, 1, np.random.default_rng(0), steps=40, learning_rate=0.1, weight=0.05)
    start = np.random.default_rng(0).random((4, 5), dtype=np.float32)
    expected = np.where(start - 0.2 > FLOOR, start - 0.2, 0)
    assert mask == pytest.approx(expected, abs=1e-5)
    assert 0 < (mask > 0).sum() < 20
    assert mask.dtype == np.float32


def test_a_mask_keeps_what_the_class_needs() -> None:
    mask = learned_mask(_Corner(), WHITE, 1, np.random.default_rng(0), steps=50, learning_rate=0.5, weight=0.05)
    assert mask[0, 0] > FLOOR
    assert mask.sum() == mask[0, 0]


def test_a_mask_is_never_between_0_and_the_floor() -> None:
    start = learned_mask(_Constant(), WHITE, 1, np.random.default_rng(3), steps=0, learning_rate=1, weight=1)
    drawn = np.random.default_rng(3).random((4, 5), dtype=np.float32)
    assert start.tolist() == np.where(drawn > FLOOR, drawn, 0).tolist()
    assert ((start == 0) | (start > FLOOR)).all()


def test_a_mask_is_the_same_when_the_seed_is() -> None:
    first, same, other = (
        learned_mask(_Corner(), WHITE, 1, np.random.default_rng(seed), steps=3, learning_rate=0.01, weight=0.01)
        for seed in (1, 1, 2)
    )
    assert first.tobytes() == same.tobytes() != other.tobytes()
