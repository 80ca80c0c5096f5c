"""Networks that tests train on poisoned images in seconds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray

from qdefense.attacks.interfaces import BatchAttack, DataAttack
from qdefense.data.images import ImageSet, Pixels
from qdefense.models import Recipe
from qdefense.training import TrainingResult, train


def train_victim(images: ImageSet, attack: DataAttack | BatchAttack, *, epochs: int) -> TrainingResult:
    """A narrow ResNet-8 with seed 0 on one thread."""
    recipe = Recipe(epochs=epochs, batch_size=64, shift=0)
    return train(images, architecture="resnet8", recipe=recipe, attack=attack, seed=0, threads=1, width=8)


def logits_of(result: TrainingResult) -> Callable[[Pixels], NDArray[np.float32]]:
    """Its answers, as an evaluator asks for them."""

    def logits(x: Pixels) -> NDArray[np.float32]:
        with torch.no_grad():
            return result.module(torch.from_numpy(x)).numpy()  # type: ignore[no-any-return]

    return logits
