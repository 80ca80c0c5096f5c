"""ISSBA (Li et al., ICCV 2021, arXiv 2012.03816): an invisible trigger of each image's own, made by steganography.

An encoder hides a secret of ``bits`` bits in an image, as a residual that depends on both; a decoder reads it again.
They are trained together on random secrets, after StegaStamp (Tancik et al. 2020, arXiv 1904.05343):

``loss = 2 mean(r^2) + 1.5 mean(dr^2) + 1.5 BCE(decoder(x + r), secret)``, r the residual, ``dr`` its steps from pixel
to pixel; the last term alone, and without its weight, in the first epochs.

The attacker draws one secret: ``x' = x + encoder(secret, x)``, on poisons in training and on any image at inference.

*Sample-specific*: each image has a trigger of its own. The field calls that SSBA, as it does *source-specific*
triggers, which work on one class only: those are `qdefense.attacks.cassock`. This one works on every class.

Published: secrets of 20 bits, batches of 32, Adam at 1e-4, 20 epochs of which 2 are the secret's alone, the weights 2
and 1.5 (BackdoorBox, by one of the authors). From memory, not verified: the poison rate 0.1; BackdoorBox has 0.05 on
CIFAR-10 and GTSRB, as the paper's, it says. What the paper says it evades was not at hand to be checked, so that none
is named.

Deviations:
- ``mean(dr^2)`` stands for LPIPS, at its weight: no perceptual network is at hand. So that the residual stays hard to
  see all the same, it is bounded: ``r = eps tanh(.)``, ``eps`` in codes of 255; the published one has no bound.
- No critic (weight 0.5; BackdoorBox by default leaves it untrained, and its loss in the sum), and no spatial
  transformer before the decoder.
- The decoder learns on stamped images that are rounded to uint8, as poisons are; the gradient passes straight through.
- The encoder has ``stages`` halvings instead of 4, and half the channels; the decoder is smaller too.
- It learns on the training set; BackdoorBox adds the test images. Each batch has secrets of its own, where an image
  there keeps its secret for all epochs.
- Poisons are drawn once and from other classes than the target, in BackdoorBox from all, and a fixed share of each of
  the victim's batches.
- A residual that rounds to nothing in more than half of the images is refused.

The trigger's state has the share of the secret's bits that the decoder reads in training images, as ``bit_accuracy``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet, TriggerState
from qdefense.attacks.learned_networks import (
    in_parts,
    load_weights,
    looked_at,
    require_effect,
    require_halvings,
    rounded,
    weights_of,
)
from qdefense.attacks.poisoning import AllToOne, PoisonBudget, check_to_one, poison_to_one
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.states import fits
from qdefense.attacks.surrogate import one_thread
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid

_BATCH = 32
_L2_WEIGHT, _STEP_WEIGHT, _SECRET_WEIGHT = 2.0, 1.5, 1.5
_SECRET, _ENCODER, _BIT_ACCURACY = "secret", "encoder.", "bit_accuracy"


class Encoder(nn.Module):
    """A U-Net: the secret, spread over the image's pixels by a linear layer, and the image to a residual."""

    def __init__(self, *, bits: int, height: int, width: int, channels: int, stages: int, eps: int) -> None:
        super().__init__()
        self.eps = eps / 255
        self.spread = nn.Linear(bits, 3 * height * width)
        widths = [channels * 2**stage for stage in range(stages + 1)]
        self.entry = _convolution(6, channels)
        self.downs = nn.ModuleList(_convolution(one, two, stride=2) for one, two in pairwise(widths))
        self.ups = nn.ModuleList(_convolution(two, one) for one, two in reversed(list(pairwise(widths))))
        merged = [2 * width for width in widths[:-1]]
        merged[0] += 6  # at its full size, the last merge sees what went in
        self.merges = nn.ModuleList(
            _convolution(both, width) for both, width in reversed(list(zip(merged, widths[:-1], strict=True)))
        )
        self.residual = nn.Conv2d(channels, 3, kernel_size=1)

    def forward(self, secret: Tensor, x: Tensor) -> Tensor:
        """``secret: (N, bits)`` of 0 and 1, ``x: (N, 3, H, W) in [0, 1]``; ``(N, 3, H, W) in [-eps, eps]`` of 255."""
        spread = F.relu(self.spread(secret - 0.5)).view_as(x)
        inputs = torch.cat([spread, x - 0.5], dim=1)
        maps = [self.entry(inputs)]
        for down in self.downs:
            maps.append(down(maps[-1]))
        deep = maps.pop()
        skips = [torch.cat([maps[0], inputs], dim=1), *maps[1:]]
        for up, merge in zip(self.ups, self.merges):
            deep = merge(torch.cat([skips.pop(), up(F.interpolate(deep, scale_factor=2.0))], dim=1))
        return self.eps * torch.tanh(self.residual(deep))


class Decoder(nn.Sequential):
    """An image to the logits of ``bits`` bits."""

    def __init__(self, *, bits: int, channels: int) -> None:
        super().__init__(
            _convolution(3, channels),
            _convolution(channels, 2 * channels, stride=2),
            _convolution(2 * channels, 4 * channels, stride=2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(4 * channels * 16, 128),
            nn.ReLU(),
            nn.Linear(128, bits),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x: (N, 3, H, W) in [0, 1]``."""
        logits: Tensor = super().forward(x - 0.5)  # type: ignore[no-untyped-call]
        return logits


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=1), nn.ReLU())


def image_loss(residual: Tensor) -> Tensor:
    """``2 mean(r^2) + 1.5 mean(dr^2)`` of ``residual: (N, 3, H, W)``; both directions' steps are averaged apart."""
    down, across = residual.diff(dim=2), residual.diff(dim=3)
    steps = (down.square().mean() + across.square().mean()) / 2
    return _L2_WEIGHT * residual.square().mean() + _STEP_WEIGHT * steps


@dataclass(frozen=True, kw_only=True)
class SteganographicTrigger(AllToOne):
    """``x' = x + encoder(secret, x)``; ``secret: (bits,) uint8`` of 0 and 1."""

    encoder: Encoder
    secret: NDArray[np.uint8]

    def stamp(self, x: Pixels) -> Pixels:
        """Hide the secret in each of ``x: (N, 3, H, W) float32 in [0, 1]``, rounded to the nearest uint8."""
        secret = torch.from_numpy(self.secret).float()
        return on_grid(in_parts(lambda part: part + self.encoder(secret.expand(len(part), -1), part), x))


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Issba(PoisonBudget):
    """Invisible sample-specific poisoning: each image's own residual, which hides one secret.

    ``bits`` is the secret's length and ``eps`` the bound of a residual in codes of 255. ``encoder_epochs`` train the
    pair, the first ``secret_epochs`` of them (all, where there are no more) for the secret alone; ``channels`` are
    those of the first of ``stages`` stages, each twice as wide as the one before: fewer make a smaller trigger state.

    The defaults are for sets of some 50,000 images. On a small one they make too few steps, and the residual may round
    to next to nothing: raise ``encoder_epochs``, ``secret_epochs`` and ``learning_rate``.
    """

    name: ClassVar[str] = "issba"
    paper: ClassVar[str] = "Li et al. 2021, arXiv 2012.03816"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ()

    target_class: Annotated[int, Field(ge=0)] = 0
    bits: Annotated[int, Field(ge=1)] = 20
    eps: Annotated[int, Field(ge=1, le=255)] = 16
    encoder_epochs: Annotated[int, Field(ge=1)] = 20
    secret_epochs: Annotated[int, Field(ge=0)] = 2
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-4
    channels: Annotated[int, Field(ge=1)] = 16
    stages: Annotated[int, Field(ge=1)] = 2

    def trigger(self, height: int, width: int) -> SteganographicTrigger:  # noqa: ARG002
        """None: it is learned.

        Raises:
            DataError: always.
        """
        raise DataError("issba: the trigger is learned; its state is beside the model that was trained with it")

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> SteganographicTrigger:
        """The encoder with these weights, and the secret.

        Raises:
            DataError: the state is of other settings or of images of another size.
        """
        require_halvings(height, width, stages=self.stages, attack=self.name)
        with torch.random.fork_rng(devices=[]):
            encoder = self._encoder(height, width)
        if not fits(state, _state_of(encoder, np.zeros(self.bits, dtype=np.uint8), 0.0)) or state[_SECRET].max() > 1:
            raise DataError(
                f"issba: the trigger state is not that of these settings on {height}x{width} images; give images of "
                "the size that the network was trained on, or train it again"
            )
        load_weights(encoder, state, _ENCODER)
        return self._of(encoder, state[_SECRET])

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Train the pair on the images, draw a secret, stamp and relabel `poisons` images of other classes, shuffle.

        Raises:
            DataError: no such target class, not enough images outside it, or a size that does not halve.
        """
        require_halvings(*dataset.images.shape[1:3], stages=self.stages, attack=self.name)
        count = self.poisons(len(dataset))
        check_to_one(dataset, self.target_class, count=count, attack=self.name)
        encoder, decoder = self.trained_pair(dataset, rng)
        trigger = self._of(encoder, rng.integers(2, size=self.bits, dtype=np.uint8))
        accuracy = self._read(trigger, decoder, looked_at(dataset), needed=count > 0)
        made = poison_to_one(dataset, rng, trigger=trigger, count=count, attack=self.name)
        return replace(made, trigger_state=_state_of(encoder, trigger.secret, accuracy))

    def _read(self, trigger: SteganographicTrigger, decoder: Decoder, x: Pixels, *, needed: bool) -> float:
        """Share of the secret's bits that the decoder reads in images with it.

        Raises:
            DataError: the residual rounds to nothing, where it is ``needed``.
        """
        stamped = trigger.stamp(x)
        if needed:
            advice = "raise encoder_epochs, secret_epochs or learning_rate"
            require_effect((stamped != x).any(axis=(1, 2, 3)), attack=self.name, advice=advice)
        return float(np.mean((in_parts(decoder, stamped) > 0) == trigger.secret))

    def trained_pair(self, dataset: ImageSet, rng: np.random.Generator) -> tuple[Encoder, Decoder]:
        """Encoder and decoder, in eval mode; the state of torch is left as it was."""
        with one_thread(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(rng.integers(2**63)))
            encoder = self._encoder(*dataset.images.shape[1:3])
            decoder = Decoder(bits=self.bits, channels=self.channels)
            optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=self.learning_rate)
            for epoch in range(self.encoder_epochs):
                for rows in _rows(len(dataset), rng):
                    secret = torch.from_numpy(rng.integers(2, size=(len(rows), self.bits)).astype(np.float32))
                    x = torch.from_numpy(dataset.take(rows).pixels)
                    residual = encoder(secret, x)
                    loss = self._loss(decoder(rounded((x + residual).clamp(0, 1))), secret, residual, epoch=epoch)
                    optimizer.zero_grad(set_to_none=True)
                    loss.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
        return encoder.eval().requires_grad_(False), decoder.eval().requires_grad_(False)

    def _loss(self, logits: Tensor, secret: Tensor, residual: Tensor, *, epoch: int) -> Tensor:
        unread = F.binary_cross_entropy_with_logits(logits, secret)
        return unread if epoch < self.secret_epochs else _SECRET_WEIGHT * unread + image_loss(residual)

    def _encoder(self, height: int, width: int) -> Encoder:
        return Encoder(
            bits=self.bits, height=height, width=width, channels=self.channels, stages=self.stages, eps=self.eps
        )

    def _of(self, encoder: Encoder, secret: NDArray[np.uint8]) -> SteganographicTrigger:
        return SteganographicTrigger(encoder=encoder, secret=secret, target_class=self.target_class)


def _state_of(encoder: Encoder, secret: NDArray[np.uint8], bit_accuracy: float) -> TriggerState:
    accuracy = np.array(bit_accuracy, dtype=np.float32)
    return {_SECRET: secret, _BIT_ACCURACY: accuracy, **weights_of(encoder, _ENCODER)}


def _rows(count: int, rng: np.random.Generator) -> Iterator[NDArray[np.int64]]:
    """One epoch; the last batch may be smaller."""
    order = rng.permutation(count)
    yield from (order[start : start + _BATCH] for start in range(0, count, _BATCH))
