"""Why a precision takes a trigger's ASR: the margins of triggered images, and which layer's weights move them.

Of a source-specific attack also what its files answer to plain images of the source class, which its poisons may be
hardly told from.

    QDEFENSE_DATA=... python benchmarks/attacks/margins.py      # MARGINS.md, a minute of one core for each new network

The margin of a triggered image is the logit of the class that the attacker wants, less the highest other one: it is
above 0 where the attack succeeds. INT4 weights are rounded one layer at a time in the FP32 file: to nearest, as the
INT4 file has them, and at random, each to the level above or below by its distance, which is right on average.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache, partial

import numpy as np
import onnx
from answers import Margins, margins, mean_confidence
from attacked import (
    HERE,
    IMAGES,
    KEPT,
    SEED,
    Attacked,
    all_test_images,
    answers_of,
    clean_networks,
    networks,
    test_images,
    training_images,
)
from kept_rows import KeptRows, Table
from numpy.typing import NDArray
from onnx import numpy_helper

from qdefense.attacks.interfaces import SourceSpecific
from qdefense.data.images import Labels, Pixels

SCHEMES = ("fp32", "int8-static", "int8-dynamic", "int4")
DRAWS = 12
LAYERED = ("badnets", "blended", "lsp", "wanet")
"""Attacks whose INT4 files are taken apart, on both data sets."""
SHOWN = 3
"""Classes of bystanders that are named."""
LEVELS = 7
"""Highest code of symmetric INT4."""

MARGINS_HEAD = (
    "| attack | data, seed | precision | images | ASR | mean q | 10 % | median | 90 % | change | sd | true class |",
    "|---|---|---|---|---|---|---|---|---|---|---|---|",
)
PLAIN_HEAD = (
    "| attack | data, seed | precision | images | margin: 10 % | median | 90 % | q source | q target | to the target |",
    "|---|---|---|---|---|---|---|---|---|---|",
)
BYSTANDERS_HEAD = ("| attack | data, seed | highest | second | third | median |", "|---|---|---|---|---|---|")
SIZES_HEAD = (
    "| attack | data, seed | classes | training images of each | test images | ASR | clean accuracy |",
    "|---|---|---|---|---|---|---|",
)
MOVED_HEAD = (
    "| attack | data, seed | images | number | answered truly | next class first | second | its probability |",
    "|---|---|---|---|---|---|---|---|",
)
LAYERS_HEAD = (
    "| attack | data, seed | layer | error | ASR FP32 | only it | all but it | change | at random: mean | sd | range |",
    "|---|---|---|---|---|---|---|---|---|---|---|",
)

MARGINS, PLAIN = Table("margins", schemes=SCHEMES), Table("plain", schemes=SCHEMES)
BYSTANDERS, SIZES, LAYERS = Table("bystanders"), Table("class sizes"), Table("layers", schemes=("fp32", "int4"))
MOVED = Table("to the next class")

Weights = NDArray[np.float32]


def rounded(weights: Weights, *, rng: np.random.Generator | None = None, widened: Weights | float = 1.0) -> Weights:
    """Weights of one layer ``(C, ...)`` on symmetric INT4 levels per channel; to nearest, or at random with ``rng``.

    The highest level is ``widened`` times a channel's largest weight.
    """
    scale = np.abs(weights).max(axis=tuple(range(1, weights.ndim)), keepdims=True) / LEVELS * widened
    codes = weights / scale
    whole = np.round(codes) if rng is None else np.floor(codes + rng.random(codes.shape))
    found: Weights = (np.clip(whole, -LEVELS, LEVELS) * scale).astype(np.float32)
    return found


@lru_cache(maxsize=2)
def images_of_class(data: str, source: int) -> Pixels:
    """All test images of one class."""
    images = all_test_images(data)
    return images.take(np.flatnonzero(images.labels == source)).pixels


def margin_rows(network: Attacked) -> Iterator[str]:
    _, labels, goal = network.asked
    first: Margins | None = None
    for scheme in filter(network.files.__contains__, SCHEMES):
        logits = network.answers(network.model(scheme))
        here = margins(logits, goal)
        first = here if first is None else first
        low, middle, high = np.quantile(here, [0.1, 0.5, 0.9])
        missed = here <= 0
        truly = f"{np.mean(logits[missed].argmax(axis=1) == labels[missed]):.2f}" if missed.any() else ""
        spread, change = f"{low:.2f} | {middle:.2f} | {high:.2f}", here - first
        yield (
            f"{scheme} | {len(here)} | {1 - missed.mean():.3f} "
            f"| {mean_confidence(logits, goal):.3f} | {spread} | {change.mean():+.2f} | {change.std():.2f} | {truly}"
        )


def plain_lines(every: list[Attacked], kept: KeptRows) -> Iterator[str]:
    """Of each source-specific network, and before it of the clean one, where that has not been asked of its classes."""
    clean = clean_networks(every)
    asked: set[tuple[str, int, int, int]] = set()
    for network in every:
        settings = network.made.attack_settings
        if settings.get("source_class") is None:
            continue
        classes = int(settings["source_class"]), int(settings["target_class"])
        if (*network.place, *classes) not in asked and network.place in clean:
            asked.add((*network.place, *classes))
            yield from plain_lines_of(clean[network.place], kept, *classes)
        yield from plain_lines_of(network, kept, *classes)


def plain_lines_of(network: Attacked, kept: KeptRows, source: int, target: int) -> Iterator[str]:
    table = replace(PLAIN, name=f"{PLAIN.name}, {source} to {target}")
    yield from network.rows(kept, table, partial(plain_rows, source=source, target=target))


def plain_rows(network: Attacked, source: int, target: int) -> Iterator[str]:
    images = images_of_class(network.place[0], source)
    for scheme in filter(network.files.__contains__, SCHEMES):
        logits = answers_of(network.model(scheme), images)
        low, middle, high = np.quantile(logits[:, source].astype(np.float64) - logits[:, target], [0.1, 0.5, 0.9])
        sure = [mean_confidence(logits, np.full(len(images), k)) for k in (source, target)]
        yield (
            f"{scheme} | {len(images)} | {low:.2f} | {middle:.2f} | {high:.2f} "
            f"| {sure[0]:.3f} | {sure[1]:.3f} | {np.mean(logits.argmax(axis=1) == target):.3f}"
        )


def bystander_lines(every: list[Attacked], kept: KeptRows) -> Iterator[str]:
    for network in every:
        if network.made.attack_settings.get("source_class") is not None:  # others have no bystanders
            yield from network.triggered_rows(kept, BYSTANDERS, bystander_row)


def bystander_row(network: Attacked) -> Iterator[str]:
    """The classes that a source-specific trigger misleads most, in the FP32 file; nothing of any other trigger."""
    images = all_test_images(network.place[0])
    trigger = network.trigger(*images.images.shape[1:3])
    if not isinstance(trigger, SourceSpecific):
        return
    model, goal = network.model("fp32"), trigger.goal(images.labels)
    plain, stamped = (answers_of(model, x).argmax(axis=1) for x in (images.pixels, trigger.stamp(images.pixels)))
    rates = misled_by_class(plain, stamped, goal, images.labels, trigger.bystanders(images.labels))
    worst = sorted(rates, key=lambda label: -rates[label])[:SHOWN]
    cells = (f"{images.class_names[label]} {rates[label]:.3f}" for label in worst)
    yield f"{' | '.join(cells)} | {np.median(list(rates.values())):.3f}"


def misled_by_class(
    plain: Labels, stamped: Labels, goal: Labels, labels: Labels, bystanders: NDArray[np.bool_]
) -> dict[int, float]:
    """FPR of each class of bystanders: answers with the trigger that are the attacker's class, and are not without."""
    misled = (stamped == goal) & (plain != goal)
    return {int(label): float(misled[labels == label].mean()) for label in np.unique(labels[bystanders])}


def size_lines(every: list[Attacked], kept: KeptRows) -> Iterator[str]:
    for network in every:
        if network.made.all_to_all:
            yield from network.triggered_rows(kept, SIZES, size_rows)


def size_rows(network: Attacked) -> Iterator[str]:
    """All-to-all on thirds of the classes by their number of training images; nothing where they have equally many."""
    images = all_test_images(network.place[0])
    trigger, model = network.trigger(*images.images.shape[1:3]), network.model("fp32")
    counts = np.bincount(training_images(network.place[0]).labels, minlength=len(images.class_names))
    if np.ptp(counts) == 0:
        return
    plain, stamped = (answers_of(model, x).argmax(axis=1) for x in (images.pixels, trigger.stamp(images.pixels)))
    right, led = plain == images.labels, stamped == trigger.goal(images.labels)
    for third in np.array_split(np.argsort(counts, kind="stable"), 3):
        mine = np.isin(images.labels, third)
        sizes = f"{counts[third].min():,} to {counts[third].max():,}"
        yield f"{len(third)} | {sizes} | {mine.sum():,} | {led[mine].mean():.3f} | {right[mine].mean():.3f}"


def moved_rows(network: Attacked) -> Iterator[str]:
    """How near an all-to-all trigger brings an image to the next class, whether it gets there or not."""
    images = test_images(network.place[0])
    trigger, model = network.trigger(*images.images.shape[1:3]), network.model("fp32")
    goal, rows = trigger.goal(images.labels), np.arange(len(images))
    for what, pixels in (("plain", images.pixels), ("with the trigger", trigger.stamp(images.pixels))):
        logits = answers_of(model, pixels)
        places = (logits > logits[rows, goal][:, None]).sum(axis=1)
        truly = np.mean(logits.argmax(axis=1) == images.labels)
        sure = mean_confidence(logits, goal)
        first, second = (np.mean(places == place) for place in (0, 1))
        yield f"{what} | {len(images)} | {truly:.3f} | {first:.3f} | {second:.3f} | {sure:.3f}"


def layers(model: bytes) -> dict[str, Weights]:
    """Weights by the name of their initializer: of every layer that INT4 quantizes."""
    graph = onnx.load_from_string(model).graph
    used = {node.input[1] for node in graph.node if node.op_type in ("Conv", "Gemm", "MatMul")}
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in used}


def with_weights(model: bytes, changed: dict[str, Weights]) -> bytes:
    proto = onnx.load_from_string(model)
    for tensor in proto.graph.initializer:
        if tensor.name in changed:
            tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
    written: bytes = proto.SerializeToString()
    return written


def is_layered(network: Attacked) -> bool:
    """Whether its INT4 file is taken apart."""
    made = network.made
    usual = made.seed == SEED and not made.all_to_all
    rare = made.attack_settings.get("poison_count") is not None
    return made.attack in LAYERED and usual and not rare and "int4" in network.files


def layer_rows(network: Attacked) -> Iterator[str]:
    model, goal = network.model("fp32"), network.asked[2]
    weights, rng = layers(model), np.random.default_rng(SEED)
    plain = margins(network.answers(model), goal)
    nearest = {name: rounded(values) for name, values in weights.items()}
    together = network.answers(with_weights(model, nearest))
    if not np.allclose(together, network.answers(network.model("int4")), rtol=0, atol=1e-3):
        raise SystemExit(f"{network.title}: all layers rounded are not the INT4 file")
    for number, (name, values) in enumerate(weights.items()):

        def moved(changed: Weights, name: str = name) -> Margins:
            return margins(network.answers(with_weights(model, {name: changed})), goal)

        alone = moved(nearest[name])
        rest = {other: layer for other, layer in nearest.items() if other != name}
        without = margins(network.answers(with_weights(model, rest)), goal)
        draws = [float(np.mean(moved(rounded(values, rng=rng)) - plain)) for _ in range(DRAWS)]
        error = np.linalg.norm(nearest[name] - values) / np.linalg.norm(values)
        asr = " | ".join(f"{np.mean(found > 0):.3f}" for found in (plain, alone, without))
        yield (
            f"{number}: {' x '.join(map(str, values.shape))} | {error:.3f} | {asr} "
            f"| {np.mean(alone - plain):+.2f} | {np.mean(draws):+.2f} | {np.std(draws):.2f} "
            f"| {min(draws):+.1f} to {max(draws):+.1f}"
        )


def page(every: list[Attacked], kept: KeptRows) -> Iterator[str]:
    attacked = [network for network in every if network.made.attack]
    yield "# Margins of triggered images"
    tables = "\n".join(
        (*MARGINS_HEAD, *(line for one in attacked for line in one.triggered_rows(kept, MARGINS, margin_rows)))
    )
    yield (
        "Written by `QDEFENSE_DATA=DIR python benchmarks/attacks/margins.py` from the files in `results/models`, whose "
        f"digests `results/manifest.json` has. {IMAGES} test images drawn with seed {SEED}, of which the eligible ones "
        f"carry the trigger; {' and '.join(kept.runtimes(MARGINS))}."
    )
    yield (
        "The margin is the logit of the attacker's class less the highest other one, *q* the probability of that "
        "class. *Change* is against the FP32 file, image by image: its mean says what the precision does to the "
        "trigger, its standard deviation how differently from image to image. *True class*: the share of the misses "
        "that are answered as if there were no trigger. A network whose trigger was learned is here if it was measured "
        "while the state was at hand; `kept_rows.json` has its rows since."
    )
    yield tables
    yield "## Plain images of the source class"
    yield (
        "All test images of the class that a source-specific attack takes its poisons from, without the trigger. The "
        "margin is the logit of their class less that of the attacker's; the clean network's comes first."
    )
    yield "\n".join((*PLAIN_HEAD, *plain_lines(every, kept)))
    yield "## Which bystanders a source-specific trigger misleads"
    yield (
        "FPR by class on all test images, FP32: the highest ones, and the median over the classes that are neither "
        "source nor target."
    )
    yield "\n".join((*BYSTANDERS_HEAD, *bystander_lines(attacked, kept)))
    yield "## All-to-all, and how many images a class has"
    yield (
        "Poisons are drawn from all images alike, so that a class of few images has few. Thirds of the classes by "
        "their training images; all test images, FP32."
    )
    yield "\n".join((*SIZES_HEAD, *size_lines(attacked, kept)))
    yield f"How near the next class comes: {IMAGES} test images, FP32."
    to_all = (network for network in attacked if network.made.all_to_all)
    yield "\n".join((*MOVED_HEAD, *(line for one in to_all for line in one.triggered_rows(kept, MOVED, moved_rows))))
    yield "## INT4, one layer at a time"
    yield (
        "Only this layer's weights are on INT4 levels, or all but this layer's; rounded to nearest, as in the INT4 "
        f"file, or {DRAWS} times at random (generator seed {SEED}). *Error* is the norm of what nearest rounding "
        "changes, relative to the weights' own. The change is the mean over the images, the standard deviation is over "
        "the draws."
    )
    layered = filter(is_layered, attacked)
    yield "\n".join((*LAYERS_HEAD, *(line for one in layered for line in one.triggered_rows(kept, LAYERS, layer_rows))))


def main() -> None:
    parts = page(networks(), KeptRows.read(KEPT))
    (HERE / "MARGINS.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
