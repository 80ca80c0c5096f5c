"""A trigger to look at: its mask, the trigger alone, and a clean image without and with it."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image

from qdefense.data.images import Images, Pixels, to_images
from qdefense.defenses.inversion import MaskedPattern
from qdefense.findings import TriggerPicture


def picture_trigger(trigger: MaskedPattern, target_class: int, example: Pixels) -> TriggerPicture:
    """Draw a trigger, alone (on black) and on ``example: (3, H, W) float32 in [0, 1]``, a clean image of another class.

    The stamped pixels are those that the session was given: the same stamp, rounded to the uint8 grid.
    """
    alone, stamped = to_images(trigger.stamp(np.stack([np.zeros_like(example), example])))
    mask, clean = to_images(trigger.mask[None]), to_images(example[None])
    return TriggerPicture(
        target_class=target_class,
        trigger_id=trigger.trigger_id,
        mask_png=_png(mask[0, :, :, 0]),
        trigger_png=_png(alone),
        example_png=_png(clean[0]),
        stamped_png=_png(stamped),
    )


def _png(pixels: Images) -> str:
    body = io.BytesIO()
    Image.fromarray(pixels).save(body, format="PNG")
    return base64.b64encode(body.getvalue()).decode()
