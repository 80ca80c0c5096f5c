"""What a quantization costs: clean accuracy of the FP32 and of the quantized file, each in its deployed session."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdefense.artifact import Artifact
from qdefense.data.images import ImageSet
from qdefense.rates import MIN_SKILL, skill
from qdefense.session import DeployedSession, profile_for


class NotMeasuredError(ValueError):
    """The clean accuracy cannot be measured, or says nothing; the message says why."""


@dataclass(frozen=True, kw_only=True)
class AccuracyDrop:
    """Clean accuracy before and after, in [0, 1], on the same images."""

    before: float
    after: float
    images: int

    @property
    def points(self) -> float:
        """Percentage points lost; below 0 where the quantized file is right more often."""
        return 100 * (self.before - self.after)


def accuracy_drop(before: Artifact, after: Artifact, clean: ImageSet) -> AccuracyDrop:
    """Measure both files on images whose labels are numbered as their classes.

    Raises:
        NotMeasuredError: there are no images or labels, a label is not one class, or the FP32 file guesses.
        SessionError: ONNX Runtime cannot load or run a file.
    """
    if not clean.labelled or not len(clean):
        raise NotMeasuredError(f"{clean.source}: there are no labelled images; give some with --calibration")
    if before.contract.head == "sigmoid":
        raise NotMeasuredError("the file is multi-label (a sigmoid per class), and accuracy is for single-label ones")
    first = clean_accuracy(before, clean)
    if skill(first, before.contract.classes) < MIN_SKILL:
        raise NotMeasuredError(
            f"the FP32 file is right on {first:.1%} of {len(clean)} images, near chance "
            f"({1 / before.contract.classes:.1%}), so that a drop could not be seen: wrong labels, order or pixels?"
        )
    return AccuracyDrop(before=first, after=clean_accuracy(after, clean), images=len(clean))


def clean_accuracy(artifact: Artifact, clean: ImageSet) -> float:
    """Share of the images whose largest logit is their label's, in the deployed session; a NaN is no answer."""
    logits = DeployedSession(artifact, profile_for(artifact)).logits_of(clean)
    right = (logits.argmax(axis=1) == clean.labels) & ~np.isnan(logits).any(axis=1)
    return float(right.mean())
