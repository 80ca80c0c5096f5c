"""What attacks share whose trigger is a network of their own: its answers, its size, its weights as a trigger state."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qdefense.attacks.interfaces import TriggerState
from qdefense.attacks.surrogate import one_thread
from qdefense.data.images import DataError, Pixels

_ROWS_AT_ONCE = 256


def in_parts(network: Callable[[Tensor], Tensor], x: Pixels) -> Pixels:
    """Answers to ``x: (N, ...) float32``, some rows at once, on one thread: others would round some otherwise.

    The size of a batch may, too, as libraries choose their kernels by it: one image's own learned trigger can differ by
    one code in a pixel with how many images are stamped along with it.
    """
    with one_thread(), torch.no_grad():
        parts = [network(part) for part in torch.from_numpy(x).split(_ROWS_AT_ONCE)]  # type: ignore[no-untyped-call]
        answers: Pixels = torch.cat(parts).numpy()
    return answers


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
