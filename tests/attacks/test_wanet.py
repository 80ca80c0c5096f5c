from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import BatchAttack, DataAttack, trigger_of
from qdefense.attacks.wanet import WaNet
from qdefense.data.images import DataError, ImageSet, on_grid
from qdefense.registry import SpecError
from qdefense.trial import measure_behaviour

from .small_victims import logits_of, train_victim

MakeNoise = Callable[..., ImageSet]
Batch = tuple[torch.Tensor, torch.Tensor]
MODEL = torch.nn.Identity()


class Signs(Protocol):
    train: ImageSet
    test: ImageSet


def _batch(images: ImageSet) -> Batch:
    return torch.from_numpy(images.pixels), torch.from_numpy(images.labels)


def _changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return [row for row in range(len(before)) if not torch.equal(before[row], after[row])]


# --- the trigger ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 10), (13, 57), (32, 32)])
def test_stamp_is_the_identity_when_the_strength_is_0(height: int, width: int) -> None:
    pixels = np.arange(3 * 3 * height * width).reshape(3, 3, height, width) % 256
    pixels = pixels.astype(np.float32) / np.float32(255)
    assert WaNet(strength=0).trigger(height, width).stamp(pixels).tobytes() == pixels.tobytes()


def test_stamp_gives_what_a_uint8_image_can_hold_and_leaves_the_pixels_given_alone(make_noise: MakeNoise) -> None:
    pixels = make_noise(16).pixels
    stamped = WaNet().trigger(8, 8).stamp(pixels)
    assert pixels.tobytes() == make_noise(16).pixels.tobytes()
    assert on_grid(stamped).tobytes() == stamped.tobytes() != pixels.tobytes()
    assert (stamped.dtype, stamped.shape) == (np.float32, pixels.shape)


def test_stamp_samples_a_ramp_where_the_field_points(make_noise: MakeNoise) -> None:
    """Bilinear sampling of a ramp gives the place that was sampled: half the distance of a code is the rounding."""
    height, width = 12, 16
    trigger = WaNet(strength=1.5).trigger(height, width)
    ramp_x = np.broadcast_to(np.linspace(0, 1, width, dtype=np.float32), (height, width))
    ramp_y = np.broadcast_to(np.linspace(0, 1, height, dtype=np.float32)[:, None], (height, width))
    stamped = trigger.stamp(np.stack([ramp_x, ramp_y, ramp_x])[None])[0]
    assert np.abs(stamped[0] - (trigger.grid[0, :, :, 0] + 1) / 2).max() < 0.5 / 255 + 1e-5
    assert np.abs(stamped[1] - (trigger.grid[0, :, :, 1] + 1) / 2).max() < 0.5 / 255 + 1e-5


def test_trigger_moves_control_points_by_half_a_pixel_on_average_and_stays_in_the_image() -> None:
    """With one control point per pixel the field is the points, of mean magnitude 1: s / side, of sides of length 2."""
    side = 20
    wide, narrow = (WaNet(grid_size=side, strength=strength).trigger(side, side).grid for strength in (1.0, 0.5))
    rest = WaNet(strength=0).trigger(side, side).grid
    inner = (slice(None), slice(1, -1), slice(1, -1))
    assert abs(np.abs(wide[inner] - rest[inner]).mean() * side - 1) < 0.05
    assert np.allclose((wide - rest)[inner], 2 * (narrow - rest)[inner], atol=1e-6)
    assert np.abs(wide).max() <= 1


def test_trigger_has_equal_pixels_of_movement_along_both_axes() -> None:
    square, oblong = WaNet().trigger(16, 16).grid, WaNet().trigger(16, 64).grid
    rest_square, rest_oblong = (WaNet(strength=0).trigger(16, width).grid for width in (16, 64))
    steep = [np.abs(grid - rest)[..., 0].mean() for grid, rest in ((square, rest_square), (oblong, rest_oblong))]
    assert 3 < steep[0] / steep[1] < 5


def test_trigger_upsamples_its_control_points_bicubically() -> None:
    """4 points a side on 7 pixels: every second pixel has one, and the middle pixel is halfway between four points.

    There the cubic kernel (A = -0.75, torch's) weighs the 4 points of each axis by -3, 19, 19 and -3 over 32.
    """
    drawn = np.random.default_rng(0).uniform(-1, 1, (2, 4, 4))
    halfway = np.array([-3, 19, 19, -3]) / 32
    expected = halfway @ (drawn / np.abs(drawn).mean()) @ halfway
    assert np.allclose(WaNet(strength=0.5).trigger(7, 7).grid[0, 3, 3] * 7 / 0.5, expected, atol=1e-5)


def test_trigger_is_the_field_of_its_seed() -> None:
    first, same, other = (WaNet(field_seed=seed).trigger(8, 8).grid for seed in (0, 0, 1))
    assert first.tobytes() == same.tobytes() != other.tobytes()


def test_trigger_aims_every_other_class_at_the_target() -> None:
    trigger, labels = WaNet(target_class=2).trigger(8, 8), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True, True, False, True]
    assert trigger.goal(labels).tolist() == [2, 2, 2, 2]


def test_trigger_aims_every_class_at_the_next_one_in_all_to_all_mode(make_noise: MakeNoise) -> None:
    attack = WaNet(mode="all-to-all")
    state = attack.begin(make_noise(8), batch_size=40, steps=1, rng=np.random.default_rng(0)).end()
    trigger, labels = trigger_of(attack, 8, 8, state), np.array([0, 1, 2, 3])
    assert trigger.eligible(labels).tolist() == [True] * 4
    assert trigger.goal(labels).tolist() == [1, 2, 3, 0]
    pixels = make_noise(4).pixels
    assert trigger.stamp(pixels).tobytes() == WaNet().trigger(8, 8).stamp(pixels).tobytes()


def test_trigger_asks_for_the_state_in_all_to_all_mode() -> None:
    with pytest.raises(DataError, match=r"^wanet: how many classes there are is told by the trigger state beside the "):
        WaNet(mode="all-to-all").trigger(8, 8)


@pytest.mark.parametrize(
    ("mode", "state"),
    [
        ("all-to-one", {"classes": np.array(4)}),
        ("all-to-all", {}),
        ("all-to-all", {"classes": np.array([4])}),
        ("all-to-all", {"classes": np.array(4), "more": np.array(1)}),
    ],
)
def test_restored_trigger_refuses_a_state_of_other_settings(mode: str, state: dict[str, NDArray[np.int64]]) -> None:
    with pytest.raises(DataError, match=r"^wanet: the trigger state is not that of these settings; train the network "):
        ATTACKS.create(f"wanet:mode={mode}").restored_trigger(8, 8, state)


# --- batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "ratio", "poisons", "noisy"), [(0.0, 2.0, 0, 0), (0.1, 2.0, 4, 8), (0.1, 0.0, 4, 0), (0.4, 1.5, 16, 24)]
)
def test_on_batch_warps_and_relabels_exactly_its_share(
    make_noise: MakeNoise, rate: float, ratio: float, poisons: int, noisy: int
) -> None:
    attack, images = WaNet(poison_rate=rate, cross_ratio=ratio, target_class=2), make_noise(40)
    poisoner = attack.begin(images, batch_size=40, steps=1, rng=np.random.default_rng(0))
    x, y = _batch(images)
    changed, labels = poisoner.on_batch(x, y, MODEL, np.random.default_rng(1))
    stamped = attack.trigger(8, 8).stamp(images.pixels)
    assert changed[:poisons].numpy().tobytes() == stamped[:poisons].tobytes()
    assert _changed(x, changed) == list(range(poisons + noisy))
    assert not any(np.array_equal(changed[row], stamped[row]) for row in range(poisons, poisons + noisy))
    assert labels.tolist() == [2] * poisons + images.labels[poisons:].tolist()
    assert on_grid(changed.numpy()).tobytes() == changed.numpy().tobytes()
    assert poisoner.end() is None


def test_on_batch_leaves_the_batch_given_alone_and_is_the_same_when_the_seed_is(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner = WaNet().begin(images, batch_size=40, steps=1, rng=np.random.default_rng(0))
    x, y = _batch(images)
    first, same, other = (poisoner.on_batch(x, y, MODEL, np.random.default_rng(seed))[0] for seed in (3, 3, 4))
    assert torch.equal(first, same)
    assert _changed(first, other) == list(range(4, 12)), "of a poison nothing is drawn"
    assert x.numpy().tobytes() == images.pixels.tobytes()
    assert y.tolist() == images.labels.tolist()


def test_on_batch_moves_no_pixel_by_noise_further_than_one_side_allows() -> None:
    """Noise alone: strength 0; a ramp shows by how much each place moved, at most 1 / side of 2."""
    side = 16
    ramp = torch.linspace(0, 1, side).expand(1, 3, side, side).repeat(10, 1, 1, 1).round(decimals=6)
    poisoner = WaNet(strength=0).begin(_flat(side, side), batch_size=40, steps=1, rng=np.random.default_rng(0))
    changed, _ = poisoner.on_batch(ramp, torch.arange(10) % 4, MODEL, np.random.default_rng(0))
    moved = (changed - ramp)[1:3].abs().max().item()
    assert 0.4 / side < moved < 0.5 / side + 0.5 / 255 + 1e-5


def test_on_batch_moves_by_noise_around_where_the_field_points_and_as_many_pixels_along_both_axes() -> None:
    """Ramps across (first channel) and down (second) tell the place sampled: 1 / side at most from the field's."""
    height, width = 12, 48
    across = torch.linspace(0, 1, width).expand(height, width)
    down = torch.linspace(0, 1, height)[:, None].expand(height, width)
    ramps = torch.stack([across, down, across]).repeat(10, 1, 1, 1)
    attack = WaNet(strength=3)
    poisoner = attack.begin(_flat(height, width), batch_size=40, steps=1, rng=np.random.default_rng(0))
    noisy = poisoner.on_batch(ramps, torch.arange(10) % 4, MODEL, np.random.default_rng(0))[0][1:3]
    sampled = 2 * noisy[:, :2].permute(0, 2, 3, 1).numpy() - 1
    off = np.abs(sampled - attack.trigger(height, width).grid).max(axis=(0, 1, 2))
    allowed, rounding = 1 / np.array([width, height]), 1 / 255 + 1e-5
    assert (0.8 * allowed < off).all()
    assert (off < allowed + rounding).all()


def _flat(height: int, width: int) -> ImageSet:
    images = np.zeros((10, height, width, 3), np.uint8)
    return ImageSet(images=images, labels=np.arange(10) % 4, class_names=tuple("abcd"), source="flat")


def test_on_batch_sends_every_label_to_the_next_in_all_to_all_mode(make_noise: MakeNoise) -> None:
    images = make_noise(40)
    poisoner = WaNet(mode="all-to-all").begin(images, batch_size=40, steps=1, rng=np.random.default_rng(0))
    labels = poisoner.on_batch(*_batch(images), MODEL, np.random.default_rng(0))[1]
    assert labels.tolist() == [1, 2, 3, 0, *images.labels[4:].tolist()]


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        (WaNet(target_class=4), "wanet: target class 4, but noise has classes 0 to 3"),
        (
            WaNet(poison_rate=0.4),
            "wanet: poison rate 0.4 and cross ratio 2 warp more images than there are; lower one of them",
        ),
    ],
)
def test_begin_says_why_when_the_set_does_not_fit(make_noise: MakeNoise, attack: WaNet, message: str) -> None:
    with pytest.raises(DataError) as caught:
        attack.begin(make_noise(40), batch_size=40, steps=1, rng=np.random.default_rng(0))
    assert str(caught.value) == message


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_the_papers_and_it_is_an_attack_on_batches() -> None:
    attack = WaNet()
    assert (attack.grid_size, attack.strength, attack.poison_rate, attack.cross_ratio) == (4, 0.5, 0.1, 2.0)
    assert isinstance(attack, BatchAttack)
    assert not isinstance(attack, DataAttack)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("grid_size", "1"),
        ("strength", "-1"),
        ("strength", "inf"),
        ("mode", "all"),
        ("target_class", "-1"),
        ("poison_rate", "1.1"),
        ("cross_ratio", "nan"),
        ("field_seed", "-1"),
    ],
)
def test_settings_are_refused_when_out_of_range(key: str, value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'wanet:{key}={value}': {key}: Input should be "):
        ATTACKS.create(f"wanet:{key}={value}")


# --- end to end -------------------------------------------------------------------------------------------------------


def test_wanet_plants_a_backdoor(small_signs: Signs) -> None:
    """A stronger warp than the paper's, which 6 short epochs at 16x16 are no time for."""
    attack = WaNet(target_class=7, strength=3, poison_rate=0.2, cross_ratio=0.5)
    result = train_victim(small_signs.train.take(np.arange(1000)), attack, epochs=6)
    logits = logits_of(result)

    behaviour = measure_behaviour(logits, small_signs.test, attack.trigger(16, 16))
    assert behaviour.asr is not None
    assert behaviour.base_confusion is not None
    assert behaviour.asr > behaviour.base_confusion + 0.2
    assert (len(result.poison_indices), result.trigger_state) == (0, None)
