"""Principal directions of the features of one class: plain functions of arrays."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

SMALLEST_SPREAD = 1e-6
"""Of the largest feature: features are float32, and what spreads less than this is its rounding."""


class FlatFeaturesError(ValueError):
    """The features of a class do not differ, so that it has no direction of largest variance."""


class Principal(NamedTuple):
    """Coordinates along the principal directions that are more than rounding, largest variance first.

    ``coordinates: (n, r)``, of mean 0; ``variances: (r,)``, each column's; ``total`` that of all directions together.
    """

    coordinates: Matrix
    variances: Matrix
    total: float


class Spectral(NamedTuple):
    """``scores: (n,)`` of the samples, their mean, which is the top variance, and its share of the total variance."""

    scores: Matrix
    top_variance: float
    top_share: float


def principal_coordinates(features: NDArray[np.floating]) -> Principal:
    """Singular value decomposition of centred features: ``X - mean = U S V'``, coordinates ``U S``.

    Args:
        features: ``(n, D)``, finite.

    Raises:
        FlatFeaturesError: no direction spreads more than a millionth of the largest feature.
    """
    values = features.astype(np.float64)
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    variances = singular**2 / len(values)
    kept = np.sqrt(variances) > SMALLEST_SPREAD * np.abs(values).max(initial=0)
    if not kept.any():
        raise FlatFeaturesError(f"the features of its {len(values)} images do not differ")
    return Principal(left[:, kept] * singular[kept], variances[kept], float(variances.sum()))


def spectral_scores(features: NDArray[np.floating]) -> Spectral:
    """Squared projection of each centred sample on the top right singular vector (Tran et al. 2018, algorithm 1).

    ``score_i = ((x_i - mean) . v)^2``: it does not depend on the sign of ``v`` nor on a rotation of the features.

    Args:
        features: ``(n, D)`` of one class, finite.

    Raises:
        FlatFeaturesError: the features do not differ.
    """
    found = principal_coordinates(features)
    top = float(found.variances[0])
    return Spectral(found.coordinates[:, 0] ** 2, top, top / found.total)


def removed_rows(scores: Matrix, share: float) -> NDArray[np.int64]:
    """The ``ceil(share * n)`` rows with the highest scores, highest first; of equal scores the earlier row.

    Args:
        scores: ``(n,)``.
        share: in (0, 1]; the paper's is 1.5 times the expected share of poison.
    """
    count = math.ceil(round(share * len(scores), 9))  # 0.15 * 20 is a little more than 3
    return np.argsort(-scores, kind="stable")[:count].astype(np.int64)
