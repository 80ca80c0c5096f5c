from __future__ import annotations

import pytest
import torch

from qdefense.converters.shadow.operands import spread


@pytest.mark.parametrize(
    ("shape", "rank", "expected"),
    [
        ((5,), 1, (5,)),
        ((5,), 4, (5, 1, 1, 1)),
        ((5, 1), 3, (5, 1, 1)),
        ((5, 7), 3, (5, 1, 7)),
        ((5, 1, 1, 1, 1), 2, (5, 1)),
        ((5, 1, 7), 2, (5, 7)),
    ],
)
def test_spread_puts_images_first_and_the_rest_last(
    shape: tuple[int, ...], rank: int, expected: tuple[int, ...]
) -> None:
    assert spread(torch.zeros(shape), rank).shape == expected


def test_spread_raises_when_a_value_of_each_image_is_too_large() -> None:
    with pytest.raises(ValueError, match=r"a per-image value of shape \(2, 7\) doesn't fit a batch tensor of rank 2"):
        spread(torch.zeros(5, 2, 7), 2)
