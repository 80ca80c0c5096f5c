from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from qdefense.attacks.surrogate import Surrogate, perturb, train_surrogate
from qdefense.data.images import ImageSet, to_images

MakeNoise = Callable[..., ImageSet]


def _coloured(count: int) -> ImageSet:
    """Four classes that differ by colour, on noise."""
    rng = np.random.default_rng(1)
    labels = np.arange(count) % 4
    colours = np.array([[200, 40, 40], [40, 200, 40], [40, 40, 200], [160, 160, 40]], dtype=np.int64)
    images = colours[labels][:, None, None, :] + rng.integers(-40, 41, (count, 8, 8, 3))
    return ImageSet(images=images.astype(np.uint8), labels=labels, class_names=("r", "g", "b", "o"), source="coloured")


def _weights(surrogate: Surrogate) -> bytes:
    return b"".join(value.numpy().tobytes() for value in surrogate.state_dict().values())


def test_surrogate_learns_the_clean_set() -> None:
    surrogate = train_surrogate(_coloured(256), np.random.default_rng(0), epochs=4)
    unseen = _coloured(400).take(np.arange(256, 400))
    answers = surrogate(torch.from_numpy(unseen.pixels)).argmax(1).numpy()
    assert (answers == unseen.labels).mean() > 0.9
    assert not surrogate.training
    assert not any(weight.requires_grad for weight in surrogate.parameters())
    assert surrogate.features(torch.zeros(3, 3, 8, 8)).shape == (3, 64)


def test_surrogate_is_the_same_when_the_rng_is_whatever_torch_is_set_to(make_noise: MakeNoise) -> None:
    threads = torch.get_num_threads()
    torch.manual_seed(7)
    before = torch.random.get_rng_state()
    first = train_surrogate(make_noise(40), np.random.default_rng(3), epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    try:
        torch.set_num_threads(2)
        torch.manual_seed(8)
        second = train_surrogate(make_noise(40), np.random.default_rng(3), epochs=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    other = train_surrogate(make_noise(40), np.random.default_rng(4), epochs=1)
    assert _weights(first) == _weights(second) != _weights(other)


def test_surrogate_learns_from_a_single_image(make_noise: MakeNoise) -> None:
    surrogate = train_surrogate(make_noise(1), np.random.default_rng(0), epochs=1)
    assert torch.isfinite(surrogate(torch.zeros(2, 3, 8, 8))).all()


def test_perturb_walks_down_by_signed_steps_to_the_edge_of_the_ball_and_of_the_range() -> None:
    """Grey 100, 3 and 252: brightening is loss for one half, darkening for the other."""
    codes = np.repeat(np.array([100, 3, 252], np.uint8), 16).reshape(3, 4, 4, 1).repeat(3, axis=3)
    images = ImageSet(images=codes, labels=np.zeros(3, np.int64), class_names=("a",), source="grey")
    up = torch.ones(3, 3, 4, 4)
    up[:, :, :2] = -1
    for steps, moved in (([], 0), ([2.0], 2), ([2.0, 1.0], 3), ([4.0] * 5, 8)):
        found = to_images(perturb(images, lambda x: (up * x).sum(), eps=8, step_sizes=steps)).astype(int)
        assert found[0, :2].ravel().tolist() == [100 + moved] * 24
        assert found[0, 2:].ravel().tolist() == [100 - moved] * 24
        assert (found[1, 2:] == max(0, 3 - moved)).all()
        assert (found[2, :2] == min(255, 252 + moved)).all()


def test_perturb_moves_nothing_when_eps_is_zero(make_noise: MakeNoise) -> None:
    noise = make_noise(4)
    assert perturb(noise, torch.sum, eps=0, step_sizes=[5.0] * 3).tobytes() == noise.pixels.tobytes()
