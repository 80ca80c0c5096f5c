from __future__ import annotations

import pytest
import torch
from torch import nn

from qdefense.models import build_model


def _vgg(width: int | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build_model("vgg11", classes=10, width=width)


def test_vgg11_holds_the_convolutions_of_the_papers_column_a() -> None:
    """torchvision's vgg11_bn has 132,868,840 parameters: these, a bias per channel, and three linear layers."""
    module = _vgg()
    classifier = sum(part.numel() for part in module.get_submodule("classifier").parameters())
    features = sum(part.numel() for part in module.parameters()) - classifier
    biases = sum(part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d))
    linear = sum(inputs * outputs + outputs for inputs, outputs in ((512 * 49, 4096), (4096, 4096), (4096, 1000)))
    assert features + biases + linear == 132_868_840
    assert classifier == 5130


@pytest.mark.parametrize(("size", "sizes"), [(32, [16, 8, 4, 2, 1]), (33, [17, 9, 5, 3, 2]), (8, [4, 2, 1, 1, 1])])
def test_vgg11_halves_the_image_five_times_and_never_pools_it_away(size: int, sizes: list[int]) -> None:
    module, seen = _vgg(2).eval(), []
    for part in module.modules():
        if isinstance(part, nn.MaxPool2d):
            part.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[2]))
    module(torch.rand(1, 3, size, size))
    assert seen == sizes
