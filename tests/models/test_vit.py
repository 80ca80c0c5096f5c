from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from qdefense.models import build_model
from qdefense.models.vit import Attention, TransformerBlock, VisionTransformer, positions


def _vit(width: int = 8) -> VisionTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model("vit", classes=5, width=width)
    assert isinstance(module, VisionTransformer)
    return module.eval()


def _count(*parts: nn.Module) -> int:
    return sum(weight.numel() for part in parts for weight in part.parameters())


def test_twelve_of_its_blocks_make_a_vit_b_16() -> None:
    """torchvision's vit_b_16 has 86,567,656 parameters, a class token and 197 learned positions among them."""
    block = TransformerBlock(768)
    others = _count(nn.Conv2d(3, 768, 16, 16), nn.LayerNorm(768), nn.Linear(768, 1000))
    assert 12 * _count(block) + others + 768 + 197 * 768 == 86_567_656


def test_vit_has_three_blocks_of_width_64() -> None:
    module = build_model("vit", classes=10)
    blocks = [part for part in module.modules() if isinstance(part, TransformerBlock)]
    assert [block.attention.heads for block in blocks] == [4, 4, 4]
    assert _count(module) == 3 * _count(TransformerBlock(64)) + 48 * 64 + 64 + 2 * 64 + 650


def _reference_positions(rows: int, columns: int, width: int) -> NDArray[np.float64]:
    """Appendix A of arXiv 2205.01580, in NumPy."""
    y, x = np.mgrid[:rows, :columns]
    omega = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
    y, x = np.einsum("m,d->md", y.flatten(), omega), np.einsum("m,d->md", x.flatten(), omega)
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)


def test_positions_are_those_of_the_paper() -> None:
    assert np.allclose(positions(3, 5, 16).numpy(), _reference_positions(3, 5, 16), atol=1e-6)


@pytest.mark.parametrize("width", [1, 2, 6, 7, 9])
def test_positions_fit_a_width_that_four_does_not_divide(width: int) -> None:
    found = positions(2, 3, width)
    assert found.shape == (6, width)
    assert found.isfinite().all()


@pytest.mark.parametrize(("width", "heads"), [(64, 4), (8, 4), (6, 2), (5, 1)])
def test_attention_has_four_heads_or_as_many_of_them_as_divide_the_width(width: int, heads: int) -> None:
    assert Attention(width).heads == heads
    assert Attention(width)(torch.rand(2, 3, width)).shape == (2, 3, width)


def test_attention_is_torchs_multi_head_attention() -> None:
    own, torchs = Attention(8), nn.MultiheadAttention(8, 4, batch_first=True)
    parts = (own.query, own.key, own.value)
    with torch.no_grad():
        assert torchs.in_proj_weight is not None
        torchs.in_proj_weight.copy_(torch.cat([part.weight for part in parts]))
        torchs.in_proj_bias.copy_(torch.cat([part.bias for part in parts]))
        torchs.out_proj.weight.copy_(own.projection.weight)
        torchs.out_proj.bias.copy_(own.projection.bias)
    x = torch.randn(3, 5, 8)
    assert torch.allclose(own(x), torchs(x, x, x)[0], atol=1e-6)


def test_transformer_block_is_its_input_when_both_branches_are_zero() -> None:
    block = TransformerBlock(8)
    for last in (block.attention.projection, block.perceptron[2]):
        for weight in last.parameters():
            nn.init.zeros_(weight)
    x = torch.randn(2, 3, 8)
    assert torch.equal(block(x), x)


def test_vit_sees_where_a_patch_is() -> None:
    module = _vit()
    image = torch.rand(1, 3, 16, 16)
    rolled = image.roll(4, dims=3)  # the same patches, one place further on
    assert not torch.allclose(module(image), module(rolled), atol=1e-4)


def test_vit_classifies_the_mean_of_its_normalised_tokens() -> None:
    module, seen = _vit(), []
    module.norm.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    logits = module(torch.rand(2, 3, 12, 8))
    assert seen[0].shape == (2, 6, 8)
    assert torch.allclose(logits, module.classifier(seen[0].mean(dim=1)), atol=1e-6)
