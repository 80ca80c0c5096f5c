"""What the fidelity table holds: the networks, the schemes, and what is expected of each cell."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from qdefense.converters.quantize import Settings, settings_of

Expectation = Literal["bit-exact", "top-1 and the operator named", "top-1", "logits"]

GROUPED_BATCH = 16


@dataclass(frozen=True)
class Network:
    """One architecture of the zoo, small enough to be trained in about a minute of one core."""

    architecture: str
    width: int
    epochs: int
    seed: int = 0

    @property
    def name(self) -> str:
        """Its file's stem."""
        return f"{self.architecture}-w{self.width}"


# Cheap ones first. Fixed before the first of them was measured.
NETWORKS = (
    Network("vgg11", 16, 3),
    Network("resnet8", 16, 3),
    Network("convnext", 16, 6),
    Network("vit", 64, 5),
    Network("mobilenetv2", 8, 3),
    Network("resnet20", 16, 2),
    Network("preactresnet18", 16, 2),
)


FP32 = "fp32"


def schemes() -> dict[str, Settings | None]:
    """Every scheme of the converters by its name; FP32 has no settings."""
    static = (
        {"format": graph_format, "types": types, "per_channel": per_channel, "reduce_range": reduce_range}
        for graph_format, types, per_channel in product(("qdq", "qoperator"), ("u8s8", "s8s8", "u8u8"), (True, False))
        for reduce_range in ((False,) if types == "u8u8" else (True, False))
    )
    weight_only = ({"block_size": block, "symmetric": flag} for block, flag in product((None, 16, 32), (True, False)))
    every = (
        *(settings_of("int8-static", **asked) for asked in static),
        settings_of("int8-static", percentile=99.9),
        settings_of("int8-dynamic"),
        *(settings_of("int8-dynamic", types="u8s8", reduce_range=reduced) for reduced in (True, False)),
        *(settings_of("int4", **asked) for asked in weight_only),
        settings_of("int4-a8"),
        settings_of("int4-a8", block_size=32, symmetric=False),
    )
    return {FP32: None} | {settings.name: settings for settings in every}


def batches(settings: Settings | None) -> tuple[int | None, ...]:
    """The session's batches; ``None`` is the one that `profile_for` chooses."""
    dynamic = settings is not None and settings.scheme == "int8-dynamic"
    return (1, GROUPED_BATCH) if dynamic else (None,)


def expectation(settings: Settings | None, inexact: dict[str, int]) -> Expectation:
    """Which of the issue's marks a file has to reach.

    ``inexact`` are the float operators before a Quantize of its dumped graph that two implementations may round
    differently.
    """
    if settings is None:
        return "top-1 and the operator named"
    if settings.scheme == "int8-dynamic":
        return "top-1"
    if settings.scheme == "int4":
        return "logits"
    exact_types = settings.scheme == "int8-static" and settings.types in ("u8s8", "u8u8")
    return "bit-exact" if exact_types and not inexact else "top-1 and the operator named"


MIN_TOP1 = 0.998
MAX_RELATIVE_LOGIT_DIFFERENCE = 1e-5


def passes(record: dict[str, Any]) -> bool:
    """Whether a measured cell reaches its mark."""
    expected, same = record["expectation"], record["bit_exact_rows"] == 1
    if expected == "bit-exact":
        return bool(same)
    if expected == "top-1":
        return bool(record["top1_agreement"] == 1)
    if expected == "logits":
        return bool(record["relative_difference"] <= MAX_RELATIVE_LOGIT_DIFFERENCE)
    named = same or record["scheme"] == FP32 or record["parts_at"] is not None
    return bool(record["top1_agreement"] >= MIN_TOP1 and named)
