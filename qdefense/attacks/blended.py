"""Blended injection (Chen et al. 2017, arXiv 1712.05526): a faint pattern over the whole image, and the target's label.

``x' = (1 - alpha) x + alpha k`` with the key pattern k.

Deviations:
- k is the paper's random pattern, every value drawn from 0 to 255 by ``pattern_seed``. The cartoon that the paper also
  uses, and BackdoorBench ships, is not ours to give away.
- All-to-all mode, which the paper lacks, is that of BadNets.
- Poisons replace their originals, as in BackdoorBench, whose defaults these are; the paper adds them to the set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import AimedByTold, AllToOne, Mode, PoisonBudget, poison_aimed
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import ImageSet, Pixels, on_grid, to_pixels


@dataclass(frozen=True, kw_only=True)
class BlendTrigger(AllToOne):
    """``x' = (1 - alpha) x + alpha k``, rounded to the nearest uint8; ``pattern: (3, H, W) float32 in [0, 1]`` is k."""

    pattern: Pixels
    alpha: float

    def stamp(self, x: Pixels) -> Pixels:
        """Blend the pattern into ``x: (N, 3, H, W) float32 in [0, 1]``."""
        key = np.float32(self.alpha)
        return on_grid((1 - key) * x + key * self.pattern)


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Blended(PoisonBudget, AimedByTold[BlendTrigger]):
    """Poisoning with a random pattern blended into the whole image.

    ``poison_rate`` is the share of the whole training set that is blended and relabelled, ``poison_count`` a number of
    images in its place; they are drawn from the other classes (all-to-all: from all), and replace their originals.
    ``pattern_seed`` draws the pattern. That it evades spectral signatures is from the rebuttal of DBD (ICLR 2022), on
    CIFAR-10.
    """

    name: ClassVar[str] = "blended"
    paper: ClassVar[str] = "Chen et al. 2017, arXiv 1712.05526"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("Spectral Signatures",)
    older_than_mode: ClassVar[bool] = True

    alpha: Annotated[float, Field(gt=0, le=1)] = 0.2
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    mode: Mode = "all-to-one"
    target_class: Annotated[int, Field(ge=0)] = 0

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Blend and relabel `poisons` images, then shuffle the whole set.

        Raises:
            DataError: no such target class, or not enough images.
        """
        trigger = self.towards_one(*dataset.images.shape[1:3])
        return poison_aimed(dataset, rng, trigger=trigger, attack=self, count=self.poisons(len(dataset)))

    def towards_one(self, height: int, width: int) -> BlendTrigger:
        """The pattern for images of this size; another size has another pattern, not a scaled one."""
        codes = np.random.default_rng(self.pattern_seed).integers(0, 256, (1, height, width, 3), dtype=np.uint8)
        return BlendTrigger(pattern=to_pixels(codes)[0], alpha=self.alpha, target_class=self.target_class)
