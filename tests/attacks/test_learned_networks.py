from __future__ import annotations

import numpy as np
import pytest
import torch

from qdefense.attacks.learned_networks import looked_at, require_effect, rounded
from qdefense.data.images import DataError, ImageSet


def test_rounded_is_what_a_uint8_image_holds_and_passes_the_gradient() -> None:
    x = torch.tensor([-0.5, 0.4 / 255, 0.6 / 255, 2.0], requires_grad=True)
    found = rounded(x)
    assert found.tolist() == pytest.approx([0, 0, 1 / 255, 1])
    (3 * found).sum().backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    assert x.grad.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize(("unchanged", "refused"), [(0, False), (100, False), (101, True)])
def test_a_trigger_may_leave_half_of_the_images_as_they_are(unchanged: int, refused: bool) -> None:
    changed = np.arange(200) >= unchanged
    if not refused:
        require_effect(changed, attack="a", advice="b")
        return
    with pytest.raises(
        DataError, match=r"^a: the trigger that was learned is nothing, or next to it, in 101 of 200 images; b$"
    ):
        require_effect(changed, attack="a", advice="b")


@pytest.mark.parametrize(("count", "rows"), [(3, [0, 1, 2]), (999, [0, 2, 4, 998])])
def test_images_from_the_first_to_the_last_are_looked_at(count: int, rows: list[int]) -> None:
    images = np.zeros((count, 1, 1, 3), dtype=np.uint8)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = np.arange(count) % 256, np.arange(count) // 256
    labels = np.zeros(count, dtype=np.int64)
    codes = np.rint(looked_at(ImageSet(images=images, labels=labels, class_names=("a",), source="s")) * 255)
    seen = (codes[:, 0, 0, 0] + 256 * codes[:, 1, 0, 0]).astype(int).tolist()
    assert len(seen) == min(count, 500)
    assert [*seen[:3], *seen[3:][-1:]] == rows
