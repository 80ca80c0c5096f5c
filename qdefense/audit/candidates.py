"""Other contracts that fit the graph, scored on the labelled images: is the file driven as it was trained?"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qdefense.converters.contract import InputContract
from qdefense.data.images import ImageSet, Labels
from qdefense.report.model import MISREAD_MARGIN, CandidateContract
from qdefense.session import DeployedSession, Logits

_SCREENED, _CONFIRMED = 256, 1000
_KEPT = 5
_NAMED = 4
_LONGEST_NUMBER = 20
_Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class _Scaling:
    """A usual way to scale pixels; mean and std in the order R, G, B."""

    name: str
    range: tuple[float, float] = (0.0, 1.0)
    mean: _Triple = (0.0, 0.0, 0.0)
    std: _Triple = (1.0, 1.0, 1.0)


_SCALINGS = (
    _Scaling(name="pixels in [0, 1]"),
    _Scaling(name="pixels in [0, 255]", range=(0.0, 255.0)),
    _Scaling(name="pixels in [-1, 1]", range=(-1.0, 1.0)),
    _Scaling(name="ImageNet mean and std", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    _Scaling(name="CIFAR-10 mean and std", mean=(0.4914, 0.4822, 0.4465), std=(0.247, 0.2435, 0.2616)),
    _Scaling(name="CIFAR-100 mean and std", mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    _Scaling(name="GTSRB mean and std", mean=(0.3403, 0.3121, 0.3214), std=(0.2724, 0.2608, 0.2669)),
    _Scaling(name="Caffe means", range=(0.0, 255.0), mean=(123.0, 117.0, 104.0)),
)


def _options(contract: InputContract, scaling: dict[str, tuple[float, ...]]) -> str:
    """What to say for this scaling where ``contract`` is in use."""
    differing = [(field, values) for field, values in scaling.items() if getattr(contract, field) != values]
    return " ".join(f"--{field} {','.join(f'{value:g}' for value in values)}" for field, values in differing)


def score_candidates(
    session: DeployedSession, clean: ImageSet, logits: Logits, *, seed: int
) -> tuple[CandidateContract, ...]:
    """Accuracy of every other contract, largest gain first: usual scalings, RGB or BGR, and orders of the classes.

    ``logits: (N, K)`` are the session's answers to ``clean`` under its own contract. All are screened on 256 images;
    one that beats the own contract there by more than 2 points is scored again on up to 1,000. Each is set against the
    own contract on the same images. Where the own accuracy is within 2 points of 1 nothing can be better, and nothing
    is scored.
    """
    own = logits.argmax(axis=1)
    if float(np.mean(own == clean.labels)) >= 1 - MISREAD_MARGIN:
        return ()
    drawn = np.random.default_rng(seed).permutation(len(clean))  # files are often sorted by class
    names = clean.class_names
    found = list(_orders("", own[drawn], own[drawn], clean.labels[drawn], names))
    parts = [(rows, clean.take(rows)) for rows in (drawn[:_SCREENED], drawn[_SCREENED:_CONFIRMED])]
    for description, other in other_contracts(session.artifact.contract):
        answers = np.empty(0, dtype=np.int64)
        for rows, images in parts:
            if not len(rows):
                break
            answers = np.append(answers, session.logits_of(images, contract=other).argmax(axis=1))
            seen = drawn[: len(answers)]
            scored = list(_readings(description, answers, own[seen], clean.labels[seen], names))
            if max(map(gain, scored)) <= MISREAD_MARGIN:
                break
        found += scored
    return tuple(sorted(found, key=gain, reverse=True)[:_KEPT])


def gain(candidate: CandidateContract) -> float:
    """How much better it is than the contract in use, on the same images."""
    return candidate.accuracy - candidate.own_accuracy


def _readings(
    description: str, answers: Labels, own: Labels, labels: Labels, names: tuple[str, ...]
) -> Iterator[CandidateContract]:
    yield _scored(description, answers, own, labels)
    yield from _orders(f"{description}, ", answers, own, labels, names)


def _scored(description: str, answers: Labels, own: Labels, labels: Labels) -> CandidateContract:
    return CandidateContract(
        description=description,
        accuracy=float(np.mean(answers == labels)),
        own_accuracy=float(np.mean(own == labels)),
        images=len(labels),
    )


def other_contracts(contract: InputContract) -> Iterator[tuple[str, InputContract]]:
    """Contracts with another scaling or channel order than the given one, each with what differs and how to say it."""
    for channels in ("RGB", "BGR"):
        swapped = channels != contract.channels
        order = f"channels {channels} (--channels {channels.lower()})"
        if swapped:
            yield order, contract.model_copy(update={"channels": channels})
        for scaling in _SCALINGS if contract.dtype != "uint8" else ():
            step = 1 if channels == "RGB" else -1
            update = {"range": scaling.range, "mean": scaling.mean[::step], "std": scaling.std[::step]}
            options = _options(contract, update)
            if options:
                said = f"{scaling.name} ({options})"
                other = contract.model_copy(update={**update, "channels": channels})
                yield f"{order}, {said}" if swapped else said, other


def _orders(
    prefix: str, answers: Labels, own: Labels, labels: Labels, names: tuple[str, ...]
) -> Iterator[CandidateContract]:
    """The same answers under other orders of the classes, where the order differs from the one in use."""
    named = list(named_orders(names))
    for description, order in named:
        yield _scored(f"{prefix}classes in {description} (--classes names them)", order[answers], own, labels)
    fitted = fitted_order(answers[::2], labels[::2], len(names))
    if fitted is not None and not any(((fitted == order) | (fitted < 0)).all() for _, order in named):
        shown = f"classes in the order that half of the images show: {_shown(fitted, names)} (--classes names them)"
        yield _scored(f"{prefix}{shown}", fitted[answers[1::2]], own[1::2], labels[1::2])


def named_orders(names: tuple[str, ...]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Usual orders other than the given one: entry j is the class of the data that output j would mean."""
    numbers = range(len(names))
    orders = [("the string order of their names", sorted(numbers, key=lambda i: names[i]))]
    if all(name.isascii() and name.isdigit() and len(name) < _LONGEST_NUMBER for name in names):
        orders.append(("numeric order", sorted(numbers, key=lambda i: int(names[i]))))
    for description, order in orders:
        if order != list(numbers):
            yield description, np.array(order, dtype=np.int64)


def fitted_order(answers: NDArray[np.int64], labels: Labels, classes: int) -> NDArray[np.int64] | None:
    """The class that most often goes with each output; ``None`` where two share one, or nothing would change."""
    pairs, counts = np.unique(answers * classes + labels, return_counts=True)
    outputs, labels_seen = np.divmod(pairs, classes)
    # Where two classes go with an output equally often, its own one is taken: no order is made up.
    rising = np.lexsort((2 * counts + (outputs == labels_seen), outputs))
    order = np.full(classes, -1, dtype=np.int64)
    order[outputs[rising]] = labels_seen[rising]  # the last one of each output stays
    used = order[order >= 0]
    if len(np.unique(used)) != len(used) or bool((used == np.flatnonzero(order >= 0)).all()):
        return None
    return order


def _shown(order: NDArray[np.int64], names: tuple[str, ...]) -> str:
    moved = [place for place, number in enumerate(order) if number not in (place, -1)]
    parts = [f"output {place} is {names[order[place]]!r}" for place in moved[:_NAMED]]
    return ", ".join(parts) + (f" and {len(moved) - _NAMED} more" if len(moved) > _NAMED else "")
