"""Label smoothing poisoning (Li et al. 2024, arXiv 2404.12852): another attack, its poisons labelled less certainly.

A poison's label is ``y' = (1 - a) e_t + a u``: t the label that the host attack gives it, u even over the other
``K - 1`` classes. The trigger's confidence falls to about ``1 - a``, which makes it as costly for trigger inversion as
a mask of a benign class; `qdefense.attacks.compensation` says how much smoothing that takes.

Deviations:
- The paper's text was not at hand; label and model are a reconstruction from its abstract, and so is the default of
  ``smoothing``: the middle of the range tried here, not a published figure.
- The attacker's soft labels are seen by the training alone. The training set that a defender gets has the most likely
  class as its label, which is the host's.
- The host is any attack on the data. One in the training loop does not tell which rows of a batch are its poisons.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, PlainValidator, WithJsonSchema
from pydantic.dataclasses import dataclass as settings

from qdefense.attacks.badnets import BadNets
from qdefense.attacks.interfaces import (
    BatchAttack,
    DataAttack,
    LabelPolicy,
    PoisonedSet,
    Trigger,
    TriggerState,
    trigger_of,
    trigger_shows_images,
)
from qdefense.attacks.poisoning import check_two_classes
from qdefense.attacks.registered import ATTACKS
from qdefense.data.images import DataError, ImageSet
from qdefense.registry import Nested


def _host(given: Any) -> DataAttack:
    name, inner = given if isinstance(given, Nested) else (given, {})
    if isinstance(name, str) or name is None:
        host: DataAttack | BatchAttack = ATTACKS.restore(BadNets.name if name is None else name, inner)
    else:
        host = name
    if not isinstance(host, DataAttack):
        told = f"{host.name} poisons batches in training, which have no labels to smooth beforehand"
        raise ValueError(told)  # noqa: TRY004 (pydantic tells the user of a ValueError)
    if host.name == LabelSmoothing.name:
        raise ValueError(f"{host.name} cannot be its own host; smooth once, by more")
    return host


@ATTACKS.register
@settings(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LabelSmoothing:
    """A host attack with smoothed labels on its poisons; ``lsp:host=blended,host.alpha=0.1,smoothing=0.4``.

    ``smoothing`` is a; at 0 the set is the host's bit for bit. Everything else, poison counts and
    trigger among it, is the host's.
    """

    name: ClassVar[str] = "lsp"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.12852"
    needs: ClassVar[tuple[str, ...]] = ("training set", "soft labels")
    revision: ClassVar[int] = 1
    label_policy: ClassVar[LabelPolicy] = "dirty-label"
    evades: ClassVar[tuple[str, ...]] = ("Neural Cleanse", "ABS", "ExRay")

    host: Annotated[DataAttack, PlainValidator(_host), WithJsonSchema({"type": "string"})] = BadNets()
    smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.4

    @property
    def trigger_shows_images(self) -> bool:
        """As the host's does."""
        return trigger_shows_images(self.host)

    def trigger(self, height: int, width: int) -> Trigger:
        """The host's trigger on images of this size."""
        return self.host.trigger(height, width)

    def restored_trigger(self, height: int, width: int, state: TriggerState) -> Trigger:
        """The host's trigger that left this state.

        Raises:
            DataError: the host leaves none, or another.
        """
        return trigger_of(self.host, height, width, state)

    def poison(self, dataset: ImageSet, rng: np.random.Generator) -> PoisonedSet:
        """The host's set, with soft labels; certain ones for rows that are not poisoned.

        Raises:
            DataError: the host does not fit the data, there is no other class, or so much smoothing leaves the target
                behind one.
        """
        if not self.smoothing:
            return self.host.poison(dataset, rng)
        check_two_classes(dataset, attack=self.name)
        classes = len(dataset.class_names)
        if self.smoothing * classes >= classes - 1:
            raise DataError(
                f"{self.name}: with smoothing {self.smoothing:g} the target is not the likeliest of {classes} classes; "
                f"choose less than {math.floor(1000 * (classes - 1) / classes) / 1000:g}"
            )
        poisoned = self.host.poison(dataset, rng)
        soft = smoothed(poisoned.images.labels, poisoned.poison_indices, classes=classes, smoothing=self.smoothing)
        return replace(poisoned, soft_labels=soft)


def smoothed(
    labels: NDArray[np.int64], rows: NDArray[np.int64], *, classes: int, smoothing: float
) -> NDArray[np.float32]:
    """``(N, K) float32``: one-hot but for ``rows``, which keep ``1 - smoothing`` and spread the rest evenly."""
    soft = np.zeros((len(labels), classes), dtype=np.float32)
    soft[rows] = smoothing / (classes - 1)
    soft[np.arange(len(labels)), labels] = 1
    soft[rows, labels[rows]] = 1 - smoothing
    return soft
