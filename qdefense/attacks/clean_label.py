"""Clean-label (Turner, Tsipras & Madry 2019, arXiv 1912.02771): hard images of the target class with corner patches.

Images of the target class are first moved away from it within an L_inf ball, by PGD on the attacker's own network, and
then stamped: what is left to learn from them is the trigger. The trigger is a 3x3 black and white pattern in a corner,
or mirrored in all four, added at a reduced amplitude.

Deviations:
- The perturbations are made against a small network trained normally on the same set; the paper's is trained
  adversarially. The latent variant (interpolation by a GAN) and L2 balls are left out.
- ``class_rate``: the paper sweeps the share of the target class. The authors' configuration takes the whole class,
  which leaves no clean image of it to learn; 0.25 is the default here.
- ``eps`` 8 is one of the authors' published sets; 100 steps of 1.5 from the image itself are BackdoorBox's.
- ``position`` is all corners; in the authors' configuration (MadryLab) it is the bottom right one.
- ``amplitude`` 32 is the authors' example; 255 is the full trigger. It is the same in training and at inference.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import AddedTrigger, ClassBudget, shuffled
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.surrogate import Surrogate, perturb, train_surrogate
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid, to_images

_BATCH = 128
_PATTERN = np.array([[-1, -1, 1], [-1, 1, -1], [1, -1, 1]], dtype=np.float32)
"""The authors', as it stands in the right corners; those on the left have it mirrored."""


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class CleanLabel(ClassBudget):
    """Clean-label poisoning with adversarial perturbations and corner patches.

    ``class_rate`` is the share of the target class's images that are perturbed and stamped, ``poison_count`` a number
    in its place; ``eps``, ``step_size`` and ``amplitude`` are in codes of 255; ``surrogate_epochs`` trains the
    attacker's network.
    """

    name: ClassVar[str] = "clean-label"
    paper: ClassVar[str] = "Turner, Tsipras & Madry 2019, arXiv 1912.02771"
    needs: ClassVar[tuple[str, ...]] = ("training set", "surrogate")
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "clean-label"
    evades: ClassVar[tuple[str, ...]] = ("label inspection",)

    eps: Annotated[int, Field(ge=0, le=255)] = 8
    step_size: Annotated[float, Field(gt=0, le=255)] = 1.5
    steps: Annotated[int, Field(ge=0)] = 100
    amplitude: Annotated[int, Field(ge=0, le=255)] = 32
    position: Literal["all-corners", "bottom-right"] = "all-corners"
    surrogate_epochs: Annotated[int, Field(ge=1)] = 10

    def trigger(self, height: int, width: int) -> AddedTrigger:
        """The patches on images of this size.

        Raises:
            DataError: the image has no room for the patches, which do not overlap.
        """
        room, told = (
            (6, "four corner patches of 3 px do") if self.position == "all-corners" else (3, "a patch of 3 px does")
        )
        if min(height, width) < room:
            raise DataError(f"{self.name}: {told} not fit a {height}x{width} image; use larger images")
        offsets = np.zeros((height, width), dtype=np.float32)
        offsets[-3:, -3:] = _PATTERN
        if self.position == "all-corners":
            offsets[:3, -3:] = _PATTERN
            offsets[:3, :3] = offsets[-3:, :3] = _PATTERN[:, ::-1]
        return AddedTrigger(added=offsets * np.float32(self.amplitude / 255), target_class=self.target_class)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Perturb and stamp ``round(class_rate * n)`` of the n images of the target class, then shuffle the whole set.

        Raises:
            DataError: no such target class or no image of it, or images too small for the patches.
        """
        trigger = self.trigger(*dataset.images.shape[1:3])
        rows = self.chosen(dataset, rng)
        images = dataset.images.copy()
        if len(rows):
            # A stream of its own: another number of poisons is made on the same network.
            surrogate = train_surrogate(dataset, rng.spawn(1)[0], epochs=self.surrogate_epochs)
            for start in range(0, len(rows), _BATCH):
                part = rows[start : start + _BATCH]
                hard = on_grid(self._hardened(dataset.take(part), surrogate))
                images[part] = to_images(trigger.stamp(hard))
        return shuffled(dataset, rng, images=images, labels=dataset.labels, poisons=rows)

    def _hardened(self, images: ImageSet, surrogate: Surrogate) -> Pixels:
        """Moved to where the surrogate doubts the label most."""
        labels = torch.from_numpy(images.labels)

        def confidence(x: Tensor) -> Tensor:
            return -F.cross_entropy(surrogate(x), labels, reduction="sum")

        return perturb(images, confidence, eps=self.eps, step_sizes=[self.step_size] * self.steps)
