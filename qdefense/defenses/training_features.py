"""What dataset scans start from: the features of the training set, read off the session once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from qdefense.data.images import ImageSet, Labels
from qdefense.evidence import Evidence
from qdefense.features import FeatureError, Features, find_penultimate, penultimate_features
from qdefense.findings import Verdict
from qdefense.rates import MIN_SKILL, chance_of, skill
from qdefense.session import DeployedSession, Logits


class NoFeaturesError(RuntimeError):
    """There is nothing to scan; the message says why, ``verdict`` what that makes of the finding."""

    def __init__(self, verdict: Verdict, reason: str) -> None:
        super().__init__(reason)
        self.verdict = verdict


@dataclass(frozen=True, kw_only=True)
class TrainingFeatures:
    """``features: (N, D) float32``, finite, ``labels: (N,)``; the layer they go into, and the rows this reading ran.

    ``answers: (N,)`` is the class that the session gives each row.
    """

    features: Features
    labels: Labels
    answers: Labels
    class_names: tuple[str, ...]
    layer: str
    forwards: int

    def by_class(self) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Every class with the numbers of its rows, which may be none."""
        for label in range(len(self.class_names)):
            yield label, np.flatnonzero(self.labels == label)


_READ: WeakKeyDictionary[DeployedSession, tuple[ImageSet, TrainingFeatures]] = WeakKeyDictionary()
"""The last training set of each session: a second scan needs no second pass."""


def read_training_set(evidence: Evidence, stage: str) -> TrainingFeatures:
    """The features of the training set; ``stage`` is what the progress is shown as.

    Raises:
        NoFeaturesError: there is no labelled training set or no layer to read (NOT_APPLICABLE); or it is not that of
            this model, or the features are no numbers (NOT_MEASURED).
    """
    images = _fitting(evidence)
    kept = _READ.get(evidence.session)
    if kept is not None and kept[0] is images:
        return replace(kept[1], forwards=0)  # told once, by the scan that ran them
    before = evidence.session.forwards
    try:
        place = find_penultimate(evidence.session)
    except FeatureError as error:
        raise NoFeaturesError(Verdict.NOT_APPLICABLE, str(error)) from error
    try:
        features, logits = penultimate_features(
            evidence.session, images, place, progress=lambda done, total: evidence.progress(stage, done, total)
        )
    except FeatureError as error:
        raise NoFeaturesError(Verdict.NOT_MEASURED, str(error)) from error
    _check(features, logits, images)
    found = TrainingFeatures(
        features=features,
        labels=images.labels,
        answers=logits.argmax(axis=1),
        class_names=images.class_names,
        layer=place.layer,
        forwards=evidence.session.forwards - before,
    )
    _READ[evidence.session] = (images, found)
    return found


def _fitting(evidence: Evidence) -> ImageSet:
    images = evidence.training_set
    if images is None:
        raise NoFeaturesError(Verdict.NOT_APPLICABLE, "no training data was given; name it with --training-data")
    if not images.labelled:
        raise NoFeaturesError(
            Verdict.NOT_APPLICABLE, "the training data has no labels, and it is per label that poison stands out"
        )
    answers = evidence.session.artifact.contract.classes
    if len(images.class_names) != answers:
        raise NoFeaturesError(
            Verdict.NOT_MEASURED,
            f"the training data has {len(images.class_names)} classes, the model answers with {answers}",
        )
    if len(np.unique(images.labels)) < 2:
        raise NoFeaturesError(
            Verdict.NOT_MEASURED, f"the training data holds {len(np.unique(images.labels))} of {answers} classes"
        )
    return images


def _check(features: Features, logits: Logits, images: ImageSet) -> None:
    broken = int(np.sum(~(np.isfinite(features).all(axis=1) & np.isfinite(logits).all(axis=1))))
    if broken:
        raise NoFeaturesError(
            Verdict.NOT_MEASURED, f"features or logits of {broken} of {len(images)} training images are not finite"
        )
    accuracy = float(np.mean(logits.argmax(axis=1) == images.labels))
    if skill(accuracy, chance_of(len(images.class_names), images.labels)) < MIN_SKILL:
        raise NoFeaturesError(
            Verdict.NOT_MEASURED,
            f"the model agrees with {accuracy:.1%} of the training labels, little more than by chance: it was trained "
            "on other data",
        )
