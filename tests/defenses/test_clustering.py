from __future__ import annotations

import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.decomposition import FastICA
from sklearn.metrics import silhouette_score

from qdefense.defenses import clustering
from qdefense.defenses.clustering import count_reclassified, reduced, two_clusters
from qdefense.defenses.spectra import FlatFeaturesError

# Three points around 0 and one at 10, on a line: centres 0 and 10.
LINE = np.array([[-1.0], [0], [1], [10]])


def test_two_clusters_of_a_line_by_hand() -> None:
    found = two_clusters(LINE, starts=5, seed=0)
    assert found.smaller.tolist() == [False, False, False, True]
    assert found.relative_size == 0.25
    np.testing.assert_allclose(found.margin, [1 - 11, 0 - 10, 1 - 9, 10 - 0])
    # own cluster's mean distance a, the other's b: (b - a) / b; a cluster of one counts 0
    expected = [(11 - 1.5) / 11, (10 - 1) / 10, (9 - 1.5) / 9, 0]
    assert found.silhouette == pytest.approx(np.mean(expected))


def test_two_clusters_take_a_seed_of_any_size() -> None:
    assert two_clusters(LINE, starts=5, seed=2**63).relative_size == two_clusters(LINE, starts=5, seed=0).relative_size


def test_two_clusters_are_the_same_for_one_seed_and_part_what_is_apart_for_any() -> None:
    rng = np.random.default_rng(0)
    points = np.vstack([rng.normal(size=(90, 4)), rng.normal(size=(30, 4)) + 8])
    found = [two_clusters(points, starts=3, seed=seed) for seed in (0, 0, 1)]
    for one in found:
        assert one.smaller.tolist() == [False] * 90 + [True] * 30
        assert one.relative_size == 0.25
        assert ((one.margin > 0) == one.smaller).all()
    assert found[0].silhouette == found[1].silhouette


def test_whitened_coordinates_give_the_clusters_that_fast_ica_gives() -> None:
    features = np.random.default_rng(0).normal(size=(250, 30)) ** 3
    whitened = reduced(features, 10, "ica")
    np.testing.assert_allclose(whitened.std(axis=0), 1, rtol=1e-9)
    independent = FastICA(10, random_state=0, max_iter=5000, whiten="unit-variance").fit_transform(features)
    by_ica = KMeans(2, n_init=10, random_state=0).fit_predict(independent)
    found = two_clusters(whitened, starts=10, seed=0)
    assert len(np.unique(np.stack([by_ica, found.smaller]), axis=1).T) == 2, "the same two clusters"
    assert found.silhouette == pytest.approx(silhouette_score(independent, by_ica), abs=1e-9)


def test_reduced_keeps_variances_with_pca_and_no_more_dimensions_than_there_are() -> None:
    features = np.array([[3.0, 0, 0], [-3, 0, 0], [0, 1, 0], [0, -1, 0]])
    assert reduced(features, 10, "pca").shape == (4, 2)
    np.testing.assert_allclose(np.abs(reduced(features, 1, "pca"))[:, 0], [3, 3, 0, 0], atol=1e-12)
    np.testing.assert_allclose(
        np.abs(reduced(features, 2, "ica")), np.sqrt([[2, 0], [2, 0], [0, 2], [0, 2]]), atol=1e-9
    )


def test_reduced_refuses_features_that_do_not_differ() -> None:
    with pytest.raises(FlatFeaturesError):
        reduced(np.ones((60, 4)), 10, "ica")


def test_clusters_of_one_cloud_score_about_7_percent() -> None:
    cloud = np.random.default_rng(4).normal(size=(500, 10))
    assert two_clusters(cloud, starts=10, seed=0).silhouette == pytest.approx(0.07, abs=0.01)


@pytest.mark.parametrize(
    ("answers", "label", "expected"),
    [
        ([2, 2, 5, 5, 5, 1], 2, (2, 3, 5)),
        ([2, 2, 2], 2, (3, 0, 0)),
        ([0, 0], 3, (0, 2, 0)),
        ([0], 0, (1, 0, 0)),
        ([4, 1, 1, 4], 2, (0, 2, 1)),
    ],
)
def test_count_reclassified_gives_own_and_the_most_frequent_other(
    answers: list[int], label: int, expected: tuple[int, int, int]
) -> None:
    assert count_reclassified(np.array(answers), label) == expected


def test_silhouette_of_more_rows_than_are_sampled_is_near_that_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    points = np.vstack([rng.normal(size=(900, 3)), rng.normal(size=(1, 3)) + 40])
    whole = two_clusters(points, starts=2, seed=0)
    monkeypatch.setattr(clustering, "SILHOUETTE_ROWS", 300)
    sampled = two_clusters(points, starts=2, seed=0)
    assert sampled.smaller.sum() == 1, "which no sample need hold"
    assert sampled.silhouette == pytest.approx(whole.silhouette, abs=0.02)
    assert sampled.silhouette != whole.silhouette


@pytest.mark.parametrize("few", [1, 2, 3])
def test_silhouette_of_a_sample_never_lacks_the_small_cluster(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Whatever the sample: one cluster alone would be an error."""
    rng = np.random.default_rng(6)
    points = np.vstack([rng.normal(size=(400, 3)), rng.normal(size=(few, 3)) + 40])
    monkeypatch.setattr(clustering, "SILHOUETTE_ROWS", 20)
    for seed in range(20):
        assert two_clusters(points, starts=1, seed=seed).silhouette > 0.9
