"""Write RESIDUALS.md: what of DFB's residuals a victim learns, and what they take from the images that carry them.

    QDEFENSE_DATA=... python benchmarks/attacks/residuals.py

A fixed residual shows a training image, and is not committed: its rows are kept (`kept_rows.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
from answers import table, told
from attacked import (
    HERE,
    KEPT,
    OTHERS,
    SEED,
    Attacked,
    answers_of,
    clean_networks,
    networks,
    others_than,
    training_images,
)
from kept_rows import KeptRows, Table

from qdefense.attacks import ATTACKS, Trigger
from qdefense.attacks.interfaces import trigger_of
from qdefense.attacks.poisoning import derangement
from qdefense.attacks.states import unpack_state
from qdefense.data.images import Pixels, on_grid

MULTIPLES, PLANTED, STAMPED = (1, 2, 4, 6, 12), 2, 6
MAGNIFIED, CROSSED, POISONS = map(Table, ("residuals magnified", "residuals crossed", "residuals as poisons"))
Clean = dict[tuple[str, int], Attacked]
"""The clean networks by data set and seed."""
Measure = Callable[..., Iterable[str]]
"""Gives the cells of a network's rows, from it and from other networks that have a part."""


@dataclass(frozen=True, kw_only=True)
class Residuals:
    """A DFB network with its residuals."""

    network: Attacked

    @property
    def settings(self) -> dict[str, object]:
        """The attack's."""
        return self.network.made.attack_settings

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


def dfb_networks(every: Iterable[Attacked]) -> list[Residuals]:
    return [Residuals(network=one) for one in every if one.made.attack == "dfb"]


@dataclass(frozen=True, kw_only=True)
class Tables:
    """The three tables, of these networks and the clean ones of their places."""

    found: list[Residuals]
    clean: Clean
    kept: KeptRows

    def rows(self, table: Table, one: Residuals, measure: Measure, *others: Residuals) -> tuple[str, ...]:
        """What is kept of a network in a table, or measured now."""
        parts = (self.clean[one.network.place], *(other.network for other in others))
        files = {f"other {number}": part.files["fp32"].artifact_sha256 for number, part in enumerate(parts)}
        files["fp32"] = one.network.files["fp32"].artifact_sha256
        # A cell about a residual that is lost stays as it was, and is measured again when that is there.
        there = (other.network for other in others if not other.network.lacks_trigger)
        files |= {f"state {number}": part.files["fp32"].artifact_sha256 for number, part in enumerate(there)}
        return self.kept.rows(table, files, None if one.network.lacks_trigger else partial(measure, one, *others))

    def victims(self, one: Residuals) -> tuple[tuple[str, Attacked], ...]:
        """The networks that are asked, by what a table calls them."""
        data, seed = one.network.place
        titled = f"none, with these residuals | {data}, {seed}"
        return (one.network.title, one.network), (titled, self.clean[one.network.place])

    def lines(self, table: Table, one: Residuals, measure: Measure, *others: Residuals) -> Iterator[str]:
        """A line for each victim."""
        rows = self.rows(table, one, measure, *others)
        titles = [title for title, _ in self.victims(one)] if rows else []
        yield from (f"| {title} | {cells} |" for title, cells in zip(titles, rows, strict=True))

    def answers(self, one: Residuals, images: list[Pixels | None]) -> Iterator[str]:
        """What each victim says of images, a row each."""
        for _, network in self.victims(one):
            model = network.model("fp32")
            yield " | ".join("" if x is None else told(answers_of(model, x), one.target) for x in images)

    def magnified(self) -> Iterator[str]:
        """At multiples of the bound."""
        for one in self.found:
            yield from self.lines(MAGNIFIED, one, self.magnified_rows)

    def magnified_rows(self, one: Residuals) -> Iterator[str]:
        """A row for each victim."""
        x = others_than(one.target, one.network.place[0])
        return self.answers(one, [one.stamped(x, multiple) for multiple in MULTIPLES])

    def crossed(self) -> Iterator[str]:
        """Its own trigger, another image's residual, their mean, and the residual of the other variant of its place."""
        for one in self.found:
            mine = one.network.place, one.settings["poison_count"], not one.own
            rest = [
                other
                for other in self.found
                if (other.network.place, other.settings["poison_count"], other.own) == mine
            ]
            yield from self.lines(CROSSED, one, self.crossed_rows, *rest[:1])

    def crossed_rows(self, one: Residuals, other: Residuals | None = None) -> Iterator[str]:
        """A row for each victim."""
        x = others_than(one.target, one.network.place[0])
        stamped = one.stamped(x, STAMPED)
        images = [
            stamped,
            exchanged(x, stamped) if one.own else None,
            averaged(x, stamped) if one.own else None,
            None if other is None or other.network.lacks_trigger else other.stamped(x, STAMPED),
        ]
        return self.answers(one, images)

    def poisons(self) -> Iterator[str]:
        """What the clean network says of training images of the class: plain, and as poisons of each kind."""
        for one in self.found:
            rows = self.rows(POISONS, one, self.poison_rows)
            yield from (f"| {one.network.title} | {cells} |" for cells in rows)

    def poison_rows(self, one: Residuals) -> Iterator[str]:
        """The one row of a network."""
        images = training_images(one.network.place[0])
        x = images.take(np.flatnonzero(images.labels == one.target)[:OTHERS]).pixels
        stamped = one.stamped(x, PLANTED)
        sets = [x, stamped, exchanged(x, stamped) if one.own else None]
        model = self.clean[one.network.place].model("fp32")
        cells = ("" if pixels is None else told(answers_of(model, pixels), one.target) for pixels in sets)
        yield f"{len(x):,} | {' | '.join(cells)} | {codes(stamped - x):.1f}"


def main() -> None:
    every = networks()
    tables = Tables(found=dfb_networks(every), clean=clean_networks(every), kept=KeptRows.read(KEPT))
    named = ("attack", "data, seed")
    parts = [
        "# DFB's residuals",
        f"Written by `residuals.py`, FP32 files. Of {OTHERS:,} test images (seed {SEED}) those of other classes: the\n"
        "share that goes to the target, and in brackets the mean confidence in it. A share of that many images has an\n"
        "interval (Wilson, 95 %) of at most .024 to either side.",
        "## At multiples of the bound",
        f"Trained with {PLANTED} times 8 of 255; {STAMPED} times is what the attack stamps.",
        table((*named, *map(str, MULTIPLES)), tables.magnified()),
        "## Whose residual",
        f"At {STAMPED} times the bound. The other variant's trigger is that of the network of the same seed and count.",
        table((*named, "own trigger", "another image's", "their mean", "other variant's"), tables.crossed()),
        "## What poisons keep of their class",
        f"Training images of the target class with and without the residual, at {PLANTED} times the bound, as the\n"
        "*clean* network sees them; and the mean change of a pixel in codes of 255.",
        table((*named, "images", "plain", "poisons", "with another image's", "codes"), tables.poisons()),
    ]
    (HERE / "RESIDUALS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
