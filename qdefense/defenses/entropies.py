"""Entropies of perturbed predictions and the normal fit to them: plain functions of arrays."""

from __future__ import annotations

from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

MIN_SPREAD = 1e-6
"""Bits; a standard deviation below it is rounding of float32 logits, not a difference between images."""


def mean_entropies(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Shannon entropy in bits, averaged over the perturbed copies of each image.

    ``H = -(1/N) sum_n sum_c p_nc log2 p_nc`` with ``p_n = softmax(logits_n)``. ``logits: (images, N, K)``, which
    log-probabilities are, too; ``(images,) float64 in [0, log2 K]``. A logit of ``-inf`` is a probability of 0; NaN,
    ``+inf`` or nothing but ``-inf`` in any copy makes the image's entropy NaN.
    """
    values = logits.astype(np.float64)
    top = values.max(axis=2, keepdims=True)
    defined = np.isfinite(top)
    shifted = np.where(defined, values - np.where(defined, top, 0.0), np.nan)
    shares = np.exp(shifted)
    total = shares.sum(axis=2)
    # p log p with p = e^s / S is (e^s / S) (s - log S), and 0 where p is 0.
    weighted = (shares * np.where(shares == 0, 0.0, shifted)).sum(axis=2)
    bits = (np.log(total) - weighted / total) / np.log(2)
    mean: NDArray[np.float64] = np.minimum(bits, np.log2(logits.shape[2])).mean(axis=1)
    return mean


def normal_boundary(entropies: NDArray[np.float64], rate: float) -> tuple[float, float, float]:
    """Quantile, mean and standard deviation of the normal distribution fitted to ``entropies: (n,)``.

    ``boundary = mean + sd * ppf(rate)``, with the maximum-likelihood ``sd`` (divided by n), as ``scipy.stats.norm.fit``
    has it. It may lie below 0, where no entropy is.

    Raises:
        ValueError: an entropy is not finite, there are fewer than 2, or they do not differ.
    """
    if len(entropies) < 2 or not np.isfinite(entropies).all():
        raise ValueError(f"no normal fit: expected 2 finite entropies or more, of {len(entropies)} not all are finite")
    mean, sd = float(entropies.mean()), float(entropies.std())
    if sd < MIN_SPREAD:
        raise ValueError(f"the entropies of the {len(entropies)} images do not differ (all {mean:.3g} bits)")
    return mean + sd * NormalDist().inv_cdf(rate), mean, sd
