"""Hidden trigger (Saha, Subramanya & Pirsiavash, AAAI 2020, arXiv 1910.00033): no poison shows the patch.

A poison z is an image t of the target class that is moved, within eps, to where a stamped image s of the source class
lies in the feature space of the attacker's network: ``min |f(z) - f(stamped s)|^2`` under ``|z - t|_inf <= eps``.
Poisons and stamped images are paired one to one in each step, anew (algorithm 1). At inference the patch is stamped on
images of the source class.

The paper's victim fine-tunes the last layers of the very network that the attacker used. A victim trained from scratch,
as `qdefense train` does, has other features: expect little of the attack there, and read it as a transfer result.

Deviations:
- The attacker's network is a small one trained on the same set; the paper's is an AlexNet trained on ImageNet.
- Steps follow the sign of the gradient: the paper's rate of 0.01 of the range belongs to the scale of AlexNet's
  features. The size is the same, and halved after each fifth of the steps (each 1,000 of the authors' 5,000). Their
  early stop at a distance of 10 depends on that scale too, and is left out.
- Pairs are the best assignment, the paper's a greedy one.
- The patch has one place, near the bottom right corner as in the authors' code without random places: a trigger is a
  function of the image here.
- ``size``: 8 of 32 pixels, a quarter of the side; the authors' configuration has 30 of 224.
- ``class_rate``: the authors' 400 poisons are about 0.3 of an ImageNet class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from pydantic import ConfigDict, Field, model_validator
from pydantic.dataclasses import dataclass as settings
from torch import Tensor

from qdefense.attacks.badnets import PatchTrigger, require_room
from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import ClassBudget, OneToOne, rows_of, shuffled
from qdefense.attacks.registered import ATTACKS
from qdefense.attacks.surrogate import Surrogate, one_thread, perturb, train_surrogate
from qdefense.data.images import ImageSet, Pixels, to_images, to_pixels

_BATCH = 100
_COLOURS = 4


@dataclass(frozen=True, kw_only=True)
class SourcePatchTrigger(OneToOne, PatchTrigger):
    """A patch that is meant for images of the source class."""


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class HiddenTrigger(ClassBudget):
    """Clean-label, source-specific poisoning by feature collision.

    ``class_rate`` is the share of the target class's images that are moved, ``poison_count`` a number in its place;
    ``eps`` and ``step_size`` are in codes of 255; the patch is ``size`` pixels of 4x4 random colours, drawn by
    ``pattern_seed`` and scaled up, ``margin`` pixels from the bottom and right border; ``surrogate_epochs`` trains the
    attacker's network.
    """

    name: ClassVar[str] = "htba"
    paper: ClassVar[str] = "Saha et al. 2020, AAAI, arXiv 1910.00033"
    needs: ClassVar[tuple[str, ...]] = ("training set", "surrogate", "victim that fine-tunes it")
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "clean-label"
    source_specific: ClassVar[bool] = True
    evades: ClassVar[tuple[str, ...]] = ("label inspection", "visual inspection", "Spectral Signatures")

    eps: Annotated[int, Field(ge=0, le=255)] = 16
    step_size: Annotated[float, Field(gt=0, le=255)] = 2.55
    steps: Annotated[int, Field(ge=0)] = 5000
    size: Annotated[int, Field(ge=1)] = 8
    margin: Annotated[int, Field(ge=0)] = 1
    pattern_seed: Annotated[int, Field(ge=0)] = 0
    source_class: Annotated[int, Field(ge=0)] = 1
    class_rate: Annotated[float, Field(ge=0, le=1)] | None = 0.3
    surrogate_epochs: Annotated[int, Field(ge=1)] = 10

    @model_validator(mode="after")
    def _two_classes(self) -> Self:
        if self.source_class == self.target_class:
            raise ValueError(f"class {self.source_class} is source and target; choose another source_class")
        return self

    def trigger(self, height: int, width: int) -> SourcePatchTrigger:
        """The patch on images of this size.

        Raises:
            DataError: the patch does not fit.
        """
        require_room(height, width, size=self.size, margin=self.margin, attack=self.name)
        return SourcePatchTrigger(
            patch=self._patch(),
            top=height - self.size - self.margin,
            left=width - self.size - self.margin,
            source_class=self.source_class,
            target_class=self.target_class,
        )

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Move ``round(class_rate * n)`` of the n images of the target class, then shuffle the whole set.

        Raises:
            DataError: no such source or target class, no image of one, or the patch does not fit.
        """
        trigger = self.trigger(*dataset.images.shape[1:3])
        sources = rows_of(dataset, self.source_class, role="source", attack=self.name)
        rows = self.chosen(dataset, rng)
        images = dataset.images.copy()
        if len(rows):
            # A stream of its own: another number of poisons is made on the same network.
            surrogate = train_surrogate(dataset, rng.spawn(1)[0], epochs=self.surrogate_epochs)
            for start in range(0, len(rows), _BATCH):
                part = rows[start : start + _BATCH]
                chosen = rng.choice(sources, size=len(part), replace=len(part) > len(sources))
                stamped = trigger.stamp(dataset.take(chosen).pixels)
                images[part] = to_images(self._collided(dataset.take(part), stamped, surrogate))
        return shuffled(dataset, rng, images=images, labels=dataset.labels, poisons=rows)

    def _collided(self, images: ImageSet, stamped: Pixels, surrogate: Surrogate) -> Pixels:
        from scipy.optimize import linear_sum_assignment  # noqa: PLC0415 (a second, which no other attack should wait for)

        with one_thread():
            goals = surrogate.features(torch.from_numpy(stamped))

        def distance(x: Tensor) -> Tensor:
            features = surrogate.features(x)
            _, nearest = linear_sum_assignment(torch.cdist(features, goals).detach().square().numpy())
            return (features - goals[torch.from_numpy(nearest)]).square().sum()

        sizes = [self.step_size * 0.5 ** (5 * step // self.steps) for step in range(self.steps)]
        return perturb(images, distance, eps=self.eps, step_sizes=sizes)

    def _patch(self) -> Pixels:
        colours = np.random.default_rng(self.pattern_seed).integers(0, 256, (_COLOURS, _COLOURS, 3), dtype=np.uint8)
        scaled = Image.fromarray(colours).resize((self.size, self.size), Image.Resampling.BILINEAR)
        patch: Pixels = to_pixels(np.asarray(scaled)[None])[0]
        return patch
