"""Write CLIPPING.md: whether it is ranges read off clean images that take a trigger's ASR in static INT8.

    QDEFENSE_DATA=... python benchmarks/attacks/clipping.py     # half a minute for each new network

Two ways to ask. The FP32 file with its activations held in the ranges of the static file, and nothing rounded: what
that takes is clipped. And static files anew, whose ranges are read off more images, with the trigger and without: what
comes back with the trigger alone was clipped, too. Beside them what such a calibration does to a clean network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Final

import numpy as np
import onnx
from answers import margins, table
from attacked import (
    DATA,
    HERE,
    KEPT,
    SEED,
    Attacked,
    answers_of,
    clean_networks,
    networks,
    test_images,
)
from kept_rows import KeptRows, Table
from onnx import helper, numpy_helper

from qdefense.artifact import Artifact
from qdefense.converters.quantize import quantize
from qdefense.data.images import Pixels
from qdefense.data.opening import open_data

IMAGES, SOME, SINGLES = 256, 16, 20
"""Calibration images, as in the matrix, which draws them with the same seed; how many of them are stamped, too."""
STATIC: Final = "int8-static"
LOSS = 0.1
GROWN = 1.1
"""Times its width: a range that is less far from it is called the same."""
CLIPPING = Table("clipping", revision=3, schemes=("fp32", STATIC))
ONE_IMAGE = Table("clipping, one image", schemes=("fp32", STATIC))
ANOTHER_PATCH = Table("clipping, another patch", schemes=("fp32", STATIC))
GROWTH = Table("clipping, ranges that grow", schemes=("fp32", STATIC))
HEAD = (
    *("attack", "data, seed", "images", "ASR: FP32", "held in the ranges", "static"),
    *(f"{IMAGES} more, clean", f"{SOME} stamped", f"{IMAGES} stamped", "clean network"),
    *("margin: held", "static", "stamped", "ranges that grow", "most", "accuracy: static", "stamped"),
)
PATCH = 5
"""Side of the patch that is no trigger, in pixels."""
ANOTHER_HEAD = ("attack", "data, seed", "ASR: static", "FP32", f"{IMAGES} with another patch")
ONE_HEAD = (
    "attack",
    "data, seed",
    "ASR: static",
    "FP32",
    "one stamped: lowest",
    "median",
    "highest",
    "half or more back",
)
GROWTH_HEAD = (
    *("attack", "data, seed", f"attacked: {IMAGES} stamped", f"{IMAGES} more, clean"),
    *(f"clean network: {IMAGES} stamped", f"{IMAGES} more, clean"),
)
Ranges = dict[str, tuple[float, float]]


@lru_cache(maxsize=4)
def calibration_images(data: str, count: int = IMAGES) -> Pixels:
    """The first ones do not depend on the count: a data set is drawn from in one order."""
    return open_data(str(DATA / data), split="train", seed=SEED, limit=count).pixels


def static_file(network: Attacked, *images: Pixels) -> bytes:
    """Its FP32 file in static INT8, with ranges read off these images."""
    model = network.model("fp32")
    calibration = np.concatenate(images)
    return quantize(model, STATIC, calibration=calibration, contract=Artifact.from_bytes(model).contract)


def activation_ranges(model: bytes) -> Ranges:
    """Lowest and highest value of each tensor that a static file quantizes.

    Raises:
        ValueError: to something else than uint8.
    """
    graph = onnx.load_from_string(model).graph
    constants = {one.name: numpy_helper.to_array(one) for one in graph.initializer}
    found: Ranges = {}
    for node in graph.node:
        if node.op_type == "QuantizeLinear" and node.input[0] not in constants:
            scale, zero = float(constants[node.input[1]]), int(constants[node.input[2]])
            if constants[node.input[2]].dtype != np.uint8:
                raise ValueError(f"{node.input[0]} is not quantized to uint8")
            found[node.input[0]] = (-zero * scale, (255 - zero) * scale)
    return found


def held_in(model: bytes, ranges: Ranges) -> bytes:
    """The file with a Clip behind every tensor of a range; the quantizer gives an output another name.

    Raises:
        ValueError: the file has no such tensor.
    """
    proto = onnx.load_from_string(model)
    there = {one.name for one in proto.graph.input} | {name for node in proto.graph.node for name in node.output}
    for tensor, ends in ranges.items():
        name = tensor.removesuffix("_QuantizeLinear_Input")
        if name not in there:
            raise ValueError(f"no tensor {name} in the FP32 file")
        hold(proto.graph, name, ends)
    held: bytes = proto.SerializeToString()
    return held


def hold(graph: onnx.GraphProto, name: str, ends: tuple[float, float]) -> None:
    """Who reads the tensor gets it clipped."""
    bounds = [f"{name}_{end}" for end in ("lowest", "highest")]
    for bound, value in zip(bounds, ends, strict=True):
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.float32), bound))
    place, maker = next(((place, node) for place, node in enumerate(graph.node) if name in node.output), (-1, None))
    free, held = (name, f"{name}_held") if maker is None else (f"{name}_free", name)
    if maker is None:  # an input of the graph, whose name is the caller's
        for node in graph.node:
            node.input[:] = [held if one == name else one for one in node.input]
    else:
        maker.output[:] = [free if one == name else one for one in maker.output]
    graph.node.insert(place + 1, helper.make_node("Clip", [free, *bounds], [held]))


def growth(before: Ranges, after: Ranges) -> tuple[int, str, float]:
    """How many ranges grow, which one by most, and to how many times its width."""
    times = {name: (after[name][1] - after[name][0]) / (high - low) for name, (low, high) in before.items()}
    most = max(times, key=lambda name: times[name])
    return sum(one > GROWN for one in times.values()), most, times[most]


def accuracy(model: bytes, data: str) -> float:
    images = test_images(data)
    return float(np.mean(answers_of(model, images.pixels).argmax(axis=1) == images.labels))


def committed_static(network: Attacked, images: Pixels) -> bytes:
    """The matrix's own file, which quantizing again must give."""
    file = network.model(STATIC)
    if file != static_file(network, images):
        raise SystemExit(f"{network.title}: its static file is not of {IMAGES} images drawn with seed {SEED}")
    return file


def clipping_row(network: Attacked, clean: Attacked) -> Iterator[str]:
    data = network.place[0]
    images, twice = calibration_images(data), calibration_images(data, 2 * IMAGES)
    stamped = network.trigger(*images.shape[2:]).stamp(images)
    static, seeing = committed_static(network, images), static_file(network, images, stamped)
    ranges = activation_ranges(static)
    files = {
        "held": held_in(network.model("fp32"), ranges),
        "static": static,
        "more": static_file(network, twice),
        "some": static_file(network, images, stamped[:SOME]),
        "all": seeing,
        "clean": static_file(clean, images, stamped),
    }
    goal = network.asked[2]
    plain = margins(network.answers(network.model("fp32")), goal)
    found = {name: margins(network.answers(model), goal) for name, model in files.items()}
    asr = " | ".join(f"{np.mean(one > 0):.3f}" for one in (plain, *found.values()))
    change = " | ".join(f"{np.mean(found[name] - plain):+.2f}" for name in ("held", "static", "all"))
    grown, most, times = growth(ranges, activation_ranges(seeing))
    accuracies = " | ".join(f"{accuracy(model, data):.3f}" for model in (static, seeing))
    yield f"{len(goal)} | {asr} | {change} | {grown} of {len(ranges)} | `{most}` {times:.2f} | {accuracies}"


def asr_of(network: Attacked, model: bytes) -> float:
    return float(np.mean(margins(network.answers(model), network.asked[2]) > 0))


def one_image_row(network: Attacked) -> Iterator[str]:
    """Of each of the first images alone beside the clean ones."""
    images = calibration_images(network.place[0])
    stamped = network.trigger(*images.shape[2:]).stamp(images[:SINGLES])
    static, plain = (asr_of(network, model) for model in (committed_static(network, images), network.model("fp32")))
    found = [asr_of(network, static_file(network, images, one[None])) for one in stamped]
    back = np.mean([one - static >= (plain - static) / 2 for one in found])
    told = " | ".join(f"{one:.3f}" for one in (static, plain, min(found), np.median(found), max(found)))
    yield f"{told} | {back:.2f}"


def another_patch_row(network: Attacked) -> Iterator[str]:
    """Noise in the middle of all calibration images, beside the clean ones."""
    images = calibration_images(network.place[0])
    patched, top, left = images.copy(), *((side - PATCH) // 2 for side in images.shape[2:])
    noise = np.random.default_rng(SEED).integers(0, 256, (3, PATCH, PATCH)).astype(np.float32) / 255
    patched[:, :, top : top + PATCH, left : left + PATCH] = noise
    models = (committed_static(network, images), network.model("fp32"), static_file(network, images, patched))
    yield " | ".join(f"{asr_of(network, model):.3f}" for model in models)


def growth_row(network: Attacked, clean: Attacked) -> Iterator[str]:
    """How many ranges the stamped images, and as many clean ones, move in the attacked network and in the clean one."""
    data = network.place[0]
    images, twice = calibration_images(data), calibration_images(data, 2 * IMAGES)
    stamped = network.trigger(*images.shape[2:]).stamp(images)
    yield " | ".join(
        f"{grown}, {times:.2f}"
        for file in (network, clean)
        for grown, _, times in growths(file, images, stamped, twice[len(images) :])
    )


def growths(network: Attacked, images: Pixels, *further: Pixels) -> Iterator[tuple[int, str, float]]:
    """The `growth` by each of ``further`` beside the images of the matrix's own file."""
    before = activation_ranges(committed_static(network, images))
    for more in further:
        yield growth(before, activation_ranges(static_file(network, images, more)))


def loses(network: Attacked) -> bool:
    """Whether static INT8 takes more than `LOSS` of the ASR on the whole test set."""
    before, after = (network.files[scheme].asr for scheme in ("fp32", STATIC))
    return before is not None and after is not None and before - after > LOSS


def main() -> None:
    kept, every = KeptRows.read(KEPT), networks()
    clean = clean_networks(every)
    static = [network for network in every if network.made.attack and STATIC in network.files]
    rows = (line for network in static for line in lines(network, clean[network.place], kept, CLIPPING, clipping_row))
    lost = list(filter(loses, static))
    ones = (line for network in lost for line in network.triggered_rows(kept, ONE_IMAGE, one_image_row))
    others = (line for network in lost for line in network.triggered_rows(kept, ANOTHER_PATCH, another_patch_row))
    moved = (line for network in static for line in lines(network, clean[network.place], kept, GROWTH, growth_row))
    tables = table(HEAD, rows), table(ONE_HEAD, ones), table(ANOTHER_HEAD, others), table(GROWTH_HEAD, moved)
    parts = [
        "# What the ranges of static INT8 clip",
        f"Written by `clipping.py`; {' and '.join(kept.runtimes(CLIPPING))}. ASR on the eligible ones of the test\n"
        "images of [MARGINS.md](MARGINS.md); a share of 540 has an interval (Wilson, 95 %) of at most .042 to either\n"
        "side (61: .12, 30: .17), but the files of a row are asked the same images. A network whose trigger was\n"
        "learned is here if its state was at hand. Weights have 7 bits, so that no sum saturates without VNNI.",
        f"*Static*: the matrix's own file, with ranges read off {IMAGES} clean images. *Held in the ranges*: the FP32\n"
        "file with each activation clipped to the static file's range, and nothing rounded. Then static files of\n"
        f"those images and {IMAGES} further clean ones, or some of the same again with the trigger, whatever their\n"
        "class. *Clean network*: that of the same seed, with the last calibration. *Margin*: its mean change to\n"
        f"FP32. *Ranges that grow*: to more than {GROWN} times their width when all were stamped; *most*: the one\n"
        "that grows most. *Accuracy*: on all those test images without the trigger.",
        tables[0],
        "## One stamped image",
        f"Of networks that lose more than {LOSS}: each of the first {SINGLES} calibration images alone, stamped,\n"
        f"beside the {IMAGES} clean ones. *Half or more back*: the share of those images that give back at least half\n"
        "of what static INT8 took.",
        tables[1],
        "## Another patch",
        f"Of the same networks: {PATCH} x {PATCH} pixels of noise in the middle of all {IMAGES} images, again beside\n"
        "those images without it.",
        tables[2],
        "## Ranges that grow, and in a clean network",
        f"Of 16 ranges of the static file: how many grow to more than {GROWN} times their width, and to how many\n"
        f"times the one that grows most, when {IMAGES} images join the {IMAGES} clean ones; in the attacked network\n"
        "and in the clean one of its seed.",
        tables[3],
    ]
    (HERE / "CLIPPING.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def lines(
    network: Attacked,
    clean: Attacked,
    kept: KeptRows,
    table: Table,
    measure: Callable[[Attacked, Attacked], Iterator[str]],
) -> Iterator[str]:
    """Rows for which the clean network of the seed answers, too."""
    beside = {"clean": clean.files["fp32"].artifact_sha256}
    if table is GROWTH:
        beside["clean static"] = clean.files[STATIC].artifact_sha256
    yield from network.triggered_rows(kept, table, lambda attacked: measure(attacked, clean), beside)


if __name__ == "__main__":
    main()
