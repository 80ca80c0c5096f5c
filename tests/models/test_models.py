from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import nn

from qdefense.models import Recipe, architectures, build_model, recipe_for
from qdefense.models.normalization import Normalization
from qdefense.models.resnet import BasicBlock


def _build(classes: int = 5, width: int = 4, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model("resnet8", classes=classes, width=width)


def test_normalization_subtracts_the_mean_and_divides_by_the_deviation_of_each_channel() -> None:
    normalize = Normalization(mean=(0.5, 0.25, 0.0), std=(0.25, 0.5, 1.0))
    assert normalize(torch.full((1, 3, 1, 1), 0.75)).flatten().tolist() == [1.0, 1.0, 0.75]
    assert not list(normalize.parameters())
    assert sorted(normalize.state_dict()) == ["mean", "std"]


@pytest.mark.parametrize("size", [8, 32, 33])
def test_build_model_gives_logits_at_any_image_size(size: int) -> None:
    assert _build().eval()(torch.rand(2, 3, size, size)).shape == (2, 5)


def test_build_model_normalises_inside() -> None:
    module = _build().eval()
    assert isinstance(module.normalization, Normalization)
    inside: list[torch.Tensor] = []
    stem = module.get_submodule("stem")
    stem.register_forward_pre_hook(lambda _module, inputs: inside.append(inputs[0]))
    module(torch.tensor([0.0, 0.5, 1.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8))
    assert inside[0][0, :, 0, 0].tolist() == [-2.0, 0.0, 2.0]


def test_build_model_gives_eight_layers_with_weights_when_resnet8_is_asked_for() -> None:
    layers = [
        part
        for name, part in _build(width=16).named_modules()
        if isinstance(part, nn.Conv2d | nn.Linear) and "shortcut" not in name
    ]
    assert len(layers) == 8
    assert [part.out_channels for part in layers if isinstance(part, nn.Conv2d)] == [16, 16, 16, 32, 32, 64, 64]


def test_build_model_pools_so_that_a_mirrored_feature_map_gives_the_same_logits() -> None:
    module = _build().eval()
    features = torch.rand(1, 16, 4, 4)
    module.stages = nn.Identity()
    module.stem = nn.Identity()
    module.normalization = nn.Identity()
    expected = module.classifier(features.mean(dim=(2, 3)))  # type: ignore[operator]
    assert torch.allclose(module(features), expected)
    assert torch.allclose(module(features.flip(3)), expected)


def test_build_model_gives_the_same_weights_when_the_generator_is_seeded_alike() -> None:
    first, same, other = (torch.cat([p.flatten() for p in _build(seed=seed).parameters()]) for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_build_model_lets_gradients_reach_input_and_every_parameter() -> None:
    module = _build()
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


def test_architectures_can_all_be_built_and_have_a_recipe() -> None:
    assert architectures() == ("resnet8",)
    for name in architectures():
        assert build_model(name, classes=2)(torch.rand(2, 3, 8, 8)).shape == (2, 2)
        assert recipe_for(name) == Recipe()


def test_build_model_and_recipe_for_raise_when_the_architecture_is_unknown() -> None:
    with pytest.raises(KeyError, match=r"^'vgg16'$"):
        build_model("vgg16", classes=2)
    with pytest.raises(KeyError, match=r"^'vgg16'$"):
        recipe_for("vgg16")


def test_recipe_is_frozen_and_does_not_mirror_signs() -> None:
    assert Recipe().flip is False
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'epochs'"):
        Recipe().epochs = 1  # type: ignore[misc]
