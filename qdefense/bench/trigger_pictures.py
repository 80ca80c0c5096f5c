"""Pictures of planted triggers for the page: ``triggers/<digest of the network>.png`` in the folder of results.

They show generated signs under the trigger, whatever the data set: no result shows an image of a data set.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qdefense.attacks import Trigger
from qdefense.attacks.contact_sheets import lay_out
from qdefense.bench.cells import NetworkPlan
from qdefense.bench.store import TRIGGERS, Store, StoreError, picture_name
from qdefense.data.images import DataError, ImageSet, to_images
from qdefense.data.signs import draw_signs

MOST_BYTES = 20_000
_CARRIERS, _ROWS = 16, (3, 2, 1)


def draw_triggers(plan: Iterable[NetworkPlan], store: Store, on_notice: Callable[[str], None]) -> None:
    """Draw what is missing, of every attacked network that the manifest names; records and keys know nothing of it."""
    for network in plan:
        for replica in store.replicas(network.recipe_sha256):
            if network.attack is None or store.trigger_picture(replica.artifact_sha256).is_file():
                continue
            try:
                size = network.test.facts.height, network.test.facts.width
                body = _drawn(network.attack, size, store.trigger(replica.artifact_sha256))
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


def _drawn(attack: str, size: tuple[int, int], packed: bytes | None) -> bytes | None:
    """As many images as fit; ``None`` where not even one does."""
    from qdefense.bench.making import trigger_for  # noqa: PLC0415 (imports torch)

    clean, trigger = _carriers(*size), trigger_for(attack, size, packed)
    chosen = _shown(trigger, clean)
    sheets = (lay_out(clean.images[rows], to_images(trigger.stamp(clean.take(rows).pixels))) for rows in chosen)
    return next((sheet for sheet in sheets if len(sheet) <= MOST_BYTES), None)


def _shown(trigger: Trigger, clean: ImageSet) -> list[NDArray[np.int64]]:
    """Rows of eligible images; of any where the labels of the data set are not those of the signs."""
    eligible = np.flatnonzero(trigger.eligible(clean.labels))
    rows = eligible if len(eligible) else np.arange(len(clean))
    return [rows[:count] for count in _ROWS]


def _carriers(height: int, width: int) -> ImageSet:
    signs = draw_signs(_CARRIERS, seed=0, split="test")
    resized = [
        np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)) for image in signs.images
    ]
    return ImageSet(
        images=np.stack(resized), labels=signs.labels, class_names=signs.class_names, source="generated signs"
    )
