from __future__ import annotations

import torch
from torch import nn

from qdefense.models import build_model
from qdefense.models.convnext import ChannelNorm, ConvNeXtBlock


def _count(*parts: nn.Module) -> int:
    return sum(weight.numel() for part in parts for weight in part.parameters())


def test_its_blocks_make_a_convnext_tiny() -> None:
    """torchvision's convnext_tiny has 28,589,128 parameters: depths 3, 3, 9, 3 and widths 96 to 768 of the paper."""
    stages = sum(depth * _count(ConvNeXtBlock(width)) for depth, width in ((3, 96), (3, 192), (9, 384), (3, 768)))
    downsampling = sum(_count(ChannelNorm(width), nn.Conv2d(width, 2 * width, 2, 2)) for width in (96, 192, 384))
    stem, head = (nn.Conv2d(3, 96, 4, 4), ChannelNorm(96)), (ChannelNorm(768), nn.Linear(768, 1000))
    assert stages + downsampling + _count(*stem, *head) == 28_589_128


def test_convnext_has_two_blocks_in_each_of_three_stages() -> None:
    module = build_model("convnext", classes=10)
    blocks = [part for part in module.modules() if isinstance(part, ConvNeXtBlock)]
    assert [block.depthwise.in_channels for block in blocks] == [32, 32, 64, 64, 128, 128]
    assert all(block.depthwise.kernel_size == (7, 7) for block in blocks)
    assert all(block.depthwise.groups == block.depthwise.in_channels for block in blocks)
    assert [block.expand.out_channels for block in blocks] == [128, 128, 256, 256, 512, 512]


def test_channel_norm_normalises_each_pixel_over_its_channels() -> None:
    norm = ChannelNorm(6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(2, 6, 3, 4)
    mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, keepdim=True, unbiased=False)
    scaled = (x - mean) / (variance + 1e-6).sqrt()
    expected = scaled * norm.weight[:, None, None] + norm.bias[:, None, None]
    assert torch.allclose(norm(x), expected, atol=1e-5)


def test_convnext_block_adds_a_tenth_of_its_branch_at_first() -> None:
    block = ConvNeXtBlock(4)
    x = torch.randn(2, 4, 6, 6)
    tenth = block(x) - x
    nn.init.ones_(block.scale)
    assert torch.allclose(10 * tenth, block(x) - x, atol=1e-5)
    nn.init.zeros_(block.scale)
    assert torch.equal(block(x), x)


def test_convnext_normalises_after_it_has_pooled() -> None:
    module = build_model("convnext", classes=3, width=4).eval()
    seen: list[torch.Tensor] = []
    module.get_submodule("norm").register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    module(torch.rand(2, 3, 16, 16))
    assert seen[0].shape == (2, 16, 1, 1)
