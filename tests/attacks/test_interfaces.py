from __future__ import annotations

import pytest

from qdefense.attacks import ATTACKS
from qdefense.attacks.interfaces import SourceSpecific, is_source_specific, revisions_of, trigger_shows_images
from qdefense.data.images import DataError
from qdefense.registry import flat_settings

CONTENT = ["cassock:variant=cont", "cassock:variant=comp", "cassock-loop:variant=cont", "cassock-loop:variant=comp"]


@pytest.mark.parametrize("spec", [*CONTENT, "dfb", "lsp:host=dfb", "lsp:host=cassock,host.variant=cont"])
def test_a_trigger_made_of_one_training_image_says_so(spec: str) -> None:
    assert trigger_shows_images(ATTACKS.create(spec))


@pytest.mark.parametrize(
    "spec", [*(name for name in ATTACKS.names() if name != "dfb"), "dfb:variant=encoder", "lsp:host=cassock"]
)
def test_patterns_and_weights_show_no_training_image(spec: str) -> None:
    assert not trigger_shows_images(ATTACKS.create(spec))


@pytest.mark.parametrize("name", ATTACKS.names())
def test_an_attack_says_whether_its_trigger_is_source_specific(name: str) -> None:
    attack = ATTACKS.create(name)
    try:
        trigger = attack.trigger(32, 32)
    except DataError:  # learned: one that is meant for some classes has a setting that names them
        assert is_source_specific(attack) == any("source" in key for key in flat_settings(attack))
        return
    assert is_source_specific(attack) == isinstance(trigger, SourceSpecific)


def test_revisions_are_told_once_they_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    lsp = ATTACKS.create("lsp:host=blended")
    assert revisions_of(lsp) == {}
    monkeypatch.setattr(type(ATTACKS.create("blended")), "revision", 3)
    assert revisions_of(lsp) == {"blended": 3}
    monkeypatch.setattr(type(lsp), "revision", 2)
    assert revisions_of(lsp) == {"lsp": 2, "blended": 3}


@pytest.mark.parametrize("spec", [*CONTENT, "lsp:host=cassock"])
def test_content_and_smoothed_labels_leave_a_trigger_source_specific(spec: str) -> None:
    assert is_source_specific(ATTACKS.create(spec))
