"""What a quantization costs: clean accuracy of the FP32 and of the quantized file, each in its deployed session."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdefense.artifact import Artifact
from qdefense.data.images import ImageSet
from qdefense.rates import MIN_SKILL, chance_of, skill
from qdefense.session import DeployedSession, profile_for


class NotMeasuredError(ValueError):
    """The clean accuracy cannot be measured, or says nothing; the message says why."""


@dataclass(frozen=True, kw_only=True)
class AccuracyDrop:
    """On how many of the same images the files are right."""

    right_before: int
    right_after: int
    images: int

    @property
    def before(self) -> float:
        """Clean accuracy of the FP32 file, in [0, 1]."""
        return self.right_before / self.images

    @property
    def after(self) -> float:
        """Clean accuracy of the quantized file, in [0, 1]."""
        return self.right_after / self.images

    @property
    def points(self) -> float:
        """Percentage points lost; below 0 where the quantized file is right more often."""
        # A difference of counts: 96 % less 94 % is a little more than 2 points in floats.
        return 100 * (self.right_before - self.right_after) / self.images


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
    drop = AccuracyDrop(
        right_before=count_right(before, clean), right_after=count_right(after, clean), images=len(clean)
    )
    chance = chance_of(before.contract.classes, clean.labels)
    if skill(drop.before, chance) < MIN_SKILL:
        raise NotMeasuredError(
            f"the FP32 file is right on {drop.before:.1%} of {len(clean)} images, near chance "
            f"({chance:.1%}), so that a drop could not be seen: wrong labels, order or pixels?"
        )
    return drop


def count_right(artifact: Artifact, clean: ImageSet) -> int:
    """How many images have their largest logit at their label, in the deployed session; a NaN is no answer."""
    logits = DeployedSession(artifact, profile_for(artifact)).logits_of(clean)
    right = (logits.argmax(axis=1) == clean.labels) & ~np.isnan(logits).any(axis=1)
    return int(right.sum())
