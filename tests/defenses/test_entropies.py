from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdefense.defenses.entropies import mean_entropies, normal_boundary

INF = np.inf


def entropies(*images: list[list[float]]) -> list[float]:
    """Of images, each a list of rows of logits."""
    values: list[float] = mean_entropies(np.array(images, dtype=np.float32)).tolist()
    return values


@pytest.mark.parametrize(
    ("rows", "bits"),
    [
        ([[0.0, 0.0]], 1.0),
        ([[7.0, 7.0, 7.0, 7.0]], 2.0),
        ([[0.0, 1000.0]], 0.0),
        ([[-INF, 0.0, 0.0]], 1.0),  # a probability of 0
        ([[np.log(0.5), np.log(0.25), np.log(0.25)]], 1.5),
        ([[np.log(0.25) + 9, np.log(0.75) + 9]], 0.811278124459),  # 2 - .75 log2 3
        ([[0.0, 0.0], [0.0, 1000.0]], 0.5),  # the mean of the entropies, not the entropy of the mean (.811)
        ([[0.0, 0.0, -INF], [0.0, -INF, -INF], [5.0, 5.0, 5.0]], (1 + np.log2(3)) / 3),
        ([[3e38, -3e38]], 0.0),
    ],
)
def test_mean_entropies_equals_the_hand_computed(rows: list[list[float]], bits: float) -> None:
    assert entropies(rows) == pytest.approx([bits], abs=1e-6)


@pytest.mark.parametrize("broken", [[np.nan, 0.0], [INF, 0.0], [-INF, -INF], [INF, -INF]])
def test_mean_entropies_is_nan_for_the_image_with_a_row_that_is_no_distribution(broken: list[float]) -> None:
    first, second = entropies([[0.0, 0.0], broken], [[0.0, 0.0], [0.0, 0.0]])
    assert np.isnan(first)
    assert second == 1.0


@given(
    st.integers(2, 9).flatmap(
        lambda k: st.lists(st.lists(st.floats(-80, 80, width=32), min_size=k, max_size=k), min_size=1, max_size=5)
    ),
    st.floats(-50, 50, width=32),
)
def test_mean_entropies_stays_between_0_and_log2_k_and_ignores_a_shift(rows: list[list[float]], shift: float) -> None:
    (bits,) = entropies(rows)
    assert 0 <= bits <= np.log2(len(rows[0]))
    moved = np.array([rows], dtype=np.float64) + shift
    assert mean_entropies(moved)[0] == pytest.approx(bits, abs=1e-9)


def test_normal_boundary_equals_the_published_figures() -> None:
    """CIFAR-10 in the paper's notebook: mu 1.1069, sd .3157, boundary .3724 at 1 %."""
    boundary, mean, sd = normal_boundary(np.array([1.1069 - 0.3157, 1.1069 + 0.3157]), 0.01)
    assert (mean, sd) == pytest.approx((1.1069, 0.3157))
    assert boundary == pytest.approx(0.3724, abs=2e-4)


@pytest.mark.parametrize(
    ("values", "rate", "expected"),
    [
        ([1.0, 3.0], 0.15865525393145707, (1.0, 2.0, 1.0)),  # one sd below the mean; the sd divides by n
        ([0.0, 0.0, 4.0, 4.0], 0.022750131948179195, (-2.0, 2.0, 2.0)),  # two below: no entropy is there
    ],
)
def test_normal_boundary_equals_the_hand_computed(
    values: list[float], rate: float, expected: tuple[float, float, float]
) -> None:
    assert normal_boundary(np.array(values), rate) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "no normal fit: there are 0 entropies, at least 2 are needed"),
        ([1.0], "no normal fit: there are 1 entropies, at least 2 are needed"),
        ([1.0, np.nan, 2.0], "no normal fit: 1 of 3 entropies are not finite"),
        ([1.5, 1.5, 1.5], r"the entropies of the 3 images do not differ \(all 1.5 bits\)"),
        ([1.0, 1.0 + 1e-7], r"the entropies of the 2 images do not differ \(all 1 bits\)"),
    ],
)
def test_normal_boundary_raises_when_nothing_can_be_fitted(values: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        normal_boundary(np.array(values), 0.01)
