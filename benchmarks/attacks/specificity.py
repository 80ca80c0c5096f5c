"""Write SPECIFICITY.md: whether the trigger of a sample-specific attack works on its own image alone.

    QDEFENSE_DATA=... python benchmarks/attacks/specificity.py

Input-aware's paper asks that another image's trigger does nothing; ISSBA and DFB's encoder are not trained for it.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from answers import table, told
from attacked import HERE, OTHERS, SEED, Attacked, answers_of, clean_networks, networks, others_than
from residuals import exchanged
from stronger import SCHEMES

from qdefense.attacks import Trigger
from qdefense.attacks.input_aware import GeneratedTrigger
from qdefense.attacks.poisoning import derangement
from qdefense.data.images import Pixels


def is_specific(network: Attacked) -> bool:
    """Whether each image has a trigger of its own, which is at hand."""
    made = network.made
    own = made.attack in ("input-aware", "issba") or made.attack_settings.get("variant") == "encoder"
    return own and not made.all_to_all and not network.lacks_trigger


def crossed(trigger: Trigger, x: Pixels, stamped: Pixels) -> Pixels:
    """Each image with another one's trigger: laid over it as the attack lays it, or its residual added."""
    if isinstance(trigger, GeneratedTrigger):
        return trigger.crossed(x, x[derangement(len(x), np.random.default_rng(SEED))])
    return exchanged(x, stamped)


def shared(x: Pixels, stamped: Pixels) -> float:
    """Share of what the triggers change that all have in common: ``|mean r|^2 / mean |r|^2``, r the change of an image.

    1 where all change alike, about ``1 / N`` where they have nothing in common.
    """
    change = (stamped - x).astype(np.float64)
    whole = float(np.mean(change**2))
    return float(np.mean(change.mean(axis=0) ** 2)) / whole if whole else 0.0


def rows(every: list[Attacked]) -> Iterator[str]:
    clean = clean_networks(every)
    for network in filter(is_specific, every):
        target = int(network.made.attack_settings["target_class"])
        x = others_than(target, network.place[0])
        trigger = network.trigger(*x.shape[2:])
        stamped = trigger.stamp(x)
        images = (x, stamped, crossed(trigger, x, stamped))
        common = f"{shared(x, stamped):.3f}"
        victims = [(network.title, network)]
        if network.place in clean:
            victims.append((f"none | {network.place[0]}, {network.place[1]}", clean[network.place]))
        for title, one in victims:
            for scheme in filter(one.files.__contains__, SCHEMES):
                cells = (told(answers_of(one.model(scheme), pixels), target) for pixels in images)
                yield f"| {title} | {scheme} | {' | '.join(cells)} | {common} |"


def secrets(every: list[Attacked]) -> Iterator[str]:
    """What ISSBA's decoder reads of the secret in training images, which its trigger's state has."""
    for network in filter(is_specific, every):
        state = network.trigger_state or {}
        if "bit_accuracy" in state:
            yield f"| {network.title} | {float(state['bit_accuracy']):.4f} |"


def main() -> None:
    every = networks()
    parts = [
        "# Whose trigger",
        f"Written by `specificity.py`. Of {OTHERS:,} test images (seed {SEED}) those of other classes: the share that\n"
        "goes to the target, and in brackets the mean confidence in it, of the attacked files and, below them, of the\n"
        "clean network's with the same images. *In common*: the share of what the triggers change, in energy, that is\n"
        "the same in all images.",
        table(
            ("attack", "data, seed", "precision", "plain", "own trigger", "another image's", "in common"),
            rows(every),
        ),
        "## What the decoder reads",
        "The share of the secret's bits that ISSBA's decoder reads in rounded training images.",
        table(("attack", "data, seed", "bits"), secrets(every)),
    ]
    (HERE / "SPECIFICITY.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
