from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import click
import numpy as np
import pytest
from numpy.typing import NDArray

from qdefense.audit.candidates import fitted_order, gain, named_orders, other_contracts, score_candidates
from qdefense.cli.contract_options import contract_options, stated_contract
from qdefense.converters.contract import InputContract, StatedContract
from qdefense.data.images import ImageSet
from qdefense.report.model import CandidateContract

CLASSES = 10
NAMES = tuple(f"class {index}" for index in range(CLASSES))
CONTRACT = InputContract(input_name="x", output_name="y", height=1, width=2, class_names=NAMES)
Truths = NDArray[np.bool_]


def numbered_images(labels: NDArray[np.int64], names: tuple[str, ...] = NAMES) -> ImageSet:
    """Image i shows the number i and nothing else."""
    images = np.zeros((len(labels), 1, 2, 3), dtype=np.uint8)
    numbers = np.arange(len(labels))
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers % 256, numbers // 256
    return ImageSet(images=images, labels=labels, class_names=names, source="numbers")


class Pretender:
    """A session that answers with what ``answers(contract)`` has for the number that an image shows."""

    def __init__(self, answers: Callable[[InputContract], NDArray[np.int64]], contract: InputContract) -> None:
        self.artifact = SimpleNamespace(contract=contract)
        self.answers = answers
        self.asked: list[int] = []

    def logits_of(self, images: ImageSet, *, contract: InputContract | None = None) -> NDArray[np.float32]:
        self.asked.append(len(images))
        rows = images.images[:, 0, 0, 0].astype(np.int64) + 256 * images.images[:, 0, 0, 1].astype(np.int64)
        chosen = self.answers(contract or self.artifact.contract)[rows]
        logits: NDArray[np.float32] = np.eye(self.artifact.contract.classes, dtype=np.float32)[chosen]
        return logits


def mostly(labels: NDArray[np.int64], right: Truths | float, seed: int = 0, classes: int = CLASSES) -> Any:
    """Labels of which this share is right, and the rest is some other class."""
    rng = np.random.default_rng(seed)
    told = right if isinstance(right, np.ndarray) else rng.random(len(labels)) < right
    return np.where(told, labels, (labels + rng.integers(1, classes, len(labels))) % classes)


def scored(
    images: ImageSet,
    answers: Callable[[InputContract], NDArray[np.int64]],
    *,
    seed: int = 0,
    contract: InputContract = CONTRACT,
) -> tuple[tuple[CandidateContract, ...], list[int]]:
    session: Any = Pretender(answers, contract)
    logits = session.logits_of(images)
    session.asked.clear()
    return score_candidates(session, images, logits, seed=seed), session.asked


def labels_of(count: int, classes: int = CLASSES) -> NDArray[np.int64]:
    return np.random.default_rng(5).integers(0, classes, count)


# --- scoring ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("wrong", "asks"), [(0, False), (40, False), (41, True), (400, True)])
def test_score_candidates_asks_nothing_when_nothing_can_be_better(wrong: int, asks: bool) -> None:
    labels = labels_of(2000)
    answers = mostly(labels, np.arange(2000) >= wrong)
    found, asked = scored(numbered_images(labels), lambda _: answers)
    assert bool(asked) is bool(found) is asks


def test_score_candidates_finds_the_channels_and_scores_them_on_1000_images() -> None:
    labels = labels_of(2000)
    right, wrong = mostly(labels, 0.95), mostly(labels, 0.4, seed=1)

    def answers(contract: InputContract) -> Any:
        bgr = CONTRACT.model_copy(update={"channels": "BGR"})
        return right if contract == bgr else wrong

    found, asked = scored(numbered_images(labels), answers)
    assert found[0].description == "channels BGR (--channels bgr)"
    assert (found[0].images, len(found)) == (1000, 5)
    drawn = np.random.default_rng(0).permutation(2000)[:1000]
    assert found[0].accuracy == np.mean(right[drawn] == labels[drawn])
    assert found[0].own_accuracy == np.mean(wrong[drawn] == labels[drawn])
    assert sorted(asked) == [256] * 15 + [744], "only what is better is scored on more"
    assert [entry.images for entry in found[1:]] == [256] * 4
    gains = [gain(entry) for entry in found]
    assert gains == sorted(gains, reverse=True)
    assert gains[1] == 0


def test_score_candidates_names_nothing_when_the_images_drawn_happen_to_be_easier() -> None:
    """An accuracy on 256 images of luck is no gain over that on all of them."""
    labels = labels_of(4000)
    easy = np.ones(4000, dtype=np.bool_)
    easy[np.random.default_rng(0).permutation(4000)[256:2000]] = False
    answers = mostly(labels, easy)
    found, asked = scored(numbered_images(labels), lambda _: answers)
    assert np.mean(answers == labels) < 0.6
    assert {(entry.accuracy, entry.own_accuracy, gain(entry)) for entry in found} == {(1.0, 1.0, 0.0)}
    assert set(asked) == {256}


def test_score_candidates_takes_back_a_lucky_screening() -> None:
    labels = labels_of(1000)
    drawn = np.random.default_rng(0).permutation(1000)
    own_right, lucky_right = np.ones(1000, dtype=np.bool_), np.ones(1000, dtype=np.bool_)
    own_right[drawn[:20]] = own_right[drawn[500:520]] = False
    lucky_right[drawn[500:540]] = False
    own, lucky = mostly(labels, own_right), mostly(labels, lucky_right)
    found, asked = scored(numbered_images(labels), lambda contract: own if contract.channels == "RGB" else lucky)
    assert 744 in asked
    assert all(gain(entry) == 0 for entry in found if entry.description.startswith("channels BGR"))
    assert max(map(gain, found)) == 0


@pytest.mark.parametrize("count", [40, 256])
def test_score_candidates_takes_all_images_when_there_are_few(count: int) -> None:
    labels = labels_of(count)
    own, other = mostly(labels, 0.2), mostly(labels, 0.9)
    found, asked = scored(numbered_images(labels), lambda contract: own if contract.channels == "RGB" else other)
    assert {entry.images for entry in found[:3]} == {count}
    assert set(asked) == {count}


def test_score_candidates_draws_by_the_seed() -> None:
    labels = labels_of(2000)
    answers = mostly(labels, 0.7)
    first, again, other = (scored(numbered_images(labels), lambda _: answers, seed=seed)[0] for seed in (1, 1, 2))
    assert first == again
    assert first != other


ORDERS = {
    "sorted by class": np.sort(labels_of(1000)),
    "one class after the other, again and again": np.arange(1000) % CLASSES,
    "shuffled": labels_of(1000),
}


@pytest.mark.parametrize("labels", ORDERS.values(), ids=list(ORDERS))
@pytest.mark.parametrize("classes", [2, CLASSES])
def test_score_candidates_finds_another_order_of_the_classes_when_the_data_is(
    labels: NDArray[np.int64], classes: int
) -> None:
    labels = labels % classes
    order = np.random.default_rng(3).permutation(classes) if classes > 2 else np.array([1, 0])
    names = NAMES[:classes]
    outputs = np.argsort(order)[mostly(labels, 0.95, classes=classes)]
    contract = CONTRACT.model_copy(update={"class_names": names})
    best = scored(numbered_images(labels, names), lambda _: outputs, contract=contract)[0][0]
    assert best.accuracy == pytest.approx(0.95, abs=0.04)
    assert gain(best) > 0.5
    assert best.images == 500, "the order is scored on the half that it was not read off"
    assert best.description.startswith("classes in the order that half of the images show: output 0 is 'class ")
    assert best.description.endswith(" (--classes names them)")
    for place, number in re.findall(r"output (\d+) is 'class (\d+)'", best.description):
        assert order[int(place)] == int(number)


def test_score_candidates_finds_numeric_order_when_the_names_are_sorted_as_strings() -> None:
    """Folders "0", "1", "10", "11", "2": what ImageFolder numbers 2 is class 10 of the model."""
    names = tuple(sorted(map(str, range(12))))
    labels = labels_of(800, classes=12)
    outputs = np.array([int(name) for name in names])[mostly(labels, 0.9, classes=12)]
    contract = CONTRACT.model_copy(update={"class_names": tuple(map(str, range(12)))})
    best = scored(numbered_images(labels, names), lambda _: outputs, contract=contract)[0][0]
    assert best.description == "classes in numeric order (--classes names them)"
    assert best.accuracy == pytest.approx(0.9, abs=0.03)


def test_score_candidates_finds_channels_and_order_together() -> None:
    labels = labels_of(1000)
    wrong, right = mostly(labels, 0.1), (mostly(labels, 0.95) + 1) % CLASSES
    found, _ = scored(numbered_images(labels), lambda contract: wrong if contract.channels == "RGB" else right)
    best = found[0].description
    assert "channels BGR (--channels bgr)" in best
    assert "classes in the order that half of the images show: output 0 is 'class 9', output 1 is 'class 0'" in best
    assert best.endswith("output 3 is 'class 2' and 6 more (--classes names them)")


# --- what else it could be --------------------------------------------------------------------------------------------


def test_other_contracts_are_every_usual_scaling_in_both_channel_orders_but_the_one_in_use() -> None:
    found = [description for description, _ in other_contracts(CONTRACT)]
    assert len(found) == len(set(found)) == 15
    assert found[0] == "pixels in [0, 255] (--range 0,255)"
    assert "ImageNet mean and std (--mean 0.485,0.456,0.406 --std 0.229,0.224,0.225)" in found
    bgr = "channels BGR (--channels bgr), ImageNet mean and std (--mean 0.406,0.456,0.485 --std 0.225,0.224,0.229)"
    assert bgr in found
    assert "channels BGR (--channels bgr)" in found


def test_other_contracts_of_codes_are_the_channels_alone() -> None:
    codes = CONTRACT.model_copy(update={"dtype": "uint8", "range": (0.0, 255.0)})
    assert [description for description, _ in other_contracts(codes)] == ["channels BGR (--channels bgr)"]
    swapped = codes.model_copy(update={"channels": "BGR"})
    assert [description for description, _ in other_contracts(swapped)] == ["channels RGB (--channels rgb)"]


IN_USE: list[dict[str, Any]] = [
    {},
    {"range": (0.0, 255.0)},
    {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)},
    {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "channels": "BGR"},
    {"range": (-1.0, 1.0), "dtype": "float16", "layout": "NHWC", "head": "softmax", "channels": "BGR"},
]


@pytest.mark.parametrize("changes", IN_USE)
def test_other_contracts_are_what_their_options_give_over_the_one_in_use(changes: dict[str, Any]) -> None:
    contract = CONTRACT.model_copy(update=changes)
    seen = list(other_contracts(contract))
    assert len(seen) > 13
    for description, other in seen:
        said = said_with(
            [part for options in re.findall(r"\((--[^)]*)\)", description) for part in shlex.split(options)]
        )
        assert contract.model_copy(update=said.values) == other, description
        assert other != contract


def said_with(arguments: list[str]) -> StatedContract:
    @click.command()
    @contract_options
    def command(said: dict[str, Any]) -> StatedContract | None:
        from pathlib import Path  # noqa: PLC0415

        return stated_contract(Path("none.onnx"), said)

    found = command.main(arguments, standalone_mode=False)
    assert isinstance(found, StatedContract)
    return found


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("a", "b", "c"), {}),
        (("b", "c", "a"), {"the string order of their names": [2, 0, 1]}),
        (("0", "1", "10", "2"), {"numeric order": [0, 1, 3, 2]}),
        (("0", "1", "2", "10"), {"the string order of their names": [0, 1, 3, 2]}),
        (("2", "10", "1"), {"the string order of their names": [2, 1, 0], "numeric order": [2, 0, 1]}),
        (("1", "0"), {"the string order of their names": [1, 0], "numeric order": [1, 0]}),
        (("²", "1"), {"the string order of their names": [1, 0]}),
        (("1" * 5000, "0"), {"the string order of their names": [1, 0]}),
        (("a",), {}),
    ],
)
def test_named_orders_are_those_that_differ(names: tuple[str, ...], expected: dict[str, list[int]]) -> None:
    assert {description: order.tolist() for description, order in named_orders(names)} == expected


FITTED = {
    "nothing differs": ([0, 1, 2, 0], [0, 1, 2, 1], 3, None),
    "two outputs share a class": ([0, 1, 2], [1, 1, 0], 3, None),
    "two classes are swapped": ([0, 1, 0, 1, 0], [1, 0, 1, 0, 0], 2, [1, 0]),
    "an output is never given": ([0, 1], [2, 0], 3, [2, 0, -1]),
    "nothing differs where outputs are missing": ([1, 1], [1, 0], 3, None),
    "there are no answers": ([], [], 3, None),
}


@pytest.mark.parametrize(("answers", "labels", "classes", "expected"), FITTED.values(), ids=list(FITTED))
def test_fitted_order_when(answers: list[int], labels: list[int], classes: int, expected: list[int] | None) -> None:
    found = fitted_order(np.array(answers, dtype=np.int64), np.array(labels, dtype=np.int64), classes)
    assert (None if found is None else found.tolist()) == expected


def test_fitted_order_needs_no_table_of_all_pairs_when_there_are_many_classes() -> None:
    """65,536 classes squared would be 34 GB."""
    numbers = np.arange(65_536, dtype=np.int64)
    found = fitted_order(numbers, numbers[::-1].copy(), 65_536)
    assert found is not None
    np.testing.assert_array_equal(found, numbers[::-1])
