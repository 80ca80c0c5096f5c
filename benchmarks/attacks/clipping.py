"""Write CLIPPING.md: whether it is ranges read off clean images that take a trigger's ASR in static INT8.

    QDEFENSE_DATA=... python benchmarks/attacks/clipping.py     # some seconds for each new network

Each network is quantized again with ranges read off the same clean images and, once more, some or all of them with the
trigger on them. What that gives back was clipped; what it does not was taken by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import onnx
from kept_rows import KeptRows, Table
from margins import DATA, HERE, KEPT, SEED, Attacked, attacked_networks, margins
from onnx import numpy_helper
from stronger import table

from qdefense.artifact import Artifact
from qdefense.converters.quantize import quantize
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data

IMAGES = 256
"""As in the matrix, which draws them with the same seed."""
STATIC = "int8-static"
SEEN = (1, 16, IMAGES)
"""How many of them come again with the trigger."""
CLIPPING = Table("clipping", 2)
HEAD = (
    "attack",
    "data, seed",
    "images",
    "ASR: FP32",
    "static",
    *(f"{count} seen" for count in SEEN),
    "change of the margin: static",
    f"{IMAGES} seen",
    "ranges that grow",
    "most",
)


@lru_cache(maxsize=2)
def calibration_images(data: str) -> Pixels:
    return open_data(str(DATA / data), split="train", seed=SEED, limit=IMAGES).pixels


def static_file(network: Attacked, images: Pixels) -> bytes:
    """Its FP32 file in static INT8, with ranges read off these images."""
    model = network.model("fp32")
    return quantize(model, STATIC, calibration=images, contract=Artifact.from_bytes(model).contract)


def activation_scales(model: bytes) -> dict[str, float]:
    """Scale of each tensor that is quantized: a step of its 255, so that a range is in proportion."""
    graph = onnx.load_from_string(model).graph
    constants = {one.name: one for one in graph.initializer}
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "QuantizeLinear"}
    return {
        name: float(numpy_helper.to_array(constants[scale]))
        for name, scale in scales.items()
        if scale in constants and name not in constants
    }


def growth(before: dict[str, float], after: dict[str, float]) -> tuple[int, str, float]:
    """How many ranges grow by more than a tenth, and which one by most, and to how many times its size."""
    ratios = {name: after[name] / scale for name, scale in before.items()}
    most = max(ratios, key=lambda name: ratios[name])
    return sum(ratio > 1.1 for ratio in ratios.values()), most, ratios[most]


def row(network: Attacked) -> Iterator[str]:
    images = calibration_images(network.place[0])
    trigger = network.trigger(*images.shape[2:])
    blind, committed = static_file(network, images), network.model(STATIC)
    if blind != committed:
        raise SystemExit(f"{network.title}: its static file is not of {IMAGES} images drawn with seed {SEED}")
    seeing = [static_file(network, np.concatenate([images, trigger.stamp(images[:count])])) for count in SEEN]
    goal = network.asked[2]
    found = [margins(network.answers(model), goal) for model in (network.model("fp32"), blind, *seeing)]
    asr = " | ".join(f"{np.mean(one > 0):.3f}" for one in found)
    change = " | ".join(f"{np.mean(one - found[0]):+.2f}" for one in (found[1], found[-1]))
    grown, most, times = growth(activation_scales(blind), activation_scales(seeing[-1]))
    yield f"{len(goal)} | {asr} | {change} | {grown} of {len(activation_scales(blind))} | `{most}` {times:.2f}"


def main() -> None:
    kept = KeptRows.read(KEPT)
    static = (network for network in attacked_networks() if STATIC in network.files)
    rows = (line for network in static for line in network.triggered_rows(kept, CLIPPING, row))
    parts = [
        "# What clean calibration clips",
        f"Written by `clipping.py`. *Static*: the file that the matrix has, whose ranges are read off {IMAGES} clean\n"
        "images (made again here, to the byte). *Seen*: the same images, and so many of them once more with the\n"
        "trigger. What that gives back of the ASR was clipped; what it does not was rounded away. Margins and test\n"
        "images are those of [MARGINS.md](MARGINS.md), their change is against FP32. *Ranges that grow*: quantized\n"
        "activations whose range is more than 1.1 times as wide when the trigger was seen on all; *most*: the one\n"
        "that grows most, and to how many times its width. A network whose trigger was learned is here if its state\n"
        "was at hand.",
        table(HEAD, rows),
    ]
    (HERE / "CLIPPING.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
