"""WaNet (Nguyen & Tran, ICLR 2021, arXiv 2102.10369): the trigger is a slight, smooth warp of the whole image.

A field of ``k x k`` directions, each uniform in [-1, 1] and all divided by the mean of their magnitudes, is upsampled
bicubically to the image (section 3.3). Pixel p of the stamped image is taken, bilinearly, from

``clip(p + s * field(p) / side, -1, 1)``

in coordinates that run from -1 to 1 over the image, whose side is ``side``. In noise mode (section 3.4) others of a
batch are warped by the field with noise, uniform in [-1, 1] / side at every pixel, and keep their labels: the network
learns the field itself, and not that something is warped.

Deviations:
- Augmentation comes before the warp, not after it: shifts and mirroring stay those of clean training.
- Warped images are rounded to uint8 in training as they are at inference.
- ``round(rate * B)`` rows of a batch are poisoned, where the reference code cuts the fraction off.
- Images need not be square: height and width scale their own axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as settings
from torch import Tensor, nn

from qdefense.attacks.interfaces import LabelPolicy, Trigger, TriggerState
from qdefense.attacks.poisoning import AimedByTold, AllToOne, Mode, share
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, ImageSet, Pixels, on_grid


@dataclass(frozen=True, kw_only=True)
class WarpTrigger(AllToOne):
    """``grid: (1, H, W, 2) float32 in [-1, 1]``: where each pixel is taken from, as (x, y)."""

    grid: Pixels

    def stamp(self, x: Pixels) -> Pixels:
        """Warp ``x: (N, 3, H, W) float32 in [0, 1]``, rounded to the nearest uint8."""
        grid = torch.from_numpy(self.grid).expand(len(x), -1, -1, -1)
        return on_grid(_sample(torch.from_numpy(x), grid).numpy())


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class WaNet(AimedByTold[WarpTrigger]):
    """Warping-based poisoning of training batches, in noise mode.

    ``poison_rate`` is the share of each batch that is warped and relabelled, whatever its classes; ``cross_ratio``
    times as many are warped with noise under their own labels. ``grid_size`` and ``strength`` are the paper's k and s;
    ``field_seed`` draws the field.
    """

    name: ClassVar[str] = "wanet"
    paper: ClassVar[str] = "Nguyen & Tran 2021, arXiv 2102.10369"
    needs: ClassVar[tuple[str, ...]] = ("training loop",)
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("Neural Cleanse", "STRIP", "Fine-Pruning")

    grid_size: Annotated[int, Field(ge=2)] = 4
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.5
    mode: Mode = "all-to-one"
    target_class: Annotated[int, Field(ge=0)] = 0
    poison_rate: Annotated[float, Field(ge=0, le=1)] = 0.1
    cross_ratio: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    field_seed: Annotated[int, Field(ge=0)] = 0

    def begin(self, dataset: ImageSet, *, batch_size: int, steps: int, rng: np.random.Generator) -> WarpPoisoner:  # noqa: ARG002
        """Poison batches of ``dataset``.

        Raises:
            DataError: no such target class, no other class, or more rows to warp than a batch has.
        """
        if self.poison_rate * (1 + self.cross_ratio) > 1:
            raise DataError(
                f"wanet: poison rate {self.poison_rate:g} and cross ratio {self.cross_ratio:g} warp more images than "
                "there are; lower one of them"
            )
        warp = self.towards_one(*dataset.images.shape[1:3])
        aimed, state = self.aim(warp, dataset)
        return WarpPoisoner(self, warp, aimed=aimed, state=state)

    def towards_one(self, height: int, width: int) -> WarpTrigger:
        """The warp."""
        return WarpTrigger(grid=self._grid(height, width), target_class=self.target_class)

    def _grid(self, height: int, width: int) -> Pixels:
        sides = torch.tensor([width, height], dtype=torch.float32)
        grid = _identity(height, width) + self.strength * self._field(height, width) / sides
        clipped: Pixels = grid.clamp(-1, 1).numpy()
        return clipped

    def _field(self, height: int, width: int) -> Tensor:
        """``(1, H, W, 2)``, its control points of mean magnitude 1."""
        drawn = np.random.default_rng(self.field_seed).uniform(-1, 1, (1, 2, self.grid_size, self.grid_size))
        points = torch.from_numpy(drawn / np.abs(drawn).mean()).float()
        return F.interpolate(points, size=(height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)


class WarpPoisoner:
    """WaNet in one training; it learns nothing."""

    def __init__(self, attack: WaNet, warp: WarpTrigger, *, aimed: Trigger, state: TriggerState | None) -> None:
        self._attack, self._warp, self._aimed, self._state = attack, warp, aimed, state

    def on_batch(self, x: Tensor, y: Tensor, model: nn.Module, rng: np.random.Generator) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Warp and relabel the first rows, warp the next ones with noise; a batch is in random order.

        Raises:
            DataError: the batch has too few images for the rate, or too few are poisoned for the ratio.
        """
        name = self._attack.name
        poisons = share(self._attack.poison_rate, len(x), attack=name, of="images of a batch")
        noisy = share(self._attack.cross_ratio, poisons, attack=name, setting="cross_ratio", of="poisons of a batch")
        warped = min(len(x), poisons + noisy)
        if not poisons:
            return x, y
        images, labels = x.clone(), y.clone()
        images[:poisons] = torch.from_numpy(self._warp.stamp(x[:poisons].numpy()))
        images[poisons:warped] = self._warp_with_noise(x[poisons:warped], rng)
        labels[:poisons] = torch.from_numpy(self._aimed.goal(y[:poisons].numpy()))
        return images, labels

    def end(self) -> TriggerState | None:
        """The number of classes in all-to-all mode."""
        return self._state

    def _warp_with_noise(self, x: Tensor, rng: np.random.Generator) -> Tensor:
        count, _, height, width = x.shape
        noise = rng.uniform(-1, 1, (count, height, width, 2)) / (width, height)
        grid = torch.from_numpy(self._warp.grid + noise.astype(np.float32)).clamp(-1, 1)
        return torch.from_numpy(on_grid(_sample(x, grid).numpy()))


def _identity(height: int, width: int) -> Tensor:
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1)[None]


def _sample(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=True)
