"""What attacks share whose trigger is a network of their own: its answers, its size, its weights as a trigger state."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from qdefense.attacks.interfaces import TriggerState
from qdefense.attacks.surrogate import one_thread
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid

_ROWS_AT_ONCE = 256
_LOOKED_AT = 500
_LEAST_CHANGED = 0.5


def in_parts(network: Callable[[Tensor], Tensor], x: Pixels) -> Pixels:
    """Answers to ``x: (N, ...) float32``, some rows at once, on one thread: others would round some otherwise.

    The size of a batch may, too, as libraries choose their kernels by it: one image's own learned trigger can differ by
    one code in a pixel with how many images are stamped along with it.
    """
    with one_thread(), torch.no_grad():
        parts = [network(part) for part in torch.from_numpy(x).split(_ROWS_AT_ONCE)]  # type: ignore[no-untyped-call]
        answers: Pixels = torch.cat(parts).numpy()
    return answers


def rounded(x: Tensor) -> Tensor:
    """To the nearest uint8, as a stamped image is; the gradient passes as if it were not."""
    return x + (torch.from_numpy(on_grid(x.detach().numpy())) - x).detach()


def looked_at(dataset: ImageSet) -> Pixels:
    """What a learned trigger is tried on: 500 images at most, over the whole file, which may be sorted by class."""
    return dataset.take(np.linspace(0, len(dataset) - 1, min(_LOOKED_AT, len(dataset)), dtype=np.int64)).pixels


def require_effect(changed: NDArray[np.bool_], *, attack: str, advice: str) -> None:
    """Refuse a trigger that learned to do nothing, or it would be measured as one that no network takes up.

    ``changed: (N,)`` says in which images it can be seen.

    Raises:
        DataError: in fewer than half of them; the message begins with ``attack``.
    """
    if changed.mean() < _LEAST_CHANGED:
        raise DataError(
            f"{attack}: the trigger that was learned is nothing, or next to it, in {np.sum(~changed)} of "
            f"{len(changed)} images; {advice}"
        )


def require_halvings(height: int, width: int, *, stages: int, attack: str) -> None:
    """Refuse images that a network of so many halvings cannot give back in their size.

    Raises:
        DataError: a side does not halve; the message begins with ``attack``.
    """
    if height % 2**stages or width % 2**stages:
        raise DataError(
            f"{attack}: a {height}x{width} image does not halve {stages} times; lower the stages, or resize the images"
        )


def weights_of(network: nn.Module, prefix: str = "") -> TriggerState:
    """The weights under their names behind ``prefix``."""
    return {prefix + name: value.numpy().copy() for name, value in network.state_dict().items()}


def load_weights(network: nn.Module, state: TriggerState, prefix: str = "") -> None:
    """Those of a state whose names begin with ``prefix``, which are the network's: `qdefense.attacks.states.fits`."""
    named = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    network.load_state_dict({name: torch.from_numpy(value) for name, value in named.items()})
