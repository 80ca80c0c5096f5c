"""Whose trigger `benchmarks/attacks/specificity.py` puts on an image, and what it says that they have in common."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from qdefense.attacks.input_aware import InputAware
from qdefense.bench.records import Network
from qdefense.data.images import Pixels


@pytest.fixture
def specificity(attack_script: Callable[[str], ModuleType]) -> ModuleType:
    return attack_script("specificity")


def grey(*levels: float) -> Pixels:
    return np.stack([np.full((3, 8, 8), level, dtype=np.float32) for level in levels])


def test_triggers_share_all_of_what_is_alike_and_nothing_of_what_is_opposite(specificity: ModuleType) -> None:
    x = grey(0.5, 0.5)
    assert specificity.shared(x, grey(0.6, 0.6)) == pytest.approx(1, abs=1e-6)
    assert specificity.shared(x, grey(0.6, 0.4)) == pytest.approx(0, abs=1e-6)
    assert specificity.shared(x, grey(0.7, 0.5)) == pytest.approx(0.5, abs=1e-6), "0.1 of 0.2 in one, and of 0 in one"
    assert specificity.shared(x, x) == 0


def test_an_added_residual_goes_to_another_image(specificity: ModuleType) -> None:
    x = grey(0.2, 0.4)
    found = specificity.crossed(SimpleNamespace(), x, x + grey(0.2, 0.4))
    assert found[:, 0, 0, 0] == pytest.approx([0.6, 0.6], abs=0.5 / 255)


def test_a_generated_trigger_is_laid_over_another_image(specificity: ModuleType) -> None:
    attack = InputAware(channels=2, stages=1)
    state = {"classes": np.array(2)}
    pattern, mask = attack._generator(3), attack._generator(1)
    for prefix, network in (("pattern.", pattern), ("mask.", mask)):
        state |= {prefix + name: value.numpy() for name, value in network.state_dict().items()}
    trigger = attack.restored_trigger(8, 8, state)
    x = grey(0.2, 0.7)
    found = specificity.crossed(trigger, x, trigger.stamp(x))
    assert found.tobytes() == trigger.crossed(x, x[::-1]).tobytes()


@pytest.mark.parametrize(
    ("attack", "settings", "lacks", "expected"),
    [
        ("input-aware", {"mode": "all-to-one"}, False, True),
        ("input-aware", {"mode": "all-to-all"}, False, False),
        ("issba", {}, False, True),
        ("issba", {}, True, False),
        ("dfb", {"variant": "encoder"}, False, True),
        ("dfb", {"variant": "fixed"}, False, False),
        (None, {}, False, False),
    ],
)
def test_only_triggers_of_an_images_own_are_asked(
    specificity: ModuleType, attack: str | None, settings: dict[str, str], lacks: bool, expected: bool
) -> None:
    made = Network.model_construct(attack=attack, attack_settings=settings)
    assert specificity.is_specific(SimpleNamespace(made=made, lacks_trigger=lacks)) is expected


def test_the_clean_network_of_the_place_is_asked_of_the_same_images(
    specificity: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file here answers class 1 where an image is bright."""
    monkeypatch.setattr(specificity, "others_than", lambda _target, _data: grey(0.2, 0.2))
    monkeypatch.setattr(
        specificity, "answers_of", lambda limit, x: np.stack([0 * x[:, 0, 0, 0], x[:, 0, 0, 0] - limit], 1)
    )

    class Stamp:
        def stamp(self, x: Pixels) -> Pixels:
            return x + grey(0.4, 0.2)

    def network(attack: str | None, limit: float, seed: int = 0) -> SimpleNamespace:
        made = Network.model_construct(attack=attack, attack_settings={"target_class": 1})
        place = ("signs", seed)
        facts = {"place": place, "title": f"{attack} | signs, {seed}", "lacks_trigger": False}
        files = {"fp32": None}
        return SimpleNamespace(made=made, files=files, trigger=lambda *_: Stamp(), model=lambda _: limit, **facts)

    every = [network("issba", 0.5), network(None, 0.3), network(None, 0.9, seed=1), network("issba", 0.5, seed=2)]
    found = [line.split(" | ") for line in specificity.rows(every)]
    assert [line[:2] for line in found] == [["| issba", "signs, 0"], ["| none", "signs, 0"], ["| issba", "signs, 2"]]
    shares = [[cell.split(" (")[0] for cell in line[3:6]] for line in found]
    assert shares == [["0.000", "0.500", "0.500"], ["0.000", "1.000", "1.000"], ["0.000", "0.500", "0.500"]]
    assert found[0][-1].startswith("0.900"), "0.3 on average, squared, of 0.16 and 0.04"


def test_only_a_trigger_with_a_secret_has_bits_to_read(specificity: ModuleType) -> None:
    def network(attack: str, state: dict[str, np.ndarray] | None) -> SimpleNamespace:
        made = Network.model_construct(attack=attack, attack_settings={})
        return SimpleNamespace(made=made, trigger_state=state, title=f"{attack} | signs, 0", lacks_trigger=False)

    every = [network("issba", {"bit_accuracy": np.float32(0.75)}), network("input-aware", {"mask.": np.zeros(1)})]
    assert [*specificity.secrets(every)] == ["| issba | signs, 0 | 0.7500 |"]
