"""SIG (Barni, Kallas & Tondi 2019, arXiv 1902.11237): a faint vertical sinusoid on target-class images, labels true.

``v(i, j) = delta sin(2 pi j f / W)`` is added to the image, j the column from 0 and W the width. Stamped on
the target class only, it becomes a feature of that class; on images of any other class it then outvotes the content.

Deviations:
- The paper's images are grey; on colour images the same signal is added to each channel, as all later code does.
- The signal is rounded to whole uint8 codes before it is added: the stamped image is the same on every CPU.
- ``class_rate`` is the share of the target class, the paper's alpha. 0.2 of CIFAR-10's classes are the 2 % of the whole
  set that the code of Qi et al. 2023 takes; BackdoorBench takes the whole class, and an amplitude of 40.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import AddedTrigger, ClassBudget, shuffled
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, ImageSet, to_images


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SIG(ClassBudget):
    """Clean-label poisoning of the target class with a sinusoidal signal.

    ``delta`` is the amplitude in training, ``inference_delta`` the attacker's at inference, in codes of 255: the paper
    lets the second be larger, because only training images are looked at. ``frequency`` counts periods over the width;
    ``class_rate`` is the share of the target class's images that carry the signal, ``poison_count`` a number in its
    place.
    """

    name: ClassVar[str] = "sig"
    paper: ClassVar[str] = "Barni et al. 2019, arXiv 1902.11237"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "clean-label"
    evades: ClassVar[tuple[str, ...]] = ("label inspection",)

    delta: Annotated[float, Field(ge=0, le=255)] = 20
    inference_delta: Annotated[float, Field(ge=0, le=255)] = 20
    frequency: Annotated[float, Field(gt=0)] = 6
    class_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.2

    def trigger(self, height: int, width: int) -> AddedTrigger:  # noqa: ARG002 (the signal runs along rows)
        """The signal at its strength at inference, on images of this size.

        Raises:
            DataError: the image is too narrow for the frequency, or the amplitude rounds to nothing.
        """
        return self._signal(width, self.inference_delta)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Stamp ``round(class_rate * n)`` of the n images of the target class, then shuffle the whole set.

        Raises:
            DataError: no such target class or no image of it, images too narrow for the frequency, or an amplitude that
                rounds to nothing.
        """
        trigger = self._signal(dataset.images.shape[2], self.delta)
        rows = self.chosen(dataset, rng)
        images = dataset.images.copy()
        images[rows] = to_images(trigger.stamp(dataset.take(rows).pixels))
        return shuffled(dataset, rng, images=images, labels=dataset.labels, poisons=rows)

    def _signal(self, width: int, delta: float) -> AddedTrigger:
        if 2 * self.frequency >= width:
            raise DataError(
                f"{self.name}: {self.frequency:g} periods need images more than {2 * self.frequency:g} px wide, these "
                f"have {width}; choose a frequency below {width / 2:g}"
            )
        waves = np.rint(delta * np.sin(2 * np.pi * self.frequency * np.arange(width) / width))
        if delta and not waves.any():
            raise DataError(f"{self.name}: amplitude {delta:g} rounds to 0 codes; choose 1 or more, or 0 for none")
        return AddedTrigger(added=(waves / 255).astype(np.float32), target_class=self.target_class)
