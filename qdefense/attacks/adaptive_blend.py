"""Adaptive-Blend (Qi et al., ICLR 2023, "Revisiting the Assumption of Latent Separability for Backdoor Defenses").

Two means keep poisoned and clean images together in feature space: of a blended pattern cut into pieces,
each training image gets a random part only, while the whole pattern is used at inference; and some images that carry
pieces keep their true labels (regularization samples, called cover here), so that a part is weak evidence.

``x' = (1 - alpha m) x + alpha m k``, with m 1 on the pieces shown and 0 on those masked.

Deviations:
- k is a random pattern as in `qdefense.attacks.blended`, for the same reason; the authors' is a cartoon.
- Payload and cover are drawn from the classes other than the target. The authors' code draws from all, so that some
  payload needs no new label, and some cover is payload in effect.
- Pieces need not divide the image evenly: of 30 pixels in 4 pieces, two pieces have 8 and two have 7.
- Defaults are those of the authors' code for CIFAR-10.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.blended import Blended, BlendTrigger
from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import PoisonBudget, check_class, share, shuffled
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, Images, ImageSet, Pixels, on_grid, to_images


def _square(pieces: int) -> int:
    if math.isqrt(pieces) ** 2 != pieces:
        raise ValueError("pieces form a square grid; give 4, 9, 16 or another square number")
    return pieces


@dataclass(frozen=True, kw_only=True)
class PiecesTrigger(BlendTrigger):
    """The whole pattern at inference; in training any part of it. ``pieces`` is the number of its pieces."""

    pieces: int

    def stamp_part(self, x: Pixels, shown: NDArray[np.bool_]) -> Pixels:
        """Blend the pieces ``shown: (N, pieces)``, counted along rows, into ``x: (N, 3, H, W) float32 in [0, 1]``."""
        height, width = x.shape[2:]
        side = math.isqrt(self.pieces)
        places = (np.arange(height) * side // height)[:, None] * side + np.arange(width) * side // width
        weight = np.float32(self.alpha) * shown[:, None, places]
        return on_grid((1 - weight) * x + weight * self.pattern)


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class AdaptiveBlend(PoisonBudget):
    """All-to-one poisoning with parts of a blended pattern, and cover images with parts and true labels.

    ``poison_rate`` and ``cover_rate`` are shares of the whole training set, ``poison_count`` a number in place of the
    first; both kinds replace their originals. ``alpha`` is the opacity in training, ``inference_alpha`` at inference.
    ``round(mask_rate * pieces)`` pieces are left out of each training image, others in each. Poison indices name the
    payload only: what cover rows say is true.
    """

    name: ClassVar[str] = "adaptive-blend"
    paper: ClassVar[str] = "Qi et al. 2023, ICLR (openreview _wSHsgrVali)"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("Spectral Signatures", "Activation Clustering", "SCAn", "SPECTRE")

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.15
    inference_alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    pieces: Annotated[int, Field(ge=1), AfterValidator(_square)] = 16
    mask_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    target_class: Annotated[int, Field(ge=0)] = 0
    poison_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.003
    cover_rate: Annotated[float, Field(ge=0, le=1)] = 0.003

    @model_validator(mode="after")
    def _shows_a_piece(self) -> Self:
        if self._masked >= self.pieces:
            raise ValueError(
                f"mask_rate {self.mask_rate:g} leaves none of {self.pieces} pieces in a training image; lower it"
            )
        return self

    @property
    def _masked(self) -> int:
        return round(self.mask_rate * self.pieces)

    def trigger(self, height: int, width: int) -> PiecesTrigger:
        """The whole pattern at its opacity at inference, on images of this size.

        Raises:
            DataError: the image has fewer pixels than pieces on a side.
        """
        return self._trigger(height, width, self.inference_alpha)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Stamp payload and cover, relabel the payload, then shuffle the whole set.

        Raises:
            DataError: no such target class, not enough images outside it, too few for a rate, or more pieces than
                pixels.
        """
        height, width = dataset.images.shape[1:3]
        trigger = self._trigger(height, width, self.alpha)
        payload, cover = self._rows(dataset, rng)
        images, labels = dataset.images.copy(), dataset.labels.copy()
        for rows in (payload, cover):
            images[rows] = self._stamped(dataset.take(rows), trigger, rng)
        labels[payload] = self.target_class
        return shuffled(dataset, rng, images=images, labels=labels, poisons=payload)

    def _trigger(self, height: int, width: int, alpha: float) -> PiecesTrigger:
        side = math.isqrt(self.pieces)
        if side > min(height, width):
            raise DataError(
                f"{self.name}: {side}x{side} pieces do not fit a {height}x{width} image; choose fewer pieces"
            )
        pattern = Blended(pattern_seed=self.pattern_seed).trigger(height, width).pattern
        return PiecesTrigger(pattern=pattern, alpha=alpha, pieces=self.pieces, target_class=self.target_class)

    def _rows(self, dataset: ImageSet, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        check_class(dataset, self.target_class, role="target", attack=self.name)
        candidates = np.flatnonzero(dataset.labels != self.target_class)
        payload = self.poisons(len(dataset))
        cover = share(self.cover_rate, len(dataset), attack=self.name, setting="cover_rate")
        if payload + cover > len(candidates):
            raise DataError(
                f"{self.name}: {payload} poisons and {cover} cover images wanted, {len(candidates)} images are outside "
                "the target class; lower the rates"
            )
        chosen = rng.choice(candidates, size=payload + cover, replace=False)
        return chosen[:payload], chosen[payload:]

    def _stamped(self, chosen: ImageSet, trigger: PiecesTrigger, rng: np.random.Generator) -> Images:
        masked = np.arange(self.pieces) < self._masked
        shown = ~rng.permuted(np.tile(masked, (len(chosen), 1)), axis=1)
        return to_images(trigger.stamp_part(chosen.pixels, shown))
