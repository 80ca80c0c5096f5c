"""What a dry run makes of the records: the closest work first, and another network by its multiply-accumulates."""

from __future__ import annotations

from typing import Any

import pytest

from qdefense.bench.costs import CostModel, defense_keys, file_keys
from qdefense.bench.records import DefenseRecord, Network, TrainingRecord
from qdefense.models import multiply_accumulates

from .sample_records import behaviour, defense, network, training, volatile

RESNET, QUICK = network(), {"budget": "quick"}
WIDER = RESNET.model_copy(update={"architecture": "preactresnet18"})
TIMES = multiply_accumulates("preactresnet18", 16) / multiply_accumulates("resnet8", 16)


def scan(seconds: float, scheme: str = "fp32", made: Network = RESNET, **changes: Any) -> DefenseRecord:
    return defense(made, scheme, settings=QUICK, **changes).model_copy(update={"volatile": volatile(seconds)})


def price(costs: CostModel, made: Network, scheme: str = "fp32", settings: Any = QUICK) -> tuple[float, str]:
    return costs.other("defense", defense_keys("neural-cleanse", settings, "session", made, scheme), made)


def test_the_same_network_at_the_same_precision_comes_first_then_at_any() -> None:
    costs = CostModel([scan(100), scan(120), scan(140), scan(300, "int4"), scan(9, made=network(data="cifar10"))])
    assert price(costs, RESNET) == (120, "records")
    assert price(costs, RESNET, "int8-static") == (130, "records")


def test_another_network_costs_by_its_multiply_accumulates() -> None:
    costs = CostModel([scan(100), scan(300, "int4"), scan(9, made=network(data="cifar10"))])
    assert round(TIMES, 2) == 2.80
    assert price(costs, WIDER, "int4") == (pytest.approx(300 * TIMES), "records")
    elsewhere = WIDER.model_copy(update={"data": "signs"})
    assert price(costs, elsewhere, "int4") == (pytest.approx(100 * TIMES), "records"), "any data, any precision"
    assert price(costs, WIDER, settings={"budget": "gate"})[0] == pytest.approx(100 * TIMES)
    back = CostModel([scan(280, made=WIDER)])
    assert price(back, RESNET) == (pytest.approx(280 / TIMES), "records")


def test_a_smaller_network_is_not_cheaper_than_what_surrounds_it() -> None:
    narrow = RESNET.model_copy(update={"width": 4})
    assert price(CostModel([scan(100)]), narrow) == (100, "records")


def test_without_like_work_the_rule_of_thumb_is_for_a_resnet_8() -> None:
    nothing = CostModel([])
    assert price(nothing, RESNET) == (240, "rule of thumb")
    assert price(nothing, WIDER) == (pytest.approx(240 * TIMES), "rule of thumb")
    assert nothing.training(RESNET, epochs=10, images=1000) == (pytest.approx(14), "rule of thumb")
    assert nothing.training(WIDER, epochs=10, images=1000) == (pytest.approx(14 * TIMES), "rule of thumb")
    gone = RESNET.model_copy(update={"architecture": "of-an-older-zoo"})
    assert price(nothing, gone) == (240, "rule of thumb")


def test_a_behaviour_is_priced_by_the_behaviours_of_its_data() -> None:
    seen = behaviour(RESNET, "int4").model_copy(update={"volatile": volatile(10)})
    keys = file_keys("behaviour", WIDER, "int4")
    assert CostModel([seen]).other("behaviour", keys, WIDER) == (pytest.approx(10 * TIMES), "records")


def trained(seconds: float, made: Network) -> TrainingRecord:
    return training(made).model_copy(update={"volatile": volatile(seconds), "epochs": 10})


def test_a_training_on_other_data_counts_by_its_images() -> None:
    other = RESNET.model_copy(update={"data": "signs", "train_sha256": "s" * 64})
    images = {RESNET.train_sha256: 1000, other.train_sha256: 3000}
    asked = {"epochs": 5, "images": 3000}
    assert CostModel([trained(100, RESNET)], images).training(other, **asked) == (pytest.approx(150), "records")
    assert CostModel([trained(100, RESNET)], images).training(RESNET, **asked) == (50, "records"), "the same network"
    assert CostModel([trained(100, RESNET)]).training(other, **asked)[1] == "rule of thumb", "of how many images?"


def test_a_training_is_priced_by_the_same_attack_which_may_train_more_than_the_victim() -> None:
    plain, content = network(), network("cassock", variant="cont", seed=3)
    square, other = network("cassock", variant="trans"), network("issba")
    costs = CostModel([trained(100, plain), trained(110, plain), trained(300, content), trained(150, square)])
    asked = {"epochs": 10, "images": 1000}
    assert costs.training(content.model_copy(update={"seed": 0}), **asked) == (300, "records")
    assert costs.training(network("cassock", variant="comp"), **asked) == (225, "records"), "other settings"
    wider = square.model_copy(update={"architecture": "preactresnet18"})
    assert costs.training(wider, **asked) == (pytest.approx(225 * TIMES), "records"), "another network"
    assert costs.training(other, **asked) == (130, "other attacks")
    assert costs.training(network(None), **asked) == (130, "records"), "which trains nothing else"


def test_trials_without_gradients_price_no_others() -> None:
    """They end at once."""
    costs = CostModel([scan(0, access="no-gradients", key="a"), scan(0, access="no-gradients", key="b"), scan(100)])
    assert price(costs, RESNET, settings={"budget": "gate"}) == (100, "records")
    blind = defense_keys("neural-cleanse", {"budget": "gate"}, "no-gradients", RESNET, "fp32")
    assert costs.other("defense", blind, RESNET) == (0, "records")
