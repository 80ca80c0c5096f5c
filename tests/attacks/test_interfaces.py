from __future__ import annotations

import pytest

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import trigger_shows_images

CONTENT = ["cassock:variant=cont", "cassock:variant=comp", "cassock-loop:variant=cont", "cassock-loop:variant=comp"]


@pytest.mark.parametrize("spec", [*CONTENT, "dfb", "lsp:host=dfb", "lsp:host=cassock,host.variant=cont"])
def test_a_trigger_made_of_one_training_image_says_so(spec: str) -> None:
    assert trigger_shows_images(ATTACKS.create(spec))


@pytest.mark.parametrize(
    "spec", [*(name for name in ATTACKS.names() if name != "dfb"), "dfb:variant=encoder", "lsp:host=cassock"]
)
def test_patterns_and_weights_show_no_training_image(spec: str) -> None:
    assert not trigger_shows_images(ATTACKS.create(spec))
