"""What the fidelity table holds: the networks, the schemes, and what is expected of each cell."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

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
    Network("resnet8", 16, 3),
    Network("vit", 64, 5),
    Network("convnext", 16, 5),
    Network("vgg11", 16, 3),
    Network("mobilenetv2", 8, 4),
    Network("resnet20", 16, 3),
    Network("preactresnet18", 16, 3),
)


@dataclass(frozen=True)
class Scheme:
    """One way to quantize: its name, and the settings that `quantize` takes."""

    name: str
    scheme: str | None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def calibrated(self) -> bool:
        """Whether it needs images."""
        return self.scheme in ("int8-static", "int4-a8")

    @property
    def batches(self) -> tuple[int | None, ...]:
        """The session's batches; ``None`` is the one that `profile_for` chooses."""
        return (1, GROUPED_BATCH) if self.scheme == "int8-dynamic" else (None,)


def schemes() -> tuple[Scheme, ...]:
    """Every scheme of the converters."""
    return (Scheme("fp32", None), *_static(), *_dynamic(), *_weight_only(), *_int4_a8())


def _static() -> Iterator[Scheme]:
    for graph_format in ("qdq", "qoperator"):
        for types in ("u8s8", "s8s8", "u8u8"):
            for per_channel in (True, False):
                for reduce_range in (True, False):
                    yield _static_scheme(graph_format, types, per_channel, reduce_range)
    yield _static_scheme("qdq", "u8s8", True, True, method="percentile")


def _static_scheme(
    graph_format: str, types: str, per_channel: bool, reduce_range: bool, method: str = "minmax"
) -> Scheme:
    words = (
        "int8-static",
        graph_format,
        types,
        "per channel" if per_channel else "per tensor",
        "reduced" if reduce_range else "full range",
        *(() if method == "minmax" else (method,)),
    )
    settings = {
        "format": graph_format,
        "types": types,
        "per_channel": per_channel,
        "reduce_range": reduce_range,
        "method": method,
    }
    return Scheme(" ".join(words), "int8-static", settings)


def _dynamic() -> Iterator[Scheme]:
    for weights in ("u8", "s8"):
        yield Scheme(f"int8-dynamic {weights}", "int8-dynamic", {"weights": weights})


def _weight_only() -> Iterator[Scheme]:
    for block in (None, 16, 32):
        for symmetric in (True, False):
            words = (
                "int4",
                "per channel" if block is None else f"block {block}",
                "symmetric" if symmetric else "asymmetric",
            )
            yield Scheme(" ".join(words), "int4", {"block": block, "symmetric": symmetric})


def _int4_a8() -> Iterator[Scheme]:
    yield Scheme("int4-a8", "int4-a8")


def expectation(scheme: str, types: str | None, inexact: dict[str, int]) -> Expectation:
    """Which of the issue's marks a file has to reach.

    ``inexact`` are the float operators before a Quantize of its dumped graph that two implementations may round
    differently.
    """
    if scheme == "int8-dynamic":
        return "top-1"
    if scheme == "int4":
        return "logits"
    exact_types = scheme == "int8-static" and types in ("u8s8", "u8u8")
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
    named = same or record["scheme"] == "fp32" or record["parts_at"] is not None
    return bool(record["top1_agreement"] >= MIN_TOP1 and named)
