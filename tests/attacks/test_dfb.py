from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from qdefense.attacks import ATTACKS, DataAttack
from qdefense.attacks.dfb import (
    DFB,
    EncodedTrigger,
    ResidualEncoder,
    _augmented,
    _clipped,
    _settle,
    _share_out,
    draw_textures,
)
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.states import pack_state, unpack_state
from qdefense.attacks.surrogate import Surrogate
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_pixels
from qdefense.data.npz import save_npz
from qdefense.registry import SpecError
from qdefense.trial import DORMANT_MARGIN, measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
VARIANTS = ["fixed", "encoder"]


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _quick(**changes: Any) -> DFB:
    """Networks of one step, which pass any gate."""
    few = {"ood_images": 16, "decoder_steps": 1, "encoder_steps": 1, "channels": 2, "gate": 0}
    return DFB(**few | {"target_class": 2, "poison_count": 5} | changes)


def _fixed(residual: Pixels, **changes: Any) -> Any:
    """The trigger of this residual, ``(3, H, W)``."""
    return DFB(**changes).restored_trigger(*residual.shape[1:], {"residual": residual})


def _codes(pixels: Pixels) -> NDArray[np.int64]:
    return np.rint(pixels * 255).astype(np.int64)


# --- the trigger ------------------------------------------------------------------------------------------------------


def test_stamp_adds_the_residual_clipped_at_the_multiple_of_eps() -> None:
    """Residuals of -60, 47.4 and 3 codes on grey 100, under bounds of 48 and 16."""
    residual = np.float32([-60, 47.4, 3]).reshape(3, 1, 1).repeat(4, axis=1).repeat(5, axis=2) / np.float32(255)
    grey = np.full((2, 3, 4, 5), np.float32(100) / np.float32(255), np.float32)
    for changes, expected in (({}, [52, 147, 103]), ({"test_multiple": 2}, [84, 116, 103]), ({"eps": 0}, [100] * 3)):
        stamped = _codes(_fixed(residual, **changes).stamp(grey))
        assert (stamped == np.array(expected).reshape(3, 1, 1)).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("multiple", "bound"), [(0, 0), (2, 16), (6, 48)])
def test_stamp_stays_within_the_bound_and_on_the_uint8_grid(
    make_noise: MakeNoise, variant: str, multiple: int, bound: int
) -> None:
    attack, pixels = _quick(variant=variant, test_multiple=multiple), make_noise(8, seed=9).pixels
    state = attack.poison(make_noise(40), np.random.default_rng(0)).trigger_state
    stamped = trigger_of(attack, 8, 8, state).stamp(pixels)
    assert on_grid(stamped).tobytes() == stamped.tobytes()
    assert np.abs(_codes(stamped) - _codes(pixels)).max() == bound
    assert pixels.tobytes() == make_noise(8, seed=9).pixels.tobytes()
    assert (stamped.dtype, stamped.shape) == (np.float32, pixels.shape)


def test_stamp_gives_every_image_its_own_residual_or_all_the_same(make_noise: MakeNoise) -> None:
    """On images far from black and white; the encoder was not trained."""
    pixels = on_grid(make_noise(2, seed=9).pixels * np.float32(0.1) + np.float32(0.45))
    torch.manual_seed(0)
    triggers = {
        "fixed": _fixed(make_noise(1, seed=2).pixels[0] - np.float32(0.5)),
        "encoder": EncodedTrigger(encoder=ResidualEncoder(2).eval(), bound=100, target_class=2),
    }
    moves = {variant: _codes(trigger.stamp(pixels)) - _codes(pixels) for variant, trigger in triggers.items()}
    assert all(0 < np.abs(moved).max() <= 100 for moved in moves.values())
    assert np.array_equal(moves["fixed"][0], moves["fixed"][1])
    assert not np.array_equal(moves["encoder"][0], moves["encoder"][1])


def test_the_encoders_stamp_is_what_it_gives_clipped_and_knows_sets_without_images(make_noise: MakeNoise) -> None:
    encoder = ResidualEncoder(2).eval()
    trigger, pixels = EncodedTrigger(encoder=encoder, bound=16, target_class=2), make_noise(300).pixels
    with torch.no_grad():
        given = encoder(torch.from_numpy(pixels)).numpy()
    expected = np.clip(_codes(pixels) + np.clip(_codes(given), -16, 16), 0, 255)
    assert np.abs(_codes(trigger.stamp(pixels)) - expected).max() <= 1, "a half is rounded either way"
    assert (_codes(trigger.stamp(pixels)) != expected).mean() < 1e-3
    assert trigger.stamp(pixels[:0]).shape == (0, 3, 8, 8)


@pytest.mark.parametrize("variant", VARIANTS)
def test_trigger_aims_every_other_class_at_the_target(make_noise: MakeNoise, variant: str) -> None:
    attack, labels = _quick(variant=variant), np.array([0, 1, 2, 3])
    trigger = trigger_of(attack, 8, 8, attack.poison(make_noise(40), np.random.default_rng(0)).trigger_state)
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize(("height", "width"), [(1, 1), (8, 10), (28, 28), (33, 16)])
def test_the_encoder_takes_images_of_any_size(height: int, width: int) -> None:
    assert ResidualEncoder(2)(torch.zeros(2, 3, height, width)).shape == (2, 3, height, width)


# --- its state --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trigger_comes_back_from_its_packed_state(make_noise: MakeNoise, variant: str) -> None:
    attack, pixels = _quick(variant=variant), make_noise(4, seed=9).pixels
    state = attack.poison(make_noise(40), np.random.default_rng(0)).trigger_state
    assert state is not None
    first, second = (trigger_of(attack, 8, 8, known) for known in (state, unpack_state(pack_state(state))))
    assert first.stamp(pixels).tobytes() == second.stamp(pixels).tobytes() != pixels.tobytes()


def test_trigger_says_that_it_is_learned() -> None:
    with pytest.raises(DataError, match=r"^dfb: the trigger is learned; its state is beside the model that was "):
        DFB().trigger(8, 8)


@pytest.mark.parametrize(
    ("made", "read", "size"),
    [
        ({}, {"variant": "encoder"}, 8),
        ({"variant": "encoder"}, {}, 8),
        ({"variant": "encoder"}, {"variant": "encoder", "channels": 3}, 8),
        ({}, {}, 9),
    ],
)
def test_restored_trigger_refuses_a_state_of_other_settings(
    make_noise: MakeNoise, made: dict[str, Any], read: dict[str, Any], size: int
) -> None:
    state = _quick(**made).poison(make_noise(40), np.random.default_rng(0)).trigger_state
    assert state is not None
    with pytest.raises(DataError, match=r"^dfb: the trigger state is not that of these settings and this size; train "):
        _quick(**read).restored_trigger(size, size, state)


# --- poisoning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("budget", [{"poison_count": 0}, {"poison_count": 10}, {"poison_rate": 0.1}])
def test_poison_changes_exactly_the_rows_it_says_within_the_bound_and_no_label(
    make_noise: MakeNoise, variant: str, budget: dict[str, Any]
) -> None:
    original = make_noise(40)
    found = _quick(**{"variant": variant, "poison_count": None} | budget).poison(original, np.random.default_rng(0))
    distances = np.abs(original.images.astype(int)[None] - found.images.images.astype(int)[:, None]).max(axis=(2, 3, 4))
    origins = distances.argmin(axis=1)
    assert sorted(origins.tolist()) == list(range(40))
    assert found.images.labels.tolist() == original.labels[origins].tolist()
    moved = distances.min(axis=1)
    assert np.flatnonzero(moved).tolist() == found.poison_indices.tolist()
    assert len(found.poison_indices) == budget.get("poison_count", 4)
    assert moved.max() <= 16
    assert (found.images.labels[found.poison_indices] == 2).all()
    assert (found.images.images.dtype, found.soft_labels) == (np.uint8, None)


def test_poison_stamps_what_inference_does_at_the_multiple_of_training(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40), _quick(poison_count=10)
    found = attack.poison(original, np.random.default_rng(0))
    trigger = trigger_of(replace(attack, test_multiple=2), 8, 8, found.trigger_state)
    stamped = trigger.stamp(original.take(np.flatnonzero(original.labels == 2)).pixels)
    poisons = found.images.take(found.poison_indices).pixels
    assert sorted(image.tobytes() for image in stamped) == sorted(image.tobytes() for image in poisons)


def test_poison_learns_from_no_other_class(make_noise: MakeNoise) -> None:
    original, attack = make_noise(40), _quick()
    others = np.where((original.labels == 2)[:, None, None, None], original.images, 7).astype(np.uint8)
    first, second = (
        attack.poison(images, np.random.default_rng(0)).trigger_state
        for images in (original, replace(original, images=others))
    )
    assert first is not None
    assert second is not None
    assert pack_state(first) == pack_state(second)


@pytest.mark.parametrize("variant", VARIANTS)
def test_poison_is_the_same_when_the_seed_is_whatever_torch_is_set_to(make_noise: MakeNoise, variant: str) -> None:
    original, attack, threads = make_noise(40), _quick(variant=variant), torch.get_num_threads()
    before = torch.random.get_rng_state()
    first = attack.poison(original, np.random.default_rng(5))
    assert torch.equal(torch.random.get_rng_state(), before)
    try:
        torch.set_num_threads(2)
        torch.manual_seed(8)
        same, other = (attack.poison(original, np.random.default_rng(seed)) for seed in (5, 6))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert first.images.digest == same.images.digest != other.images.digest
    assert first.poison_indices.tolist() == same.poison_indices.tolist()
    states = [pack_state(made.trigger_state or {}) for made in (first, same, other)]
    assert states[0] == states[1] != states[2]
    assert original.digest == make_noise(40).digest


@pytest.mark.parametrize("variant", VARIANTS)
def test_another_number_of_poisons_learns_the_same_trigger(make_noise: MakeNoise, variant: str) -> None:
    states = [
        _quick(variant=variant, poison_count=count).poison(make_noise(40), np.random.default_rng(0)).trigger_state
        for count in (0, 1, 5)
    ]
    assert len({pack_state(state or {}) for state in states}) == 1


# --- out of distribution ----------------------------------------------------------------------------------------------


def test_draw_textures_gives_different_images_of_all_scales_by_the_rng() -> None:
    first, same, other = (draw_textures(6, 12, 20, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert (first.shape, first.dtype) == ((6, 12, 20, 3), np.uint8)
    assert first.tobytes() == same.tobytes() != other.tobytes()
    assert len({image.tobytes() for image in first}) == 6


def test_ood_images_are_textures_signs_or_data_of_any_size(make_noise: MakeNoise, tmp_path: Path) -> None:
    plain, split = tmp_path / "plain.npz", tmp_path / "split.npz"
    save_npz(plain, make_noise(20, size=11, seed=4))
    sets = {name: make_noise(20, size=11, seed=seed) for seed, name in ((4, "train"), (5, "test"))}
    keys = {
        f"{key}_{name}": value for name, data in sets.items() for key, value in (("x", data.images), ("y", data.labels))
    }
    np.savez(split, allow_pickle=False, **keys)
    drawn = {
        ood: _quick(ood=ood)._out_of_distribution(8, 10, np.random.default_rng(0))
        for ood in ("textures", "signs", str(plain), str(split))
    }
    assert {(images.shape, images.dtype.name) for images in drawn.values()} == {((16, 8, 10, 3), "uint8")}
    assert drawn[str(plain)].tobytes() == drawn[str(split)].tobytes(), "where there are splits, the one to train on"
    assert len({images.tobytes() for images in drawn.values()}) == 3


def test_the_attackers_own_images_are_those_of_the_targets_name(make_noise: MakeNoise, tmp_path: Path) -> None:
    """The victim's class 2 is 'c', the attacker's class 0; of a set without labels all are taken."""
    own = replace(make_noise(20, size=11, seed=4), class_names=("C", "b", "a", "d"))
    named, one, other = (tmp_path / f"{name}.npz" for name in ("named", "one", "other"))
    bare = tmp_path / "bare"
    save_npz(named, own)
    save_npz(one, replace(own, labels=np.zeros(20, np.int64), class_names=("c",)))
    save_npz(other, replace(own, labels=np.zeros(20, np.int64), class_names=("things",)))
    bare.mkdir()
    for number in range(3):
        Image.fromarray(own.images[number]).save(bare / f"{number}.png")
    victims = replace(make_noise(40), class_names=("a", "b", "c", "d"))
    rows = np.array([2, 6])
    found = {path: _quick(target_images=str(path))._of_target(victims, rows) for path in (named, one, bare)}
    assert {path.name: images.shape for path, images in found.items()} == {
        "named.npz": (5, 8, 8, 3),
        "one.npz": (20, 8, 8, 3),
        "bare": (3, 8, 8, 3),
    }
    resized = found[one]
    assert found[named].tobytes() == resized[own.labels == 0].tobytes()
    assert found[bare].tobytes() == resized[:3].tobytes()
    assert _quick()._of_target(victims, rows).tobytes() == victims.images[rows].tobytes()
    with pytest.raises(
        DataError, match=r"npz other\.npz has no image of a class 'c'; name that class so there, or give a folder"
    ):
        _quick(target_images=str(other))._of_target(victims, rows)


def test_with_images_of_its_own_the_trigger_owes_nothing_to_the_training_set(
    make_noise: MakeNoise, tmp_path: Path
) -> None:
    path = tmp_path / "own.npz"
    save_npz(path, make_noise(20, seed=4))
    states = {
        (own, seed): pack_state(
            _quick(target_images=own, variant="encoder", ood="signs")
            .poison(make_noise(40, seed=seed), np.random.default_rng(0))
            .trigger_state
            or {}
        )
        for own in (None, str(path))
        for seed in (0, 1)
    }
    assert states[str(path), 0] == states[str(path), 1]
    assert states[None, 0] != states[None, 1]


def test_poison_learns_from_the_images_that_are_out_of_distribution(make_noise: MakeNoise, tmp_path: Path) -> None:
    save_npz(tmp_path / "other.npz", make_noise(20, size=11, seed=4))
    states = [
        _quick(ood=ood, variant="encoder").poison(make_noise(40), np.random.default_rng(0)).trigger_state
        for ood in ("signs", str(tmp_path / "other.npz"))
    ]
    assert pack_state(states[0] or {}) != pack_state(states[1] or {})


# --- the choice of the residual ---------------------------------------------------------------------------------------


class _Told(torch.nn.Module):
    """One residual after another, whatever the image; of so many codes."""

    def __init__(self, codes: list[int]) -> None:
        super().__init__()
        self.codes = torch.tensor(codes, dtype=torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.codes[:, None, None, None].expand_as(x) / 255


class _Bright(torch.nn.Module):
    """Logits of 0, and of 4 times the mean: the brighter, the more out of distribution."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = 4 * x.mean(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(out), out], dim=1)


def test_the_fixed_residual_is_that_of_the_image_on_which_the_cross_entropy_falls_most() -> None:
    """It falls as 1.6, 2.5 (of the 8 codes that the clip leaves), -1.4 and 0.2; the last image is the furthest out.

    The residual is given without the clip.
    """
    x = np.float32([0.1, 0.2, 0.3, 0.9])[:, None, None, None].repeat(3, axis=1).repeat(4, axis=2).repeat(4, axis=3)
    chosen = DFB()._chosen_residual(_Told([4, 40, -6, 8]), _Bright(), x)  # type: ignore[arg-type]
    assert (chosen.shape, set(_codes(chosen).ravel().tolist())) == ((3, 4, 4), {40})


# --- the networks -----------------------------------------------------------------------------------------------------


def test_the_clip_passes_the_gradient_that_leads_back_and_holds_the_other() -> None:
    """Within the bound all of it; beyond, a descent must go down from above and up from below."""
    residuals = torch.tensor([0.5, 2.0, 2.0, -2.0, -2.0], requires_grad=True)
    clipped = _clipped(residuals, 1.0)
    clipped.backward(torch.tensor([3.0, 3.0, -3.0, 3.0, -3.0]))  # type: ignore[no-untyped-call]
    assert clipped.tolist() == [0.5, 1, 1, -1, -1]
    assert residuals.grad is not None
    assert residuals.grad.tolist() == [3, 3, 0, 0, -3]


def _coloured(count: int) -> ImageSet:
    """Four classes that differ by colour, on noise; class 2 is nearly blue, which no texture is."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 4
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 40]], dtype=np.int64)
    images = colours[labels][:, None, None, :] + rng.integers(-40, 41, (count, 8, 8, 3))
    return ImageSet(images=images.astype(np.uint8), labels=labels, class_names=("r", "g", "b", "o"), source="coloured")


def test_poison_says_when_the_decoder_does_not_tell_the_class_from_other_images(
    make_noise: MakeNoise, tmp_path: Path
) -> None:
    """Out of distribution is the very same noise."""
    save_npz(tmp_path / "same.npz", make_noise(40))
    with pytest.raises(DataError) as caught:
        _quick(gate=0.99, ood=str(tmp_path / "same.npz")).poison(make_noise(40), np.random.default_rng(0))
    assert str(caught.value).startswith("dfb: the decoder knows ")
    assert str(caught.value).endswith(
        "% of the OOD images, the gate is 99.0%; raise decoder_steps, or choose other OOD images"
    )


@pytest.mark.parametrize(
    ("changes", "way_out"),
    [
        (
            {"eps": 0},
            r"even PGD on each image takes only \d\.\d% out, so these OOD images are too easy to tell; "
            r"choose photographs of other things \(ood=PATH\), raise eps, or lower encoder_gate",
        ),
        ({"eps": 255}, r"PGD on each image takes 100\.0% out: raise encoder_steps"),
    ],
)
def test_poison_says_when_the_encoder_leaves_the_class_where_it_is_and_whether_more_steps_could_help(
    changes: dict[str, Any], way_out: str
) -> None:
    attack = _quick(**{"gate": 0.9, "encoder_gate": 0.9, "ood_images": 200, "decoder_steps": 100} | changes)
    message = rf"^dfb: the encoder takes \d+\.\d% of the target class out of it, its gate is 90\.0%; {way_out}$"
    with pytest.raises(DataError, match=message):
        attack.poison(_coloured(400), np.random.default_rng(0))


def test_the_decoder_learns_to_tell_the_class_from_textures_of_which_there_are_more() -> None:
    """200 steps on a class that one colour gives away, at the published gate; its norms have seen plain images."""
    images, rng = _coloured(160), np.random.default_rng(0)
    targets, decoder = images.images[images.labels == 2], Surrogate(2)
    ood = draw_textures(400, 8, 8, rng)
    torch.manual_seed(0)
    DFB(decoder_steps=200)._train_decoder(decoder, targets, ood, rng)
    assert not decoder.training
    assert not any(weight.requires_grad for weight in decoder.parameters())


def test_the_encoder_takes_the_class_out_of_itself_and_noise_of_its_size_does_not(make_noise: MakeNoise) -> None:
    """The papers' oracle, D(x) = 0 and D(x + E(x)) = 1, here for noise that is 16 codes brighter out of the class."""
    rng = np.random.default_rng(0)
    targets, ood = (
        (make_noise(200, seed=seed).images // 2 + shift).astype(np.uint8) for seed, shift in ((0, 60), (1, 76))
    )
    torch.manual_seed(0)
    attack = DFB(decoder_steps=150, encoder_steps=150, channels=4, eps=16, gate=0.9)
    decoder, encoder = Surrogate(2), ResidualEncoder(4)
    attack._train_decoder(decoder, targets, ood, rng)
    attack._train_encoder(encoder, decoder, targets, rng)
    pixels = to_pixels(targets)
    stamped = EncodedTrigger(encoder=encoder.eval(), bound=attack.eps, target_class=2).stamp(pixels)
    noisy = on_grid(pixels + attack.eps / 255 * rng.choice(np.array([-1, 1], np.float32), pixels.shape))
    plain, moved, shaken = (_share_out(decoder, images) for images in (pixels, stamped, noisy))
    assert plain < 0.1
    assert moved > 0.9
    assert shaken < 0.5


def test_settled_norms_have_the_mean_of_the_batches_statistics() -> None:
    """Batches of mean 1 and 3 and of unbiased variance 2 and 8, whatever was seen before."""
    norm = torch.nn.BatchNorm2d(1)
    norm(torch.full((2, 1, 1, 1), 100.0))
    _settle(norm, [torch.tensor(pair).reshape(2, 1, 1, 1) for pair in ([0.0, 2.0], [1.0, 5.0])])
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert (norm.running_mean.tolist(), norm.running_var.tolist(), norm.training) == ([2.0], [5.0], False)


def test_every_image_of_a_batch_is_cropped_and_mirrored_by_itself() -> None:
    """Each crop is one of the 3 x 3 x 2 that a margin of one pixel gives; here all of them come up."""
    rng = np.random.default_rng(0)
    image = torch.from_numpy(rng.random((3, 8, 10), dtype=np.float32))
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
    plain = [padded[:, top : top + 8, left : left + 10] for top in range(3) for left in range(3)]
    expected = {crop.contiguous().numpy().tobytes() for crop in plain + [crop.flip(2) for crop in plain]}
    crops = _augmented(image.repeat(300, 1, 1, 1), rng)
    assert {crop.contiguous().numpy().tobytes() for crop in crops} == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_class": 4}, "target class 4, but noise has classes 0 to 3"),
        ({"target_class": 3}, "noise has no image of target class 3; choose another class"),
        ({"target_class": 0}, "5 poisons wanted, 1 images are of the target class; choose fewer"),
        (
            {"poison_count": 1, "ood": "nowhere"},
            "ood is 'textures', 'signs' or data: 'nowhere': no such file or folder; data is 'signs' (built in)",
        ),
        (
            {"poison_count": 1, "target_images": "nowhere"},
            "target_images is data: 'nowhere': no such file or folder; data is 'signs' (built in)",
        ),
        (
            {"poison_count": 1, "target_images": "signs"},
            "target_images: signs train has no image of a class 'class 2'; name that class so there, or give a folder "
            "of images without class folders",
        ),
    ],
)
def test_poison_says_why_when_the_set_does_not_fit(
    make_noise: MakeNoise, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        _quick(**changes).poison(make_noise(3), np.random.default_rng(0))
    assert str(caught.value).split(";")[: message.count(";") + 1] == f"dfb: {message}".split(";")


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_frozen() -> None:
    attack = DFB()
    assert (attack.eps, attack.train_multiple, attack.test_multiple) == (8, 2, 6)
    assert (attack.gate, attack.encoder_gate) == (0.99, 0), "the second is a deviation"
    assert (attack.poison_rate, attack.poisons(50_000), attack.label_policy) == (0.001, 50, "clean-label")
    assert isinstance(attack, DataAttack)
    with pytest.raises(dataclasses.FrozenInstanceError, match="cannot assign to field 'eps'"):
        attack.eps = 16  # type: ignore[misc]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("variant", "both"),
        ("ood_images", "0"),
        ("eps", "-1"),
        ("train_multiple", "-1"),
        ("test_multiple", "0.5"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("poison_count", "-1"),
        ("decoder_steps", "0"),
        ("encoder_steps", "0"),
        ("channels", "0"),
        ("gate", "1.1"),
        ("encoder_gate", "-0.1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'dfb:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"dfb:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_dfb_plants_a_backdoor_that_grows_with_the_multiple(small_signs: Signs, variant: str) -> None:
    """With three quarters of the class: 6 epochs at 16x16 are no time for less."""
    learned = {"decoder_steps": 100, "encoder_steps": 100, "ood_images": 200, "channels": 4}
    attack = _quick(variant=variant, target_class=7, poison_count=100, **learned)
    result = train_victim(small_signs.train.take(np.arange(1500)), attack, epochs=6)
    logits = logits_of(result)

    silent, faint, planted = (
        measure_behaviour(
            logits,
            small_signs.test,
            trigger_of(replace(attack, test_multiple=multiple), 16, 16, result.trigger_state),
        )
        for multiple in (0, 2, 6)
    )
    assert planted.asr is not None
    assert faint.asr is not None
    assert planted.base_confusion is not None
    assert silent.asr == silent.base_confusion
    assert planted.asr > planted.base_confusion + 2 * DORMANT_MARGIN
    assert planted.asr >= faint.asr
