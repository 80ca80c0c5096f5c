from __future__ import annotations

import re
from dataclasses import FrozenInstanceError

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qdefense.models import Recipe, architectures, build_model, default_width, multiply_accumulates, recipe_for
from qdefense.models.normalization import Normalization
from qdefense.models.preact_resnet import PreActivationBlock
from qdefense.models.resnet import BasicBlock

NAMES = ("convnext", "mobilenetv2", "preactresnet18", "resnet20", "resnet8", "vgg11", "vit")
EVERY = pytest.mark.parametrize("architecture", NAMES)
# MobileNetV2 rounds channels to multiples of eight, a vision transformer's convolution is its stem alone.
PROPORTIONAL = pytest.mark.parametrize("architecture", [name for name in NAMES if name not in ("mobilenetv2", "vit")])


def _build(classes: int = 5, width: int | None = 4, seed: int = 0, architecture: str = "resnet8") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(architecture, classes=classes, width=width)


def test_normalization_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    normalize = Normalization(mean=(0.5, 0.25, 0.0), std=(0.25, 0.5, 1.0))
    assert normalize(torch.full((1, 3, 1, 1), 0.75)).flatten().tolist() == [1.0, 1.0, 0.75]
    assert not list(normalize.parameters())
    assert sorted(normalize.state_dict()) == ["mean", "std"]


def test_multiply_accumulates_of_resnet8_are_those_counted_by_hand() -> None:
    """Stem, three stages of one block (a 1x1 shortcut in two), 64 features to 10 classes; nothing is computed."""
    first = 32 * 32 * 9 * (3 * 16 + 2 * 16 * 16)
    second = 16 * 16 * (9 * (16 * 32 + 32 * 32) + 16 * 32)
    third = 8 * 8 * (9 * (32 * 64 + 64 * 64) + 32 * 64)
    assert multiply_accumulates("resnet8") == first + second + third + 64 * 10


@EVERY
def test_multiply_accumulates_grow_with_the_width_and_leave_the_generator_alone(architecture: str) -> None:
    before = torch.random.get_rng_state()
    usual = default_width(architecture)
    assert multiply_accumulates(architecture) == multiply_accumulates(architecture, usual)
    assert multiply_accumulates(architecture, 2 * usual) > 2 * multiply_accumulates(architecture, usual)
    assert torch.equal(torch.random.get_rng_state(), before)


@EVERY
@pytest.mark.parametrize("size", [8, 32, 33])
def test_build_model_gives_logits_at_any_image_size(architecture: str, size: int) -> None:
    assert _build(architecture=architecture).eval()(torch.rand(2, 3, size, size)).shape == (2, 5)


@EVERY
def test_build_model_normalises_inside(architecture: str) -> None:
    module = _build(architecture=architecture).eval()
    assert isinstance(module.normalization, Normalization)
    inside: list[torch.Tensor] = []
    stem = module.get_submodule("stem")
    stem.register_forward_pre_hook(lambda _module, inputs: inside.append(inputs[0]))
    module(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8))
    assert inside[0][0, :, 0, 0].tolist() == [-2.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("architecture", "channels"),
    [
        ("resnet8", [16] * 3 + [32] * 2 + [64] * 2),
        ("resnet20", [16] * 7 + [32] * 6 + [64] * 6),
        ("preactresnet18", [64] * 5 + [128] * 4 + [256] * 4 + [512] * 4),
        ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
    ],
)
def test_build_model_gives_the_layers_that_the_name_counts(architecture: str, channels: list[int]) -> None:
    module = _build(architecture=architecture, width=None)
    layers = {name: part for name, part in module.named_modules() if isinstance(part, nn.Conv2d | nn.Linear)}
    counted = [part for name, part in layers.items() if "shortcut" not in name]
    linear_layers_of_the_paper = 3 if architecture == "vgg11" else 1
    assert len(channels) + linear_layers_of_the_paper == int(re.sub(r"\D", "", architecture))
    assert [part.out_channels for part in counted if isinstance(part, nn.Conv2d)] == channels
    assert default_width(architecture) == channels[0]


@pytest.mark.parametrize(
    ("architecture", "count"), [("resnet8", 78_042), ("resnet20", 272_474), ("preactresnet18", 11_172_170)]
)
def test_build_model_has_as_many_parameters_as_the_networks_of_the_literature(architecture: str, count: int) -> None:
    module = _build(architecture=architecture, width=None, classes=10)
    assert sum(part.numel() for part in module.parameters()) == count


@PROPORTIONAL
def test_build_model_scales_every_stage_with_the_width(architecture: str) -> None:
    def channels(width: int) -> list[int]:
        module = _build(architecture=architecture, width=width)
        return [part.out_channels for part in module.modules() if isinstance(part, nn.Conv2d)]

    assert len(channels(2)) > 1
    assert channels(6) == [3 * outputs for outputs in channels(2)]
    assert channels(6)[0] == 6


def _weights_drawn_in_the_order_of_the_committed_files(width: int, classes: int) -> list[Tensor]:
    """The convolutions and the linear layer of the first ResNet-8, drawn one after the other."""
    drawn: list[nn.Conv2d | nn.Linear] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        drawn += [nn.Conv2d(inputs, outputs, 3, bias=False), nn.Conv2d(outputs, outputs, 3, bias=False)]
        drawn += [nn.Conv2d(inputs, outputs, 1, bias=False)] if stage else []
        inputs = outputs
    drawn.append(nn.Linear(inputs, classes))
    return [weight for layer in drawn for weight in layer.parameters()]


@pytest.mark.parametrize("width", [None, 4])
def test_build_model_gives_resnet8_the_weights_that_committed_files_began_with(width: int | None) -> None:
    module = _build(architecture="resnet8", width=width, classes=12, seed=3)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = _weights_drawn_in_the_order_of_the_committed_files(width or 16, 12)
    named = [(name, weight) for name, weight in module.named_parameters() if "norm" not in name and weight.ndim != 1]
    named += [(name, weight) for name, weight in module.named_parameters() if name == "classifier.bias"]
    assert [tuple(weight.shape) for _, weight in named] == [tuple(weight.shape) for weight in expected]
    assert [name for (name, weight), other in zip(named, expected) if not torch.equal(weight, other)] == []


def test_build_model_pools_so_that_a_mirrored_feature_map_gives_the_same_logits() -> None:
    module = _build().eval()
    features = torch.rand(1, 16, 4, 4)
    module.stages = nn.Identity()
    module.stem = nn.Identity()
    module.normalization = nn.Identity()
    expected = module.classifier(features.mean(dim=(2, 3)))  # type: ignore[operator]
    assert torch.allclose(module(features), expected)
    assert torch.allclose(module(features.flip(3)), expected)


@EVERY
def test_build_model_gives_the_same_weights_when_the_generator_is_seeded_alike(architecture: str) -> None:
    first, same, other = (
        torch.cat([p.flatten() for p in _build(seed=seed, architecture=architecture).parameters()])
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@EVERY
def test_build_model_lets_gradients_reach_input_and_every_parameter(architecture: str) -> None:
    module = _build(architecture=architecture)
    x = torch.rand(4, 3, 8, 8, requires_grad=True)
    module(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.any()
    assert all(p.grad is not None and p.grad.any() for p in module.parameters())


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "shape"),
    [(4, 4, 1, (1, 4, 6, 6)), (4, 8, 2, (1, 8, 3, 3)), (4, 8, 1, (1, 8, 6, 6))],
)
def test_basic_block_projects_its_shortcut_only_when_the_shape_changes(
    inputs: int, outputs: int, stride: int, shape: tuple[int, ...]
) -> None:
    block = BasicBlock(inputs, outputs, stride).eval()
    assert isinstance(block.shortcut, nn.Identity) is (inputs == outputs and stride == 1)
    assert block(torch.rand(1, inputs, 6, 6)).shape == shape


def test_basic_block_is_its_rectified_input_when_the_residual_is_zero() -> None:
    block = BasicBlock(4, 4, 1).eval()
    nn.init.zeros_(block.norm2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x.relu())


@pytest.mark.parametrize(
    ("inputs", "outputs", "stride", "shape"),
    [(4, 4, 1, (1, 4, 6, 6)), (4, 8, 2, (1, 8, 3, 3)), (4, 8, 1, (1, 8, 6, 6))],
)
def test_preactivation_block_projects_its_shortcut_only_when_the_shape_changes(
    inputs: int, outputs: int, stride: int, shape: tuple[int, ...]
) -> None:
    block = PreActivationBlock(inputs, outputs, stride).eval()
    assert (block.shortcut is None) is (inputs == outputs and stride == 1)
    assert block(torch.rand(1, inputs, 6, 6)).shape == shape


def test_preactivation_block_is_its_input_when_the_residual_is_zero() -> None:
    block = PreActivationBlock(4, 4, 1).eval()
    nn.init.zeros_(block.conv2.weight)
    x = torch.randn(2, 4, 6, 6)
    assert torch.equal(block(x), x)


def test_preactivation_block_projects_what_is_normalised_and_rectified() -> None:
    block = PreActivationBlock(4, 8, 2).eval()
    nn.init.zeros_(block.conv2.weight)
    nn.init.constant_(block.norm1.bias, 0.5)
    assert block.shortcut is not None
    x = torch.randn(2, 4, 6, 6)
    assert torch.allclose(block(x), block.shortcut(F.relu(block.norm1(x))))
    assert not torch.allclose(block(x), block.shortcut(x))


def test_preactresnet18_normalises_and_rectifies_before_it_pools() -> None:
    module = _build(architecture="preactresnet18", classes=3).eval()
    features = torch.randn(2, 32, 4, 4)
    module.stages, module.stem, module.normalization = nn.Identity(), nn.Identity(), nn.Identity()
    nn.init.constant_(module.get_submodule("norm").bias, 0.5)  # type: ignore[arg-type]
    expected = F.relu(module.norm(features)).mean(dim=(2, 3))  # type: ignore[operator]
    assert torch.allclose(module(features), module.classifier(expected))  # type: ignore[operator]


def test_architectures_can_all_be_built_and_have_a_recipe() -> None:
    assert architectures() == NAMES
    for name in architectures():
        assert build_model(name, classes=2, width=2)(torch.rand(2, 3, 16, 16)).shape == (2, 2)
        assert recipe_for(name).optimizer == ("adamw" if name in ("convnext", "vit") else "sgd")
        assert recipe_for(name).optimizer == "adamw" or recipe_for(name) == Recipe()


def test_zoo_raises_when_the_architecture_is_unknown() -> None:
    with pytest.raises(KeyError, match=r"^'vgg16'$"):
        build_model("vgg16", classes=2)
    with pytest.raises(KeyError, match=r"^'vgg16'$"):
        recipe_for("vgg16")
    with pytest.raises(KeyError, match=r"^'vgg16'$"):
        default_width("vgg16")


def test_recipe_is_frozen_and_does_not_mirror_signs() -> None:
    assert Recipe().flip is False
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'epochs'"):
        Recipe().epochs = 1  # type: ignore[misc]
