"""Pictures of planted triggers for the page: ``triggers/<digest of the network>.png`` in the folder of results.

They show generated signs under the trigger, and as the attack poisons them, whatever the data set: no result shows an
image of a data set. Where the trigger itself shows a training image, there is no picture of it; where poisons take a
trigger or a network that is learned first, none of them is shown.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdefense.attacks import ATTACKS, Attack, DataAttack, PoisonedSet, Trigger
from qdefense.attacks.contact_sheets import PoisonBlock, lay_out, poison_block
from qdefense.attacks.interfaces import with_inner
from qdefense.attacks.poisoning import only_counts_classes
from qdefense.attacks.states import unpack_state
from qdefense.bench.cells import NetworkPlan
from qdefense.bench.store import TRIGGERS, Store, StoreError, picture_name
from qdefense.data.images import DataError, ImageSet, to_images
from qdefense.data.signs import draw_signs

MOST_BYTES = 20_000
_CARRIERS, _POISONED, _ROWS = 16, 400, (3, 2, 1)


def draw_triggers(plan: Iterable[NetworkPlan], store: Store, on_notice: Callable[[str], None]) -> None:
    """Draw what is missing, of every attacked network that the manifest names; records and keys know nothing of it."""
    for network in plan:
        if network.attack is None or network.trigger_shows_images:
            continue
        for replica in store.replicas(network.recipe_sha256):
            if store.trigger_picture(replica.artifact_sha256).is_file():
                continue
            try:
                facts = network.test.facts
                size = facts.height, facts.width
                body = _drawn(network.attack, size, store.trigger(replica.artifact_sha256), facts.classes)
            except (DataError, StoreError) as error:
                on_notice(f"{network.title}: no picture of its trigger: {error}")
                continue
            if body is not None:
                store.add_trigger_picture(replica.artifact_sha256, body)


def read_trigger_pictures(folder: Path) -> Mapping[str, str]:
    """Base64 PNGs by file name; larger ones than are written here are left out."""
    found = sorted((folder / TRIGGERS).glob("*.png"))
    return {
        path.name: base64.b64encode(path.read_bytes()).decode()
        for path in found
        if path.is_file() and path.stat().st_size <= MOST_BYTES
    }


def picture_of(pictures: Mapping[str, str], artifact_sha256: str | None) -> str | None:
    """That of a network, if there is one."""
    return None if artifact_sha256 is None else pictures.get(picture_name(artifact_sha256))


def _drawn(attack: str, size: tuple[int, int], packed: bytes | None, classes: int) -> bytes | None:
    """As many images as fit, with poisons where there are any and they fit too; ``None`` where not even one does."""
    from qdefense.bench.making import trigger_for  # noqa: PLC0415 (imports torch)

    clean, trigger = _carriers(_CARRIERS, size), trigger_for(attack, size, packed)
    chosen = _shown(trigger, clean)
    learned = packed is not None and not only_counts_classes(unpack_state(packed))
    poisons = None if learned else _poisons(ATTACKS.create(attack), size, classes)
    sheets = (
        lay_out(clean.images[rows], to_images(trigger.stamp(clean.take(rows).pixels)), block)
        for block in ([None] if poisons is None else [poisons, None])
        for rows in chosen
    )
    return next((sheet for sheet in sheets if len(sheet) <= MOST_BYTES), None)


def _shown(trigger: Trigger, clean: ImageSet) -> list[NDArray[np.int64]]:
    """Rows of eligible images; of any where the labels of the data set are not those of the signs."""
    eligible = np.flatnonzero(trigger.eligible(clean.labels))
    rows = eligible if len(eligible) else np.arange(len(clean))
    return [rows[:count] for count in _ROWS]


def _poisons(attack: Attack, size: tuple[int, int], classes: int) -> PoisonBlock | None:
    """Of signs that are labelled as the attack's classes and two others in turn; ``None`` where it learns before."""
    named = list(with_inner(attack))
    if any("surrogate" in getattr(one, "needs", ()) for one in named):
        return None
    signs = _carriers(_POISONED, size)
    if not isinstance(attack, DataAttack):
        return poison_block(PoisonedSet(images=signs, poison_indices=np.empty(0, np.int64)), made_in_training=True)
    told = {getattr(one, role) for one in named for role in ("source_class", "target_class") if hasattr(one, role)}
    others = [label for label in range(classes) if label not in told]
    labels = np.resize(np.array([*sorted(told), *others[:2]], dtype=np.int64), len(signs))
    try:
        relabelled = replace(signs, labels=labels, class_names=tuple(f"class {label}" for label in range(classes)))
        return poison_block(attack.poison(relabelled, np.random.default_rng(0)), most=3)
    except DataError:  # more poisons than signs, or no such class
        return None


@lru_cache(maxsize=2)
def _carriers(count: int, size: tuple[int, int]) -> ImageSet:
    height, width = size
    signs = draw_signs(count, seed=0, split="test")
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)) for image in signs.images
    ]
    return replace(signs, images=np.stack(resized), source="generated signs")
