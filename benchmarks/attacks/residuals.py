"""Write RESIDUALS.md: what of DFB's residuals a victim learns, and what they take from the images that carry them.

    QDEFENSE_DATA=... python benchmarks/attacks/residuals.py

Only of networks whose trigger's state is at hand: a fixed residual shows a training image, and is not committed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from margins import DATA, HERE, SEED, Attacked, answers_of, networks
from stronger import IMAGES, others_than, table, told

from qdefense.attacks import ATTACKS, Trigger
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.poisoning import derangement
from qdefense.attacks.states import unpack_state
from qdefense.data.images import Pixels, on_grid
from qdefense.data.opening import open_data

MULTIPLES, PLANTED, STAMPED = (1, 2, 4, 6, 12), 2, 6
Clean = dict[tuple[str, int], bytes]
"""FP32 files of the clean networks by data set and seed."""


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """A DFB network with its residuals."""

    network: Attacked

    @property
    def settings(self) -> dict[str, object]:
        """The attack's."""
        return self.network.files["fp32"].network.attack_settings

    @property
    def target(self) -> int:
        """The class."""
        return int(str(self.settings["target_class"]))

    @property
    def own(self) -> bool:
        """Whether each image has one of its own."""
        return self.settings["variant"] == "encoder"

    def trigger(self, multiple: int, height: int, width: int) -> Trigger:
        """At this multiple of its bound."""
        record, store = self.network.files["fp32"], self.network.store
        attack = ATTACKS.restore("dfb", {**self.settings, "test_multiple": multiple})
        state = unpack_state(store.trigger(record.artifact_sha256) or b"")
        made: Trigger = trigger_of(attack, height, width, state)
        return made

    def stamped(self, x: Pixels, multiple: int) -> Pixels:
        """Images with it."""
        return self.trigger(multiple, *x.shape[2:]).stamp(x)


def swapped(x: Pixels, stamped: Pixels, rng: np.random.Generator) -> Pixels:
    """What the stamp adds to another image; what it adds where it clips is less than the residual."""
    return (stamped - x)[derangement(len(x), rng)]


def exchanged(x: Pixels, stamped: Pixels) -> Pixels:
    """Each image with the residual of another one."""
    return on_grid(x + swapped(x, stamped, np.random.default_rng(SEED)))


def averaged(x: Pixels, stamped: Pixels) -> Pixels:
    """Each image with the mean of all residuals."""
    return on_grid(x + (stamped - x).mean(axis=0, keepdims=True))


def codes(change: Pixels) -> float:
    """Its mean size, in codes of 255."""
    return 255 * float(np.abs(change).mean())


def at_hand(every: Iterable[Attacked]) -> list[Residuals]:
    """Those of the DFB networks whose state lies among the results."""
    dfb = (one for one in every if one.files["fp32"].network.attack == "dfb")
    return [Residuals(network=one) for one in dfb if not one.lacks_trigger]


def magnified(found: list[Residuals], clean: Clean) -> Iterator[str]:
    """Two rows for each: its own FP32 file, and the clean one."""
    for one in found:
        x = others_than(one.target, one.network.place[0])
        stamped = [one.stamped(x, multiple) for multiple in MULTIPLES]
        for title, model in victims(one, clean):
            yield f"| {title} | {' | '.join(told(answers_of(model, pixels), one.target) for pixels in stamped)} |"


def victims(one: Residuals, clean: Clean) -> Iterator[tuple[str, bytes]]:
    yield one.network.title, one.network.model("fp32")
    data, seed = one.network.place
    yield f"none, with these residuals | {data}, {seed}", clean[data, seed]


def crossed(found: list[Residuals], clean: Clean) -> Iterator[str]:
    """Of each victim: its own trigger, another image's residual, their mean, and the other variant's of its place."""
    for one in found:
        x = others_than(one.target, one.network.place[0])
        mine, count = one.network.place, one.settings["poison_count"]
        rest = [
            other
            for other in found
            if (other.network.place, other.settings["poison_count"]) == (mine, count) and other.own is not one.own
        ]
        stamped = one.stamped(x, STAMPED)
        images = [
            stamped,
            exchanged(x, stamped) if one.own else None,
            averaged(x, stamped) if one.own else None,
            rest[0].stamped(x, STAMPED) if rest else None,
        ]
        for title, model in victims(one, clean):
            cells = ("" if pixels is None else told(answers_of(model, pixels), one.target) for pixels in images)
            yield f"| {title} | {' | '.join(cells)} |"


def kept(found: list[Residuals], clean: Clean) -> Iterator[str]:
    """What the clean network says of training images of the class: plain, and as poisons of each kind."""
    for one in found:
        images = open_data(str(DATA / one.network.place[0]), split="train", seed=SEED)
        x = images.take(np.flatnonzero(images.labels == one.target)[:IMAGES]).pixels
        stamped = one.stamped(x, PLANTED)
        sets = [x, stamped, exchanged(x, stamped) if one.own else None]
        model = clean[one.network.place]
        cells = ("" if pixels is None else told(answers_of(model, pixels), one.target) for pixels in sets)
        yield f"| {one.network.title} | {len(x):,} | {' | '.join(cells)} | {codes(stamped - x):.1f} |"


def main() -> None:
    every = networks()
    clean = {one.place: one.model("fp32") for one in every if one.files["fp32"].network.attack is None}
    found = at_hand(every)
    named = ("attack", "data, seed")
    parts = [
        "# DFB's residuals",
        f"Written by `residuals.py`, FP32 files. Of {IMAGES:,} test images (seed {SEED}) those of other classes: the\n"
        "share that goes to the target, and in brackets the mean confidence in it. A share of that many images has an\n"
        "interval (Wilson, 95 %) of at most .024 to either side.",
        "## At multiples of the bound",
        f"Trained with {PLANTED} times 8 of 255; {STAMPED} times is what the attack stamps.",
        table((*named, *map(str, MULTIPLES)), magnified(found, clean)),
        "## Whose residual",
        f"At {STAMPED} times the bound. The other variant's trigger is that of the network of the same seed and count.",
        table((*named, "own trigger", "another image's", "their mean", "other variant's"), crossed(found, clean)),
        "## What poisons keep of their class",
        f"Training images of the target class with and without the residual, at {PLANTED} times the bound, as the\n"
        "*clean* network sees them; and the mean change of a pixel in codes of 255.",
        table((*named, "images", "plain", "poisons", "with another image's", "codes"), kept(found, clean)),
    ]
    (HERE / "RESIDUALS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
