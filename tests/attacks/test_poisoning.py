from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from qdefense.attacks import ATTACKS
from qdefense.attacks.badnets import BadNets
from qdefense.attacks.blended import Blended
from qdefense.data.images import DataError, ImageSet
from qdefense.registry import SpecError, flat_settings

MakeNoise = Callable[..., ImageSet]
BOTH = "poison_rate and poison_count both say how many images are poisoned; give one of them"


@pytest.mark.parametrize("attack", [BadNets, Blended])
@pytest.mark.parametrize("count", [0, 1, 10, 30])
def test_a_count_poisons_exactly_as_many(make_noise: MakeNoise, attack: type[Any], count: int) -> None:
    made = attack(poison_count=count).poison(make_noise(40), np.random.default_rng(0))
    assert len(made.poison_indices) == count
    assert len(made.images) == 40


@pytest.mark.parametrize("attack", [BadNets, Blended])
def test_a_count_gives_the_set_of_the_rate_that_comes_to_it(make_noise: MakeNoise, attack: type[Any]) -> None:
    by_count, by_rate = (
        made.poison(make_noise(40), np.random.default_rng(3))
        for made in (attack(poison_count=10), attack(poison_rate=0.25))
    )
    assert by_count.images.digest == by_rate.images.digest
    assert by_count.poison_indices.tolist() == by_rate.poison_indices.tolist()


def test_a_count_says_why_when_there_are_too_few_images(make_noise: MakeNoise) -> None:
    with pytest.raises(DataError, match=r"^badnets: 31 poisons wanted, 30 images are outside the target class$"):
        BadNets(poison_count=31).poison(make_noise(40), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("spec", "told"),
    [("badnets", {"poison_rate": 0.1}), ("badnets:poison-count=50", {"poison_count": 50})],
)
def test_settings_tell_the_one_that_counts(spec: str, told: dict[str, float]) -> None:
    settings = flat_settings(ATTACKS.create(spec))
    assert {key: value for key, value in settings.items() if key.startswith("poison")} == told
    assert ATTACKS.restore("badnets", settings) == ATTACKS.create(spec)


def test_rate_and_count_are_refused_together() -> None:
    with pytest.raises(SpecError, match=f"^attack 'blended:poison-count=5,poison-rate=0.1': {BOTH}$"):
        ATTACKS.create("blended:poison-count=5,poison-rate=0.1")
    with pytest.raises(ValidationError, match=BOTH):
        BadNets(poison_count=5, poison_rate=0.1)


def test_neither_rate_nor_count_is_the_default_rate() -> None:
    assert BadNets(poison_count=None) == BadNets(poison_rate=None) == BadNets(poison_rate=0.1)


@pytest.mark.parametrize("value", ["-1", "1.5", "few"])
def test_a_count_is_refused_when_it_is_none(value: str) -> None:
    with pytest.raises(SpecError, match=rf"^attack 'badnets:poison-count={value}': poison_count: Input should be "):
        ATTACKS.create(f"badnets:poison-count={value}")
