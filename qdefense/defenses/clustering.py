"""Two clusters in the features of one class, and the rules that judge them: plain functions of arrays."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qdefense.defenses.spectra import Matrix, principal_coordinates

Reduction = Literal["ica", "pca"]

SILHOUETTE_ROWS = 10_000
"""More rows than that are sampled for the silhouette, whose cost is their square."""
_MEBIBYTES = 64
"""Of distances held at a time; scikit-learn's own is a gibibyte."""
_SEEDS = 2**32
"""As many as scikit-learn takes."""


class Clusters(NamedTuple):
    """``smaller: (n,) bool``; ``relative_size`` its share in (0, 0.5]; ``silhouette`` in [-1, 1]; ``margin: (n,)``.

    The margin of a sample is how much nearer it is to the centre of the smaller cluster than to that of the larger.
    """

    smaller: NDArray[np.bool_]
    relative_size: float
    silhouette: float
    margin: Matrix


class Reclassified(NamedTuple):
    """How many samples of a cluster a network that never saw it gives their own label, and the most frequent other."""

    own: int
    other: int
    other_class: int


def reduced(features: NDArray[np.floating], dimensions: int, reduction: Reduction) -> Matrix:
    """At most ``dimensions`` coordinates of each sample, as Euclidean distances need them.

    ``pca`` gives the principal coordinates; ``ica`` the same scaled to variance 1. Independent components are a
    rotation of these, which moves no distance and so no k-means and no silhouette: FastICA's search for it is left out.

    Args:
        features: ``(n, D)`` of one class, finite.
        dimensions: fewer come back where the features span fewer.
        reduction: which.

    Returns:
        ``(n, min(dimensions, rank))``.

    Raises:
        FlatFeaturesError: the features do not differ.
    """
    found = principal_coordinates(features)
    kept = found.coordinates[:, :dimensions]
    return kept if reduction == "pca" else kept / np.sqrt(found.variances[:dimensions])


def two_clusters(points: Matrix, *, starts: int, seed: int) -> Clusters:
    """k-means with k = 2 over all samples of a class at once; equal halves count the first found as the smaller.

    Args:
        points: ``(n, d)``, at least two of them different.
        starts: of k-means; the one with the smallest distances to its centres counts.
        seed: of the starts, and of the sample for the silhouette.
    """
    from sklearn.cluster import KMeans  # noqa: PLC0415 (seconds, which no other defense should wait for)

    fitted = KMeans(n_clusters=2, n_init=starts, random_state=seed % _SEEDS).fit(points)
    smaller = fitted.labels_ == np.argmin(np.bincount(fitted.labels_, minlength=2))
    distances = fitted.transform(points)
    near, far = (distances[:, int(fitted.labels_[rows.argmax()])] for rows in (smaller, ~smaller))
    return Clusters(
        smaller=smaller,
        relative_size=float(smaller.mean()),
        silhouette=_silhouette(points, smaller, seed),
        margin=far - near,
    )


def _silhouette(points: Matrix, smaller: NDArray[np.bool_], seed: int) -> float:
    from sklearn import config_context  # noqa: PLC0415
    from sklearn.metrics import silhouette_score  # noqa: PLC0415

    rows = np.random.default_rng(seed).permutation(len(points))[:SILHOUETTE_ROWS]
    rows = np.union1d(rows, np.flatnonzero(smaller)[:2])  # one cluster alone has no silhouette
    with config_context(working_memory=_MEBIBYTES):
        return float(silhouette_score(points[rows], smaller[rows]))


def count_reclassified(answers: NDArray[np.int64], label: int) -> Reclassified:
    """``l`` and ``p`` of exclusionary reclassification, whose score is ``l / p`` (Chen et al. 2018).

    Args:
        answers: ``(m,)``, what the samples of one cluster were classified as, m > 0.
        label: what they are labelled as.
    """
    counts = np.bincount(answers, minlength=label + 1)
    own = int(counts[label])
    counts[label] = -1
    other = int(counts.argmax())
    return Reclassified(own, max(int(counts[other]), 0), other)
