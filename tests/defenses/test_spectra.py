from __future__ import annotations

import numpy as np
import pytest

from qdefense.defenses.spectra import FlatFeaturesError, principal_coordinates, removed_rows, spectral_scores

# Centred by (10, 20), these points lie at (3, 0), (-3, 0), (0, 1), (0, -1): v = (1, 0), the squared projections are 9.
CROSS = np.array([[13.0, 20], [7, 20], [10, 21], [10, 19]])


def test_spectral_scores_are_the_squared_projections_of_centred_rows() -> None:
    found = spectral_scores(CROSS)
    np.testing.assert_allclose(found.scores, [9, 9, 0, 0], atol=1e-12)
    assert found.top_variance == pytest.approx(18 / 4)
    assert found.top_share == pytest.approx(18 / 20)


def test_spectral_scores_centre_what_is_far_from_the_origin() -> None:
    np.testing.assert_allclose(spectral_scores(CROSS + 1000).scores, [9, 9, 0, 0], atol=1e-8)


def test_spectral_scores_do_not_depend_on_sign_or_rotation() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(40, 5)) * [5, 2, 1, 1, 1]
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    expected = spectral_scores(features).scores
    np.testing.assert_allclose(spectral_scores(-features).scores, expected, rtol=1e-9)
    np.testing.assert_allclose(spectral_scores(features @ rotation).scores, expected, rtol=1e-7, atol=1e-9)


def test_spectral_scores_average_to_the_top_variance() -> None:
    features = np.random.default_rng(1).normal(size=(30, 8)).astype(np.float32)
    found = spectral_scores(features)
    assert found.scores.mean() == pytest.approx(found.top_variance)
    values = np.linalg.eigvalsh(np.cov(features.T, bias=True))
    assert found.top_variance == pytest.approx(values[-1], rel=1e-5)
    assert found.top_share == pytest.approx(values[-1] / values.sum(), rel=1e-5)


def test_spectral_scores_rank_a_planted_minority_first() -> None:
    rng = np.random.default_rng(2)
    features = rng.normal(size=(200, 16))
    features[:20] += 6 * rng.normal(size=16) / 4  # a shift of about 6 standard deviations in one direction
    assert set(removed_rows(spectral_scores(features).scores, 0.1)) == set(range(20))


@pytest.mark.parametrize("value", [0.0, 7.5])
def test_principal_coordinates_refuse_features_that_do_not_differ(value: float) -> None:
    flat = np.full((60, 4), value)
    with pytest.raises(FlatFeaturesError, match="the features of its 60 images do not differ"):
        principal_coordinates(flat)
    noise = np.random.default_rng(0).normal(size=flat.shape)
    with pytest.raises(FlatFeaturesError):
        principal_coordinates(1.0 + 1e-8 * noise)


def test_principal_coordinates_leave_out_directions_of_rounding_noise() -> None:
    rng = np.random.default_rng(3)
    features = np.hstack([rng.normal(size=(50, 3)), 1e-9 * rng.normal(size=(50, 3))])
    found = principal_coordinates(features)
    assert found.coordinates.shape == (50, 3)
    assert (np.diff(found.variances) <= 0).all()


@pytest.mark.parametrize(
    ("share", "rows"), [(0.25, [3]), (0.3, [3, 0]), (0.5, [3, 0]), (0.75, [3, 0, 2]), (1.0, [3, 0, 2, 1])]
)
def test_removed_rows_are_the_highest_rounded_up(share: float, rows: list[int]) -> None:
    assert removed_rows(np.array([5.0, 1, 5, 9]), share).tolist() == rows


def test_removed_rows_of_twenty_at_15_percent_are_three() -> None:
    assert len(removed_rows(np.arange(20.0), 1.5 * 0.1)) == 3
