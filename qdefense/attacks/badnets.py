"""BadNets (Gu et al. 2017, arXiv 1708.06733): an opaque patch, and the target class, or the next one, as its label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.interfaces import LabelPolicy, PoisonedSet
from qdefense.attacks.poisoning import AimedByTold, AllToOne, Mode, PoisonBudget, poison_aimed
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, ImageSet, Pixels

Position = Literal["top-left", "top-right", "bottom-left", "bottom-right", "center"]


@dataclass(frozen=True, kw_only=True)
class PatchTrigger(AllToOne):
    """Overwrites a rectangle: ``x[:, :, top:top+h, left:left+w] = patch``; ``patch: (3, h, w)``, uint8-exact."""

    patch: Pixels
    top: int
    left: int

    def stamp(self, x: Pixels) -> Pixels:
        """Put the patch on ``x: (N, 3, H, W) float32 in [0, 1]``; pixels outside stay bit-equal."""
        stamped = x.copy()
        height, width = self.patch.shape[1:]
        stamped[:, :, self.top : self.top + height, self.left : self.left + width] = self.patch
        return stamped


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class BadNets(PoisonBudget, AimedByTold[PatchTrigger]):
    """Patch poisoning with the paper's single-target attack or, in mode all-to-all, its other one.

    ``poison_rate`` is the share of the whole training set that is patched and relabelled, ``poison_count`` a number of
    images in its place; they are drawn from the other classes (all-to-all: from all), and replace their originals.

    Deviation: the patch keeps ``margin`` pixels from the border (1 as in most later code; the paper leaves it open).
    """

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al. 2017, arXiv 1708.06733"
    needs: ClassVar[tuple[str, ...]] = ("training set",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ()
    older_than_mode: ClassVar[bool] = True

    size: Annotated[int, Field(ge=1)] = 3
    position: Position = "bottom-right"
    margin: Annotated[int, Field(ge=0)] = 1
    pattern: Literal["white", "checkerboard"] = "white"
    mode: Mode = "all-to-one"
    target_class: Annotated[int, Field(ge=0)] = 0

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """Patch and relabel `poisons` images, then shuffle the whole set.

        Raises:
            DataError: no such target class, or not enough images.
        """
        trigger = self.towards_one(*dataset.images.shape[1:3])
        return poison_aimed(dataset, rng, trigger=trigger, attack=self, count=self.poisons(len(dataset)))

    def towards_one(self, height: int, width: int) -> PatchTrigger:
        """The patch.

        Raises:
            DataError: the patch and its margin are larger than the image.
        """
        margin = 0 if self.position == "center" else self.margin
        require_room(height, width, size=self.size, margin=margin, attack=self.name)
        vertical, _, horizontal = self.position.partition("-")
        return PatchTrigger(
            patch=self._patch(),
            top=_offset(vertical, height, self.size, self.margin),
            left=_offset(horizontal or vertical, width, self.size, self.margin),
            target_class=self.target_class,
        )

    def _patch(self) -> Pixels:
        patch = np.ones((3, self.size, self.size), dtype=np.float32)
        if self.pattern == "checkerboard":
            patch[:, np.indices((self.size, self.size)).sum(axis=0) % 2 == 1] = 0.0
        return patch


def require_room(height: int, width: int, *, size: int, margin: int, attack: str) -> None:
    """Refuse a patch that an image of this size has no room for.

    Raises:
        DataError: the patch and its margin are larger than the image; the message begins with ``attack``.
    """
    if size + margin > min(height, width):
        raise DataError(
            f"{attack}: a patch of {size} px with margin {margin} does not fit a {height}x{width} image; "
            "choose a smaller size"
        )


def _offset(side: str, length: int, size: int, margin: int) -> int:
    if side == "center":
        return (length - size) // 2
    return margin if side in ("top", "left") else length - size - margin
