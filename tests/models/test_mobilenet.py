from __future__ import annotations

import pytest
import torch
from torch import nn

from qdefense.models import build_model, default_width
from qdefense.models.mobilenet import InvertedResidual, MobileNetV2

# Input channels, expansion, output channels: the rows of table 2 of the paper, each block of a row by itself.
TABLE_2 = [
    *[(32, 1, 16)],
    *[(16, 6, 24), (24, 6, 24)],
    *[(24, 6, 32), (32, 6, 32), (32, 6, 32)],
    *[(32, 6, 64), (64, 6, 64), (64, 6, 64), (64, 6, 64)],
    *[(64, 6, 96), (96, 6, 96), (96, 6, 96)],
    *[(96, 6, 160), (160, 6, 160), (160, 6, 160)],
    *[(160, 6, 320)],
]


def _mobilenet(classes: int = 10, width: int | None = None) -> MobileNetV2:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_model("mobilenetv2", classes=classes, width=width)
    assert isinstance(module, MobileNetV2)
    return module


def _blocks(module: nn.Module) -> list[InvertedResidual]:
    return [part for part in module.modules() if isinstance(part, InvertedResidual)]


def _convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


def test_mobilenetv2_has_the_papers_blocks_at_width_32() -> None:
    rows = [
        (first.in_channels, depthwise.groups // first.in_channels, last.out_channels)
        for block in _blocks(_mobilenet())
        for first, depthwise, last in [(_convolutions(block)[0], _convolutions(block)[-2], _convolutions(block)[-1])]
    ]
    assert rows == TABLE_2
    assert default_width("mobilenetv2") == 32
    assert _convolutions(_mobilenet())[-1].out_channels == 1280


@pytest.mark.parametrize(
    ("width", "classes", "count"),
    [
        (32, 1000, 3_504_872),  # torchvision's mobilenet_v2, and 3.4 M in table 4 of the paper
        (32, 10, 2_236_682),
    ],
)
def test_mobilenetv2_has_as_many_parameters_as_the_papers(width: int, classes: int, count: int) -> None:
    assert sum(part.numel() for part in _mobilenet(classes, width).parameters()) == count


@pytest.mark.parametrize(
    ("width", "channels"),
    [
        (24, [24, 16, 24, 24, 48, 72, 120, 240, 1280]),
        (45, [48, 24, 32, 48, 88, 136, 224, 448, 1800]),
        (4, [8, 8, 8, 8, 8, 16, 24, 40, 1280]),
    ],
)
def test_mobilenetv2_rounds_channels_as_the_authors_code_does(width: int, channels: list[int]) -> None:
    module = _mobilenet(width=width)
    ends = [_convolutions(block)[-1].out_channels for block in _blocks(module)]
    stages = [ends[index] for index in (0, 1, 3, 6, 10, 13, 16)]
    assert [_convolutions(module)[0].out_channels, *stages, _convolutions(module)[-1].out_channels] == channels
    assert all(part.out_channels % 8 == 0 for part in _convolutions(module))


def test_mobilenetv2_has_depthwise_3x3_convolutions_and_relu6_after_all_but_the_projections() -> None:
    module = _mobilenet(width=8)
    depthwise = [part for part in _convolutions(module) if part.groups > 1]
    assert len(depthwise) == 17
    assert all(part.groups == part.in_channels and part.kernel_size == (3, 3) for part in depthwise)
    assert sum(isinstance(part, nn.ReLU6) for part in module.modules()) == len(_convolutions(module)) - 17
    assert not any(isinstance(list(block.branch)[-1], nn.ReLU6) for block in _blocks(module))


def test_mobilenetv2_keeps_32_pixels_down_to_4() -> None:
    seen: list[int] = []
    module = _mobilenet(width=4).eval()
    for block in _blocks(module):
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output.shape[2]))
    module(torch.rand(1, 3, 32, 32))
    assert [seen[index] for index in (0, 2, 5, 9, 12, 15, 16)] == [32, 32, 16, 8, 8, 4, 4]


@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(8, 8, 1), (8, 16, 1), (8, 8, 2)])
def test_inverted_residual_adds_its_input_only_where_the_shape_stays(inputs: int, outputs: int, stride: int) -> None:
    block = InvertedResidual(inputs, outputs, stride, 6).eval()
    norm = list(block.branch)[-1]
    assert isinstance(norm, nn.BatchNorm2d)
    nn.init.zeros_(norm.weight)
    x = torch.randn(2, inputs, 6, 6)
    stays = inputs == outputs and stride == 1
    assert torch.equal(block(x), x if stays else torch.zeros(2, outputs, 6 // stride, 6 // stride))
